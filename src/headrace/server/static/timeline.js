// The last steps of the model as bars on a canvas: above, prompt tokens computed and found in the
// cache; below, rows that decode. Each lane has its own scale.

import { duration, number } from "./dom.js";

const BAR = 5;
const LABEL = 14;

/** Draw as many of `steps` (oldest first) as fit; returns a sentence about them. */
export function drawTimeline(canvas, steps) {
  const { width, height } = canvas.getBoundingClientRect();
  const ratio = devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const shown = steps.slice(-Math.floor(width / BAR));
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const style = getComputedStyle(canvas);
  const color = (name) => style.getPropertyValue(name);
  const prompt = Math.max(...shown.map((step) => step.prefill + step.cached), 1);
  const rows = Math.max(...shown.map((step) => step.decode), 1);
  const middle = Math.round(height * 0.6);
  const left = width - shown.length * BAR;

  lane(pen, color, `${number(prompt)} prompt tokens`, LABEL, middle, width);
  lane(pen, color, `${number(rows)} rows`, middle + LABEL + 6, height, width);
  shown.forEach((step, index) => {
    const x = left + index * BAR;
    const scale = (middle - LABEL) / prompt;
    const bar = (name, bottom, size) => {
      pen.fillStyle = color(name);
      pen.fillRect(x, bottom - size, BAR - 1, size);
    };
    bar("--accent", middle, step.prefill * scale);
    bar("--soft", middle - step.prefill * scale, step.cached * scale);
    bar("--muted", height, (step.decode * (height - middle - LABEL - 6)) / rows);
  });
  return describe(shown);
}

function lane(pen, color, label, top, bottom, width) {
  pen.fillStyle = color("--muted");
  pen.font = "11px system-ui, sans-serif";
  pen.fillText(label, 0, top - 4);
  pen.fillStyle = color("--line");
  pen.fillRect(0, top, width, 1);
  pen.fillRect(0, bottom - 1, width, 1);
}

function describe(steps) {
  if (!steps.length) return "No step yet.";
  const sum = (name) => steps.reduce((total, step) => total + step[name], 0);
  const mean = sum("seconds") / steps.length;
  return (
    `${steps.length} steps, ${duration(mean)} each: ${number(sum("prefill"))} prompt tokens computed, ` +
    `${number(sum("cached"))} from the cache, ${number(sum("decode") / steps.length)} rows decoding.`
  );
}
