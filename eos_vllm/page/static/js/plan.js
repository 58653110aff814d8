// The plan of a budget: asked of the server, which answers with the figures of `eos-vllm plan`.

import { ApiError, json } from "./api.js";
import { el, replace } from "./dom.js";
import { against, bytes, count, flops, layers, percent } from "./format.js";
import { found, state } from "./store.js";

const TEXT = 88; // text of the prompt, as everywhere in this project where costs are compared

/** What a budget is called. */
export function budgetName(budget, total = state.total) {
  if (isWhole(budget, total)) return total ? `all ${count(total)} tokens` : "all tokens";
  return typeof budget === "string" ? `${budget} of the tokens` : `${count(budget)} tokens`;
}

/** Whether a budget means no reduction. */
export function isWhole(budget, total = state.total) {
  if (typeof budget === "string") return parseFloat(budget) >= 100;
  return budget !== null && total !== null && budget >= total;
}

/** Whether two budgets keep the same. */
export const sameBudget = (a, b) => a === b || (isWhole(a) && isWhole(b));

/**
 * Plans of budgets for the image that is there.
 *
 * Returns {stock, plans}, null where the server has no plans (then `state.has.plan` is false). Throws `ApiError`.
 */
export async function plansOf(budgets, signal = null) {
  if (state.has.plan === false) return null;
  const body = { budgets, text_tokens: TEXT, output_tokens: 0, images: 1 };
  if (state.shares && state.image !== null) body.size = [state.image.width, state.image.height];
  try {
    const answer = await json("eos/plan", { method: "POST", body, signal });
    found("plan", true);
    return answer;
  } catch (error) {
    if (error instanceof ApiError && (error.status === 404 || error.status === 405)) {
      found("plan", false);
      return null;
    }
    throw error;
  }
}

/** The lowest budget that the profile can meet: most measures end above one token, for early layers see all. */
export async function lowest(low, high, named) {
  const can = async (value) => {
    try {
      const answer = await plansOf([named(value)]);
      return answer === null || refusalOf(answer.plans?.[0]) === null;
    } catch (error) {
      if (error instanceof ApiError && error.status === 400) return false;
      throw error;
    }
  };
  if (await can(low)) return low;
  let no = low;
  let yes = high;
  while (yes - no > 1) {
    const middle = Math.floor((no + yes) / 2);
    if (await can(middle)) yes = middle;
    else no = middle;
  }
  return yes;
}

/** Why a plan is none, or null. */
export const refusalOf = (plan) => (plan === undefined || plan === null ? "no plan" : plan.refused ?? plan.error ?? null);

/** Draws a plan against stock's. */
export function drawPlan(element, answer) {
  const plan = answer?.plans?.[0];
  if (plan === undefined) {
    replace(element);
    return;
  }
  const stock = answer.stock;
  const most = Math.max(1, ...plan.segments.map((s) => s.tokens), stock.tokens ?? 0);
  const rows = plan.segments.map((segment) => {
    const bar = el("i");
    bar.style.width = `${(100 * segment.tokens) / most}%`;
    return el(
      "div",
      { class: "segment" },
      el("span", { class: "name" }, layers(segment.layer_from, segment.layers)),
      el("span", { class: "bar", "aria-hidden": "true" }, bar),
      el("span", { class: "what" }, `${count(segment.tokens)} tokens · ${count(segment.kv_blocks)} KV blocks`),
    );
  });
  const line = (name, mine, theirs, share, explanation = null) =>
    el(
      "tr",
      { title: explanation },
      el("th", { scope: "row" }, name),
      el("td", { class: "num" }, mine),
      el("td", { class: "num" }, theirs),
      el("td", { class: share < 0.995 ? "num saves" : "num" }, share === null ? "" : against(share)),
    );
  // A block of a server with a profile holds fewer layers than stock's: numbers of blocks don't compare.
  const blocks = `Of ${bytes(plan.kv_bytes / plan.kv_blocks)} here, ${bytes(stock.kv_bytes / stock.kv_blocks)} in stock`;
  replace(
    element,
    rows,
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, ...["", "this", "stock", ""].map((h) => el("th", { class: "num", scope: "col" }, h)))),
      el(
        "tbody",
        {},
        line("KV blocks", count(plan.kv_blocks), count(stock.kv_blocks), null, blocks),
        line("KV memory", bytes(plan.kv_bytes), bytes(stock.kv_bytes), plan.kv_bytes / stock.kv_bytes),
        line("Prefill", flops(plan.prefill_flops), flops(stock.prefill_flops), plan.prefill_flops / stock.prefill_flops),
      ),
    ),
    el(
      "p",
      { class: "note" },
      `One image and ${TEXT} tokens of text. Layer average ${count(plan.layer_average)} visual tokens; `,
      `the image's KV is ${percent(plan.kv_share)} of stock's, in the end ${count(plan.final)} are left. `,
      `${blocks.replace("Of", "KV blocks are of")}.`,
    ),
  );
}
