// The form of settings: kept in the browser, and turned into the fields of a request.

import { byId, copy } from "./dom.js";

const STORE = "headrace-settings";
const SHUT = "headrace-settings-shut";
const NUMBERS = ["temperature", "max_tokens", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty"];
const NARROW = matchMedia("(max-width: 56rem)"); // as in chat.css

const EXAMPLES = {
  tools: [
    {
      type: "function",
      function: {
        name: "get_weather",
        description: "The weather in a city now",
        parameters: {
          type: "object",
          properties: { city: { type: "string", maxLength: 40 } },
          required: ["city"],
          additionalProperties: false,
        },
      },
    },
  ],
  schema: {
    type: "object",
    properties: { name: { type: "string", maxLength: 20 }, age: { type: "integer", minimum: 0, maximum: 150 } },
    required: ["name", "age"],
    additionalProperties: false,
  },
};

const form = byId("settings");
const field = (name) => form.elements.namedItem(name);

/** Bring back the last settings and keep new ones. `request()` gives what would be sent next. */
export function startSettings(request) {
  restore();
  form.addEventListener("input", save);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("keydown", (event) => event.key === "Escape" && NARROW.matches && show(false));
  for (const button of form.querySelectorAll("[data-example]")) {
    button.addEventListener("click", () => insertExample(button.dataset.example));
  }
  byId("settings-toggle").addEventListener("click", () => show(form.hidden, true));
  byId("settings-close").addEventListener("click", () => show(false, true));
  byId("settings-reset").addEventListener("click", reset);
  byId("curl").addEventListener("click", () => copyAsCurl(request));
  NARROW.addEventListener("change", () => show(!NARROW.matches && !localStorage.getItem(SHUT)));
  show(!NARROW.matches && !localStorage.getItem(SHUT));
}

/** Open or shut the form; what the user chose on a wide window is remembered. */
function show(open, chosen = false) {
  const within = form.contains(document.activeElement);
  form.hidden = !open;
  byId("settings-toggle").setAttribute("aria-expanded", open);
  if (chosen && !NARROW.matches) localStorage.setItem(SHUT, open ? "" : "yes");
  if (chosen && open) byId("settings-close").focus();
  else if (within) byId("settings-toggle").focus();
}

/** Write an example into the form: "tools" or "schema", with the choice that makes it matter. */
export function insertExample(name) {
  field(name).value = JSON.stringify(EXAMPLES[name], null, 1);
  if (name === "schema") field("format").value = "json_schema";
  field(name).closest("details").open = true;
  save();
}

/** The model must call a tool. */
export function requireTool() {
  field("tool_choice").value = "required";
  save();
}

function reset() {
  form.reset();
  save();
}

function controls() {
  return [...form.elements].filter((control) => control.name);
}

function save() {
  for (const control of controls()) control.removeAttribute("aria-invalid");
  byId("settings-error").textContent = "";
  const values = controls().map((control) => [control.name, control.type === "checkbox" ? control.checked : control.value]);
  localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(values)));
  mark();
}

function restore() {
  const values = JSON.parse(localStorage.getItem(STORE) ?? "{}");
  for (const control of controls()) {
    if (!(control.name in values)) continue;
    if (control.type === "checkbox") control.checked = values[control.name];
    else control.value = values[control.name];
  }
  mark();
}

const isDefault = (control) =>
  control.type === "checkbox"
    ? control.checked === control.defaultChecked
    : control.value === (control.tagName === "SELECT" ? "" : control.defaultValue);

/** Say on each group how many of its fields are not as they were. */
function mark() {
  for (const group of form.querySelectorAll("[data-group]")) {
    const set = controls().filter((control) => group.contains(control) && !isDefault(control)).length;
    const summary = group.querySelector("summary");
    if (set) summary.dataset.set = `${set} set`;
    else delete summary.dataset.set;
  }
}

/** Point at the field that is wrong, by its name in a request ("temperature", "tools[0].function"). */
export function markWrong(param) {
  const name = param?.match(/^\w+/)?.[0];
  const control = field({ response_format: "schema", top_logprobs: "alternatives" }[name] ?? name);
  if (!control) return;
  control.setAttribute("aria-invalid", "true");
  control.closest("details").open = true;
}

/** The system prompt, "" for none. */
export const systemPrompt = () => field("system").value.trim();

/** The fields of a request that the form sets. Throws an Error with the `param` that is wrong. */
export function requestFields() {
  const fields = {};
  for (const name of NUMBERS) {
    const control = field(name);
    if (!control.validity.valid) throw wrong(name, control.validationMessage);
    if (control.value !== "") fields[name] = Number(control.value);
  }
  const stop = field("stop").value.split("\n").filter(Boolean);
  if (stop.length) fields.stop = stop;
  if (field("thinking").value) {
    const on = field("thinking").value === "on";
    fields.chat_template_kwargs = { enable_thinking: on, thinking: on };
  }
  if (field("tokens").checked) {
    fields.logprobs = true;
    fields.top_logprobs = Number(field("alternatives").value);
  }
  return { ...fields, ...toolFields(), ...formatFields() };
}

const wrong = (param, message) => Object.assign(new Error(`${param}: ${message}`), { param });

function toolFields() {
  const tools = json("tools");
  if (!tools?.length) return {};
  return { tools, ...(field("tool_choice").value && { tool_choice: field("tool_choice").value }) };
}

function formatFields() {
  const type = field("format").value;
  if (!type) return {};
  if (type === "json_object") return { response_format: { type } };
  const schema = json("schema");
  if (!schema) throw wrong("schema", "is empty");
  return { response_format: { type, json_schema: { name: "answer", schema, strict: true } } };
}

function json(name) {
  const text = field(name).value.trim();
  if (!text) return null;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw wrong(name, error.message);
  }
}

function copyAsCurl(request) {
  let body;
  try {
    body = JSON.stringify(request(), null, 1);
  } catch (error) {
    byId("settings-error").textContent = error.message;
    return;
  }
  const url = new URL("v1/chat/completions", document.baseURI);
  const quoted = body.replaceAll("'", "'\\''");
  copy(byId("curl"), `curl -N ${url} -H 'Content-Type: application/json' -d '${quoted}'`);
}
