// The left column: image, question, budget and its live plan. It writes to the store, and reads nothing else.

import { ApiError, json } from "./api.js";
import { $, el, replace, say, settled, show } from "./dom.js";
import { read } from "./image.js";
import { budgetName, drawPlan, lowest, plansOf, refusalOf } from "./plan.js";
import { found, on, set, state } from "./store.js";

let nextSample = 0;
let reading = 0; // only the last image that was chosen counts
let planning = null;

/** Makes the column work. */
export function startPrompt() {
  $("sample").addEventListener("click", () => takeSample(nextSample));
  $("file").addEventListener("change", () => takeFiles($("file").files));
  const drop = $("drop");
  for (const event of ["dragenter", "dragover"]) {
    drop.addEventListener(event, (e) => {
      e.preventDefault();
      drop.classList.add("over");
    });
  }
  for (const event of ["dragleave", "drop"]) drop.addEventListener(event, () => drop.classList.remove("over"));
  // A picture that misses the box must not replace the page.
  window.addEventListener("dragover", (e) => e.preventDefault());
  window.addEventListener("drop", (e) => {
    e.preventDefault();
    takeFiles(e.dataTransfer?.files ?? []);
  });
  window.addEventListener("paste", (e) => {
    if ((e.clipboardData?.files.length ?? 0) > 0) {
      e.preventDefault();
      takeFiles(e.clipboardData.files);
    }
  });
  $("question").addEventListener("input", () => set({ question: $("question").value }));
  $("budget").addEventListener("input", () => setBudget(Number($("budget").value)));
  $("budget-number").addEventListener("change", () => setBudget(Number($("budget-number").value)));
  on(["image"], drawImage);
  on(["question"], () => {
    if ($("question").value !== state.question) $("question").value = state.question;
  });
  on(["budget", "total", "lowest", "shares"], drawBudget);
  const plan = settled(updatePlan, 120);
  on(["budget"], plan);
  on(["image", "shares", "status"], plan);
}

/** Takes sample number `number`; where the server has none the button goes. */
export async function takeSample(number) {
  const ticket = ++reading;
  try {
    const sample = await json(`eos/samples/${number}`);
    if (ticket !== reading) return;
    found("samples", true);
    nextSample = number + 1;
    fail(null);
    const image = { url: sample.image, name: `Sample ${number}`, width: 96, height: 96, sample: number, questions: sample.questions };
    set({ image, question: sample.questions[0]?.text ?? "" });
  } catch (error) {
    if (ticket !== reading) return;
    if (error instanceof ApiError && error.status === 404) {
      found("samples", false);
      show($("sample"), false);
    } else fail(error.message);
  }
}

async function takeFiles(files) {
  const file = files[0];
  if (file === undefined) return;
  const ticket = ++reading;
  try {
    const image = await read(file);
    if (ticket !== reading) return;
    fail(null);
    set({ image });
    say(`Image ${image.name}, ${image.width} by ${image.height} pixels`);
  } catch (error) {
    if (ticket === reading) fail(error.message);
  } finally {
    $("file").value = ""; // so that the same file can be chosen again
  }
}

function fail(reason) {
  $("image-error").textContent = reason ?? "";
  show($("image-error"), reason !== null);
}

function drawImage() {
  const { image } = state;
  const preview = $("preview");
  show(preview, image !== null);
  if (image === null) return;
  preview.src = image.url;
  preview.alt = `The image that is asked about: ${image.name}`;
  $("image-name").textContent = `${image.name}, ${image.width} × ${image.height} pixels`;
  if (image.sample !== null) $("sample").textContent = "Another sample";
  const chips = image.questions.map((question) => {
    const [first, ...options] = question.text.split("\n");
    const shown = options.length > 0 ? `${first} (one of ${options.length})` : first;
    return el("button", { type: "button", on: { click: () => set({ question: question.text }) } }, shown);
  });
  replace($("suggestions"), chips);
  replace($("second-list"), image.questions.map((question) => el("option", { value: question.text })));
}

/** Sets the budget by its number: tokens, or whole per cent; out of range is brought back into it. */
export function setBudget(number) {
  const high = state.shares ? 100 : state.total ?? 576;
  const low = Math.min(state.lowest, high);
  const value = Number.isFinite(number) ? Math.min(high, Math.max(low, Math.round(number))) : low;
  set({ budget: state.shares ? `${value}%` : value });
  drawBudget(); // also where the store had this value, but the field another one
}

function drawBudget() {
  const high = state.shares ? 100 : state.total ?? 576;
  const value = typeof state.budget === "string" ? parseFloat(state.budget) : state.budget ?? high;
  for (const id of ["budget", "budget-number"]) {
    $(id).min = state.lowest;
    $(id).max = high;
    $(id).value = value;
  }
  $("budget").setAttribute("aria-valuetext", budgetName(state.budget ?? high));
  $("budget-unit").textContent = state.shares ? "% of the tokens" : "tokens";
  const measure = MEASURES[state.status?.profile?.measure];
  const own = state.status?.budget?.retain;
  $("budget-note").textContent =
    (measure ? `${measure} ` : "") +
    (state.lowest > 1 ? `Less than ${state.shares ? `${state.lowest} %` : state.lowest} this profile can't reach. ` : "") +
    (own !== undefined ? `The server's own: ${own}.` : "");
}

const MEASURES = {
  final: "Visual tokens that are left after the last reducer.",
  layer_average: "Visual tokens that a layer holds on average.",
  kv_bytes: "As much KV memory as if every layer held so many visual tokens.",
  flops: "As much prefill work as if every layer carried so many visual tokens.",
};

async function updatePlan() {
  if (state.budget === null) return;
  planning?.abort();
  planning = new AbortController();
  const { signal } = planning;
  const element = $("plan");
  element.classList.add("stale");
  try {
    const answer = await plansOf([state.budget], signal);
    if (answer === null) {
      replace(element, el("p", { class: "note" }, "This server makes no plans (it has no /eos/plan)."));
    } else if (refusalOf(answer.plans[0]) !== null) {
      replace(element, el("p", { class: "error" }, refusalOf(answer.plans[0])));
    } else {
      set({ plan: answer, ...(state.shares || answer.visual_tokens === undefined ? {} : { total: answer.visual_tokens }) });
      drawPlan(element, answer);
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    replace(element, el("p", { class: "error" }, error.message));
  }
  element.classList.remove("stale");
}

/** Learns the range of budgets from the server's status and its plans. */
export async function learnRange(status) {
  const shares = typeof status?.budget?.retain === "string";
  const total = status?.budget?.visual_tokens ?? null;
  const high = shares ? 100 : total ?? 576;
  set({ shares, total: shares ? null : total });
  if (status === null) {
    if (state.budget === null) set({ budget: Math.round(high / 4) });
    return;
  }
  const least = await lowest(1, high, (value) => (shares ? `${value}%` : value)).catch(() => 1);
  set({ lowest: least });
  if (state.budget === null) setBudget(parseFloat(status.budget.retain));
}
