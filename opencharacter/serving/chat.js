"use strict";

// Text reaches the page through textContent only, never as markup.

const STORAGE_KEY = "opencharacter";
const JUDGE = "judge";
const UNLIKELY = 0.1;  // tokens of a lower probability are underlined
const AUTHORS = { user: "You", assistant: "Model", error: "Error" };

const $ = (id) => document.getElementById(id);
const saved = readSession();
let apiKey = saved.apiKey || "";
let personas = {};  // descriptions by name
let choices = [];   // what the model menus offer
let running = null; // the AbortController of the responses in progress
const sides = ["Left", "Right"].map(makeSide);

// ---------------------------------------------------------------- session

function readSession() {
  try {
    return JSON.parse(sessionStorage.getItem(STORAGE_KEY)) || {};
  } catch {
    return {};
  }
}

function saveSession() {
  sessionStorage.setItem(STORAGE_KEY, JSON.stringify({
    apiKey,
    persona: $("persona").value,
    choices: sides.map((side) => side.select.value),
    messages: sides.map((side) => side.messages),
    revisions: sides.map((side) => side.revision),
    presences: sides.map((side) => side.presences),
  }));
}

// ---------------------------------------------------------------- page

function makeSide(name, index) {
  const node = $("side").content.cloneNode(true);
  const select = node.querySelector("select");
  const label = node.querySelector("label");
  const log = node.querySelector(".log");
  node.querySelector("h2").textContent = name;
  select.id = `model-${index}`;
  label.htmlFor = select.id;
  label.textContent = `${name} model`;
  log.setAttribute("aria-label", `${name} conversation`);
  const side = {
    select,
    log,
    figure: node.querySelector("figure"),
    messages: (saved.messages || [])[index] || [],
    revision: (saved.revisions || [])[index] || "",  // the model that responded, by its full name
    presences: (saved.presences || [])[index] || [],  // of each answer; null if there is none
  };
  side.messages.forEach((message) => showMessage(side, message.role, message.content));
  showPresences(side);
  select.addEventListener("change", () => { restart(); saveSession(); });
  $("sides").append(node);
  return side;
}

function showMessage(side, role, text) {
  const line = document.createElement("p");
  const author = document.createElement("span");
  const content = document.createElement("span");
  line.className = role;
  author.className = "author";
  author.textContent = AUTHORS[role];
  content.textContent = text;
  line.append(author, content);
  side.log.append(line);
  side.log.scrollTop = side.log.scrollHeight;
  return content;
}

// Each token becomes an element with its probability as a tooltip, if the tokens are the whole text.
function appendText(content, text, tokens) {
  if (!tokens || tokens.map(({ token }) => token).join("") !== text) {
    content.append(text);
    return;
  }
  for (const { token, logprob } of tokens) {
    const element = document.createElement("span");
    const probability = Math.exp(logprob);
    element.className = probability < UNLIKELY ? "token unlikely" : "token";
    element.title = `probability ${(100 * probability).toFixed(1)} %`;
    element.textContent = token;
    content.append(element);
  }
}

// The judge's probability that an answer sounds like the persona, as a curve over the turns.
function showPresences(side) {
  const svg = side.figure.querySelector("svg");
  const turns = Math.max(side.presences.length - 1, 1);
  const points = side.presences.flatMap((presence, turn) => presence === null ? [] : [
    { turn: turn + 1, presence, x: 6 + 288 * turn / turns, y: 54 - 48 * presence },
  ]);
  side.figure.hidden = !points.length;
  svg.setAttribute("aria-label", points.map(({ turn, presence }) => `turn ${turn}: ${percent(presence)}`).join(", "));
  svg.replaceChildren(
    draw("line", { x1: 0, x2: 300, y1: 30, y2: 30 }),
    draw("polyline", { points: points.map(({ x, y }) => `${x},${y}`).join(" ") }),
    ...points.map(({ x, y }) => draw("circle", { cx: x, cy: y, r: 3 })),
  );
}

function draw(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
  return element;
}

function percent(share) {
  return `${(100 * share).toFixed(0)} %`;
}

function showInfo(text) {
  $("notice").textContent = text;
  $("notice").className = "info";
}

function showError(text) {
  $("notice").textContent = text;
  $("notice").className = "";
}

function fillSelect(select, options, selected) {
  select.replaceChildren(...options.map(({ value, text }) => new Option(text, value, false, value === selected)));
}

function showConstitution() {
  const persona = personas[$("persona").value] || { description: "", traits: [] };
  $("description").textContent = persona.description;
  $("traits").replaceChildren(...persona.traits.map((trait) => {
    const item = document.createElement("li");
    item.textContent = trait;
    return item;
  }));
}

function updateRatingButtons() {
  const answered = sides.every((side) => side.messages.length && side.revision);
  const enabled = !running && $("persona").value && answered;
  document.querySelectorAll(".rate").forEach((button) => { button.disabled = !enabled; });
}

function restart() {
  if (running) running.abort();
  for (const side of sides) {
    side.messages = [];
    side.revision = "";
    side.log.replaceChildren();
  }
  forgetPresences();
  updateRatingButtons();
}

function forgetPresences() {
  for (const side of sides) {
    side.presences = [];
    side.log.querySelectorAll(".presence").forEach((note) => note.remove());
    showPresences(side);
  }
}

// ---------------------------------------------------------------- server

