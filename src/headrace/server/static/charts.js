// Small charts in SVG: a line over time, a histogram. Pure drawing; data comes ready.

import { duration, number, svg } from "./dom.js";

/** Draw `values` (oldest first) as a line over its area; `room` is how many fit, `most` the top. */
export function drawLine(box, values, room, most = 0) {
  const top = Math.max(most, ...values.filter(Number.isFinite), 1e-9);
  const points = values.map((value, index) => {
    const height = Number.isFinite(value) ? (33 * value) / top : 0;
    return `${room - values.length + index},${(38.5 - height).toFixed(2)}`;
  });
  const path = points.join(" L");
  box.setAttribute("viewBox", `0 0 ${room - 1} 40`);
  box.setAttribute("preserveAspectRatio", "none");
  box.replaceChildren(
    svg("path", { class: "spark-area", d: `M${room - values.length},40 L${path} L${room - 1},40 Z` }),
    svg("path", { class: "spark-line", d: `M${path}` }),
  );
}

const TOP = 16; // px above the highest bar, for its share
const FOOT = 18; // px below, for the bounds
const LABEL = 52; // px that a bound needs

/** Draw counts by bucket, each as wide as the others; only the span of buckets in use is shown. */
export function drawHistogram(box, { bounds, counts }) {
  const { width, height } = box.getBoundingClientRect();
  const floor = height - FOOT;
  box.replaceChildren(svg("line", { x1: 0, x2: width, y1: floor, y2: floor }));
  const used = counts.flatMap((count, index) => (count ? [index] : []));
  if (!used.length || !width) return;
  const first = Math.max(0, used[0] - 1);
  const last = Math.min(counts.length - 1, used.at(-1) + 1);
  const step = Math.min(width / (last - first + 1), 64);
  const left = (width - step * (last - first + 1)) / 2;
  const most = Math.max(...counts);
  const total = counts.reduce((sum, count) => sum + count, 0);
  const every = Math.ceil(LABEL / step);
  for (let index = first; index <= last; index += 1) {
    const x = left + (index - first) * step;
    const size = counts[index] ? Math.max(1, (floor - TOP) * (counts[index] / most)) : 0;
    const share = (100 * counts[index]) / total;
    const bar = svg("rect", { x: x + 1, y: floor - size, width: Math.max(1, step - 2), height: size, rx: Math.min(3, size / 2) });
    bar.append(svg("title", {}, `${bucketName(bounds, index)}: ${number(counts[index])}, ${number(share)}%`));
    box.append(bar);
    if (share >= 1 && step > 24) box.append(middle(x + step / 2, floor - size - 4, `${Math.round(share)}%`));
    if (index < last && (index - first) % every === 0) box.append(middle(x + step, height - 4, duration(bounds[index])));
  }
}

const middle = (x, y, text) => svg("text", { x, y, "text-anchor": "middle" }, text);

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
