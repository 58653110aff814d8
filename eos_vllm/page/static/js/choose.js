// Choose: accuracy against cost as measured, with intervals; a point that this server can serve goes to the slider.

import { json } from "./api.js";
import { $, el, figure, replace } from "./dom.js";
import { count, percent, short } from "./format.js";
import { setBudget } from "./prompt.js";
import { COSTS, frontier, scatter } from "./scatter.js";
import { found, state } from "./store.js";

let data = null;
let chosen = null;
let cost = "layer_average";
let lit = "";
let loading = false;
const phone = matchMedia("(max-width: 40rem)");
phone.addEventListener("change", () => data !== null && draw());

/** Loads the points when the view is opened, and again where that failed. */
export async function openChoose() {
  if (data !== null || loading) return;
  loading = true;
  $("choose-note").textContent = "Loading…";
  try {
    data = await json("eos/choices");
    found("choices", true);
    draw();
  } catch (error) {
    const missing = error.status === 404;
    if (missing) found("choices", false);
    $("choose-note").textContent = missing ? "This server has no measured points (no /eos/choices)." : `No points: ${error.message}.`;
  }
  loading = false;
}

const MEASURES = {
  final: "tokens left in the end",
  layer_average: "tokens per layer on average",
  kv_bytes: "tokens by KV memory",
  flops: "tokens by prefill work",
};

const served = () => data.points.filter((point) => point.served_here);
// A budget is measured in several ways, and the same one may have been measured twice.
const idOf = (point) => [point.profile, point.budget, point.measure, point.source].join("@");

function draw() {
  $("choose-note").textContent =
    `Measured on ${data.model}: right answers of questions that it had not seen, against what a budget costs. ` +
    (served().length > 0 ? "Points in the strong colour can be asked of this server: click one." : "This server serves none of these profiles.");
  const plot = el("div");
  const detail = el("aside", { class: "card", "aria-label": "The chosen point", "aria-live": "polite" });
  const axis = el(
    "select",
    { on: { change: () => ((cost = axis.value), paint()) } },
    Object.entries(COSTS)
      .filter(([name]) => data.points.some((point) => Number.isFinite(COSTS[name].of(point))))
      .map(([name, { label }]) => el("option", { value: name, selected: name === cost }, label)),
  );
  const names = [...new Set(data.points.filter((p) => !p.served_here).map((p) => p.profile))].sort();
  const highlight = el(
    "select",
    { on: { change: () => ((lit = highlight.value), paint()) } },
    el("option", { value: "" }, "(none)"),
    names.map((name) => el("option", { value: name, selected: name === lit }, name)),
  );
  const choose = (point) => {
    chosen = idOf(point);
    tell(detail, point);
    if (point.served_here) setBudget(typeof point.budget === "string" ? parseFloat(point.budget) : point.budget);
    paint();
    plot.querySelector(".chosen")?.focus();
  };
  function paint() {
    replace(plot, scatter(data.points, { cost, lit, chosen, idOf, choose, baseline: baselineOf(data), narrow: phone.matches }));
  }
  paint();
  tell(detail, data.points.find((point) => idOf(point) === chosen) ?? null);
  replace(
    $("choose-body"),
    el("div", { class: "row" }, el("label", {}, "Cost ", axis), el("label", {}, "Highlight ", highlight)),
    el(
      "div",
      { class: "choose-grid" },
      el("div", { class: "card" }, plot, keys()),
      detail,
    ),
    table(),
  );
}

/** Accuracy of all tokens, {mean, low, high}, or null. */
function baselineOf({ baselines, baseline }) {
  const first = baseline ?? baselines?.[0];
  return first?.accuracy ?? first ?? null;
}

function keys() {
  const dot = (kind, text) => {
    const mark = el("i");
    mark.style.background = `var(--${kind})`;
    mark.style.borderRadius = "50%";
    return el("span", {}, mark, text);
  };
  return el(
    "div",
    { class: "legend" },
    dot("accent", "served here: click to set the slider"),
    dot("series-3", "highlighted"),
    dot("stock", "other profiles and selectors"),
    el("span", {}, "bars: 95 % interval"),
    dot("series-2", "dashed: best measured at each cost"),
  );
}

