// A small chart over time, by uPlot: axes with their units, a legend with the last values, and the same as text.

import { colour, el } from "./dom.js";

const HEIGHT = 220;
const WHOLE = [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5].map((p) => n * 10 ** p)).sort((a, b) => a - b);
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

/**
 * A chart: `about` is {title, unit, about, series: [[name, values, text]], range, whole (only whole numbers on the axis)}.
 *
 * Returns {element, attach, update, destroy}; `attach` once the element is in the document, for it needs its width.
 */
export function chart(about) {
  const plot = el("div", { class: "plot" });
  const words = el("p", { class: "sr" });
  const element = el(
    "article",
    { class: "card chart", "aria-label": `${about.title}, ${about.unit}` },
    el("h3", {}, about.title),
    plot,
    el("p", { class: "note" }, about.about),
    words,
  );
  plot.setAttribute("aria-hidden", "true");
  let drawn = null;
  let observer = null;

  function attach() {
    const text = colour("soft");
    const grid = { stroke: colour("grid"), width: 1 };
    const axis = { stroke: text, grid, ticks: { stroke: colour("grid") }, font: "12px system-ui", labelFont: "12px system-ui" };
    drawn = new window.uPlot(
      {
        width: Math.max(240, plot.clientWidth),
        height: HEIGHT,
        cursor: { y: false },
        scales: { x: { time: true }, y: { range: (_, low, high) => about.range ?? [0, ceiling(high)] } },
        axes: [
          { ...axis, label: "time of day", labelSize: 18, size: 34, space: 70, values: (_, times) => times.map((t) => clock.format(t * 1000)) },
          { ...axis, label: about.unit, labelSize: 20, size: 52, ...(about.whole ? { incrs: WHOLE } : {}) },
        ],
        series: [
          { label: "at", value: (_, time) => (time === null || time === undefined ? "–" : clock.format(time * 1000)) },
          ...about.series.map(([name, , write], i) => ({
            label: name,
            stroke: colour(`series-${(i % 6) + 1}`),
            width: 2,
            dash: i >= 6 ? [6, 4] : undefined,
            points: { show: false },
            value: (_, value) => (value === null || value === undefined ? "–" : write(value)),
          })),
        ],
        legend: { live: true },
      },
      [[], ...about.series.map(() => [])],
      plot,
    );
    observer = new ResizeObserver(() => drawn.setSize({ width: Math.max(240, plot.clientWidth), height: HEIGHT }));
    observer.observe(plot);
  }

  function update(times, series) {
    drawn.setData([times, ...series.map(([, values]) => values)]);
    drawn.setLegend({ idx: times.length - 1 });
    const last = series.map(([name, values, write]) => {
      const value = values[values.length - 1];
      return `${name}: ${value === null || value === undefined ? "none" : write(value)}`;
    });
    words.textContent = `Now, in ${about.unit}: ${last.join(", ")}`;
  }

  function destroy() {
    observer?.disconnect();
    drawn?.destroy();
    element.remove();
  }

  return { element, attach, update, destroy };
}

/** The end of an axis that starts at 0: some air above the highest value, 1 where there is none. */
function ceiling(high) {
  return high === null || high === undefined || high <= 0 ? 1 : Math.max(1, high * 1.1);
}

/** Ends charts whose colours are no longer those of the page. */
export function recolour(charts) {
  for (const { destroy } of charts) destroy();
  charts.length = 0;
}
