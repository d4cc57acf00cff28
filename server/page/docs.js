// Shows /openapi.json, which wants a key where there are keys: that of the page at /, or one that is asked for.
"use strict";

const KEY = "evospec-key";

async function load() {
  for (;;) {
    const key = localStorage.getItem(KEY);
    const answer = await fetch("openapi.json", key ? { headers: { Authorization: `Bearer ${key}` } } : {});
    if (answer.ok) return { spec: await answer.json(), key };
    const { error } = await answer.json();
    const given = answer.status === 401 ? prompt("API key") : null;
    if (given === null) throw new Error(error.message);
    localStorage.setItem(KEY, given);
  }
}

load().then(
  ({ spec, key }) => {
    const ui = SwaggerUIBundle({
      spec,
      dom_id: "#docs",
      onComplete: () => key && ui.preauthorizeApiKey("HTTPBearer", key),
    });
  },
  (error) => {
    document.getElementById("docs").textContent = error.message;
  },
);