async function request(path, body, signal) {
  const headers = apiKey ? { Authorization: `Bearer ${apiKey}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const method = body ? "POST" : "GET";
  const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  if (response.status === 401) $("key-form").hidden = false;
  let message = `The server responded with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch { /* the body is not an error of this server */ }
  throw new Error(message);
}

const requestJson = async (path) => (await request(path)).json();

async function load() {
  try {
    if (!apiKey && (await requestJson("health")).needs_key) {
      $("key-form").hidden = false;
      showInfo("This server requires an API key.");
      return;
    }
    const models = (await requestJson("v1/models")).data;
    personas = await requestJson("personas");
    $("key-form").hidden = true;
    choices = listChoices(models);
    const base = models[0].id;
    const trained = (models.find((model) => model.parent) || models[0]).id;
    sides.forEach((side, index) => {
      fillSelect(side.select, choices, (saved.choices || [])[index] || [base, trained][index]);
    });
    fillSelect($("persona"), Object.keys(personas).map((name) => ({ value: name, text: name })), saved.persona);
    $("presence-option").hidden = !models.some(({ id }) => id === JUDGE);
    showConstitution();
    updateRatingButtons();
    showInfo("");
  } catch (error) {
    showError(error.message);
  }
}

function listChoices(models) {
  const base = models[0].id;
  const plain = models.map(({ id }) => ({ value: id, text: displayName(id), model: id, system: "" }));
  const prompted = Object.entries(personas).filter(([, persona]) => persona.system).map(([name, persona]) => ({
    value: `${base}+${name}`,
    text: `${base} with ${name} as system prompt`,
    model: base,
    system: persona.system,
  }));
  return [...plain, ...prompted];
}

function displayName(id) {
  return id.endsWith(":dpo") ? `${id.slice(0, -":dpo".length)} (DPO only)` : id;
}

const choiceOf = (side) => choices.find((choice) => choice.value === side.select.value);

async function send() {
  const text = $("text").value.trim();
  if (!text || running || !choices.length) return;
  running = new AbortController();
  $("text").value = "";
  $("send").disabled = true;
  $("stop").disabled = false;
  updateRatingButtons();
  showInfo("Both models are responding.");
  await Promise.all(sides.map((side) => respond(side, text, running.signal)));
  showInfo(running.signal.aborted ? "Stopped." : "Both models have finished.");
  running = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  updateRatingButtons();
  saveSession();
  $("text").focus();
}

async function respond(side, text, signal) {
  const choice = choiceOf(side);
  const history = side.messages;  // restart() replaces the array, so a late response is not shown
  const message = { role: "user", content: text };
  const system = choice.system ? [{ role: "system", content: choice.system }] : [];
  showMessage(side, "user", text);
  const content = showMessage(side, "assistant", "");
  let answer = "";
  try {
    const body = { model: choice.model, messages: [...system, ...history, message], stream: true };
    if ($("probabilities").checked) body.logprobs = true;
    const response = await request("v1/chat/completions", body, signal);
    for await (const event of readEvents(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (side.messages === history) side.revision = event.model || side.revision;
      const part = event.choices[0];
      const piece = part?.delta.content || "";
      answer += piece;
      appendText(content, piece, part?.logprobs?.content);
      side.log.scrollTop = side.log.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") showMessage(side, "error", error.message);
    if (!answer) return;
  }
  history.push(message, { role: "assistant", content: answer });
  if ($("presence").checked && $("persona").value) await measurePresence(side, text, answer, content, signal);
}

async function measurePresence(side, prompt, answer, content, signal) {
  const history = side.messages;
  const persona = $("persona").value;
  const note = document.createElement("span");
  note.className = "presence";
  note.textContent = "The judge is reading.";
  content.after(note);
  let presence = null;
  try {
    ({ presence } = await (await request("presence", { persona, prompt, answer }, signal)).json());
    note.textContent = presence === null ? "The judge gave no readable verdict." : `Sounds like ${persona}: ${percent(presence)}`;
  } catch (error) {
    note.textContent = error.name === "AbortError" ? "" : error.message;
  }
  if (side.messages !== history || $("persona").value !== persona) {
    note.remove();
    return;
  }
  const turn = history.length / 2 - 1;
  while (side.presences.length < turn) side.presences.push(null);
  side.presences[turn] = presence;
  showPresences(side);
}

async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (buffer + value).split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      if (event !== "data: [DONE]") yield JSON.parse(event.slice("data: ".length));
    }
  }
}

// ---------------------------------------------------------------- ratings and export

function conversations() {
  return sides.map((side) => ({
    model: side.revision,
    system: choiceOf(side).system,
    messages: side.messages,
  }));
}

async function rate(verdict) {
  try {
    await request("ratings", { persona: $("persona").value, verdict, conversations: conversations() });
    showInfo("Thank you. Your rating has been saved.");
  } catch (error) {
    showError(error.message);
  }
}

function exportConversations() {
  const data = JSON.stringify({ persona: $("persona").value, conversations: conversations() }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([data], { type: "application/json" }));
  link.download = "conversations.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

// ---------------------------------------------------------------- events

$("message-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", () => running && running.abort());
$("reset").addEventListener("click", () => {
  restart();
  saveSession();
  showInfo("Conversations cleared.");
  $("text").focus();
});
$("export").addEventListener("click", exportConversations);
$("persona").addEventListener("change", () => { showConstitution(); forgetPresences(); saveSession(); });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = $("key").value;
  load().then(saveSession);
});
document.querySelectorAll(".rate").forEach((button) => {
  button.addEventListener("click", () => rate(button.dataset.verdict));
});
updateRatingButtons();
load();
