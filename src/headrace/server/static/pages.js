// KV pages by use, as one bar and a legend.

import { el, number } from "./dom.js";

const USES = [
  ["shared", "solid", "shared by requests"],
  ["locked", "mid", "of one, in the tree"],
  ["private", "grain", "of one, not in the tree yet"],
  ["unused", "soft", "kept for later"],
  ["free", "empty", "free"],
];

/** `pages.shared` is a part of those in use: shown apart, so that the bar adds up. */
export function drawPages(bar, legend, pages) {
  const shared = Math.min(pages.shared, pages.locked);
  const sizes = { ...pages, shared, locked: pages.locked - shared };
  const share = (use) => (100 * sizes[use]) / pages.total;
  bar.replaceChildren(
    ...USES.filter(([use]) => use !== "free" && sizes[use]).map(([use]) => {
      const part = el("i", { className: use });
      part.style.flex = `0 0 ${share(use)}%`;
      return part;
    }),
  );
  legend.replaceChildren(
    ...USES.map(([use, key, text]) => {
      const size = el("dd", {}, number(sizes[use]), " ", el("small", { textContent: `${number(share(use))}%` }));
      return el("div", {}, el("dt", { className: `key ${key}`, textContent: text }), size);
    }),
  );
  const words = USES.map(([use, , text]) => `${sizes[use]} pages ${text}`).join(", ");
  bar.setAttribute("aria-label", `${words}; ${pages.size} tokens each`);
}
