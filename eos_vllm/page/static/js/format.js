// Numbers with their units, as a reader wants them. Pure functions.

const WHOLE = new Intl.NumberFormat("en");

/** A whole number with separators: 12,345. */
export const count = (n) => (n === null || n === undefined || Number.isNaN(n) ? "–" : WHOLE.format(Math.round(n)));

/** Three significant digits, without an exponent. */
export function short(n) {
  if (n === null || n === undefined || !Number.isFinite(n)) return "–";
  if (n === 0) return "0";
  if (Math.abs(n) >= 100) return count(n);
  return String(Number(n.toPrecision(3)));
}

/** Bytes as KiB, MiB or GiB. */
export function bytes(n) {
  if (n === null || n === undefined || !Number.isFinite(n)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (Math.abs(n) >= 1024 && i < units.length - 1) {
    n /= 1024;
    i += 1;
  }
  return `${short(n)} ${units[i]}`;
}

/** Floating-point operations as GFLOP or TFLOP. */
export function flops(n) {
  if (n === null || n === undefined || !Number.isFinite(n)) return "–";
  const units = [["PFLOP", 1e15], ["TFLOP", 1e12], ["GFLOP", 1e9], ["MFLOP", 1e6]];
  const [unit, size] = units.find(([, size]) => n >= size) ?? ["MFLOP", 1e6];
  return `${short(n / size)} ${unit}`;
}

/** A share as a percentage: 0.333 is 33.3 %. */
export function percent(share, digits = 0) {
  if (share === null || share === undefined || !Number.isFinite(share)) return "–";
  return `${(100 * share).toFixed(digits)} %`;
}

/** Milliseconds, in seconds from ten thousand on. */
export function ms(n) {
  if (n === null || n === undefined || !Number.isFinite(n)) return "–";
  return n >= 10_000 ? `${(n / 1000).toFixed(1)} s` : n < 10 ? `${n.toFixed(1)} ms` : `${count(n)} ms`;
}

/** "layer 3" or "layers 0–2", of the first one and how many. */
export function layers(from, number) {
  if (!number) return "no layers";
  return number === 1 ? `layer ${from}` : `layers ${from}–${from + number - 1}`;
}

/** Where a reducer stands. */
export const place = (layer) => (layer < 0 ? "Before the decoder" : `After layer ${layer}`);

/** What an amount is against stock's: "3.1 times less", "the same". */
export function against(share) {
  if (!Number.isFinite(share) || share <= 0) return "";
  if (Math.abs(share - 1) < 0.005) return "as stock";
  return share < 1 ? `${short(1 / share)}× less` : `${short(share)}× more`;
}

/** A plural that knows the one. */
export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;
