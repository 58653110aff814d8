// Start: views by the address' hash, theme, API key, and whether the server is there.

import { ApiError, ask, isReachable, json, key, server } from "./api.js";
import { startAsk } from "./ask.js";
import { openChoose } from "./choose.js";
import { $, el, replace, say, show } from "./dom.js";
import { learnRange, startPrompt, takeSample } from "./prompt.js";
import { redraw, startLook } from "./look.js";
import { found, set, state } from "./store.js";
import { openWatch, recolourWatch } from "./watch.js";

const VIEWS = { ask: "Ask", look: "Look", watch: "Watch", choose: "Choose" };
const OPENED = { watch: openWatch, choose: openChoose };
const CALM = 10_000; // between two looks at a server that is there, ms
const EAGER = 2000; // at one that is gone
let timer = 0;
let learnt = false;

function route(focus) {
  const wanted = location.hash.slice(1);
  const view = wanted in VIEWS ? wanted : null;
  if (view === null && wanted !== "" && focus) return; // a link within the page
  const shown = view ?? "ask";
  for (const name of Object.keys(VIEWS)) show($(name), name === shown);
  show($("workbench"), shown === "ask" || shown === "look");
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${shown}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${VIEWS[shown]}: eos, visual token reduction`;
  OPENED[shown]?.();
  if (focus) {
    $(shown).focus();
    window.scrollTo(0, 0);
  }
}

function startTheme() {
  const theme = $("theme");
  theme.value = localStorage.getItem("eos-theme") ?? "auto";
  const apply = () => {
    if (theme.value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme.value;
    redraw();
    recolourWatch();
  };
  theme.addEventListener("change", () => {
    localStorage.setItem("eos-theme", theme.value);
    apply();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
  apply();
}

function startKey() {
  const form = $("key-form");
  let shown = false; // by itself it opens once for each key: who closed it is left alone
  const open = (visible) => {
    show(form, visible);
    $("key-button").setAttribute("aria-expanded", String(visible));
    if (visible) $("key").focus();
  };
  $("key-button").addEventListener("click", () => open(form.hidden));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    key.set($("key").value.trim());
    $("key").value = "";
    shown = false;
    open(false);
    look();
  });
  $("key-forget").addEventListener("click", () => {
    key.set("");
    open(false);
    look();
  });
  server.addEventListener("refused", () => {
    const wrong = key.get() !== "";
    banner(
      wrong
        ? "The server refuses this API key (HTTP 401). Give the one that it was started with (--api-key)."
        : "The server asks for an API key (HTTP 401). Give the one that it was started with (--api-key).",
    );
    if (!shown) open(true);
    shown = true;
  });
  server.addEventListener("accepted", () => banner(null));
}

function banner(text) {
  if ($("banner").textContent !== (text ?? "")) $("banner").textContent = text ?? "";
  show($("banner"), text !== null);
}

/** Looks whether the server is there, again and again; learns what it is when it comes (back). */
async function look() {
  clearTimeout(timer);
  try {
    const models = await json("v1/models");
    const model = models.data?.[0]?.id ?? null;
    const status = await statusOf();
    set({ model, status });
    describe(models.data?.[0], status);
    if (!learnt) {
      learnt = true;
      await learn(status);
    }
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status !== 401 && isReachable()) banner(`The server answers, but not as expected: ${error.message}`);
  } finally {
    timer = setTimeout(look, isReachable() ? CALM : EAGER);
  }
}

async function statusOf() {
  try {
    const status = await json("eos/status");
    found("status", true);
    return status;
  } catch (error) {
    if (error.status === 404) found("status", false);
    return error.status === 503 ? lost(error) : null;
  }
}

/** A status that is answered as 503 says the same as one that is not, and why. */
function lost(error) {
  let body = {};
  try {
    body = JSON.parse(error.body);
  } catch {
    // some proxy's page: what was known of the server stays
  }
  return { ...(state.status ?? {}), ...(body.profile ? body : { status: "lost", reasons: [error.message] }) };
}

async function learn(status) {
  found("trace", await hasTraces());
  await learnRange(status);
  if (state.image === null) await takeSample(0);
}

/** An unknown trace is told by a text of our own, an unknown path by that of whatever server it is. */
async function hasTraces() {
  try {
    await ask("eos/trace/none");
    return true;
  } catch (error) {
    return error.status === 404 && error.message.includes("eos_trace");
  }
}

function describe(model, status) {
  const parts = [el("b", {}, model?.id ?? "no model")];
  if (status?.profile) {
    parts.push(" with ", el("b", {}, status.profile.name), ", ");
    const good = status.status === "proved";
    parts.push(el("span", { class: good ? "good" : "bad" }, good ? "reduction proved in every worker" : `reduction not proved: ${(status.reasons ?? []).join("; ")}`));
  } else parts.push(", without a profile (no /eos/status): what is shown is what plain requests and /metrics can tell");
  replace($("server"), parts);
}

server.addEventListener("gone", () => {
  banner(`The server does not answer. Trying again every ${EAGER / 1000} s; this page goes on by itself when it is back.`);
  clearTimeout(timer);
  timer = setTimeout(look, EAGER);
});
server.addEventListener("back", () => {
  banner(null);
  say("The server is back.");
  learnt = false; // it may be another one
});

window.addEventListener("hashchange", () => route(true));
startPrompt();
startAsk();
startLook();
startTheme();
startKey();
route(false);
look();
