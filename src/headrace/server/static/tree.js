// The prefix tree as an icicle: a node lies right of its parent, as wide as it has tokens (on a
// square-root scale) and as high as its leaves.

import { el, number, svg } from "./dom.js";

const ROW = 22;
const GAP = 2;
const LETTER = 6.7;
const MIN_WIDTH = 34;

/** Draw `nodes` (parents first; see OutlineNode) into an SVG, `width` pixels wide if they fit. */
export function drawTree(box, nodes, width) {
  layOut(nodes);
  const deepest = Math.max(...nodes.map((node) => node.end), 1);
  const scale = Math.max(1, (width - 2) / deepest);
  const rows = nodes.filter((node) => node.parent < 0).reduce((sum, node) => sum + node.rows, 0);
  box.setAttribute("width", Math.max(1, deepest * scale));
  box.setAttribute("height", Math.max(1, rows * ROW));
  box.replaceChildren(...nodes.map((node) => draw(node, scale)));
  box.setAttribute("aria-label", describe(nodes));
  return describe(nodes);
}

/** Give each node its place: start and end (width units), row and rows. */
function layOut(nodes) {
  nodes.forEach((node) => Object.assign(node, { rows: 0, next: 0 }));
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

function draw(node, scale) {
  const [x, y] = [node.start * scale, node.row * ROW];
  const width = (node.end - node.start) * scale - GAP;
  const height = node.rows * ROW - GAP;
  const count = `${number(node.tokens)}${node.locks ? ` ×${node.locks}` : ""}`;
  const room = Math.floor(width / LETTER) - count.length - 3;
  const middle = y + height / 2 + 4;
  const group = svg(
    "g",
    { class: `node ${stateOf(node)}` },
    svg("title", {}, `${node.text}…\n${summary(node)}`),
    svg("rect", { x: x + 0.5, y: y + 0.5, width, height, rx: 3 }),
    svg("text", { class: "count", x: x + width - 4, y: middle, "text-anchor": "end" }, count),
  );
  if (room > 2) group.append(svg("text", { x: x + 5, y: middle }, flat(node.text).slice(0, room)));
  return group;
}

const flat = (text) => text.replaceAll("\n", "⏎");

function summary({ tokens, locks, hits, hidden }) {
  const more = hidden ? `, ${number(hidden)} branches not shown` : "";
  return `${number(tokens)} tokens, ${locks} requests use it, found ${hits} times${more}`;
}

function describe(nodes) {
  if (!nodes.length) return "No prefixes are kept.";
  const count = (state) => nodes.filter((node) => stateOf(node) === state).length;
  const hidden = nodes.reduce((sum, node) => sum + node.hidden, 0);
  return (
    `${nodes.length} nodes: ${count("shared")} shared, ${count("used")} used by one request, ` +
    `${count("kept")} kept for later${hidden ? `; ${number(hidden)} branches are not shown` : ""}.`
  );
}

/** The same nodes as rows of a table. */
export function fillTable(body, nodes) {
  body.replaceChildren(
    ...nodes.map((node) =>
      el(
        "tr",
        {},
        ...[flat(node.text), number(node.tokens), node.locks, node.hits].map((text) => el("td", { textContent: text })),
      ),
    ),
  );
}
