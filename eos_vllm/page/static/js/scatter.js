// Points of accuracy against a cost, as SVG: each can be reached by the keyboard and is named in full.

import { svg } from "./dom.js";
import { percent, short } from "./format.js";

// In units of the picture, which is as wide as its column: few on a phone, so that its text stays readable.
const WIDE = { width: 860, height: 480, left: 62, right: 20, top: 18, bottom: 56 };
const NARROW = { width: 400, height: 400, left: 54, right: 16, top: 18, bottom: 54 };

/** Costs that may stand on the axis: `of` a point, `low` whether less is better, a scale by doublings where `log`. */
export const COSTS = {
  layer_average: { label: "visual tokens per layer, on average", of: (p) => p.layer_average, low: true, log: true, unit: "tokens" },
  kv_share: { label: "visual KV memory, % of stock's", of: (p) => 100 * p.kv_share, low: true, log: true, unit: "%" },
  stock_ratio: { label: "requests per second, times stock's", of: (p) => p.stock_ratio ?? NaN, low: false, log: false, unit: "times" },
};

/** Points that no other one beats in both. */
export function frontier(points, cost) {
  const { of, low } = COSTS[cost];
  const sorted = points.filter((p) => Number.isFinite(of(p))).sort((a, b) => (low ? of(a) - of(b) : of(b) - of(a)) || b.accuracy.mean - a.accuracy.mean);
  const best = [];
  for (const point of sorted) if (best.length === 0 || point.accuracy.mean > best[best.length - 1].accuracy.mean) best.push(point);
  return best;
}

/** Round numbers of an axis between two values. */
export function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let t = 2 ** Math.ceil(Math.log2(low) - 1e-9); t <= high * 1.0001; t *= 2) found.push(t);
    return found;
  }
  const rough = (high - low) / 6;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].find((f) => f * power >= rough) * power;
  const found = [];
  for (let t = Math.ceil(low / size) * size; t <= high + 1e-9; t += size) found.push(Number(t.toPrecision(6)));
  return found;
}

/** The picture. `options`: {cost, lit (profile), chosen (id), idOf, choose(point), baseline, narrow}. */
export function scatter(points, { cost, lit, chosen, idOf, choose, baseline, narrow }) {
  const SIZE = narrow ? NARROW : WIDE;
  const { of, log, label } = COSTS[cost];
  const shown = points.filter((p) => Number.isFinite(of(p)));
  const xs = shown.map(of);
  const lowest = Math.min(...xs) / (log ? 1.15 : 1) - (log ? 0 : 0.2);
  const highest = Math.max(...xs) * (log ? 1.1 : 1) + (log ? 0 : 0.2);
  const floor = Math.max(0, Math.floor(10 * Math.min(...shown.map((p) => p.accuracy.low))) / 10);
  const across = (x) => {
    const t = log ? Math.log(x / lowest) / Math.log(highest / lowest) : (x - lowest) / (highest - lowest);
    return SIZE.left + t * (SIZE.width - SIZE.left - SIZE.right);
  };
  const up = (y) => SIZE.height - SIZE.bottom - ((y - floor) / (1 - floor)) * (SIZE.height - SIZE.top - SIZE.bottom);
  const rank = (p) => (p.served_here ? 2 : p.profile === lit ? 1 : 0);
  const ordered = [...shown].sort((a, b) => rank(a) - rank(b) || of(a) - of(b));
  const edge = SIZE.height - SIZE.bottom;
  return svg(
    "svg",
    { class: "scatter", viewBox: `0 0 ${SIZE.width} ${SIZE.height}`, role: "group", "aria-label": `Right answers against ${label}` },
    ticks(lowest, highest, log).map((t) => [
      svg("line", { class: "gridline", x1: across(t), x2: across(t), y1: SIZE.top, y2: edge }),
      svg("text", { x: across(t), y: edge + 18, "text-anchor": "middle" }, short(t)),
    ]),
    ticks(floor, 1, false).map((t) => [
      svg("line", { class: "gridline", x1: SIZE.left, x2: SIZE.width - SIZE.right, y1: up(t), y2: up(t) }),
      svg("text", { x: SIZE.left - 8, y: up(t) + 4, "text-anchor": "end" }, String(Math.round(100 * t))),
    ]),
    svg("line", { class: "axis", x1: SIZE.left, x2: SIZE.width - SIZE.right, y1: edge, y2: edge }),
    svg("line", { class: "axis", x1: SIZE.left, x2: SIZE.left, y1: SIZE.top, y2: edge }),
    svg("text", { class: "title", x: (SIZE.left + SIZE.width) / 2, y: SIZE.height - 12, "text-anchor": "middle" }, `${narrow ? "" : "Cost: "}${label}${log && !narrow ? " (each line doubles)" : ""}`),
    svg("text", { class: "title", x: 16, y: (SIZE.top + edge) / 2, "text-anchor": "middle", transform: `rotate(-90 16 ${(SIZE.top + edge) / 2})` }, "Right answers, %"),
    baseline !== null && Number.isFinite(baseline?.mean)
      ? [
          svg("line", { class: "axis", "stroke-dasharray": "2 4", x1: SIZE.left, x2: SIZE.width - SIZE.right, y1: up(baseline.mean), y2: up(baseline.mean) }),
          svg("text", { class: "label", x: SIZE.left + 8, y: up(baseline.mean) - 5 }, `all tokens: ${percent(baseline.mean, 1)}`),
        ]
      : null,
    svg("polyline", { class: "frontier", points: frontier(shown, cost).map((p) => `${across(of(p))},${up(p.accuracy.mean)}`).join(" ") }),
    labels(shown.filter((p) => p.served_here), (p) => [across(of(p)), up(p.accuracy.mean)]),
    ordered.map((point) => dot(point, across(of(point)), up, { lit, chosen: idOf(point) === chosen, choose, of })),
  );
}

