// Look: which patches each reducer kept for a question, where discards went, and what the next turn of a chat reuses.

import { chat, trace } from "./api.js";
import { $, el, replace, say, show } from "./dom.js";
import { count, layers, percent, place, plural } from "./format.js";
import { load } from "./image.js";
import { overlap } from "./patches.js";
import { picture } from "./picture.js";
import { budgetName } from "./plan.js";
import { messages, on, state, truth } from "./store.js";

const MOST_TOKENS = 64;
let pictures = [];
let looking = false;

/** Makes the view work. */
export function startLook() {
  $("look-go").addEventListener("click", go);
  for (const id of ["goes", "by-importance"]) $(id).addEventListener("change", redraw);
  on(["has"], () => fail(state.has.trace === false ? MISSING : null));
}

const MISSING = "This server keeps no traces: start it with --eos-profile PROFILE --eos-page to see its patches.";

/** Draws all pictures anew: other options, other colours. */
export function redraw() {
  for (const { draw } of pictures) draw();
  for (const key of document.querySelectorAll("[data-goes]")) show(key, key.dataset.goes === $("goes").value);
}

const options = () => ({ goes: $("goes").value, importance: $("by-importance").checked });

function fail(reason) {
  $("look-error").textContent = reason ?? "";
  show($("look-error"), reason !== null);
}

async function go() {
  const { image, question, model, budget } = state;
  const second = $("second").value.trim();
  if (state.has.trace === false) return fail(MISSING);
  if (image === null) return fail("Choose an image first, or take a sample.");
  if (question.trim() === "") return fail("Type a question first.");
  if (model === null) return fail("The server has not answered yet.");
  if (looking) return undefined;
  fail(null);
  looking = true;
  $("look-go").disabled = true;
  pictures = [];
  replace($("pictures"), el("p", { class: "note" }, "Asking…"));
  // An image that is found in the prefix cache is not chosen from again, so that there would be nothing to see: each
  // look has a salt of its own, which its second turn shares.
  const look = { model, image, budget, salt: crypto.getRandomValues(new Uint32Array(2)).join("-") };
  try {
    const source = await load(image.url);
    const first = await askTraced(look, [question]);
    const cards = [card(source, first, { title: question, number: 1, budget })];
    replace($("pictures"), cards);
    if (second !== "") {
      const turn = $("second-how").value === "turn";
      const turns = turn ? [question, first.answer.text, second] : [second];
      const then = await askTraced(look, turns);
      cards.push(card(source, then, { title: second, number: 2, budget, before: first, turn }));
      replace($("pictures"), cards);
    }
    say(`${plural(pictures.length, "picture")} drawn`);
  } catch (error) {
    if (pictures.length === 0) replace($("pictures"));
    fail(error.message);
  } finally {
    looking = false;
    $("look-go").disabled = false;
  }
  return undefined;
}

async function askTraced({ model, image, budget, salt }, turns) {
  const answer = await chat({ model, messages: messages(image, ...turns), budget, trace: true, maxTokens: MOST_TOKENS, salt });
  const found = await trace(answer.id);
  if (found === null) throw new Error("The server has no trace of this request any more: others took its place. Look again.");
  return { answer, trace: found };
}

/** What one question kept. */
function card(source, { answer, trace: found }, { title, number, budget, before = null, turn = false }) {
  const image = found.images[0];
  const right = truth(title);
  const reading = el("p", { class: "note reading", "aria-live": "polite" }, "Point at a patch, or use the arrow keys on a picture, to read its figures.");
  const own = [];
  const read = (line, token) => {
    if (line !== "") reading.textContent = line;
    for (const one of own) one.cursor(token);
  };
  const reducers = image?.reducers ?? [];
  const figures = [];
  const add = (reducer, heading, text, data = {}) => {
    const drawn = picture(source, image, reducer, heading, options, read);
    own.push(drawn);
    pictures.push(drawn);
    figures.push(el("figure", { data }, drawn.canvas, el("figcaption", {}, el("b", {}, heading), text)));
  };
  if (reducers.length > 0) {
    add(null, reducers[0].layer < 0 ? "In the vision tower" : within(-1, reducers[0].layer), `all ${count(image.tokens)} patches`);
  }
  reducers.forEach((reducer, i) => {
    const share = percent(reducer.kept.length / image.tokens, 1);
    const same = before?.trace.images[0]?.reducers[i];
    const alike = same === undefined || same.kept.length === 0 ? "" : ` ${count(overlap(reducer.kept, same.kept))} of them as for the first question.`;
    const text = `${place(reducer.layer)}: ${count(reducer.kept.length)} of ${count(image.tokens)} patches are kept (${share}).${alike}${fateOf(reducer)}`;
    add(reducer, within(reducer.layer, reducers[i + 1]?.layer ?? null), text, { layer: reducer.layer, kept: reducer.kept.join(",") });
  });
  return el(
    "article",
    { class: "card asked", "aria-label": `Question ${number}: ${title}`, data: { question: String(number) } },
    el("h2", {}, `${number}. ${title}`),
    el("p", { class: "said" }, answer.text === "" ? "(no text)" : answer.text),
    el("p", { class: "note" }, `at ${budgetName(budget)}`, right === null ? "" : `; the right answer is “${right}”`),
    reuse(found, image, answer, turn),
    reducers.length === 0 ? nothing(image, turn) : [el("div", { class: own[0].levels > 1 ? "strip tiled" : "strip" }, figures), legend(own[0].levels), reading, texts(image, reducers)],
  );
}

