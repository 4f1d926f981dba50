// The prefix tree as an icicle: a node lies right of its parent, as wide as it has tokens (on a
// square-root scale) and as high as its leaves. A node can be picked with the pointer or the arrow
// keys: its way from the root is marked, and told in words.

import { counted, el, number, svg } from "./dom.js";

const ROW = 22;
const GAP = 2;
const LETTER = 6.65;
const MIN_WIDTH = 44;

export class Tree {
  constructor(box, note, table) {
    this.box = box;
    this.note = note;
    this.table = table;
    this.nodes = [];
    this.picked = ""; // the key of a node
    box.addEventListener("pointermove", (event) => event.pointerType === "mouse" && this.#pickAt(event));
    box.addEventListener("click", (event) => this.#pickAt(event));
    box.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.#pick(""));
    box.addEventListener("blur", () => this.#pick(""));
    box.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Draw nodes, parents first; see OutlineNode. */
  draw(nodes) {
    this.nodes = inOrder(nodes);
    layOut(this.nodes);
    const room = this.box.parentElement.clientWidth;
    const deepest = Math.max(...this.nodes.map((node) => node.end), 1);
    const scale = Math.max(1, Math.min(5, (room - 2) / deepest));
    const rows = this.nodes.filter((node) => node.parent < 0).reduce((sum, node) => sum + node.rows, 0);
    this.box.setAttribute("width", Math.max(1, Math.round(deepest * scale)));
    this.box.setAttribute("height", Math.max(1, rows * ROW));
    this.box.replaceChildren(...this.nodes.map((node, index) => drawNode(node, scale, index)));
    fillTable(this.table, this.nodes);
    this.#mark();
  }

  #pickAt(event) {
    const index = event.target.closest(".node")?.dataset.index;
    this.#pick(index === undefined ? "" : this.nodes[index].key);
  }

  #pick(key) {
    if (key === this.picked) return;
    this.picked = key;
    this.#mark();
  }

  #find() {
    return this.nodes.findIndex((node) => node.key === this.picked);
  }

  #mark() {
    const way = new Set();
    for (let index = this.#find(); index >= 0; index = this.nodes[index].parent) way.add(index);
    for (const group of this.box.children) group.classList.toggle("path", way.has(Number(group.dataset.index)));
    const sentence = describe(this.nodes);
    const nodes = [...way].reverse().map((index) => this.nodes[index]);
    const text = way.size ? `${nodes.map((node) => flat(node.text)).join(" … ")} …: ${summary(nodes.at(-1))}` : sentence;
    this.note.textContent = text;
    this.box.setAttribute("aria-label", sentence);
    if (way.size) this.box.setAttribute("aria-description", text);
    else this.box.removeAttribute("aria-description");
  }

  #key(event) {
    const now = this.#find();
    const { parent = -1 } = this.nodes[now] ?? {};
    const next = {
      ArrowUp: now - 1,
      ArrowDown: now + 1,
      ArrowLeft: parent,
      ArrowRight: this.nodes.findIndex((node) => node.parent === now),
    }[event.key];
    if (event.key === "Escape") this.#pick("");
    if (next === undefined) return;
    event.preventDefault();
    const node = this.nodes[now < 0 ? 0 : next];
    if (!node) return;
    this.#pick(node.key);
    this.box.children[this.nodes.indexOf(node)].scrollIntoView({ block: "nearest", inline: "nearest" });
  }
}

/** The nodes depth first, siblings by their text: a node keeps its place while others come and go. */
function inOrder(nodes) {
  const children = new Map();
  nodes.forEach((node, index) => children.set(node.parent, [...(children.get(node.parent) ?? []), { ...node, index }]));
  const found = [];
  const visit = (below, parent, path) => {
    const siblings = (children.get(below) ?? []).sort((a, b) => (a.text < b.text ? -1 : a.text > b.text ? 1 : b.tokens - a.tokens));
    for (const node of siblings) {
      const key = `${path}\n${node.tokens} ${node.text}`;
      found.push({ ...node, parent, key });
      visit(node.index, found.length - 1, key);
    }
  };
  visit(-1, -1, "");
  return found;
}

/** Give each node its place: start and end (width units), row and rows. */
function layOut(nodes) {
  for (const node of nodes) Object.assign(node, { rows: 0, next: 0 });
  for (const node of [...nodes].reverse()) {
    node.rows = Math.max(1, node.rows);
    if (node.parent >= 0) nodes[node.parent].rows += node.rows;
  }
  let top = 0;
  for (const node of nodes) {
    const parent = nodes[node.parent];
    node.start = parent ? parent.end : 0;
    node.end = node.start + Math.max(MIN_WIDTH, Math.sqrt(node.tokens) * 12);
    node.row = parent ? parent.next : top;
    node.next = node.row;
    if (parent) parent.next += node.rows;
    else top += node.rows;
  }
}

const stateOf = ({ locks }) => (locks > 1 ? "shared" : locks ? "used" : "kept");

function drawNode(node, scale, index) {
  const [x, y] = [node.start * scale, node.row * ROW];
  const width = (node.end - node.start) * scale - GAP;
  const height = node.rows * ROW - GAP;
  const count = `${number(node.tokens)}${node.locks ? ` ×${node.locks}` : ""}`;
  const room = Math.floor((width - 12) / LETTER) - count.length - 1;
  const group = svg(
    "g",
    { class: `node ${stateOf(node)}`, "data-index": index },
    svg("rect", { x: x + 0.5, y: y + 0.5, width, height, rx: 3 }),
    svg("text", { class: "count", x: x + width - 5, y: y + 14.5, "text-anchor": "end" }, count),
  );
  if (room > 1) group.append(svg("text", { x: x + 6, y: y + 14.5 }, cut(flat(node.text), room)));
  return group;
}

/** In one line, with the names of special tokens in short: "<|im_end|>" as "‹im_end›". */
const flat = (text) => text.replaceAll("\n", "⏎").replace(/<\|(\w+)\|>/g, "‹$1›");
const cut = (text, room) => (text.length > room ? `${text.slice(0, room - 1)}…` : text);

function summary({ tokens, locks, hits, hidden }) {
  const more = hidden ? `, ${number(hidden)} branches not shown` : "";
  return `${counted(tokens, "token")}, locked by ${counted(locks, "request")}, found ${counted(hits, "time")}${more}.`;
}

function describe(nodes) {
  if (!nodes.length) return "No prefixes are kept.";
  const count = (state) => nodes.filter((node) => stateOf(node) === state).length;
  const hidden = nodes.reduce((sum, node) => sum + node.hidden, 0);
  return (
    `${counted(nodes.length, "node")}: ${count("shared")} shared, ${count("used")} locked by one request, ` +
    `${count("kept")} kept for later${hidden ? `; ${number(hidden)} branches are not shown` : ""}.`
  );
}

/** The same nodes as rows of a table, indented by depth. */
function fillTable(body, nodes) {
  nodes.forEach((node) => (node.depth = node.parent < 0 ? 0 : nodes[node.parent].depth + 1));
  body.replaceChildren(
    ...nodes.map((node) => {
      const name = `${"· ".repeat(node.depth)}${flat(node.text)}`;
      return el("tr", {}, ...[name, number(node.tokens), node.locks, node.hits].map((text) => el("td", { textContent: text })));
    }),
  );
}
