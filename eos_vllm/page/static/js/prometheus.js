// Prometheus' text form, and figures over time. Pure.

const LINE = /^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$/;
const LABEL = /([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"\s*,?\s*/gy;
const ESCAPES = { "\\\\": "\\", '\\"': '"', "\\n": "\n" };

/** Samples by name: `Map(name → [{labels, value}])`; lines that are none are left out. */
export function parse(text) {
  const found = new Map();
  for (const raw of text.split("\n")) {
    const line = raw.trim();
    if (line === "" || line.startsWith("#")) continue;
    const match = LINE.exec(line);
    if (match === null) continue;
    const labels = labelsOf(match[2] ?? "");
    const value = number(match[3]);
    if (labels === null || value === null) continue;
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value });
  }
  return found;
}

function labelsOf(text) {
  const labels = {};
  LABEL.lastIndex = 0;
  let at = 0;
  while (at < text.length) {
    const match = LABEL.exec(text);
    if (match === null) return null;
    labels[match[1]] = match[2].replace(/\\[\\"n]/g, (escape) => ESCAPES[escape]);
    at = LABEL.lastIndex;
  }
  return labels;
}

function number(text) {
  if (text === "NaN") return NaN;
  if (/^[+-]?Inf$/.test(text)) return text.startsWith("-") ? -Infinity : Infinity;
  const value = Number(text);
  return Number.isNaN(value) ? null : value;
}

/** Sum of a name's samples, null where there are none. */
export function sum(metrics, name) {
  const samples = metrics.get(name);
  return samples === undefined ? null : samples.reduce((total, sample) => total + sample.value, 0);
}

/** Sums by the value of a label: `Map(value → sum)`; engines are added up. */
export function by(metrics, name, label) {
  const sums = new Map();
  for (const { labels, value } of metrics.get(name) ?? []) {
    const key = labels[label] ?? "";
    sums.set(key, (sums.get(key) ?? 0) + value);
  }
  return sums;
}

/** Figures of the last minutes: of each name one value a look, null where there was none. */
export class History {
  /** `seconds` to keep. */
  constructor(seconds) {
    this.seconds = seconds;
    this.times = [];
    this.series = new Map();
  }

  /** Adds a look at `time` (seconds) with `values` (name → number or null). */
  push(time, values) {
    for (const name of values.keys()) {
      if (!this.series.has(name)) this.series.set(name, new Array(this.times.length).fill(null));
    }
    this.times.push(time);
    for (const [name, list] of this.series) list.push(values.get(name) ?? null);
    while (this.times.length > 1 && this.times[0] < time - this.seconds) {
      this.times.shift();
      for (const list of this.series.values()) list.shift();
    }
  }

  /** The values of a name, as many as there are times. */
  of(name) {
    return this.series.get(name) ?? new Array(this.times.length).fill(null);
  }

  /** What a counter grew by a second between looks; null for the first one and behind a restart. */
  rate(name) {
    const values = this.of(name);
    return values.map((value, i) => {
      if (i === 0 || value === null || values[i - 1] === null || value < values[i - 1]) return null;
      return (value - values[i - 1]) / Math.max(this.times[i] - this.times[i - 1], 1e-6);
    });
  }

  /** What a counter grew by within the last `seconds` before each look, over what another one grew by; null for 0/0. */
  share(part, whole, seconds) {
    const parts = this.of(part);
    const wholes = this.of(whole);
    return this.times.map((time, i) => {
      let first = i;
      while (first > 0 && this.times[first - 1] >= time - seconds) first -= 1;
      const grown = wholes[i] - wholes[first];
      return wholes[i] === null || wholes[first] === null || grown <= 0 ? null : (parts[i] - parts[first]) / grown;
    });
  }

  /** Growth of a counter within the last `seconds` before each look. */
  growth(name, seconds) {
    const values = this.of(name);
    return this.times.map((time, i) => {
      let first = i;
      while (first > 0 && this.times[first - 1] >= time - seconds) first -= 1;
      if (values[i] === null) return null;
      const before = values[first] ?? 0;
      return values[i] < before ? null : values[i] - before;
    });
  }

  /** Names with a prefix, in the order of what stands behind it (numbers as numbers). */
  names(prefix) {
    return [...this.series.keys()]
      .filter((name) => name.startsWith(prefix))
      .sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  }
}
