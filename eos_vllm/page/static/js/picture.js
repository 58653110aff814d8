// One picture of an image's tokens at a reducer, on a canvas: kept in colour, discarded in grey, and where they went.

import { colour, el } from "./dom.js";
import { short } from "./format.js";
import { boxes, centre, fates, hueOf, levels, nameOf, received, step, tokenAt } from "./patches.js";

const WIDTH = 480; // pixels of the canvas; style makes it as wide as its column

/**
 * A canvas with what a reducer kept.
 *
 * Args: `source`: the loaded image; `image`: of the trace; `reducer`: of it, null for the image as it came in; `title`;
 * `options`: () → {goes: "none" | "tint" | "lines", importance: bool}; `read`: called with a line about the token that
 * is pointed at, or "". Returns {canvas, draw, cursor}: `cursor(token)` marks a token in this picture as well.
 */
export function picture(source, image, reducer, title, options, read) {
  const { naturalWidth: w, naturalHeight: h } = source;
  const own = boxes(image, w, h); // in fractions of the image
  const { count, shown: places } = levels(own); // in fractions of the canvas
  const fate = reducer === null ? null : fates(image.tokens, reducer);
  const gets = fate === null ? new Map() : received(fate);
  const canvas = el("canvas", { tabindex: "0", role: "img", "aria-label": `${title}. Arrow keys tell of single patches.` });
  canvas.width = WIDTH * count;
  canvas.height = Math.max(40, Math.round((WIDTH * h) / w));
  const context = canvas.getContext("2d");
  let at = null;
  const grey = greyOf(source, WIDTH, canvas.height);

  const pixels = (box) => {
    const x = Math.round(box[0] * canvas.width);
    const y = Math.round(box[1] * canvas.height);
    return [x, y, Math.round(box[2] * canvas.width) - x, Math.round(box[3] * canvas.height) - y];
  };

  function draw() {
    const { goes, importance } = options();
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingEnabled = w > 2 * WIDTH / 3;
    if (fate === null) for (let i = 0; i < count; i += 1) context.drawImage(source, i * WIDTH, 0, WIDTH, canvas.height);
    else {
      context.fillStyle = colour("sunk");
      context.fillRect(0, 0, canvas.width, canvas.height);
      places.forEach((box, token) => box !== null && cell(pixels(box), fate[token], token, goes, importance));
      if (goes === "lines") lines();
    }
    if (at !== null && places[at]) {
      context.lineWidth = 4;
      context.strokeStyle = colour("text");
      context.strokeRect(...pixels(places[at]));
      context.lineWidth = 2;
      context.strokeStyle = colour("card");
      context.strokeRect(...pixels(places[at]));
    }
  }

  function cell([x, y, width, height], { state, rank, goes: target }, token, goes, importance) {
    if (state === "gone") return;
    const kept = state === "kept";
    // What is kept hardly fades, so that it can be told from what is not.
    const strength = importance && rank !== null ? rank : 0.5;
    context.globalAlpha = kept ? 0.75 + 0.25 * (importance && rank !== null ? rank : 1) : 0.2 + 0.4 * strength;
    const [from, across, down] = kept ? [source, w, h] : [grey, WIDTH, canvas.height];
    const [x0, y0, x1, y1] = own[token];
    context.drawImage(from, x0 * across, y0 * down, (x1 - x0) * across, (y1 - y0) * down, x, y, width, height);
    const owner = kept ? (gets.has(token) ? token : null) : target;
    if (goes === "tint" && owner !== null) {
      context.globalAlpha = kept ? 0.9 : 0.45;
      const hue = `hsl(${hueOf(owner)} 75% 50%)`;
      if (kept) {
        context.strokeStyle = hue;
        context.lineWidth = 3;
        context.strokeRect(x + 1.5, y + 1.5, width - 3, height - 3);
      } else {
        context.fillStyle = hue;
        context.fillRect(x, y, width, height);
      }
    }
    context.globalAlpha = 1;
  }

  function lines() {
    context.lineWidth = 1;
    fate.forEach(({ goes }, token) => {
      if (goes === null || places[token] === null || !places[goes]) return;
      const [x0, y0] = centre(places[token]);
      const [x1, y1] = centre(places[goes]);
      context.strokeStyle = `hsl(${hueOf(goes)} 80% 45% / 0.75)`;
      context.beginPath();
      context.moveTo(x0 * canvas.width, y0 * canvas.height);
      context.lineTo(x1 * canvas.width, y1 * canvas.height);
      context.stroke();
      context.fillStyle = context.strokeStyle;
      context.beginPath();
      context.arc(x1 * canvas.width, y1 * canvas.height, 3.5, 0, 7);
      context.fill();
    });
  }

  function cursor(token) {
    at = token;
    draw();
  }

  function tell(token) {
    cursor(token);
    read(token === null ? "" : `${title}: ${sentence(image, token, fate?.[token], gets.get(token) ?? 0)}`, token);
  }

  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const token = tokenAt(places, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    if (token !== at) tell(token);
  });
  canvas.addEventListener("pointerleave", () => tell(null));
  canvas.addEventListener("keydown", (event) => {
    if (!event.key.startsWith("Arrow")) return;
    event.preventDefault();
    const next = at === null ? places.findIndex((box) => box !== null) : step(image, places, at, event.key);
    if (next !== null && next >= 0) tell(next);
  });
  canvas.addEventListener("blur", () => tell(null));
  draw();
  return { canvas, draw, cursor, levels: count };
}

/** A patch in words. */
function sentence(image, token, fate, gets) {
  const name = nameOf(image, token);
  if (fate === undefined || fate === null) return name;
  if (fate.state === "gone") return `${name} was gone before`;
  const importance = fate.importance === null ? "" : `, importance ${short(fate.importance)}`;
  if (fate.state === "kept") return `${name} is kept${importance}${gets > 0 ? `; ${gets} discards go to it most` : ""}`;
  return `${name} is discarded${importance}${fate.goes === null ? "" : `; most of it goes to patch ${fate.goes}`}`;
}

function greyOf(source, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = source.naturalWidth > 2 * WIDTH / 3;
  context.filter = "grayscale(1)";
  context.drawImage(source, 0, 0, width, height);
  return canvas;
}
