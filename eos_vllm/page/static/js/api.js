// Talking to the server: the key, errors as one line, streams, and whether it is there at all.

import { Events, oneLine } from "./sse.js";

const ROOT = new URL("..", document.baseURI); // the page is at ROOT/eos/
const KEY = "eos-api-key";
const OPEN = new Set(["metrics"]); // no key guards it, so that its answer says nothing of ours
const GONE = new Set([502, 504]); // what a proxy says of a server that is not there

/** An answer that is none: `status` 0 where the server did not answer; `body` as it came. */
export class ApiError extends Error {
  constructor(status, line, body = "") {
    super(line);
    this.status = status;
    this.body = body;
  }
}

/** The API key, kept for as long as this tab is open. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value === "" ? sessionStorage.removeItem(KEY) : sessionStorage.setItem(KEY, value)),
};

/** Events: "gone", "back", "refused" (401), "accepted". */
export const server = new EventTarget();
let reachable = true;

function reached(there) {
  if (there === reachable) return;
  reachable = there;
  server.dispatchEvent(new Event(there ? "back" : "gone"));
}

/** Whether the last request reached the server. */
export const isReachable = () => reachable;

/**
 * Asks the server.
 *
 * `path` is below the server's root. Throws `ApiError`, or `AbortError` where `signal` ended it.
 */
export async function ask(path, { method = "GET", body = null, signal = null } = {}) {
  const headers = {};
  if (key.get() !== "") headers.Authorization = `Bearer ${key.get()}`;
  if (body !== null) headers["Content-Type"] = "application/json";
  let answer;
  try {
    const text = body === null ? null : JSON.stringify(body);
    answer = await fetch(new URL(path, ROOT), { method, headers, body: text, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (/[^\x20-\x7e]/.test(key.get())) throw new ApiError(401, "the API key holds characters that no key can have");
    reached(false);
    throw new ApiError(0, "the server does not answer");
  }
  if (answer.ok) {
    reached(true);
    if (!OPEN.has(path)) server.dispatchEvent(new Event("accepted"));
    return answer;
  }
  const said = await answer.text().catch(() => "");
  if (answer.status === 401) {
    reached(true);
    server.dispatchEvent(new Event("refused"));
    throw new ApiError(401, "the server wants another API key");
  }
  // 503 is also what a server says that is there: a proof that is lost, a queue that is full.
  if (GONE.has(answer.status)) reached(false);
  throw new ApiError(answer.status, oneLine(said, answer.status), said);
}

/** The JSON of an answer. */
export async function json(path, options) {
  const answer = await ask(path, options);
  return answer.json();
}

/**
 * A chat completion, streamed.
 *
 * `request`: {model, messages, budget, trace, salt (of the prefix cache), maxTokens, signal}; `onText` is called with each piece. Returns {id, text,
 * first (ms to the first token), perToken (ms between tokens, null where none was seen), tokens, promptTokens, cached, finish}.
 */
export async function chat(request, onText) {
  const extra = {};
  if (request.budget !== null && request.budget !== undefined) extra.eos_retain = request.budget;
  if (request.trace) extra.eos_trace = true;
  const body = {
    model: request.model,
    messages: request.messages,
    max_tokens: request.maxTokens ?? 64,
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
    ...(request.salt ? { cache_salt: request.salt } : {}),
    ...(Object.keys(extra).length > 0 ? { vllm_xargs: extra } : {}),
  };
  const start = performance.now();
  const answer = await ask("v1/chat/completions", { method: "POST", body, signal: request.signal });
  const out = { id: null, text: "", first: null, perToken: null, tokens: 0, promptTokens: null, cached: null, finish: null };
  let last = start;
  const events = new Events();
  const take = (data) => {
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(500, oneLine(data, 500));
    out.id = chunk.id ?? out.id;
    if (chunk.usage) {
      out.tokens = chunk.usage.completion_tokens ?? out.tokens;
      out.promptTokens = chunk.usage.prompt_tokens ?? null;
      out.cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? null;
    }
    const choice = chunk.choices?.[0];
    const piece = choice?.delta?.content;
    if (choice) last = performance.now(); // the last token may be the end, which has no text
    if (piece) {
      out.first ??= last - start;
      out.text += piece;
      onText?.(piece);
    }
    out.finish = choice?.finish_reason ?? out.finish;
  };
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      for (const data of events.push(done ? "\n\n" : value)) take(data);
      if (done) break;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    reached(false);
    throw new ApiError(0, "the server left in the middle of the answer");
  }
  const since = out.first === null ? 0 : last - start - out.first;
  // Tokens that came in one piece of the network have no time between them.
  if (out.tokens > 1 && since >= 1) out.perToken = since / (out.tokens - 1);
  return out;
}

/** What the workers kept of a request that was asked with `trace`; null where the server keeps none. */
export async function trace(id) {
  // The engine may still be putting the request away when its last token is here.
  for (let tries = 0; ; tries += 1) {
    try {
      return await json(`eos/trace/${encodeURIComponent(id)}`);
    } catch (error) {
      if (error.status !== 404) throw error;
      if (tries === 2) return null;
      await new Promise((resolve) => setTimeout(resolve, 100 * 2 ** tries));
    }
  }
}
