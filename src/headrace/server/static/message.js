// One message on the page. An answer grows as its chunks come. Knows no network.

import { duration, el, number } from "./dom.js";
import { TokenView } from "./tokens.js";

const NAMES = { user: "You", assistant: "Answer", tool: "Tool" };

/** A finished message of the user or of a tool. */
export function said(role, text) {
  return el(
    "li",
    { className: `message ${role}` },
    el("h2", { textContent: NAMES[role] }),
    el("div", { className: "text", textContent: text }),
  );
}

/** The answer that is being written: text or tokens, reasoning, tool calls, and its measures. */
export class AnswerView {
  constructor(withTokens) {
    this.text = el("div", { className: "text" });
    this.note = el("p", { className: "note" });
    this.problem = el("p", { className: "error" });
    this.problem.setAttribute("role", "alert");
    this.item = el(
      "li",
      { className: "message assistant waiting" },
      el("h2", { textContent: NAMES.assistant }),
      this.text,
      this.note,
      this.problem,
    );
    this.tokens = withTokens ? new TokenView(this.text) : null;
    this.reasoning = null;
  }

  /** More content; `entries` are the log-probabilities of its tokens, if asked for. */
  addContent(text, entries) {
    if (this.tokens) this.tokens.add(entries);
    else this.text.append(text);
  }

  /** More reasoning, folded away; its tokens are shown there. */
  addReasoning(text, entries) {
    if (!this.reasoning) {
      const box = el("div");
      const fold = el("details", { className: "reasoning" }, el("summary", { textContent: "Reasoning" }), box);
      fold.style.position = "relative";
      this.text.before(fold);
      this.reasoning = { box, tokens: this.tokens && new TokenView(box) };
    }
    if (this.reasoning.tokens) this.reasoning.tokens.add(entries);
    else this.reasoning.box.append(text);
  }

  /** The calls of a finished answer, each with a field for its result; `answered(results)` once. */
  askForResults(calls, answered) {
    const forms = calls.map((call) => callForm(call));
    const send = el("button", { type: "submit", className: "primary", textContent: "Send results" });
    const form = el("form", {}, ...forms.map(({ box }) => box), el("p", { className: "row" }, send));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      send.disabled = true;
      for (const { field } of forms) field.readOnly = true;
      answered(forms.map(({ field }) => field.value));
    });
    this.note.before(form);
  }

  /** It has ended. */
  finish(measures) {
    this.item.classList.remove("waiting");
    this.note.textContent = describe(measures);
  }

  fail(message) {
    this.item.classList.remove("waiting");
    this.problem.textContent = message;
  }
}

function callForm(call) {
  const field = el("textarea", { rows: 1, className: "code", placeholder: "What the tool answers", required: true });
  const box = el(
    "div",
    { className: "call" },
    el("strong", { className: "code", textContent: call.function.name }),
    el("pre", { className: "code", textContent: pretty(call.function.arguments) }),
    el("label", {}, "Result ", field),
  );
  return { box, field };
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function describe({ usage, first, last, began, reason, ignored }) {
  const parts = [];
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${usage.prompt_tokens} tokens in${cached ? ` (${cached} cached)` : ""}`);
    parts.push(`${usage.completion_tokens} out`);
  }
  if (first) parts.push(`first token ${duration((first - began) / 1000)}`);
  if (usage?.completion_tokens > 1 && last > first) {
    parts.push(`${number(((usage.completion_tokens - 1) * 1000) / (last - first))} tokens/s`);
  }
  if (reason && reason !== "stop") parts.push(reason === "length" ? "cut at max tokens" : reason);
  if (ignored) parts.push(`without effect: ${ignored}`);
  return parts.join(" · ");
}
