// Makes elements. Knows no view; text is always set as text, never parsed as HTML.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** An HTML element with properties and children. */
export function el(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

/** An SVG element with attributes and children. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Append to the last text of a box, so that a long answer is not thousands of nodes. */
export function addText(box, text) {
  if (box.lastChild instanceof Text) box.lastChild.appendData(text);
  else box.append(text);
}

/** Say what went wrong in `box`, an element of class "problem". */
export function showProblem(box, error) {
  const title = error.status ? `The server refused this (${error.status})` : "That did not work";
  box.replaceChildren(el("b", { textContent: title }), error.message);
}

/** Put `text` on the clipboard and say so on the button for a moment. */
export async function copy(button, text) {
  const name = button.textContent;
  const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  button.textContent = done ? "Copied" : "The browser does not allow it";
  setTimeout(() => (button.textContent = name), 1500);
}

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

/** A number for people: "1,234", "9.5". */
export const number = (value) => (Math.abs(value) < 10 ? fine : plain).format(value);

/** "1 step", "2 steps". */
export const counted = (count, name) => `${number(count)} ${name}${count === 1 ? "" : "s"}`;

/** A time for people: "820 µs", "12 ms", "3.4 s", "5 min". */
export function duration(seconds) {
  if (seconds < 0.001) return `${number(seconds * 1e6)} µs`;
  if (seconds < 1) return `${number(seconds * 1e3)} ms`;
  if (seconds < 120) return `${number(seconds)} s`;
  return seconds < 7200 ? `${number(seconds / 60)} min` : `${number(seconds / 3600)} h`;
}
