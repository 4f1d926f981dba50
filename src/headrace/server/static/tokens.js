// The text of an answer as tokens: tinted by probability, with the alternatives of each on request.

import { el } from "./dom.js";

/** `probability` as a percentage; tiny ones in words. */
function percent(probability) {
  if (probability >= 0.9995) return "100%";
  return probability < 0.0005 ? "<0.1%" : `${(probability * 100).toFixed(1)}%`;
}

// How tokenizers write the tokens that end or open a turn.
const SPECIAL = /^(<[|｜].*[|｜]>|<\/?[a-z_]+>)$/;

const visible = (text) => text.replaceAll("\n", "⏎").replaceAll(" ", "␣");

/** Shows tokens in `box`, an element inside a positioned parent. One tab stop; arrow keys walk. */
export class TokenView {
  constructor(box) {
    this.box = box;
    this.entries = [];
    this.decoder = new TextDecoder();
    this.current = -1;
    this.card = null;
    this.pinned = false;
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
      const name = SPECIAL.test(entry.token) ? "token special" : "token";
      const span = el("span", { className: name, textContent: text });
      span.style.setProperty("--p", Math.exp(entry.logprob).toFixed(4));
      span.dataset.index = this.entries.length;
      this.entries.push({ entry, span });
      this.box.append(span);
    }
  }

  /** Show the alternatives of one token. */
  show(index) {
    this.hide();
    const { entry, span } = this.entries[index];
    this.current = index;
    span.classList.add("current");
    this.card = card(entry);
    const parent = this.box.parentElement;
    parent.append(this.card);
    const [place, frame] = [span.getBoundingClientRect(), parent.getBoundingClientRect()];
    const left = Math.min(place.left - frame.left, frame.width - this.card.offsetWidth);
    this.card.style.left = `${Math.max(0, left)}px`;
    this.card.style.top = `${place.bottom - frame.top + 6}px`;
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
    if (index >= 0 && index !== this.current) this.show(index);
    else if (index >= 0 && !this.card) this.show(index);
  }

  #click(event) {
    const index = this.#indexOf(event);
    if (index < 0 || (this.pinned && index === this.current)) return this.hide();
    this.show(index);
    this.pinned = true;
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") this.hide();
    if (!step || !this.entries.length) return;
    event.preventDefault();
    this.show(Math.min(this.entries.length - 1, Math.max(0, this.current + step)));
    this.pinned = true;
  }
}

function card({ token, logprob, top_logprobs: top }) {
  const rows = top.some((other) => other.token === token) ? top : [{ token, logprob }, ...top];
  const list = rows.map((other) => {
    const probability = Math.exp(other.logprob);
    return el(
      "li",
      { className: other.token === token ? "chosen" : "" },
      el("code", { textContent: visible(other.token) }),
      el("meter", { value: probability, ariaLabel: "probability" }),
      el("span", { textContent: percent(probability) }),
    );
  });
  const title = `${visible(token)}  ${logprob.toFixed(3)}`;
  const box = el("div", { className: "alternatives" }, el("h3", { textContent: title }), el("ol", {}, ...list));
  box.setAttribute("role", "status");
  return box;
}
