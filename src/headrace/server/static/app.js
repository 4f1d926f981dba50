// The frame of the page: which view is shown, the server's state, the API key.

import { ApiError, ask, setKey } from "./api.js";
import { startChat } from "./chat.js";
import { byId } from "./dom.js";
import { Dashboard } from "./live.js";
import { startVectors } from "./vectors.js";

const VIEWS = ["chat", "live"];
let playground = "chat"; // or "vectors", for a model that writes no text
let known = null; // the promise of the model's name

/** Show how the server is: ready, starting or lost. */
function showState(state, text) {
  const chip = byId("status");
  chip.dataset.state = state;
  if (chip.textContent !== text) chip.textContent = text;
}

/** Ask for the API key; resolves once there is one, rejects if there will be none. */
function askForKey(again) {
  const dialog = byId("key-dialog");
  byId("key-problem").textContent = again ? "The server did not take this key." : "";
  if (!dialog.open) {
    dialog.returnValue = "";
    dialog.showModal();
  }
  return new Promise((resolve, reject) => {
    const closed = () => {
      if (dialog.returnValue === "use") return resolve(setKey(byId("key").value));
      byId("locked").hidden = false;
      return reject(new ApiError("An API key is needed."));
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}

/** Run `work`; where it lacks the API key, ask for it and run it again. */
async function withKey(work) {
  for (let again = false; ; again = true) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 401) throw error;
      await askForKey(again);
    }
  }
}

async function showModel() {
  const info = await (await withKey(() => ask("model_info"))).json();
  const name = info.served_model_name;
  byId("model").textContent = name;
  byId("model").title = `${name}, ${info.max_model_len} tokens of context`;
  byId("welcome-model").textContent = name;
  document.title = `${name} · headrace`;
  if (info.is_generation) return;
  playground = "vectors";
  startVectors({ withKey, info });
  showView();
}

async function checkReady() {
  const ready = await fetch("ready").catch(() => null);
  if (!ready) return showState("lost", "no connection");
  showState(ready.ok ? "ready" : "starting", ready.ok ? "ready" : "starting");
  if (ready.ok) known ??= showModel().catch((error) => showState("lost", error.message));
}

const dashboard = new Dashboard({ withKey, showState });

function showView() {
  const wanted = location.hash.slice(1);
  const view = VIEWS.includes(wanted) ? wanted : VIEWS[0];
  byId("view-live").hidden = view !== "live";
  for (const name of ["chat", "vectors"]) byId(`view-${name}`).hidden = view !== "chat" || name !== playground;
  for (const link of document.querySelectorAll(".bar nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  dashboard.watch(view === "live" && !document.hidden);
}

function startKeyDialog() {
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
  byId("unlock").addEventListener("click", () => location.reload());
}

window.addEventListener("hashchange", showView);
document.addEventListener("visibilitychange", showView);
startKeyDialog();
startChat({ withKey });
showView();
checkReady();
setInterval(() => document.hidden || (dashboard.watching && known) || checkReady(), 5000);
