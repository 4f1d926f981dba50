// The frame of the page: which view is shown, the server's state, the API key.

import { ApiError, ask, setKey } from "./api.js";
import { startChat } from "./chat.js";
import { byId } from "./dom.js";
import { Dashboard } from "./live.js";

const VIEWS = ["chat", "live"];

/** Show how the server is: ready, starting or lost. */
function showState(state, text) {
  const chip = byId("status");
  chip.dataset.state = state;
  chip.textContent = text;
}

/** Ask for the API key; resolves once there is one. */
function askForKey() {
  const dialog = byId("key-dialog");
  const form = dialog.querySelector("form");
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    form.addEventListener("submit", () => resolve(setKey(byId("key").value)), { once: true });
  });
}

/** Run `work`; where it lacks the API key, ask for it and run it again. */
async function withKey(work) {
  for (;;) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 401) throw error;
      await askForKey();
    }
  }
}

async function showModel() {
  const answer = await withKey(() => ask("v1/models"));
  const { data } = await answer.json();
  byId("model").textContent = data[0].id;
  byId("model").title = `${data[0].id}, ${data[0].max_model_len} tokens of context`;
}

async function checkReady() {
  try {
    const ready = await fetch("ready");
    showState(ready.ok ? "ready" : "starting", ready.ok ? "ready" : "starting");
  } catch {
    showState("lost", "no connection");
  }
}

const dashboard = new Dashboard({ withKey, showState });

function showView() {
  const wanted = location.hash.slice(1);
  const view = VIEWS.includes(wanted) ? wanted : VIEWS[0];
  for (const name of VIEWS) byId(`view-${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll(".bar nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  dashboard.watch(view === "live" && !document.hidden);
}

window.addEventListener("hashchange", showView);
document.addEventListener("visibilitychange", showView);
startChat({ withKey });
showView();
checkReady();
setInterval(() => document.hidden || dashboard.watching || checkReady(), 5000);
showModel().catch((error) => showState("lost", error.message));
