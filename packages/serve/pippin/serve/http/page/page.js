"use strict";
// Chats with the server that the page came from, and shows its load.

const $ = (id) => document.getElementById(id);
const LOAD_EVERY_MS = 1000;
const RATE_OVER_MS = 5000;

const turns = []; // what the model is sent: {role, content}
let running = null; // the AbortController of the answer that comes

function headers(more = {}) {
  const token = $("token").value.trim();
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

// The text of an error of the API.
async function problem(response) {
  if (response.status === 401) $("token-field").hidden = false;
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

// ---- The conversation

function addTurn(role, text) {
  $("hint")?.remove();
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  const who = document.createElement("h2");
  who.textContent = role === "user" ? "You" : "Model";
  const body = document.createElement("p");
  body.textContent = text;
  turn.append(who, body);
  $("log").append(turn);
  $("log").scrollTop = $("log").scrollHeight;
  return turn;
}

// The data of the server's events, until [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer was cut off.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(turn) {
  const body = turn.querySelector("p");
  const began = performance.now();
  let first = null;
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    signal: running.signal,
    body: JSON.stringify({
      messages: turns,
      temperature: $("temperature").valueAsNumber,
      max_tokens: $("max-tokens").valueAsNumber,
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  if (!response.ok) throw new Error(await problem(response));
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const text = event.choices[0]?.delta.content;
    if (text) {
      first ??= performance.now();
      const log = $("log");
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      body.textContent += text;
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
    if (event.usage) {
      const seconds = (performance.now() - began) / 1000;
      const cost = document.createElement("p");
      cost.className = "cost";
      const wait = Math.round((first ?? performance.now()) - began);
      cost.textContent = `${event.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s, the first after ${wait} ms`;
      turn.append(cost);
    }
  }
}

async function send(event) {
  event?.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  addTurn("user", text);
  turns.push({ role: "user", content: text });
  running = new AbortController();
  setBusy(true);
  const turn = addTurn("assistant", "");
  try {
    await answer(turn);
    $("said").textContent = `The model said: ${turn.querySelector("p").textContent}`;
  } catch (error) {
    if (error.name !== "AbortError") {
      turn.classList.add("wrong");
      $("said").textContent = error.message;
      const note = document.createElement("p");
      note.className = "problem";
      note.textContent = error.message;
      turn.append(note);
    }
  }
  const said = turn.querySelector("p").textContent;
  if (!turn.isConnected) {
    // Cleared meanwhile.
  } else if (said) {
    turns.push({ role: "assistant", content: said });
  } else {
    turns.pop(); // nothing was answered: the next message stands alone
  }
  running = null;
  setBusy(false);
}

function setBusy(busy) {
  document.body.dataset.busy = busy;
  $("send").disabled = busy;
  $("stop").hidden = !busy;
}

function clear() {
  running?.abort();
  turns.length = 0;
  $("log").replaceChildren();
  $("prompt").focus();
}

// ---- The load

const counts = []; // [time in ms, tokens since the server's start]

function tokensPerSecond(generated) {
  const now = performance.now();
  counts.push([now, generated]);
  while (counts.length > 2 && now - counts[0][0] > RATE_OVER_MS) counts.shift();
  const [time, before] = counts[0];
  return now > time ? Math.max(0, ((generated - before) * 1000) / (now - time)) : 0;
}

async function showLoad() {
  const state = $("state");
  try {
    const response = await fetch("load", { headers: headers() });
    if (!response.ok) throw new Error(await problem(response));
    const load = await response.json();
    $("model").textContent = load.model;
    document.title = `${load.model} – pippin`;
    $("running").textContent = load.running;
    $("waiting").textContent = load.waiting;
    $("speed").textContent = tokensPerSecond(load.generated_tokens).toFixed(1);
    $("cache").value = load.cache_usage;
    $("cache-text").textContent = `${Math.round(load.cache_usage * 100)}%`;
    say(state, load.serving ? "serving" : "not serving", !load.serving);
  } catch (error) {
    say(state, error instanceof TypeError ? "The server does not answer." : error.message, true);
  }
  setTimeout(showLoad, LOAD_EVERY_MS);
}

// Only what is new is told to those who hear the page.
function say(element, text, wrong) {
  if (element.textContent !== text) element.textContent = text;
  element.classList.toggle("wrong", wrong);
}

$("form").addEventListener("submit", send);
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
showLoad();
