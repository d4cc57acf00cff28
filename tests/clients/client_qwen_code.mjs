// requires: @qwen-code/qwen-code
// Qwen Code: an answer with the tools of an agent at hand.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [url, model] = process.argv.slice(2);
const home = mkdtempSync(join(tmpdir(), "qwen-"));
const qwen = join(import.meta.dirname, "node_modules", ".bin", "qwen");
const server = ["--auth-type", "openai", "--openai-base-url", url, "--openai-api-key", "none", "--model", model];
const question = "What is the capital of France? Answer in one sentence.";
const options = { cwd: home, env: { ...process.env, HOME: home }, stdio: ["ignore", "pipe", "inherit"], encoding: "utf8" };
assert.match(execFileSync(qwen, [question, "--bare", ...server], options), /Paris/);
console.log("chat stream");
