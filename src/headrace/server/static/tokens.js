// The text of an answer as tokens: tinted by probability, with the alternatives of each on request.
// Tokens of all answers are bounded: beyond that, those of the oldest answers become plain text.

import { addText, el } from "./dom.js";

/** Tokens that are shown with their alternatives, over all answers. */
export const MOST_TOKENS = 20000;

// How tokenizers write the tokens that end or open a turn.
const SPECIAL = /^(<[|｜].*[|｜]>|<\/?[a-z_]+>)$/;

const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");

/** `probability` as a percentage; tiny ones in words. */
function percent(probability) {
  if (probability >= 0.9995) return "100%";
  return probability < 0.0005 ? "<0.1%" : `${(probability * 100).toFixed(1)}%`;
}

let shown = []; // the views on the page, oldest first
window.addEventListener("resize", () => shown.forEach((view) => view.hide()));

function makeRoom() {
  shown = shown.filter((view) => view.box.isConnected);
  let total = shown.reduce((sum, view) => sum + view.entries.length, 0);
  while (total > MOST_TOKENS && shown.length) {
    total -= shown[0].entries.length;
    shown.shift().flatten();
  }
}

/** Shows tokens in `box`, an element inside a positioned parent. One tab stop; arrow keys walk. */
export class TokenView {
  constructor(box) {
    this.box = box;
    this.entries = [];
    this.decoder = new TextDecoder();
    this.current = -1;
    this.card = null;
    this.pinned = false;
    this.flat = false;
    shown.push(this);
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "Answer; arrow keys walk through its tokens");
    box.addEventListener("keydown", (event) => this.#key(event));
    box.addEventListener("pointerover", (event) => event.pointerType === "mouse" && !this.pinned && this.#point(event));
    box.addEventListener("pointerleave", () => this.pinned || this.hide());
    box.addEventListener("click", (event) => this.#click(event));
    box.addEventListener("blur", () => this.hide());
  }

  /** Append entries of `logprobs.content`. Tokens may be parts of a character: bytes are joined. */
  add(entries) {
    for (const entry of entries) {
      const text = this.decoder.decode(new Uint8Array(entry.bytes), { stream: true });
      if (this.flat) addText(this.box, text);
      else this.#append(entry, text);
    }
    if (this.entries.length % 64 < entries.length) makeRoom();
  }

  /** Become plain text, and forget the alternatives. */
  flatten() {
    this.hide();
    this.flat = true;
    this.entries = [];
    this.box.textContent = this.box.textContent;
    this.box.removeAttribute("tabindex");
  }

  #append(entry, text) {
    const start = text.length - text.trimStart().length;
    const tinted = el("i", { textContent: text.slice(start) });
    const name = SPECIAL.test(entry.token) ? "token special" : "token";
    const span = el("span", { className: name }, text.slice(0, start), tinted);
    span.style.setProperty("--p", Math.exp(entry.logprob).toFixed(4));
    span.dataset.index = this.entries.length;
    this.entries.push({ entry, span });
    this.box.append(span);
  }

  /** Show the alternatives of one token, below it, or above where there is more room. */
  show(index) {
    this.hide();
    const { entry, span } = this.entries[index];
    this.current = index;
    span.classList.add("current");
    this.card = card(entry);
    const parent = this.box.parentElement;
    parent.append(this.card);
    const [place, frame] = [span.querySelector("i").getBoundingClientRect(), parent.getBoundingClientRect()];
    const window = (parent.closest(".scroller") ?? document.documentElement).getBoundingClientRect();
    const height = this.card.offsetHeight + 6;
    const above = place.bottom + height > window.bottom && place.top - height > window.top;
    const left = Math.min(place.left - frame.left, frame.width - this.card.offsetWidth);
    this.card.style.left = `${Math.max(0, left)}px`;
    this.card.style.top = `${above ? place.top - frame.top - height : place.bottom - frame.top + 6}px`;
  }

  hide() {
    this.entries[this.current]?.span.classList.remove("current");
    this.card?.remove();
    this.card = null;
    this.pinned = false;
  }

  #indexOf(event) {
    const index = event.target.closest(".token")?.dataset.index;
    return index === undefined ? -1 : Number(index);
  }

  #point(event) {
    const index = this.#indexOf(event);
    if (index >= 0 && (index !== this.current || !this.card)) this.show(index);
  }

  #click(event) {
    const index = this.#indexOf(event);
    if (index < 0 || (this.pinned && index === this.current)) return this.hide();
    this.show(index);
    this.pinned = true;
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape" && this.card) {
      this.hide();
      event.stopPropagation();
    }
    if (!step || !this.entries.length) return;
    event.preventDefault();
    this.show(Math.min(this.entries.length - 1, Math.max(0, this.current + step)));
    this.pinned = true;
    this.entries[this.current].span.scrollIntoView({ block: "nearest" });
    this.card.scrollIntoView({ block: "nearest" });
  }
}

function card({ token, logprob, top_logprobs: top }) {
  const among = top.some((other) => other.token === token);
  const rows = among ? top : [...top, { token, logprob }];
  const list = rows.map((other) => {
    const probability = Math.exp(other.logprob);
    const bar = el("i");
    bar.style.width = `${(probability * 100).toFixed(1)}%`;
    return el(
      "li",
      { className: other.token === token ? "chosen" : "" },
      bar,
      el("code", { textContent: visible(other.token) || "∅" }),
      el("span", {}, percent(probability), " ", el("small", { textContent: other.logprob.toFixed(2) })),
    );
  });
  const box = el("div", { className: "alternatives" }, el("ol", {}, ...list));
  const note = verdict(token, top, among);
  if (note) box.append(el("p", { textContent: note }));
  box.setAttribute("role", "status");
  return box;
}

/** How the token that was chosen stands among the likeliest. */
function verdict(token, top, among) {
  if (!top.length || top[0].token === token) return "";
  return among ? "Sampled; not the likeliest." : `Sampled; not among the ${top.length} likeliest.`;
}
