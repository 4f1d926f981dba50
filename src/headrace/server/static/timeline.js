// The last steps of the model as bars on a canvas: prompt tokens computed and found in the cache, rows
// that decode, and how long each step took. Each lane has its own scale. One step can be picked with
// the pointer or the arrow keys.

import { counted, duration, number } from "./dom.js";

const BAR = 5;
const LABEL = 15; // px above a lane
const FOOT = 16; // px below the lowest
const LANES = [
  { share: 0.46, fields: [["prefill", "--fill"], ["cached", "--mid"]], label: (most) => counted(most, "prompt token") },
  { share: 0.27, fields: [["decode", "--grain"]], label: (most) => counted(most, "row") },
  { share: 0.27, fields: [["seconds", "--muted"]], label: duration },
];

export class Timeline {
  constructor(canvas, note) {
    this.canvas = canvas;
    this.note = note;
    this.steps = []; // those that are drawn
    this.picked = null; // number of a step
    canvas.addEventListener("pointermove", (event) => this.#pick(this.#at(event)));
    canvas.addEventListener("pointerdown", (event) => this.#pick(this.#at(event)));
    canvas.addEventListener("pointerleave", () => this.#pick(-1));
    canvas.addEventListener("blur", () => this.#pick(-1));
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Draw as many of `steps` (oldest first) as fit. */
  draw(steps) {
    const { width, height } = this.canvas.getBoundingClientRect();
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.steps = steps.slice(-Math.floor(width / BAR));
    this.left = width - this.steps.length * BAR;
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = `11px ${getComputedStyle(this.canvas).fontFamily}`;
    this.#lanes(pen, width, height);
    this.#axis(pen, width, height);
    this.#tell();
  }

  #lanes(pen, width, height) {
    const style = getComputedStyle(this.canvas);
    const color = (name) => style.getPropertyValue(name);
    const picked = this.steps.findIndex(({ step }) => step === this.picked);
    pen.fillStyle = color("--line");
    if (picked >= 0) pen.fillRect(this.left + picked * BAR - 1, LABEL, BAR + 1, height - LABEL - FOOT);
    let top = 0;
    for (const { share, fields, label } of LANES) {
      const bottom = Math.round(top + (height - FOOT) * share);
      const sum = (step) => fields.reduce((total, [name]) => total + step[name], 0);
      const most = Math.max(...this.steps.map(sum), 0);
      pen.fillStyle = color("--line");
      pen.fillRect(0, bottom - 1, width, 1);
      const scale = most ? (bottom - top - LABEL - 5) / most : 0;
      this.steps.forEach((step, index) => {
        let floor = bottom;
        for (const [name, tint] of fields) {
          if (!step[name]) continue;
          const size = Math.max(1, step[name] * scale);
          pen.fillStyle = color(tint);
          pen.fillRect(this.left + index * BAR, floor - size, BAR - 1, size);
          floor -= size;
        }
      });
      pen.fillStyle = color("--muted");
      pen.fillText(most ? `up to ${label(most)}` : "", 0, top + LABEL - 3);
      top = bottom;
    }
    this.muted = color("--muted");
  }

  /** Below the bars: how long ago the first began, from the end of the last. */
  #axis(pen, width, height) {
    if (!this.steps.length) return;
    const [first, last] = [this.steps[0], this.steps.at(-1)];
    pen.fillStyle = this.muted;
    if (this.left < width / 2) pen.fillText(`${duration(last.at + last.seconds - first.at)} before`, this.left, height - 3);
    pen.textAlign = "right";
    pen.fillText("last step", width, height - 3);
  }

  #at(event) {
    return Math.floor((event.offsetX - this.left) / BAR);
  }

  #pick(index) {
    const step = this.steps[index]?.step ?? null;
    if (step === this.picked) return;
    this.picked = step;
    this.draw(this.steps);
  }

  #key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.#pick(-1);
    if (!by || !this.steps.length) return;
    event.preventDefault();
    const index = this.steps.findIndex(({ step }) => step === this.picked);
    const next = index < 0 ? this.steps.length - 1 : index + by;
    this.#pick(Math.min(this.steps.length - 1, Math.max(0, next)));
  }

  #tell() {
    const picked = this.steps.find(({ step }) => step === this.picked);
    this.note.textContent = picked ? one(picked) : all(this.steps);
    this.canvas.setAttribute("aria-label", all(this.steps));
    if (picked) this.canvas.setAttribute("aria-description", one(picked));
    else this.canvas.removeAttribute("aria-description");
  }
}

const one = ({ step, seconds, prefill, cached, decode }) =>
  `Step ${number(step)}, ${duration(seconds)}: ${counted(prefill, "prompt token")} computed, ` +
  `${number(cached)} from the cache, ${counted(decode, "row")} decoding.`;

function all(steps) {
  if (!steps.length) return "No step yet.";
  const sum = (name) => steps.reduce((total, step) => total + step[name], 0);
  return (
    `${counted(steps.length, "step")}, ${duration(sum("seconds") / steps.length)} each: ` +
    `${counted(sum("prefill"), "prompt token")} computed, ${number(sum("cached"))} from the cache, ` +
    `${counted(sum("decode") / steps.length, "row")} decoding.`
  );
}
