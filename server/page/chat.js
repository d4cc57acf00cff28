// A chat whose answers show where each of their tokens came from.
import { call, model, tell } from "./main.js";

const SOURCES = ["target", "draft", "session", "copied", "prediction"];
const DRAWN_EVERY = 100; // milliseconds
const byId = (id) => document.getElementById(id);
let history = [];
let session = newSession();
let running = null; // what stops the answer that is coming, an AbortController

// A name for what the server learns of this chat's words.
function newSession() {
  return `page-${Math.random().toString(36).slice(2)}`;
}

// The events of a streamed answer.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment: nothing yet
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function addMessage(role) {
  const item = document.createElement("li");
  item.className = role;
  const text = item.appendChild(document.createElement("div"));
  text.className = "text";
  byId("messages").append(item);
  return { item, text };
}

// Tokens as coloured pieces of text, shown a few times a second: what draws them may share the server's processor. One
// that ends within a character is shown with the token that completes it.
class ColouredText {
  constructor(message) {
    this.message = message;
    this.waiting = document.createDocumentFragment();
    this.timer = null;
    this.decoder = new TextDecoder();
    this.counts = Object.fromEntries(SOURCES.map((source) => [source, 0]));
  }

  add(entry) {
    this.counts[entry.source] += 1;
    if (/^<\|.*\|>$|^<\/?s>$/.test(entry.token)) return; // it ends the answer and is no text
    const text = this.decoder.decode(new Uint8Array(entry.bytes), { stream: true });
    const span = this.waiting.appendChild(document.createElement("span"));
    span.className = `token ${entry.source}`;
    span.title = entry.source;
    span.textContent = text;
    this.timer ??= setTimeout(() => this.show(), DRAWN_EVERY);
  }

  show() {
    clearTimeout(this.timer);
    this.timer = null;
    this.message.text.append(this.waiting);
    this.message.item.scrollIntoView({ block: "nearest" });
  }
}

// Stream an answer into a message; returns its text and what it took. A stopped one is as long as it got, unless nothing
// of it has come: then it is an error, as when the server fails.
async function answer(message, body, signal) {
  const coloured = new ColouredText(message);
  const started = performance.now();
  let text = "", first = null, usage = null, metrics = null;
  try {
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-Session-Id": session },
      body: JSON.stringify({ ...body, stream: true, logprobs: true, stream_options: { include_usage: true } }),
      signal,
    });
    for await (const event of events(response)) {
      const [choice] = event.choices;
      if (choice) {
        first ??= performance.now();
        text += choice.delta.content ?? "";
        for (const entry of choice.logprobs?.content ?? []) coloured.add(entry);
      }
      ({ usage = usage, metrics = metrics } = event);
    }
  } catch (error) {
    if (!signal.aborted || !text) throw error;
  }
  const seconds = (performance.now() - started) / 1000;
  coloured.show();
  const shown = Object.values(coloured.counts).reduce((sum, count) => sum + count, 0);
  const tokens = usage?.completion_tokens ?? shown;
  return { text, counts: coloured.counts, tokens, seconds, first: (first - started) / 1000, metrics };
}

// Tokens a second after the first one: the second answer to a question finds its prompt computed.
function rateOf(result) {
  return (result.tokens - 1) / Math.max(result.seconds - result.first, 0.001);
}

function describe(result, without) {
  const rate = rateOf(result);
  const counts = SOURCES.map((source) => `${source} ${result.counts[source]}`).join(", ");
  const drafts = result.metrics?.speculative_decoding;
  const length = drafts?.num_spec_steps ? ` · ${drafts.mean_acceptance_length.toFixed(2)} tokens a verification` : "";
  let line = `${result.tokens} tokens: ${counts} · ${rate.toFixed(0)} tokens/s, the first after ${result.first.toFixed(2)} s${length}`;
  if (without) {
    const slow = rateOf(without);
    const same = without.text === result.text ? "the same answer" : "another answer: chosen anew at this temperature";
    line += ` · without drafts ${slow.toFixed(0)} tokens/s (${(rate / slow).toFixed(2)} times), ${same}`;
  }
  return line;
}

async function ask(prompt, prediction, signal) {
  const chat = history; // "New chat" begins another
  const asked = { role: "user", content: prompt };
  const question = addMessage("user");
  question.text.textContent = prompt;
  const body = {
    model,
    messages: [...chat, asked],
    temperature: Number(byId("temperature").value),
    max_tokens: Number(byId("max-tokens").value),
    seed: 1,
    ...(prediction && { prediction: { type: "content", content: prediction } }),
  };
  const message = addMessage("assistant");
  const result = await answer(message, body, signal).catch((error) => {
    question.item.remove();
    message.item.remove();
    throw error;
  });
  const figures = message.item.appendChild(document.createElement("p"));
  figures.className = "figures";
  figures.textContent = describe(result, null);
  chat.push(asked, { role: "assistant", content: result.text });
  if (byId("compare").checked && !signal.aborted) {
    await compare(result, message, figures, body, signal).catch((error) => signal.aborted || tell(error.message));
  }
}

// Ask again without drafts; only the figures of that answer are shown.
async function compare(result, message, figures, body, signal) {
  const hidden = { item: message.item, text: document.createElement("div") };
  const without = await answer(hidden, { ...body, num_speculative_tokens: 0 }, signal);
  if (!signal.aborted) figures.textContent = describe(result, without);
}

// Note whether an answer is coming: then the button that sends stops it.
function setRunning(controller) {
  running = controller;
  byId("send").textContent = running ? "Stop" : "Send";
  byId("send").formNoValidate = running !== null; // there need be no further question
}

export function startChat() {
  const form = byId("ask"), prompt = byId("prompt"), expected = byId("prediction");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) {
      if (event.submitter) running.abort(); // the button, not Enter
      return;
    }
    const text = prompt.value.trim();
    if (!text) return;
    const controller = new AbortController();
    setRunning(controller);
    prompt.value = "";
    tell(null);
    try {
      await ask(text, expected.value, controller.signal);
      if (running === controller) expected.value = "";
    } catch (error) {
      if (running !== controller) return; // of a chat that is gone
      prompt.value = text;
      if (!controller.signal.aborted) tell(error.message);
    } finally {
      if (running === controller) setRunning(null);
    }
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  byId("clear").addEventListener("click", () => {
    running?.abort();
    setRunning(null);
    history = [];
    session = newSession();
    byId("messages").replaceChildren();
    tell(null);
  });
}
