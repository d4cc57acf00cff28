// requires: opencode-ai
// opencode: an answer with the tools of an agent at hand.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [baseURL, model] = process.argv.slice(2);
const home = mkdtempSync(join(tmpdir(), "opencode-"));
const models = { [model]: { limit: { context: 32768, output: 1024 } } };
const evospec = { npm: "@ai-sdk/openai-compatible", options: { baseURL, apiKey: "none" }, models };
const config = { provider: { evospec }, share: "disabled", autoupdate: false };
const env = { ...process.env, HOME: home, OPENCODE_CONFIG_CONTENT: JSON.stringify(config) };
const opencode = join(import.meta.dirname, "node_modules", ".bin", "opencode");
const question = "What is the capital of France? Answer in one sentence.";
const options = { cwd: home, env, stdio: ["ignore", "pipe", "inherit"], encoding: "utf8" };
assert.match(execFileSync(opencode, ["run", "--model", `evospec/${model}`, question], options), /Paris/);
console.log("chat stream");
