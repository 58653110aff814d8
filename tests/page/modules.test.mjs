// The page's pure modules, by Node's own test runner: node --test tests/page/modules.test.mjs

import assert from "node:assert/strict";
import { test } from "node:test";
import { difference } from "../../eos_vllm/page/static/js/diff.js";
import { against, bytes, flops, layers, ms, percent, short } from "../../eos_vllm/page/static/js/format.js";
import { boxes, fates, levels, nameOf, overlap, received, seen, step, tokenAt } from "../../eos_vllm/page/static/js/patches.js";
import { by, History, parse, sum } from "../../eos_vllm/page/static/js/prometheus.js";
import { Events, oneLine } from "../../eos_vllm/page/static/js/sse.js";

const text = (pieces, same) => pieces.filter((p) => p.same === same).map((p) => p.text.trim());

test("words that another answer has not are told from those that it has", () => {
  const pieces = difference("a red circle and a dog", "a blue circle and one dog");
  assert.deepEqual(text(pieces, false), ["blue", "one"]);
  assert.equal(pieces.map((p) => p.text).join(""), "a blue circle and one dog");
  assert.deepEqual(difference("same text", "same text"), [{ text: "same text", same: true }]);
  assert.deepEqual(difference("", "new"), [{ text: "new", same: false }]);
  assert.deepEqual(difference("old", ""), []);
});

test("a difference gives the text again, whatever it is", () => {
  const some = ["", " ", "a", "a  b\nc", "b a", "<b>a</b> b", "x y z x y", "y x z y x", "  lead", "trail  "];
  for (const a of some) for (const b of some) assert.equal(difference(a, b).map((p) => p.text).join(""), b);
  const long = (word) => Array.from({ length: 3000 }, (_, i) => `${word}${i}`).join(" ");
  assert.equal(difference(long("a"), long("b")).map((p) => p.text).join(""), long("b"));
});

const METRICS = `# HELP eos_kv_blocks_held KV blocks held by requests.
# TYPE eos_kv_blocks_held gauge
eos_kv_blocks_held{engine="0",segment="0"} 7.0
eos_kv_blocks_held{engine="1",segment="0"} 3.0
eos_kv_blocks_held{engine="0",segment="1"} 2.0
vllm:num_requests_running{engine="0",model_name="a \\"b\\" \\\\ c, d}\\n"} 1e1
plain_total 42 1700000000
not a sample
bad{label="open} 1
nan_gauge NaN
inf_gauge +Inf
`;

test("Prometheus' text form", () => {
  const metrics = parse(METRICS);
  assert.deepEqual([...by(metrics, "eos_kv_blocks_held", "segment")], [["0", 10], ["1", 2]]);
  assert.equal(sum(metrics, "vllm:num_requests_running"), 10);
  assert.equal(metrics.get("vllm:num_requests_running")[0].labels.model_name, 'a "b" \\ c, d}\n');
  assert.equal(sum(metrics, "plain_total"), 42);
  assert.equal(sum(metrics, "missing"), null);
  assert.ok(Number.isNaN(sum(metrics, "nan_gauge")));
  assert.equal(sum(metrics, "inf_gauge"), Infinity);
  assert.ok(!metrics.has("bad"));
  assert.ok(!metrics.has("not"));
});

test("rates, shares and growth over time, with restarts and gaps", () => {
  const history = new History(10);
  history.push(0, new Map([["n", 10], ["hits", 0], ["asked", 0]]));
  history.push(2, new Map([["n", 20], ["hits", 5], ["asked", 10]]));
  history.push(4, new Map([["n", 2], ["hits", 5], ["asked", 10], ["late", 3]]));
  history.push(6, new Map([["hits", 20], ["asked", 30], ["late", 7]]));
  assert.deepEqual(history.rate("n"), [null, 5, null, null]);
  assert.deepEqual(history.share("hits", "asked", 60), [null, 0.5, 0.5, 20 / 30]);
  assert.deepEqual(history.share("hits", "asked", 2), [null, 0.5, null, 15 / 20]);
  assert.deepEqual(history.of("late"), [null, null, 3, 7]);
  assert.deepEqual(history.growth("late", 60), [null, null, 3, 7]);
  history.push(13, new Map([["n", 4]]));
  assert.deepEqual(history.times, [4, 6, 13]);
  assert.equal(history.of("late").length, 3);
  history.push(14, new Map([["b/10", 1], ["b/9", 1], ["b/-1", 1]]));
  assert.deepEqual(history.names("b/"), ["b/-1", "b/9", "b/10"]);
});

test("events are found however the stream is cut", () => {
  const stream = 'data: {"a":1}\n\n: comment\n\ndata: {"b":\ndata: 2}\r\n\r\ndata: [DONE]\n\n';
  for (let size = 1; size <= stream.length; size += 1) {
    const events = new Events();
    const found = [];
    for (let at = 0; at < stream.length; at += size) found.push(...events.push(stream.slice(at, at + size)));
    assert.deepEqual(found.map((one) => JSON.parse(one)), [{ a: 1 }, { b: 2 }], `chunks of ${size}`);
  }
});

