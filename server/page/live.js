// How drafts fare: acceptance by tenant, domain and place, the engine's load, and adapters.
import { call, hasKey, introduce, model, tell } from "./main.js";

const INTERVAL = 2000, POINTS = 120;
const byId = (id) => document.getElementById(id);
const seen = new Map(); // by tenant and domain: the last counts, and acceptance lengths of the intervals since
let failing = false; // and the page tells why

function element(name, text, parent) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function table(section, title, headings, rows) {
  section.replaceChildren();
  element("h2", title, section);
  const scroller = element("div", undefined, section);
  scroller.className = "table";
  const made = element("table", undefined, scroller);
  const head = element("tr", undefined, element("thead", undefined, made));
  for (const heading of headings) element("th", heading, head);
  const body = element("tbody", undefined, made);
  for (const row of rows) {
    const line = element("tr", undefined, body);
    for (const cell of row) element("td", undefined, line).append(cell);
  }
}

const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(0)} %` : "–");
const lengthOf = (counts) => (counts.drafts ? 1 + counts.accepted_tokens / counts.drafts : null);

// What was accepted since the last look, as one more point of the domain's curve.
function follow(name, now) {
  const known = seen.get(name) ?? { counts: null, curve: [] };
  if (known.counts && now.drafts > known.counts.drafts) {
    const accepted = now.accepted_tokens - known.counts.accepted_tokens;
    known.curve = [...known.curve, 1 + accepted / (now.drafts - known.counts.drafts)].slice(-POINTS);
  }
  known.counts = now;
  seen.set(name, known);
  return known.curve;
}

function curveOf(points) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "curve");
  svg.setAttribute("viewBox", `0 0 ${POINTS} 10`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `acceptance length of late: ${points.map((point) => point.toFixed(1)).join(", ") || "nothing yet"}`);
  const most = Math.max(...points, 2);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points.map((point, at) => `${at},${10 - (9 * (point - 1)) / (most - 1)}`).join(" "));
  svg.append(line);
  return svg;
}

function placesOf(places) {
  const bars = element("span");
  bars.className = "places";
  places.forEach(([drafted, accepted], at) => {
    const bar = element("i", undefined, bars);
    bar.style.height = `${drafted ? (100 * accepted) / drafted : 0}%`;
    bar.title = `place ${at + 1}: ${accepted} of ${drafted} accepted`;
  });
  return bars;
}

function showTenants(tenants) {
  const rows = tenants.flatMap(({ tenant, domains }) =>
    domains.map((domain) => [
      domain.domain ? `${tenant} / ${domain.domain}` : tenant,
      lengthOf(domain)?.toFixed(2) ?? "–",
      curveOf(follow(`${tenant}/${domain.domain}`, domain)),
      `${domain.accepted_tokens} of ${domain.draft_tokens}`,
      percent(domain.accepted_tokens, domain.draft_tokens),
      percent(domain.accepted_copied_tokens, domain.copied_tokens),
      placesOf(domain.places),
      percent(domain.covered_tokens, domain.verified_tokens),
      String(Object.values(domain.tail_hits).reduce((sum, count) => sum + count, 0)),
    ]),
  );
  const headings = ["tenant", "tokens a step", "of late", "accepted", "share", "of copies", "by place", "draftable", "own tokens"];
  table(byId("tenants"), "Acceptance", headings, rows);
}

function showEngine(engine) {
  byId("engine").replaceChildren();
  if (!engine) return;
  const used = percent(engine.kv_blocks_used, engine.kv_blocks_total);
  table(byId("engine"), "Engine", ["running", "waiting", "KV cache used"], [[String(engine.running), String(engine.waiting), used]]);
}

async function showAdapters() {
  const section = byId("adapters");
  let list;
  try {
    list = await (await call("v1/adapters")).json();
  } catch {
    section.replaceChildren(); // only with the admin key
    return;
  }
  const number = (value) => (value === null ? "–" : value.toFixed(2));
  const rows = list.data.map(({ key, status }) => [key, String(status.revision), String(status.num_trained_positions),
    number(status.acceptance), number(status.control_acceptance), String(status.num_refused), String(status.num_rolled_back)]);
  const headings = ["adapter", "revision", "positions learned from", "first draft right", "without adapter", "refused", "taken back"];
  table(section, "Adapters", headings, rows);
}

// Look at the server, and show what there is. Problems are told where they are in the way: in the live tab, and before
// the first success, while the engine is starting or the key is wrong.
export async function update() {
  try {
    const overview = await (await call("v1/overview")).json();
    if (failing) tell(null);
    failing = false;
    introduce(overview);
    showEngine(overview.engine);
    showTenants(overview.tenants);
    if (overview.engine && hasKey()) await showAdapters();
  } catch (error) {
    failing = !model || !byId("live").hidden;
    if (failing) tell(error.message);
  }
}

// Look at the server as long as the page is looked at, whichever tab: the curves begin with the first chat.
export function startLive() {
  setInterval(() => document.hidden || update(), INTERVAL);
  byId("tab-live").addEventListener("click", update);
}
