// Watch: the server's last minutes from /metrics, every two seconds once the view has been opened.

import { ask } from "./api.js";
import { chart, recolour } from "./chart.js";
import { $, el, replace, show } from "./dom.js";
import { count, percent, place, short } from "./format.js";
import { by, History, parse, sum } from "./prometheus.js";
import { on, state } from "./store.js";

const EVERY = 2000;
const MINUTES = 5;
const WITHIN = 60; // seconds that shares and growths look back
const history = new History(60 * MINUTES);
let started = false;
let charts = [];

/** Starts to look, the first time that the view is opened. */
export function openWatch() {
  if (started) return;
  started = true;
  tick();
  on(["status"], () => draw());
}

async function tick() {
  if (document.visibilityState === "visible") {
    try {
      const answer = await ask("metrics");
      look(parse(await answer.text()));
      $("watch-note").textContent = note();
    } catch (error) {
      $("watch-note").textContent = `No figures: ${error.message}. Charts go on when it answers again.`;
    }
    if (!$("watch").hidden) draw();
  }
  setTimeout(tick, EVERY);
}

function note() {
  const what = `Every ${EVERY / 1000} s from /metrics, for the last ${MINUTES} minutes that this page was open.`;
  return history.names("blocks/").length === 0 ? `${what} This server has no eos_ metrics: it runs without a profile.` : what;
}

function look(metrics) {
  const values = new Map([
    ["running", sum(metrics, "vllm:num_requests_running")],
    ["waiting", sum(metrics, "vllm:num_requests_waiting")],
    ["usage", sum(metrics, "vllm:kv_cache_usage_perc")],
    ["hits", sum(metrics, "vllm:prefix_cache_hits_total")],
    ["queries", sum(metrics, "vllm:prefix_cache_queries_total")],
    ["answers", sum(metrics, "vllm:generation_tokens_total")],
    ["images", sum(metrics, "eos_images_total")],
  ]);
  const engines = metrics.get("vllm:kv_cache_usage_perc")?.length ?? 1;
  if (values.get("usage") !== null) values.set("usage", values.get("usage") / engines);
  for (const [prefix, name, label] of [
    ["blocks/", "eos_kv_blocks_held", "segment"],
    ["in/", "eos_visual_tokens_in_total", "layer"],
    ["kept/", "eos_visual_tokens_kept_total", "layer"],
    ["budget/", "eos_requests_total", "budget"],
  ]) {
    for (const [key, value] of by(metrics, name, label)) values.set(prefix + key, value);
  }
  history.push(Date.now() / 1000, values);
}

/** What each chart shows: title, unit of its axis, explanation, series of [name, values, how a value is written]. */
function contents() {
  const layersOf = history.names("kept/").map((name) => name.slice("kept/".length));
  const first = layersOf[0];
  const budgets = history.names("budget/");
  const all = [
    {
      title: "Requests",
      unit: "requests",
      whole: true,
      about: "Running: in a step of the engine. Waiting: for a place or for memory.",
      series: [
        ["running", history.of("running"), count],
        ["waiting", history.of("waiting"), count],
      ],
    },
    {
      title: "KV blocks held, by segment of layers",
      unit: "KV blocks",
      whole: true,
      about: "Later segments hold fewer blocks, for fewer tokens are left there.",
      series: history.names("blocks/").map((name) => [segmentName(Number(name.slice("blocks/".length))), history.of(name), count]),
    },
    {
      title: "Visual tokens",
      unit: "tokens per second",
      about: "What enters the first reducer, and what is left behind each one.",
      series: [
        ...(first === undefined ? [] : [["entering", history.rate(`in/${first}`), short]]),
        ...layersOf.map((layer) => [`${place(Number(layer)).toLowerCase()}`, history.rate(`kept/${layer}`), short]),
      ],
    },
    {
      title: "Budgets chosen",
      unit: `requests in ${WITHIN} s`,
      whole: true,
      about: "Requests with images, by the budget that they were given.",
      series: budgets.map((name) => [budgetLabel(name.slice("budget/".length)), history.growth(name, WITHIN), count]),
    },
    {
      title: "Prefix cache",
      unit: "% of prompt tokens",
      about: `Prompt tokens found in the cache within the last ${WITHIN} s. Gaps: nothing was asked.`,
      range: [0, 100],
      series: [["hit rate", history.share("hits", "queries", WITHIN).map((v) => (v === null ? null : 100 * v)), (v) => `${short(v)} %`]],
    },
    {
      title: "Answers",
      unit: "tokens per second",
      about: "Tokens generated, all requests together.",
      series: [["generated", history.rate("answers"), short]],
    },
  ];
  return all.filter((one) => one.series.length > 0);
}

const budgetLabel = (budget) => (/^\d+$/.test(budget) ? `${budget} tokens` : budget);

function segmentName(segment) {
  const ends = (state.status?.profile?.layers ?? []).filter((layer) => layer >= 0);
  if (ends.length === 0 || segment > ends.length) return `segment ${segment}`;
  const from = segment === 0 ? 0 : ends[segment - 1] + 1;
  return segment === ends.length ? `layers ${from} on` : from === ends[segment] ? `layer ${from}` : `layers ${from}–${ends[segment]}`;
}

function draw() {
  const shown = contents();
  const names = shown.map((one) => `${one.title}:${one.series.map(([name]) => name)}`).join("|");
  if (charts.names !== names) {
    for (const { destroy } of charts) destroy();
    charts = shown.map((one) => chart(one));
    charts.names = names;
    replace($("charts"), charts.map(({ element }) => element));
    for (const one of charts) one.attach();
  }
  charts.forEach((one, i) => one.update(history.times, shown[i].series));
  tiles();
}

function tiles() {
  const last = (values) => values[values.length - 1] ?? null;
  const reducers = history.names("kept/");
  const entered = last(history.of(reducers[0]?.replace("kept/", "in/") ?? ""));
  const kept = last(history.of(reducers[reducers.length - 1] ?? ""));
  const found = [
    [count(last(history.of("running"))), "requests running"],
    [count(last(history.of("waiting"))), "requests waiting"],
    [percent(last(history.of("usage")), 1), "of the KV cache in use"],
    [percent(last(history.share("hits", "queries", WITHIN))), `of prompt tokens from the cache, last ${WITHIN} s`],
  ];
  if (reducers.length > 0) {
    found.push([count(last(history.of("images"))), "images reduced since start"]);
    found.push([entered > 0 ? percent(kept / entered, 1) : "–", "of their tokens kept behind the last reducer"]);
  }
  replace($("tiles"), found.map(([value, what]) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, what))));
  show($("tiles"), history.times.length > 0);
}

/** Other colours. */
export function recolourWatch() {
  recolour(charts);
  charts.names = "";
  if (started) draw();
}
