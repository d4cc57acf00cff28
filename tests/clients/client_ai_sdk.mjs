// requires: ai @ai-sdk/openai zod
// Vercel's AI SDK, over /v1/chat/completions and over /v1/responses, which is its default.

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const [baseURL, name] = process.argv.slice(2);
const provider = createOpenAI({ baseURL, apiKey: "none" });
const Sum = z.object({ a: z.int(), b: z.int() });

async function all(api, model) {
  const capital = { model, prompt: "What is the capital of France? Answer in one sentence.", temperature: 0 };
  const { text } = await generateText(capital);
  assert.match(text, /Paris/);
  console.log(api, "answer");
  assert.equal(await streamText(capital).text, text);
  console.log(api, "stream");
  const add = tool({ description: "Add two numbers.", inputSchema: Sum });
  const question = { role: "user", content: "Add 17 and 25." };
  const options = { model, messages: [question], temperature: 0, maxOutputTokens: 100, tools: { add } };
  const required = { ...options, toolChoice: "required", providerOptions: { openai: { parallelToolCalls: false } } };
  const called = await generateText(required);
  assert.deepEqual(called.toolCalls.map((call) => call.input), [{ a: 17, b: 25 }]);
  console.log(api, "call");
  assert.deepEqual((await streamText(required).toolCalls).map((call) => call.input), [{ a: 17, b: 25 }]);
  console.log(api, "call-stream");
  const { toolCallId, toolName } = called.toolCalls[0];
  const result = { type: "tool-result", toolCallId, toolName, output: { type: "text", value: "42" } };
  const messages = [question, ...called.response.messages, { role: "tool", content: [result] }];
  assert.match((await generateText({ ...options, messages, toolChoice: "none" })).text, /42/);
  console.log(api, "result");
  const prompt = "Write the numbers of '17 and 25' as JSON with a and b.";
  const json = { model, prompt, temperature: 0, output: Output.object({ schema: Sum }) };
  assert.deepEqual((await generateText(json)).output, { a: 17, b: 25 });
  console.log(api, "schema");
}

await all("chat", provider.chat(name));
await all("responses", provider(name));
