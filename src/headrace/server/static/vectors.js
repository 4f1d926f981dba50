// The playground of a model that makes vectors or scores: texts go in, and come out compared.

import { ask } from "./api.js";
import { byId, counted, duration, el, number, showProblem } from "./dom.js";

const MOST_TEXTS = 20;
const SCORERS = /ForSequenceClassification$/;

/** Wire up the view. `info` is the server's /model_info. */
export function startVectors({ withKey, info }) {
  const scores = info.architectures.some((name) => SCORERS.test(name));
  const compare = scores ? classify : cosines;
  byId("vectors-kind").textContent = scores ? "scores" : "vectors";
  byId("vectors-about").textContent = scores
    ? "It cannot chat. Each text is scored by /v1/classify."
    : "It cannot chat. Each text is embedded by /v1/embeddings, and compared with the others: 1 is the same direction.";
  byId("vectors-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    byId("vectors-error").replaceChildren();
    const input = byId("texts").value.split("\n").filter((text) => text.trim()).slice(0, MOST_TEXTS);
    if (!input.length) return;
    const began = performance.now();
    try {
      const { rows, note } = await compare(withKey, input, info.served_model_name);
      byId("vectors-table").replaceChildren(...rows);
      byId("vectors-note").textContent = `${note} · ${duration((performance.now() - began) / 1000)}`;
      byId("vectors-answer").hidden = false;
    } catch (error) {
      showProblem(byId("vectors-error"), error);
    }
  });
}

async function post(withKey, path, body) {
  return (await withKey(() => ask(path, { body }))).json();
}

/** A table of the cosines between all texts. */
async function cosines(withKey, input, model) {
  const { data, usage } = await post(withKey, "v1/embeddings", { model, input });
  const vectors = data.map((item) => unit(item.embedding));
  const head = el("tr", {}, el("th"), ...input.map((_, index) => el("th", { textContent: index + 1 })));
  const rows = vectors.map((vector, index) => {
    const cells = vectors.map((other) => heat(dot(vector, other)));
    return el("tr", {}, el("td", { textContent: `${index + 1}  ${input[index]}` }), ...cells);
  });
  const note = `${counted(input.length, "vector")} of ${number(vectors[0].length)} numbers · ${counted(usage.prompt_tokens, "token")}`;
  return { rows: [head, ...rows], note };
}

/** A table of the label and its probability for each text. */
async function classify(withKey, input, model) {
  const { data, usage } = await post(withKey, "v1/classify", { model, input });
  const head = el("tr", {}, ...["Text", "Label", "Share"].map((name) => el("th", { textContent: name })));
  const rows = data.map(({ label, probs }, index) =>
    el("tr", {}, el("td", { textContent: input[index] }), el("td", { textContent: label }), heat(Math.max(...probs))),
  );
  return { rows: [head, ...rows], note: `${counted(input.length, "text")} · ${counted(usage.prompt_tokens, "token")}` };
}

const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);

function unit(vector) {
  const length = Math.sqrt(dot(vector, vector)) || 1;
  return vector.map((value) => value / length);
}

function heat(value) {
  const cell = el("td", { className: "heat", textContent: value.toFixed(3) });
  cell.style.setProperty("--p", Math.max(0, Math.min(1, value)).toFixed(3));
  return cell;
}
