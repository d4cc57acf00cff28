// requires: @anthropic-ai/claude-code
// Claude Code, over /v1/messages: an answer with the tools of an agent at hand.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [url, model] = process.argv.slice(2);
const home = mkdtempSync(join(tmpdir(), "claude-"));
const server = { ANTHROPIC_BASE_URL: url.replace(/\/v1$/, ""), ANTHROPIC_API_KEY: "none", ANTHROPIC_MODEL: model };
const env = { ...process.env, ...server, HOME: home, CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: "1" };
const claude = join(import.meta.dirname, "node_modules", ".bin", "claude");
const question = "What is the capital of France? Answer in one sentence.";
const options = { cwd: home, env, stdio: ["ignore", "pipe", "inherit"], encoding: "utf8" };
assert.match(execFileSync(claude, ["-p", question], options), /Paris/);
console.log("messages stream");
