// The form of settings: kept in the browser, and turned into the fields of a request.

import { byId } from "./dom.js";

const STORE = "headrace-settings";
const NUMBERS = ["temperature", "max_tokens", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty"];

const EXAMPLES = {
  tools: [
    {
      type: "function",
      function: {
        name: "get_weather",
        description: "The weather in a city now",
        parameters: {
          type: "object",
          properties: { city: { type: "string" } },
          required: ["city"],
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

/** Bring back the last settings, keep new ones, fold the form away on small windows. */
export function startSettings() {
  restore();
  form.addEventListener("input", save);
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const button of form.querySelectorAll("[data-example]")) {
    button.addEventListener("click", () => insertExample(button.dataset.example));
  }
  if (matchMedia("(max-width: 56rem)").matches) byId("settings-box").open = false;
}

function insertExample(name) {
  field(name).value = JSON.stringify(EXAMPLES[name], null, 1);
  if (name === "schema") field("format").value = "json_schema";
  save();
}

function controls() {
  return [...form.elements].filter((control) => control.name);
}

function save() {
  const values = controls().map((control) => [control.name, control.type === "checkbox" ? control.checked : control.value]);
  localStorage.setItem(STORE, JSON.stringify(Object.fromEntries(values)));
}

function restore() {
  const values = JSON.parse(localStorage.getItem(STORE) ?? "{}");
  for (const control of controls()) {
    if (!(control.name in values)) continue;
    if (control.type === "checkbox") control.checked = values[control.name];
    else control.value = values[control.name];
  }
}

/** The system prompt, "" for none. */
export const systemPrompt = () => field("system").value.trim();

/** The fields of a request that the form sets. Throws an Error that names what is wrong. */
export function requestFields() {
  const fields = {};
  for (const name of NUMBERS) {
    const control = field(name);
    if (!control.validity.valid) throw new Error(`${name}: ${control.validationMessage}`);
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
  if (!schema) throw new Error("Schema: is empty");
  return { response_format: { type, json_schema: { name: "answer", schema, strict: true } } };
}

function json(name) {
  const text = field(name).value.trim();
  if (!text) return null;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name === "tools" ? "Tools" : "Schema"}: ${error.message}`);
  }
}
