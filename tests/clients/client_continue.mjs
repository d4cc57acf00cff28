// requires: @continuedev/cli
// Continue, by its command `cn`: an answer with the tools of an agent at hand.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [apiBase, model] = process.argv.slice(2);
const home = mkdtempSync(join(tmpdir(), "continue-"));
const config = join(home, "config.yaml"); // JSON is YAML
const evospec = { name: "evospec", provider: "openai", model, apiBase, apiKey: "none", roles: ["chat"] };
writeFileSync(config, JSON.stringify({ name: "evospec", version: "0.0.1", schema: "v1", models: [evospec] }));
const cn = join(import.meta.dirname, "node_modules", ".bin", "cn");
const question = "What is the capital of France? Answer in one sentence.";
const options = { cwd: home, env: { ...process.env, HOME: home }, stdio: ["ignore", "pipe", "inherit"], encoding: "utf8" };
assert.match(execFileSync(cn, ["-p", "--config", config, question], options), /Paris/);
console.log("chat stream");
