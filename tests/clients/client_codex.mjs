// requires: @openai/codex
// Codex, over /v1/responses: an answer with the tools of an agent at hand.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [url, model] = process.argv.slice(2);
const home = mkdtempSync(join(tmpdir(), "codex-"));
writeFileSync(join(home, "config.toml"), `
model = "${model}"
model_provider = "evospec"
web_search = "disabled"
[features]
multi_agent = false
[model_providers.evospec]
name = "EvoSpec"
base_url = "${url}"
wire_api = "responses"
`);
const codex = join(import.meta.dirname, "node_modules", ".bin", "codex");
const question = "What is the capital of France? Answer in one sentence.";
const options = { cwd: home, env: { ...process.env, CODEX_HOME: home }, stdio: ["ignore", "pipe", "inherit"], encoding: "utf8" };
assert.match(execFileSync(codex, ["exec", "--skip-git-repo-check", question], options), /Paris/);
console.log("responses stream");
