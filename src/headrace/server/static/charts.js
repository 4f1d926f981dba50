// Small charts in SVG: a line over time, a histogram. Pure drawing; data comes ready.

import { duration, svg } from "./dom.js";

/** Draw `values` (oldest first) as a line over its area; `room` is how many fit. */
export function drawLine(box, values, room) {
  const top = Math.max(...values, 1e-9);
  const points = values.map((value, index) => {
    const x = room - values.length + index;
    return [x, 38 - (36 * value) / top];
  });
  const path = points.map(([x, y]) => `${x},${y.toFixed(2)}`).join(" L");
  box.setAttribute("viewBox", `0 0 ${room - 1} 40`);
  box.setAttribute("preserveAspectRatio", "none");
  box.replaceChildren(
    svg("path", { class: "spark-area", d: `M${points[0][0]},40 L${path} L${room - 1},40 Z` }),
    svg("path", { class: "spark-line", d: `M${path}` }),
  );
}

const WIDTH = 400;
const HEIGHT = 128;
const FLOOR = HEIGHT - 16;

/** Draw counts by bucket; only the span of buckets in use is shown. */
export function drawHistogram(box, { bounds, counts }) {
  box.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  box.replaceChildren(svg("line", { x1: 0, x2: WIDTH, y1: FLOOR, y2: FLOOR }));
  const used = counts.flatMap((count, index) => (count ? [index] : []));
  if (!used.length) return;
  const first = Math.max(0, used[0] - 1);
  const last = Math.min(counts.length - 1, used.at(-1) + 1);
  const step = WIDTH / (last - first + 1);
  const top = Math.max(...counts);
  for (let index = first; index <= last; index += 1) {
    const x = (index - first) * step;
    const height = (FLOOR - 14) * (counts[index] / top);
    const bar = svg("rect", { x: x + 1, y: FLOOR - height, width: Math.max(1, step - 2), height, rx: 2 });
    bar.append(svg("title", {}, `${bucketName(bounds, index)}: ${counts[index]}`));
    box.append(bar);
    if (index < bounds.length && (index - first) % Math.ceil((last - first + 1) / 6) === 0) {
      const label = svg("text", { x: x + step, y: HEIGHT - 3, "text-anchor": "middle" }, duration(bounds[index]));
      box.append(label);
    }
  }
}

function bucketName(bounds, index) {
  if (index === 0) return `up to ${duration(bounds[0])}`;
  if (index === bounds.length) return `over ${duration(bounds.at(-1))}`;
  return `${duration(bounds[index - 1])} to ${duration(bounds[index])}`;
}

/** The upper bound of the bucket that holds quantile `share`, or null without values. */
export function quantile({ bounds, counts }, share) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  let seen = 0;
  for (let index = 0; index < counts.length; index += 1) {
    seen += counts[index];
    if (total && seen >= share * total) return bounds[Math.min(index, bounds.length - 1)];
  }
  return null;
}
