// The playground: a conversation through /v1/chat/completions, streamed, with stop and try again.

import { ask, events } from "./api.js";
import { byId } from "./dom.js";
import { AnswerView, said } from "./message.js";
import { insertExample, markWrong, requestFields, requireTool, startSettings, systemPrompt } from "./settings.js";

const list = byId("messages");
const scroller = byId("scroller");
const prompt = byId("prompt");
let history = []; // messages as the API takes them
let views = []; // their elements, and that of a failed answer, in the same order
let running = null; // AbortController of the answer in progress
let withKey;

/** What the examples of the empty page set, and ask. */
const STARTERS = {
  story: [() => {}, "Tell me a story about a fox."],
  schema: [() => insertExample("schema"), "Invent a person."],
  tools: [() => [insertExample("tools"), requireTool()], "How is the weather in Oslo?"],
};

/** Wire up the playground. `withKey` runs a call and asks for the API key where it is missing. */
export function startChat(parts) {
  ({ withKey } = parts);
  startSettings(() => request([{ role: "user", content: prompt.value.trim() }]));
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(prompt.value.trim());
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send(prompt.value.trim());
  });
  byId("view-chat").addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  byId("stop").addEventListener("click", () => running?.abort());
  byId("fresh").addEventListener("click", clear);
  byId("again").addEventListener("click", tryAgain);
  for (const button of document.querySelectorAll("[data-starter]")) {
    const [set, question] = STARTERS[button.dataset.starter];
    button.addEventListener("click", () => {
      set();
      send(question);
    });
  }
}

function send(content) {
  if (!content || running) return;
  prompt.value = "";
  dropUnkept();
  push({ role: "user", content });
  answer();
}

function push(message, view = said(message.role, message.content)) {
  history.push(message);
  show(view);
}

function show(view) {
  views.push(view);
  list.append(view);
  byId("welcome").hidden = true;
  scroller.scrollTop = scroller.scrollHeight;
}

function clear() {
  running?.abort();
  for (const view of views) view.remove();
  history = [];
  views = [];
  byId("settings-error").textContent = "";
  byId("welcome").hidden = false;
  byId("again").hidden = true;
  prompt.focus();
}

/** Forget what followed the last message of the user or a tool, and ask anew. */
function tryAgain() {
  if (running) return;
  while (history.at(-1)?.role === "assistant") history.pop();
  dropUnkept();
  if (history.length) answer();
}

/** Remove the view of an answer that failed or was stopped before its first word. */
function dropUnkept() {
  while (views.length > history.length) views.pop().remove();
}

/** The body of a request that continues the conversation with `more`. Throws like requestFields. */
function request(more = []) {
  const fields = requestFields();
  const system = systemPrompt();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...history, ...more];
  // The call that was required has been made.
  if (messages.at(-1)?.role === "tool" && fields.tool_choice === "required") delete fields.tool_choice;
  return { ...fields, messages, stream: true, stream_options: { include_usage: true } };
}

/** Stream the answer to the conversation so far. */
async function answer() {
  let body;
  byId("settings-error").textContent = "";
  try {
    body = request();
  } catch (error) {
    byId("settings-error").textContent = error.message;
    byId("again").hidden = false;
    markWrong(error.param);
    return;
  }
  const view = new AnswerView(Boolean(body.logprobs));
  show(view.item);
  const mine = (running = new AbortController());
  setBusy(true);
  const got = { content: "", calls: [], began: performance.now() };
  try {
    await read(body, mine.signal, view, got);
  } catch (error) {
    if (mine.signal.aborted) got.reason = "stopped";
    else view.fail(error);
    markWrong(error.param);
  }
  if (running === mine) setBusy((running = null));
  if (!view.item.isConnected) return; // the conversation was cleared
  view.finish(got);
  keep(view, got);
  follow();
}

/** Follow the chunks of one answer; fills `got`. */
async function read(body, signal, view, got) {
  const response = await withKey(() => {
    got.began = performance.now();
    return ask("v1/chat/completions", { body, signal });
  });
  got.ignored = response.headers.get("x-headrace-ignored");
  for await (const chunk of events(response)) {
    if (chunk.usage) got.usage = chunk.usage;
    for (const choice of chunk.choices) take(choice, view, got);
    follow();
  }
}

function take({ delta, logprobs, finish_reason: reason }, view, got) {
  const entries = logprobs?.content ?? [];
  const thought = delta.reasoning_content;
  if (delta.content || thought || delta.tool_calls || entries.length) {
    got.last = performance.now();
    got.first ??= got.last;
  }
  if (thought) view.addReasoning(thought, entries);
  else if (delta.content || entries.length) view.addContent(delta.content, entries);
  got.content += delta.content ?? "";
  for (const piece of delta.tool_calls ?? []) addCall(got.calls, piece);
  if (reason) got.reason = reason;
}

function addCall(calls, { index, id, function: piece }) {
  const call = (calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
  call.function.name += piece.name ?? "";
  call.function.arguments += piece.arguments ?? "";
}

/** Put a finished answer into the conversation, and ask for the results of its calls. */
function keep(view, got) {
  byId("again").hidden = false;
  const calls = got.reason === "stopped" ? [] : got.calls;
  if (!got.content && !calls.length) return;
  history.push({ role: "assistant", content: got.content, ...(calls.length && { tool_calls: calls }) });
  if (!calls.length) return;
  view.askForResults(calls, (results) => {
    results.forEach((content, index) => push({ role: "tool", tool_call_id: calls[index].id, content }));
    answer();
  });
}

function setBusy(busy) {
  byId("send").hidden = Boolean(busy);
  byId("stop").hidden = !busy;
  byId("race").classList.toggle("flows", Boolean(busy));
  if (busy) byId("again").hidden = true;
}

let following = false;

/** Keep the end in sight, unless the reader has scrolled away from it. At most once a frame. */
function follow() {
  if (following) return;
  following = true;
  requestAnimationFrame(() => {
    following = false;
    if (scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 200) scroller.scrollTop = scroller.scrollHeight;
  });
}
