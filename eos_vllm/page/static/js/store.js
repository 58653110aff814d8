// What the views share: the image, the question, the budget, and what the server can do.

const listeners = new Map();

/** Current values; set them by `set` only. */
export const state = {
  image: null, // {url, name, width, height, sample: number or null, questions: [{text, answer, kind}]}
  question: "",
  budget: null, // tokens (number), or a share such as "11%"; null until the server's own is known
  total: null, // visual tokens of the image, as far as known
  shares: false, // the model takes images of any size: budgets are shares
  lowest: 1,
  plan: null, // of the current budget
  model: null,
  status: null, // GET /eos/status
  has: { plan: null, trace: null, choices: null, status: null, samples: null }, // null: not known yet
};

/** Calls `listener` with the state whenever one of `names` changes. */
export function on(names, listener) {
  for (const name of names) {
    if (!listeners.has(name)) listeners.set(name, new Set());
    listeners.get(name).add(listener);
  }
}

/** Changes values, and tells each listener once. */
export function set(values) {
  const told = new Set();
  for (const [name, value] of Object.entries(values)) {
    if (Object.is(state[name], value)) continue;
    state[name] = value;
    for (const listener of listeners.get(name) ?? []) told.add(listener);
  }
  for (const listener of told) listener(state);
}

/** Notes that the server has, or lacks, something. */
export function found(name, there) {
  if (state.has[name] !== there) set({ has: { ...state.has, [name]: there } });
}

/** The truth about a question, where it is a sample's. */
export function truth(question) {
  return state.image?.questions?.find((one) => one.text === question.trim())?.answer ?? null;
}

/** The messages of a chat with the image in its first turn. */
export function messages(image, ...turns) {
  return turns.map((text, i) => ({
    role: i % 2 === 0 ? "user" : "assistant",
    content:
      i === 0 && image !== null
        ? [{ type: "image_url", image_url: { url: image.url } }, { type: "text", text }]
        : text,
  }));
}
