// One message on the page. An answer grows as its chunks come. Knows no network.

import { addText, copy, duration, el, number, showProblem } from "./dom.js";
import { TokenView } from "./tokens.js";

const NAMES = { user: "You", assistant: "Answer", tool: "Result of the tool" };

/** A finished message of the user or of a tool. */
export function said(role, text) {
  return el(
    "li",
    { className: `message ${role}` },
    el("h2", { className: role === "tool" ? "" : "hidden", textContent: NAMES[role] }),
    el("div", { className: "text", textContent: text }),
  );
}

/** The answer that is being written: text or tokens, reasoning, tool calls, and its measures. */
export class AnswerView {
  constructor(withTokens) {
    this.text = el("div", { className: "text" });
    this.foot = el("div", { className: "foot" });
    this.problem = el("p", { className: "problem" });
    this.problem.setAttribute("role", "alert");
    const heading = el("h2", { className: "hidden", textContent: NAMES.assistant });
    this.item = el("li", { className: "message assistant waiting" }, heading, this.text, this.foot, this.problem);
    this.tokens = withTokens ? new TokenView(this.text) : null;
    this.reasoning = null;
  }

  /** More content; `entries` are the log-probabilities of its tokens, if asked for. */
  addContent(text, entries) {
    if (this.tokens) this.tokens.add(entries);
    else addText(this.text, text);
  }

  /** More reasoning, folded away; its tokens are shown there. */
  addReasoning(text, entries) {
    if (!this.reasoning) {
      const box = el("div");
      const fold = el("details", { className: "reasoning" }, el("summary", { textContent: "Reasoning" }), box);
      this.text.before(fold);
      this.reasoning = { box, tokens: this.tokens && new TokenView(box) };
    }
    if (this.reasoning.tokens) this.reasoning.tokens.add(entries);
    else addText(this.reasoning.box, text);
  }

  /** The calls of a finished answer, each with a field for its result; `answered(results)` once. */
  askForResults(calls, answered) {
    const forms = calls.map((call) => callForm(call));
    const send = el("button", { type: "submit", className: "primary", textContent: "Send results" });
    const row = el("p", { className: "row" }, send);
    const form = el("form", {}, ...forms.map(({ box }) => box), row);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      row.remove();
      for (const { field } of forms) field.readOnly = true;
      answered(forms.map(({ field }) => field.value));
    });
    this.foot.before(form);
  }

  /** It has ended. */
  finish(measures) {
    this.item.classList.remove("waiting");
    const parts = [el("p", { className: "note", textContent: describe(measures) })];
    if (measures.content) {
      const button = el("button", { type: "button", className: "quiet", textContent: "Copy" });
      button.addEventListener("click", () => copy(button, measures.content));
      parts.push(button);
    }
    if (this.tokens && measures.first) parts.push(el("span", { className: "note scale" }, "sure", el("i"), "unsure"));
    this.foot.replaceChildren(...parts);
  }

  fail(error) {
    showProblem(this.problem, error);
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

const REASONS = { length: "cut at max tokens", tool_calls: "calls a tool" };

function describe({ usage, first, last, began, reason, ignored }) {
  const parts = [];
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${usage.prompt_tokens} tokens in${cached ? ` (${cached} cached)` : ""}`);
    parts.push(`${usage.completion_tokens} out`);
  }
  if (first) parts.push(`first token ${duration((first - began) / 1000)}`);
  // Over the whole time: a browser that was busy sees all tokens at once.
  if (usage?.completion_tokens && last) parts.push(`${number((usage.completion_tokens * 1000) / (last - began))} tokens/s`);
  if (reason && reason !== "stop") parts.push(REASONS[reason] ?? reason);
  if (ignored) parts.push(`without effect: ${ignored}`);
  return parts.join(" · ");
}