test("an error is one line", () => {
  assert.equal(oneLine('{"error": {"message": "no\\nimage"}}', 400), "no image");
  assert.equal(oneLine('{"error": "Unauthorized"}', 401), "Unauthorized");
  assert.equal(oneLine('{"detail": "Not Found"}', 404), "Not Found");
  assert.equal(oneLine('{"detail": [{"loc": ["path", "number"], "msg": "too large"}]}', 422), "path.number: too large");
  assert.equal(oneLine("<html><h1>Bad</h1></html>", 502), "the server answered with HTTP 502");
  assert.equal(oneLine("", 500), "the server answered with HTTP 500");
  assert.equal(oneLine("x".repeat(999), 500).length, 298);
});

const grid = (rows, columns) => ({ tokens: rows * columns, rows, columns, boxes: null });

test("tokens stand where the family puts them", () => {
  assert.deepEqual(boxes(grid(2, 2), 100, 100)[3], [0.5, 0.5, 1, 1]);
  // A square grid on an image that is none: the middle was cropped.
  assert.deepEqual(seen(grid(2, 2), 200, 100), [0.25, 0, 0.75, 1]);
  assert.deepEqual(boxes(grid(2, 2), 200, 100)[0], [0.25, 0, 0.5, 0.5]);
  // As many columns as the image is wide: all of it.
  assert.deepEqual(seen(grid(2, 4), 200, 100), [0, 0, 1, 1]);
  const tiled = { tokens: 2, rows: null, columns: null, boxes: [[0, 0, 1, 1], null] };
  assert.equal(boxes(tiled, 10, 10), tiled.boxes);
  assert.deepEqual(boxes({ tokens: 3, rows: 2, columns: 2, boxes: null }, 9, 9), [null, null, null]);
  assert.equal(nameOf(grid(2, 3), 4), "patch 4 (row 2, column 2)");
  assert.equal(tokenAt(boxes(grid(2, 2), 1, 1), 0.75, 0.2), 1);
  assert.equal(tokenAt([null, [0, 0, 0.5, 0.5]], 0.9, 0.9), null);
});

test("tiles that lie on the whole image stand beside it", () => {
  const whole = boxes(grid(2, 2), 1, 1);
  const tiles = boxes(grid(4, 4), 1, 1);
  const found = levels([...whole, ...tiles.slice(0, 8), null, ...tiles.slice(8)]);
  assert.equal(found.count, 2);
  assert.deepEqual(found.of, [...new Array(4).fill(0), ...new Array(17).fill(1)]);
  assert.deepEqual(found.shown[0], [0, 0, 0.25, 0.5]);
  assert.deepEqual(found.shown[4], [0.5, 0, 0.625, 0.25]);
  assert.equal(found.shown[12], null);
  assert.equal(levels(tiles).count, 1);
  assert.deepEqual(levels(tiles).shown, tiles);
});

test("arrow keys go from patch to patch, and stop at the edge", () => {
  const image = grid(3, 3);
  const places = boxes(image, 1, 1);
  assert.equal(step(image, places, 4, "ArrowRight"), 5);
  assert.equal(step(image, places, 4, "ArrowLeft"), 3);
  assert.equal(step(image, places, 4, "ArrowUp"), 1);
  assert.equal(step(image, places, 4, "ArrowDown"), 7);
  assert.equal(step(image, places, 5, "ArrowRight"), null);
  assert.equal(step(image, places, 4, "Enter"), null);
});

test("what became of each token", () => {
  const fate = fates(5, { entered: [0, 2, 3, 4], kept: [2, 4], importance: [0.1, 0.4, 0.1, 0.2], assigned: [4, 4] });
  assert.deepEqual(fate.map((f) => f.state), ["discarded", "gone", "kept", "discarded", "kept"]);
  assert.deepEqual(fate.map((f) => f.goes), [4, null, null, 4, null]);
  assert.deepEqual(fate.map((f) => f.rank), [0, null, 1, 0, 2 / 3]);
  assert.deepEqual([...received(fate)], [[4, 2]]);
  const plain = fates(2, { entered: [0, 1], kept: [1], importance: null, assigned: null });
  assert.deepEqual(plain.map((f) => [f.state, f.rank, f.goes]), [["discarded", null, null], ["kept", null, null]]);
  assert.equal(overlap([1, 2, 3], [3, 1, 9]), 2);
});

test("numbers have units", () => {
  assert.equal(bytes(1536), "1.5 KiB");
  assert.equal(bytes(3 * 2 ** 20), "3 MiB");
  assert.equal(flops(2.5e12), "2.5 TFLOP");
  assert.equal(flops(12), "0 MFLOP".replace("0", "0.000012"));
  assert.equal(percent(1 / 3, 1), "33.3 %");
  assert.equal(ms(4.25), "4.3 ms");
  assert.equal(ms(12345), "12.3 s");
  assert.equal(layers(0, 3), "layers 0–2");
  assert.equal(layers(3, 1), "layer 3");
  assert.equal(against(0.25), "4× less");
  assert.equal(against(1), "as stock");
  assert.equal(short(NaN), "–");
});
