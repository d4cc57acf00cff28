// Tabs, the key, and what both tabs need of the server.
import { startChat } from "./chat.js";
import { startLive, update } from "./live.js";

const STORED_KEY = "evospec-key";
const byId = (id) => document.getElementById(id);

// A response of the server, or an error with what the server says of it.
export async function call(path, options = {}) {
  const key = byId("key").value.trim();
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `The server answers ${response.status}.`);
}

// The served model's name, once the server has told.
export let model = "";

// Whether a key was given; without one nobody is the admin.
export const hasKey = () => byId("key").value.trim() !== "";

// Show what went wrong; null: nothing does.
export function tell(problem) {
  byId("problem").hidden = problem === null;
  byId("problem").textContent = problem ?? "";
}

function show(name) {
  for (const tab of ["chat", "live"]) {
    byId(tab).hidden = tab !== name;
    byId(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
  }
  tell(null);
}

// Take from the server's overview what is served; null: not known.
export function introduce(overview) {
  model = overview?.model ?? "";
  byId("about").textContent = overview ? `${model} · ${overview.draft ? `drafts by ${overview.draft}` : "no drafts"}` : "";
}

startLive();
startChat();
byId("key").value = localStorage.getItem(STORED_KEY) ?? "";
byId("access").addEventListener("submit", (event) => event.preventDefault());
byId("key").addEventListener("change", () => {
  localStorage.setItem(STORED_KEY, byId("key").value.trim());
  introduce(null);
  update();
});
byId("tab-chat").addEventListener("click", () => show("chat"));
byId("tab-live").addEventListener("click", () => show("live"));
update();
