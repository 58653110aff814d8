// Differences between two answers, word by word. Pure functions.

const LONGEST = 1200; // words of either text that are compared; what is behind counts as different

/** Words and the blanks between them, so that joining gives the text again. */
export const words = (text) => text.match(/\s+|[^\s]+/g) ?? [];

/**
 * The pieces of `text` with whether `base` has them at that place of the longest common sequence of words.
 *
 * Returns `[{text, same}]`, neighbours of one kind joined.
 */
export function difference(base, text) {
  const a = words(base);
  const b = words(text);
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end += 1;
  const same = new Array(b.length).fill(false);
  same.fill(true, 0, start);
  same.fill(true, b.length - end);
  const left = a.slice(start, a.length - end).slice(0, LONGEST);
  const right = b.slice(start, b.length - end).slice(0, LONGEST);
  for (const index of common(left, right)) same[start + index] = true;
  return joined(b, same);
}

/** Indices of `b` that are in a longest common sequence of both. */
function common(a, b) {
  const width = b.length + 1;
  const table = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      table[i * width + j] =
        a[i] === b[j] ? table[(i + 1) * width + j + 1] + 1 : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  const found = [];
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) {
      found.push(j);
      i += 1;
      j += 1;
    } else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return found;
}

function joined(pieces, same) {
  const out = [];
  pieces.forEach((piece, i) => {
    // A blank between two words of one kind is of that kind: marks would else have holes.
    const kind = /^\s+$/.test(piece) && i > 0 ? (i + 1 < pieces.length && same[i + 1] === same[i - 1] ? same[i - 1] : true) : same[i];
    const last = out[out.length - 1];
    if (last !== undefined && last.same === kind) last.text += piece;
    else out.push({ text: piece, same: kind });
  });
  return out;
}
