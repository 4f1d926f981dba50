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

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

/** A number for people: "1,234", "9.5". */
export const number = (value) => (Math.abs(value) < 10 ? fine : plain).format(value);

/** A time for people: "820 µs", "12 ms", "3.4 s". */
export function duration(seconds) {
  if (seconds < 0.001) return `${number(seconds * 1e6)} µs`;
  return seconds < 1 ? `${number(seconds * 1e3)} ms` : `${number(seconds)} s`;
}