/** Budgets beside the points that are served, each at the first place where it covers no other label or point. */
function labels(points, at) {
  const taken = points.map((p) => [at(p)[0] - 7, at(p)[1] - 7, at(p)[0] + 7, at(p)[1] + 7]);
  return points.map((point) => {
    const [x, y] = at(point);
    const text = String(point.budget);
    const width = 8 * text.length;
    const places = [[x + 10, y + 4], [x - width / 2, y - 13], [x - width / 2, y + 24], [x - 10 - width, y + 4], [x - width / 2, y + 40], [x - width / 2, y - 29]];
    const free = ([left, base]) => taken.every(([l, t, r, b]) => left > r || left + width < l || base < t || base - 11 > b);
    const [left, base] = places.find(free) ?? places[0];
    taken.push([left, base - 11, left + width, base]);
    return svg("text", { class: "label", x: left, y: base }, text);
  });
}

function dot(point, x, up, { lit, chosen, choose, of }) {
  const { mean, low, high } = point.accuracy;
  const strong = point.served_here || point.profile === lit || chosen;
  const kind = `${point.served_here ? " served" : ""}${point.profile === lit ? " lit" : ""}${chosen ? " chosen" : ""}`;
  const name = `${point.profile} at ${point.budget}: ${percent(mean, 1)} right (${percent(low, 1)} to ${percent(high, 1)}), cost ${short(of(point))}`;
  const act = (event) => {
    if (event.type === "keydown" && event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose(point);
  };
  return svg(
    "g",
    {
      class: `point${kind}`,
      role: "button",
      // Hundreds of stops would bury the rest of the page: the table below holds the others.
      tabindex: strong ? "0" : "-1",
      "aria-label": name,
      "aria-pressed": String(chosen),
      data: { profile: point.profile, budget: String(point.budget) },
      on: { click: act, keydown: act },
    },
    svg("title", {}, name),
    strong ? svg("line", { class: "interval", x1: x, x2: x, y1: up(low), y2: up(high) }) : null,
    svg("circle", { cx: x, cy: up(mean), r: strong ? 6 : 4, opacity: strong ? 1 : 0.55 }),
  );
}
