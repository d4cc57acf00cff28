// requires: openai zod
// openai for JavaScript, over /v1/chat/completions and /v1/responses.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none" });
const question = [{ role: "user", content: "Add 17 and 25." }];
const json = [{ role: "user", content: "Write the numbers of '17 and 25' as JSON with a and b." }];
const capital = [{ role: "user", content: "What is the capital of France? Answer in one sentence." }];
const Sum = z.object({ a: z.int(), b: z.int() });
const add = { name: "add", description: "Add two numbers.", parameters: z.toJSONSchema(Sum) };

async function chat() {
  const options = { model, temperature: 0, max_tokens: 100 };
  const completions = client.chat.completions;
  const answer = (await completions.create({ ...options, messages: capital })).choices[0].message.content;
  assert.match(answer, /Paris/);
  console.log("chat answer");
  let streamed = "";
  for await (const chunk of await completions.create({ ...options, messages: capital, stream: true })) {
    streamed += chunk.choices[0].delta.content ?? "";
  }
  assert.equal(streamed, answer);
  console.log("chat stream");
  const tools = { tools: [{ type: "function", function: add }], tool_choice: "required", parallel_tool_calls: false };
  const { message } = (await completions.create({ ...options, ...tools, messages: question })).choices[0];
  const [call] = message.tool_calls;
  assert.deepEqual(JSON.parse(call.function.arguments), { a: 17, b: 25 });
  console.log("chat call");
  const stream = completions.stream({ ...options, ...tools, messages: question });
  const [streamedCall] = (await stream.finalMessage()).tool_calls;
  assert.equal(streamedCall.function.arguments, call.function.arguments);
  console.log("chat call-stream");
  const told = [...question, message, { role: "tool", tool_call_id: call.id, content: "42" }];
  const said = await completions.create({ ...options, ...tools, tool_choice: "none", messages: told });
  assert.match(said.choices[0].message.content, /42/);
  console.log("chat result");
  const response_format = zodResponseFormat(Sum, "sum");
  const parsed = await completions.parse({ ...options, response_format, messages: json });
  assert.deepEqual(parsed.choices[0].message.parsed, { a: 17, b: 25 });
  console.log("chat schema");
}

async function responses() {
  const options = { model, temperature: 0, max_output_tokens: 100 };
  const answer = (await client.responses.create({ ...options, input: capital })).output_text;
  assert.match(answer, /Paris/);
  console.log("responses answer");
  const stream = client.responses.stream({ ...options, input: capital });
  assert.equal((await stream.finalResponse()).output_text, answer);
  console.log("responses stream");
  const tools = { tools: [{ type: "function", ...add }], tool_choice: "required", parallel_tool_calls: false };
  const [call] = (await client.responses.create({ ...options, ...tools, input: question })).output;
  assert.deepEqual(JSON.parse(call.arguments), { a: 17, b: 25 });
  console.log("responses call");
  const [streamedCall] = (await client.responses.stream({ ...options, ...tools, input: question }).finalResponse()).output;
  assert.equal(streamedCall.arguments, call.arguments);
  console.log("responses call-stream");
  const told = [...question, call, { type: "function_call_output", call_id: call.call_id, output: "42" }];
  const said = await client.responses.create({ ...options, ...tools, tool_choice: "none", input: told });
  assert.match(said.output_text, /42/);
  console.log("responses result");
  const text = { format: zodTextFormat(Sum, "sum") };
  assert.deepEqual((await client.responses.parse({ ...options, text, input: json })).output_parsed, { a: 17, b: 25 });
  console.log("responses schema");
}

await chat();
await responses();
