// The dashboard: listens to /ui/events while it is on screen and draws each second what comes. Keeps
// one minute of counters and the last steps, nothing else.

import { ApiError, ask, events } from "./api.js";
import { drawHistogram, drawLine, quantile } from "./charts.js";
import { byId, counted, duration, number } from "./dom.js";
import { drawPages } from "./pages.js";
import { Timeline } from "./timeline.js";
import { Tree } from "./tree.js";

const SECONDS = 60; // what the small lines and "the last minute" span
const STEPS = 512;
const RETRY_MS = 2000;
const NODE_FIELDS = ["parent", "tokens", "locks", "hits", "hidden", "text"];

export class Dashboard {
  constructor({ withKey, showState }) {
    this.withKey = withKey;
    this.showState = showState;
    this.watching = null;
    this.about = {};
    this.steps = [];
    this.ticks = []; // counters and histograms, one for each second
    this.picture = null; // the pages and the tree of the last second
    this.held = false;
    this.timeline = new Timeline(byId("timeline"), byId("timeline-note"));
    this.tree = new Tree(byId("tree"), byId("tree-note"), byId("tree-rows"));
    byId("span").addEventListener("change", () => this.#histograms());
    byId("hold").addEventListener("click", () => this.#hold(!this.held));
    this.width = 0;
    new ResizeObserver(([{ contentRect }]) => this.#resized(contentRect.width)).observe(byId("view-live"));
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
        if (!signal.aborted) this.#lost("starting", "The server is starting, or going away.");
      } catch (error) {
        if (signal.aborted) return;
        this.#lost("lost", error.message);
        if (!(error instanceof ApiError)) throw error;
        if (!byId("locked").hidden) return;
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  #lost(state, text) {
    this.showState(state, state === "lost" ? "no connection" : state);
    this.#notice(text);
  }

  #notice(text) {
    const box = byId("live-note");
    box.hidden = !text;
    if (box.textContent !== text) box.textContent = text;
  }

  #take(news) {
    this.showState(news.status, news.status);
    if (!news.stats) {
      this.about = news;
      return;
    }
    const { stats, ttft, itl, pages } = news;
    this.#notice(stats.paused ? `Generation is paused; ${counted(stats.paused, "request")} held up.` : "");
    const last = this.ticks.at(-1);
    if (last && stats.uptime < last.stats.uptime) this.steps = this.ticks = []; // a new server
    this.ticks = [...this.ticks, { stats, ttft, itl }].slice(-SECONDS - 1);
    if (!this.held) {
      this.steps = [...this.steps, ...news.steps.map((step) => named(news.fields, step))].slice(-STEPS);
      this.picture = { pages, nodes: news.tree.map((node) => named(NODE_FIELDS, node)) };
    }
    this.#draw();
  }

  /** Keep steps, pages and tree as they are, to look at them. */
  #hold(held) {
    this.held = held;
    byId("hold").setAttribute("aria-pressed", held);
    byId("hold").textContent = held ? "Held: go on" : "Hold the picture";
  }

  #resized(width) {
    if (width === this.width) return;
    this.width = width;
    this.#draw();
  }

  #draw() {
    const now = this.ticks.at(-1);
    if (!now || !this.watching) return;
    byId("race").classList.toggle("flows", now.stats.running > 0);
    this.#facts(now.stats);
    this.#tiles(now.stats);
    this.#histograms();
    if (!this.picture) return;
    this.timeline.draw(this.steps);
    drawPages(byId("pages"), byId("pages-legend"), this.picture.pages);
    this.tree.draw(this.picture.nodes);
  }

  #facts(stats) {
    const parts = [
      `${this.about.model}, headrace ${this.about.version}`,
      `up ${duration(stats.uptime)}`,
      counted(stats.requests_total, "request"),
      stats.aborted_total && `${number(stats.aborted_total)} aborted`,
      stats.retracted_total && `${number(stats.retracted_total)} retracted`,
      stats.evicted_tokens_total && `${number(stats.evicted_tokens_total)} tokens evicted`,
    ];
    byId("live-about").textContent = parts.filter(Boolean).join(" · ");
  }

  #tiles(stats) {
    const each = (read) => this.ticks.map((tick) => read(tick.stats));
    this.#tile("out", rates(this.ticks, (s) => s.generated_tokens_total));
    this.#tile("in", rates(this.ticks, (s) => s.prompt_tokens_total));
    this.#tile("cached", cachedShares(this.ticks), 100);
    this.#tile("running", each((s) => s.running));
    this.#tile("waiting", each((s) => s.waiting));
    this.#tile("kv", each((s) => (100 * s.used_tokens) / s.max_total_tokens), 100);
    byId("tile-rows").textContent = `of ${number(stats.max_running_requests)}`;
  }

  #tile(name, values, top) {
    byId(`tile-${name}`).textContent = Number.isFinite(values.at(-1)) ? number(values.at(-1)) : "–";
    drawLine(byId(`spark-${name}`), values, SECONDS + 1, top);
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

const WINDOW = 10; // seconds: requests are few, tokens come in lumps

/** The share of prompt tokens that were cached, in percent over the last seconds; NaN without any. */
function cachedShares(ticks) {
  return ticks.map(({ stats }, index) => {
    const before = ticks[Math.max(0, index - WINDOW)].stats;
    const prompt = stats.prompt_tokens_total - before.prompt_tokens_total;
    return (100 * (stats.cached_tokens_total - before.cached_tokens_total)) / prompt;
  });
}
