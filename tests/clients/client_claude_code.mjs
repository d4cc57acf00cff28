// requires: @anthropic-ai/claude-code
// Claude Code, over /v1/messages: an answer with the tools of an agent at hand, and another in the same conversation.

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
const options = { cwd: home, env, stdio: ["ignore", "pipe", "inherit"], encoding: "utf8" };
const ask = (...words) => execFileSync(claude, ["--bare", "-p", ...words], options);
assert.match(ask("What is the capital of France? Answer in one sentence."), /Paris/);
assert.match(ask("--continue", "And what is the capital of Italy? Answer in one sentence."), /Rome/);
console.log("messages stream");