/** The layers behind one reducer up to the next one, or to the end. */
function within(layer, next) {
  if (next !== null) return `In ${layers(layer + 1, next - layer)}`;
  const segments = state.plan?.plans?.[0]?.segments ?? [];
  const last = segments[segments.length - 1];
  return last?.layer_from === layer + 1 ? `In ${layers(last.layer_from, last.layers)}` : `In layers ${layer + 1} on`;
}

function fateOf(reducer) {
  if (reducer.kept.length === 0) return " The image is withdrawn from all later layers.";
  if (!Array.isArray(reducer.assigned) || reducer.assigned.length === 0) return "";
  if (reducer.share === null || reducer.share === undefined) return " Discards are merged into what is kept.";
  return reducer.share === 0 ? " Discards are dropped." : ` ${percent(reducer.share)} of the discards are merged into what is kept.`;
}

function reuse(found, image, answer, turn) {
  const prompt = answer.promptTokens === null ? "" : ` of ${count(answer.promptTokens)}`;
  const hit = `${count(found.hit_tokens)}${prompt} prompt tokens were found in the prefix cache`;
  const held = `${plural(found.segments.reduce((sum, s) => sum + s.kv_blocks, 0), "KV block")} held at the end`;
  if (!turn) return el("p", { class: "note" }, `${hit}; ${held}.`);
  const again = image?.reused
    ? "The image was not computed again: this turn goes on with the patches that the first one kept."
    : "The image was computed again, for nothing of it was found in the cache.";
  return el("p", { class: "verdict right reuse" }, `Next turn: ${hit}; ${held}. ${again}`);
}

function nothing(image, turn) {
  if (turn && image?.reused) return el("p", { class: "note" }, "Its patches are those of the first question, above.");
  const why = image?.reused
    ? "All of this prompt was found in the prefix cache, so that nothing was chosen."
    : `All ${count(image?.tokens ?? 0)} patches are kept in all layers: this budget means no reduction.`;
  return el("p", { class: "note" }, why);
}

function legend(levels) {
  const key = (kind, text) => el("span", {}, el("i", { class: kind }), text);
  const goes = (how, text) => el("span", { data: { goes: how }, hidden: $("goes").value !== how }, text);
  return el(
    "div",
    { class: "legend" },
    key("key-kept", "kept: in colour"),
    key("key-grey", "discarded here: grey (paler is less important)"),
    key("key-gone", "empty: gone before"),
    levels > 1 && el("span", {}, "side by side: the image as a whole, then its tiles"),
    goes("tint", "a tint: goes to the kept patch in a frame of that colour"),
    goes("lines", "a line: from a discarded patch to the kept one that it goes to"),
  );
}

/** The same as text. */
function texts(image, reducers) {
  return el(
    "details",
    {},
    el("summary", {}, "Kept patches as text"),
    reducers.map((reducer) => [
      el("h3", {}, `${place(reducer.layer)}: ${count(reducer.kept.length)} of ${plural(reducer.entered.length, "patch", "patches")} kept`),
      el("p", { class: "indices" }, reducer.kept.join(", ") || "none"),
    ]),
    el("p", { class: "note" }, `Patches are numbered from 0${image.rows ? `, row by row, ${image.columns} in a row` : ", in the order of the prompt"}.`),
  );
}
