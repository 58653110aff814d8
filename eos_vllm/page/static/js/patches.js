// Where an image's tokens stand, and what became of them. Pure.

/** Sides of the part of an image that a square grid covers: such models crop the middle. Fractions of the image. */
export function seen(image, width, height) {
  const square = image.rows !== null && image.rows === image.columns;
  // Any-size models have as many rows as the image asks for; a square grid on an image that is none was cropped.
  if (!square || Math.abs(width / height - 1) < 0.1) return [0, 0, 1, 1];
  const [w, h] = width > height ? [height / width, 1] : [1, width / height];
  return [(1 - w) / 2, (1 - h) / 2, (1 + w) / 2, (1 + h) / 2];
}

/** Boxes of all tokens `[x0, y0, x1, y1]` in fractions of the image; null where a token has no place. */
export function boxes(image, width, height) {
  if (Array.isArray(image.boxes)) return image.boxes;
  if (!image.rows || !image.columns || image.rows * image.columns !== image.tokens) {
    return new Array(image.tokens).fill(null);
  }
  const [left, top, right, bottom] = seen(image, width, height);
  const w = (right - left) / image.columns;
  const h = (bottom - top) / image.rows;
  return Array.from({ length: image.tokens }, (_, i) => {
    const row = Math.floor(i / image.columns);
    const column = i % image.columns;
    return [left + column * w, top + row * h, left + (column + 1) * w, top + (row + 1) * h];
  });
}

/**
 * Tokens that lie on others are of another level: families with tiles see an image as a whole first, then in parts.
 *
 * Returns {of: level of each token, count, shown: boxes with the levels side by side, in fractions of all of them}.
 */
export function levels(places) {
  const of = new Array(places.length).fill(0);
  let level = 0;
  let current = [];
  places.forEach((box, token) => {
    if (box !== null) {
      const [x, y] = centre(box);
      if (current.some(([x0, y0, x1, y1]) => x > x0 && x < x1 && y > y0 && y < y1)) {
        level += 1;
        current = [];
      }
      current.push(box);
    }
    of[token] = level;
  });
  const count = level + 1;
  const shown = places.map((box, token) =>
    box === null ? null : [(of[token] + box[0]) / count, box[1], (of[token] + box[2]) / count, box[3]],
  );
  return { of, count, shown };
}

/** Name of a token for people: its number, and its row and column from 1 where it has them. */
export function nameOf(image, token) {
  if (!image.rows || !image.columns) return `patch ${token}`;
  return `patch ${token} (row ${Math.floor(token / image.columns) + 1}, column ${(token % image.columns) + 1})`;
}

/**
 * What became of each token at a reducer.
 *
 * Returns of all tokens `state` ("kept", "discarded", "gone" before), `importance`, its `rank` in [0, 1] among those
 * that entered (1 is the highest, ties alike), and `goes`: the kept token that a discarded one goes to most, or null.
 */
export function fates(tokens, reducer) {
  const out = Array.from({ length: tokens }, () => ({ state: "gone", importance: null, rank: null, goes: null }));
  const kept = new Set(reducer.kept);
  const values = reducer.importance;
  const sorted = values === null || values === undefined ? [] : [...values].sort((a, b) => a - b);
  reducer.entered.forEach((token, i) => {
    const fate = out[token];
    if (fate === undefined) return;
    fate.state = kept.has(token) ? "kept" : "discarded";
    if (sorted.length > 0) {
      fate.importance = values[i];
      fate.rank = sorted.length === 1 ? 1 : below(sorted, values[i]) / (sorted.length - 1);
    }
  });
  if (Array.isArray(reducer.assigned)) {
    const discarded = reducer.entered.filter((token) => !kept.has(token));
    discarded.forEach((token, i) => {
      if (out[token] !== undefined) out[token].goes = reducer.assigned[i] ?? null;
    });
  }
  return out;
}

function below(sorted, value) {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** How many discards go to each kept token: `Map(token → number)`. */
export function received(fate) {
  const found = new Map();
  for (const { goes } of fate) if (goes !== null) found.set(goes, (found.get(goes) ?? 0) + 1);
  return found;
}

/** A hue for each kept token, neighbours far apart: degrees. */
export const hueOf = (token) => (token * 137.508) % 360;

/** The token whose box holds a point (fractions of the image), or null; the last one wins, for tiles lie on top. */
export function tokenAt(places, x, y) {
  for (let i = places.length - 1; i >= 0; i -= 1) {
    const box = places[i];
    if (box !== null && x >= box[0] && x < box[2] && y >= box[1] && y < box[3]) return i;
  }
  return null;
}

/** The next token from one in a direction of the arrow keys, in the grid or by the nearest place. */
export function step(image, places, from, key) {
  const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  if (direction === undefined) return null;
  const start = places[from];
  if (start === null || start === undefined) return places.findIndex((box) => box !== null);
  const [cx, cy] = centre(start);
  let best = null;
  let least = Infinity;
  places.forEach((box, i) => {
    if (box === null || i === from) return;
    const [x, y] = centre(box);
    const along = (x - cx) * direction[0] + (y - cy) * direction[1];
    const aside = Math.abs((x - cx) * direction[1]) + Math.abs((y - cy) * direction[0]);
    if (along <= 1e-9 || aside > along) return;
    const far = along + 3 * aside;
    if (far < least - 1e-9) {
      least = far;
      best = i;
    }
  });
  return best;
}

/** Middle of a box. */
export const centre = (box) => [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2];

/** How many of one list are in another. */
export function overlap(a, b) {
  const other = new Set(b);
  return a.filter((token) => other.has(token)).length;
}
