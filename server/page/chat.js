// A chat whose answers show where each of their tokens came from.
import { call, model, tell } from "./main.js";

const SOURCES = ["target", "draft", "session", "copied", "prediction"];
const DRAWN_EVERY = 100; // milliseconds
const byId = (id) => document.getElementById(id);
const history = [];
let session = newSession();

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

// Stream an answer into a message; returns its text and what it took.
async function answer(message, body) {
  const coloured = new ColouredText(message);
  const started = performance.now();
  let text = "", first = null, usage = null, metrics = null;
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Session-Id": session },
    body: JSON.stringify({ ...body, stream: true, logprobs: true, stream_options: { include_usage: true } }),
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
  const seconds = (performance.now() - started) / 1000;
  coloured.show();
  return { text, counts: coloured.counts, tokens: usage?.completion_tokens ?? 0, seconds, first: (first - started) / 1000, metrics };
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

async function ask(prompt, prediction) {
  const question = addMessage("user");
  question.text.textContent = prompt;
  history.push({ role: "user", content: prompt });
  const body = {
    model,
    messages: history,
    temperature: Number(byId("temperature").value),
    max_tokens: Number(byId("max-tokens").value),
    seed: 1,
    ...(prediction && { prediction: { type: "content", content: prediction } }),
  };
  const message = addMessage("assistant");
  const result = await answer(message, body).catch((error) => {
    question.item.remove();
    message.item.remove();
    throw error;
  });
  const figures = message.item.appendChild(document.createElement("p"));
  figures.className = "figures";
  figures.textContent = describe(result, null);
  if (byId("compare").checked) {
    const hidden = { item: message.item, text: document.createElement("div") };
    figures.textContent = describe(result, await answer(hidden, { ...body, num_speculative_tokens: 0 }));
  }
  history.push({ role: "assistant", content: result.text });
}

export function startChat() {
  const form = byId("ask"), prompt = byId("prompt"), expected = byId("prediction"), send = byId("send");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = prompt.value.trim();
    if (!text || send.disabled) return;
    send.disabled = true;
    prompt.value = "";
    tell(null);
    const length = history.length;
    try {
      await ask(text, expected.value);
      expected.value = "";
    } catch (error) {
      history.length = length;
      prompt.value = text;
      tell(error.message);
    } finally {
      send.disabled = false;
    }
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  byId("clear").addEventListener("click", () => {
    history.length = 0;
    session = newSession();
    byId("messages").replaceChildren();
    tell(null);
  });
}
