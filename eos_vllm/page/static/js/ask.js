// Ask: one question at several budgets side by side, with what each costs, and where the answers differ.

import { chat, trace } from "./api.js";
import { difference } from "./diff.js";
import { $, el, figure, replace, say, show } from "./dom.js";
import { count, ms } from "./format.js";
import { budgetName, isWhole, sameBudget } from "./plan.js";
import { messages, on, state, truth } from "./store.js";

const MOST = 6;
let budgets = [];
let running = null;
let proposed = null; // by what the budgets were proposed

/** Makes the view work. */
export function startAsk() {
  $("go").addEventListener("click", go);
  $("stop").addEventListener("click", () => running?.abort());
  $("add-budget").addEventListener("click", () => add(state.budget));
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("ask").hidden) go();
  });
  on(["status", "total", "shares", "lowest"], () => {
    const now = [state.status?.budget?.retain, state.total, state.shares, state.lowest].join();
    if (now !== proposed) propose(); // a look at the server that says the same leaves what was chosen
    proposed = now;
  });
  on(["budget"], drawAdd);
  propose();
}

/** All tokens, the server's own budget and one between them, until the user has chosen. */
function propose() {
  const own = state.status?.budget?.retain;
  if (own === undefined) budgets = [null];
  else {
    const whole = state.shares ? 100 : state.total;
    const least = Math.max(state.lowest, Math.min(parseFloat(own), whole / 4));
    const numbers = [whole, Math.round(Math.sqrt(whole * least)), isWhole(own) ? Math.round(least) : parseFloat(own)];
    budgets = [];
    for (const budget of numbers.map((n) => (state.shares ? `${n}%` : n))) {
      if (!budgets.some((b) => sameBudget(b, budget))) budgets.push(budget);
    }
  }
  drawBudgets();
}

function add(budget) {
  if (budget === null || budgets.length >= MOST || budgets.some((b) => sameBudget(b, budget))) return;
  budgets = [...budgets, budget].sort((a, b) => parseFloat(b) - parseFloat(a));
  drawBudgets();
}

function drawBudgets() {
  const chips = budgets.map((budget) =>
    el(
      "span",
      { class: "chip", data: { budget: String(budget) } },
      budget === null ? "as the server answers" : budgetName(budget),
      budgets.length > 1 &&
        el(
          "button",
          {
            type: "button",
            "aria-label": `Leave out ${budgetName(budget)}`,
            on: {
              click: () => {
                budgets = budgets.filter((b) => b !== budget);
                drawBudgets();
                $("add-budget").focus();
              },
            },
          },
          "×",
        ),
    ),
  );
  replace($("budgets"), chips);
  drawAdd();
}

function drawAdd() {
  const button = $("add-budget");
  show(button, state.status !== null);
  button.textContent = state.budget === null ? "Add the slider's budget" : `Add ${budgetName(state.budget)}`;
  button.disabled = state.budget === null || budgets.length >= MOST || budgets.some((b) => sameBudget(b, state.budget));
}

async function go() {
  const { image, question, model } = state;
  const missing = image === null ? "Choose an image first, or take a sample." : question.trim() === "" ? "Type a question first." : null;
  fail(missing ?? (model === null ? "The server has not answered yet." : null));
  if (missing !== null || model === null || running !== null) return;
  running = new AbortController();
  show($("stop"), true);
  $("go").disabled = true;
  const asked = { model, image, question, maxTokens: Number($("longest").value) || 64, signal: running.signal };
  const cards = budgets.map((budget) => new Card(budget, truth(question)));
  replace($("answers"), cards.map((card) => card.element));
  $("ask-note").textContent = "";
  try {
    if ($("together").checked) await Promise.all(cards.map((card) => card.ask(asked)));
    else for (const card of cards) await card.ask(asked);
    finish(cards);
  } finally {
    running = null;
    show($("stop"), false);
    $("go").disabled = false;
  }
}

function finish(cards) {
  const answered = cards.filter((card) => card.answer !== null);
  if (answered.length === 0) return;
  const [base, ...others] = answered;
  const differ = others.filter((card) => card.mark(base.answer.text)).length;
  const compared = others.length === 0 ? "" : differ === 0 ? "All answers are the same word by word. " : `${differ} of ${others.length} differ from the first; other words are marked. `;
  const times = $("together").checked
    ? "Asked at the same time, they share the machine: times are longer than alone."
    : "Asked one after another. The first one computes the image, later ones may find parts of it in the cache (hit tokens).";
  $("ask-note").textContent = compared + times;
  say(`${answered.length} answers. ${compared}`);
}

function fail(reason) {
  $("ask-error").textContent = reason ?? "";
  show($("ask-error"), reason !== null);
}

/** One budget's answer. */
class Card {
  constructor(budget, right) {
    this.budget = budget;
    this.right = right;
    this.answer = null;
    this.said = el("p", { class: "said", "aria-live": "polite", "aria-busy": "true" });
    this.verdict = el("p", { class: "verdict" });
    this.figures = el("dl", { class: "figures" });
    const name = budget === null ? "As the server answers" : budgetName(budget);
    this.element = el(
      "article",
      { class: `card answer waiting${isWhole(budget) ? " whole" : ""}`, "aria-label": name, data: { budget: String(budget) } },
      el("h3", {}, name),
      this.said,
      this.verdict,
      this.figures,
    );
  }

  async ask({ model, image, question, maxTokens, signal }) {
    this.element.classList.remove("waiting");
    const request = { model, messages: messages(image, question), budget: this.budget, trace: state.has.trace === true, maxTokens, signal };
    try {
      this.answer = await chat(request, (piece) => this.said.append(piece));
      const held = request.trace ? await trace(this.answer.id) : null;
      this.tell(this.answer, held);
    } catch (error) {
      const stopped = error.name === "AbortError";
      this.element.append(el("p", { class: stopped ? "note" : "error" }, stopped ? "Stopped." : error.message));
    }
    this.said.setAttribute("aria-busy", "false");
    if (this.said.textContent === "") this.said.textContent = "(no text)";
  }

  tell(answer, held) {
    const blocks = held?.segments?.reduce((total, segment) => total + segment.kv_blocks, 0);
    const hit = held?.hit_tokens ?? answer.cached;
    const unknown = "not told by this server";
    replace(
      this.figures,
      figure("First token after", ms(answer.first), "Time from sending the request to its first token, as this browser saw it"),
      figure("Per further token", answer.perToken === null ? (answer.tokens > 1 ? "came together" : "one token only") : ms(answer.perToken), "Mean time between tokens"),
      figure("Tokens of the answer", `${count(answer.tokens)}${answer.finish === "length" ? " (cut)" : ""}`),
      figure("Prompt tokens", count(answer.promptTokens), "Before any reduction inside the decoder"),
      figure("KV blocks held", blocks === undefined ? unknown : count(blocks), "In all KV groups, at the end of the answer"),
      figure("Hit tokens", hit === null || hit === undefined ? unknown : count(hit), "Prompt tokens that were found in the prefix cache"),
    );
    if (this.right !== null) {
      const right = answer.text.trim().toLowerCase().replace(/\.$/, "") === this.right.toLowerCase();
      this.verdict.className = `verdict ${right ? "right" : "wrong"}`;
      this.verdict.textContent = right ? "✓ right" : `✗ the right answer is “${this.right}”`;
    }
  }

  /** Marks words that `base` has not; whether there are any. */
  mark(base) {
    const pieces = difference(base, this.answer.text);
    replace(this.said, pieces.map((piece) => (piece.same ? piece.text : el("mark", {}, piece.text))));
    return base !== this.answer.text;
  }
}
