// The dashboard: listens to /ui/events while it is on screen and draws each second what comes.

import { ApiError, ask, events } from "./api.js";
import { drawHistogram, drawLine, quantile } from "./charts.js";
import { byId, duration, el, number } from "./dom.js";
import { drawTimeline } from "./timeline.js";
import { drawTree, fillTable } from "./tree.js";

const SECONDS = 60; // what the small lines and "the last minute" span
const STEPS = 512;
const RETRY_MS = 2000;
const NODE_FIELDS = ["parent", "tokens", "locks", "hits", "hidden", "text"];
const PAGE_USES = [
  ["shared", "shared by requests"],
  ["locked", "used, in the tree"],
  ["private", "of one request"],
  ["unused", "kept for later"],
  ["free", "free"],
];

export class Dashboard {
  constructor({ withKey, showState }) {
    this.withKey = withKey;
    this.showState = showState;
    this.watching = null;
    this.steps = [];
    this.ticks = [];
    byId("span").addEventListener("change", () => this.#histograms());
    new ResizeObserver(() => this.#draw()).observe(byId("view-live"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  /** Begin or end to listen. */
  watch(on) {
    if (!on) {
      this.watching?.abort();
      this.watching = null;
    } else if (!this.watching) {
      this.watching = new AbortController();
      this.#listen(this.watching.signal);
    }
  }

  async #listen(signal) {
    while (!signal.aborted) {
      try {
        const response = await this.withKey(() => ask("ui/events", { signal }));
        for await (const news of events(response)) this.#take(news);
        if (!signal.aborted) this.showState("starting", "starting");
      } catch (error) {
        if (signal.aborted) return;
        this.showState("lost", error instanceof ApiError ? error.message : "no connection");
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  #take(news) {
    this.showState(news.status, news.status);
    if (!news.stats) return;
    const last = this.ticks.at(-1);
    if (last && news.stats.uptime < last.stats.uptime) this.steps = this.ticks = []; // a new server
    const steps = news.steps.map((step) => named(news.fields, step));
    this.steps = [...this.steps, ...steps].slice(-STEPS);
    const tree = news.tree.map((node) => named(NODE_FIELDS, node));
    this.ticks = [...this.ticks, { ...news, tree }].slice(-SECONDS - 1);
    this.#draw();
  }

  #draw() {
    const now = this.ticks.at(-1);
    if (!now || !this.watching) return;
    this.#tiles(now.stats);
    const sentence = drawTimeline(byId("timeline"), this.steps);
    byId("timeline").setAttribute("aria-label", sentence);
    byId("timeline-note").textContent = sentence;
    drawPages(now.pages);
    const svg = byId("tree");
    byId("tree-note").textContent = drawTree(svg, now.tree, svg.parentElement.clientWidth);
    fillTable(byId("tree-rows"), now.tree);
    this.#histograms();
  }

  #tiles(stats) {
    this.#tile("out", rates(this.ticks, (s) => s.generated_tokens_total));
    this.#tile("in", rates(this.ticks, (s) => s.prompt_tokens_total));
    this.#tile("running", this.ticks.map((tick) => tick.stats.running));
    this.#tile("waiting", this.ticks.map((tick) => tick.stats.waiting));
    byId("tile-rows").textContent = `of ${number(stats.max_running_requests)}`;
  }

  #tile(name, values) {
    byId(`tile-${name}`).textContent = number(values.at(-1));
    drawLine(byId(`spark-${name}`), values, SECONDS + 1);
  }

  #histograms() {
    if (!this.ticks.length) return;
    for (const name of ["ttft", "itl"]) {
      const data = this.#spanned(name);
      drawHistogram(byId(name), data);
      const [half, most] = [quantile(data, 0.5), quantile(data, 0.95)];
      byId(`${name}-note`).textContent =
        half === null ? "Nothing measured yet." : `Half within ${duration(half)}, 95% within ${duration(most)}.`;
    }
  }

  /** A histogram over the chosen span of time. */
  #spanned(name) {
    const { bounds, counts } = this.ticks.at(-1)[name];
    if (byId("span").value === "all") return { bounds, counts };
    const before = this.ticks[0][name].counts;
    return { bounds, counts: counts.map((count, index) => Math.max(0, count - before[index])) };
  }
}

const named = (names, values) => Object.fromEntries(names.map((name, index) => [name, values[index]]));

/** A counter's growth per second between ticks. */
function rates(ticks, read) {
  const found = [0];
  for (let index = 1; index < ticks.length; index += 1) {
    const [before, after] = [ticks[index - 1].stats, ticks[index].stats];
    found.push((read(after) - read(before)) / Math.max(0.001, after.uptime - before.uptime));
  }
  return found;
}

/** `pages.shared` is a part of those in use: shown apart, so that the bar adds up. */
function drawPages(pages) {
  const shared = Math.min(pages.shared, pages.locked);
  const sizes = { ...pages, shared, locked: pages.locked - shared };
  byId("pages").replaceChildren(
    ...PAGE_USES.filter(([use]) => use !== "free").map(([use]) => {
      const part = el("i", { className: use });
      part.style.flex = `0 0 ${(100 * sizes[use]) / pages.total}%`;
      return part;
    }),
  );
  byId("pages-legend").replaceChildren(
    ...PAGE_USES.map(([use, text]) =>
      el("div", {}, el("dt", { textContent: text }), el("dd", { textContent: number(sizes[use]) })),
    ),
  );
  byId("pages").setAttribute("aria-label", PAGE_USES.map(([use, text]) => `${sizes[use]} pages ${text}`).join(", "));
}