/** Whether this server keeps other counts at a point's budget than it was measured with. */
const roundedOther = (point) => Array.isArray(point.counts_here) && String(point.counts_here) !== String(point.counts);

function tell(detail, point) {
  if (point === null) {
    replace(detail, el("h2", {}, "What a point rests on"), el("p", { class: "note" }, "Choose a point: click it, or move to it by the Tab key and press Enter."));
    return;
  }
  const { accuracy } = point;
  const rate = point.requests_per_second;
  replace(
    detail,
    el("h2", {}, `${point.profile} at ${point.budget}`),
    el(
      "dl",
      { class: "figures" },
      figure("Budget", `${point.budget}${MEASURES[point.measure] ? `, ${MEASURES[point.measure]}` : ""}`),
      figure("Right answers", `${percent(accuracy.mean, 1)} (${(100 * accuracy.low).toFixed(1)} to ${percent(accuracy.high, 1)})`),
      figure("without counting", point.without_counting === null || point.without_counting === undefined ? "–" : percent(point.without_counting, 1)),
      figure("Questions", count(accuracy.questions)),
      figure("Kept, as measured", (point.counts ?? []).join(" → "), "Visual tokens of an image left after each reducer"),
      point.counts_here && figure("Kept here", point.counts_here.join(" → "), "This server rounds to whole KV blocks"),
      figure("Layer average", `${short(point.layer_average)} visual tokens`),
      figure("Visual KV", `${percent(point.kv_share, 1)} of stock's`),
      figure("Requests per second", rate ? `${short(rate.value)} (${short(rate.low)} to ${short(rate.high)})` : "not measured"),
      figure("against stock", point.stock_ratio ? `${short(point.stock_ratio)} times` : "not measured"),
    ),
    el(
      "p",
      {},
      point.served_here
        ? el("a", { href: "#ask" }, `The slider is at ${point.budget} now: ask`)
        : el("span", { class: "note" }, "Another profile than this server's: start one with it to ask."),
    ),
    roundedOther(point) && el("p", { class: "note" }, "It was measured at its exact counts; this server rounds to whole KV blocks and keeps more."),
    el("p", { class: "note" }, "Rests on ", el("code", {}, point.source), `${origin(point)}. 95 % interval by bootstrap over images.`),
  );
}

/** When, with which revision and on what a point was measured. */
function origin(point) {
  const raw = data.origin?.find((one) => one.file === point.source);
  return raw === undefined ? "" : `: ${raw.about}. ${raw.created.slice(0, 10)}, revision ${raw.git.slice(0, 9)}, ${raw.machine}`;
}

function table() {
  const best = new Set(frontier(data.points, cost).map(idOf));
  const rows = data.points.filter((point) => point.served_here || best.has(idOf(point)));
  rows.sort((a, b) => a.layer_average - b.layer_average);
  return el(
    "details",
    {},
    el("summary", {}, "As a table: points served here, and the best measured at each cost"),
    el(
      "div",
      { class: "scroll" },
      el(
        "table",
        {},
        el("thead", {}, el("tr", {}, ["profile", "budget", "layer average (tokens)", "visual KV (% of stock's)", "right answers (%)", "95 % interval (%)"].map((h) => el("th", { scope: "col" }, h)))),
        el(
          "tbody",
          {},
          rows.map((p) =>
            el(
              "tr",
              {},
              [p.profile, p.budget, short(p.layer_average), (100 * p.kv_share).toFixed(1), (100 * p.accuracy.mean).toFixed(1), `${(100 * p.accuracy.low).toFixed(1)} to ${(100 * p.accuracy.high).toFixed(1)}`].map((cell, i) =>
                el("td", { class: i > 0 ? "num" : null }, String(cell)),
              ),
            ),
          ),
        ),
      ),
    ),
  );
}
