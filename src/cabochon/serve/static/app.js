// The page: its views, the conversation, and what is sent for it.

import { chat, get } from "./api.js";
import { Attachments } from "./attachments.js";
import { el } from "./markdown.js";
import { drawPlan } from "./plan.js";
import { Settings } from "./settings.js";
import { setUpTheme } from "./theme.js";
import { Answer, results, userTurn } from "./turn.js";

const $ = (id) => document.getElementById(id);
const log = $("log");
const prompt = $("prompt");
const settings = new Settings($("settings"), $("sampling"), $("thinking"));
const attachments = new Attachments($("attachments"), say);

let model = null; // as /v1/models has it
let messages = [];
let running = null; // the AbortController of the answer that is being written

// For everybody in words, for screen readers at once.
function say(text, bad = false) {
  $("status").textContent = text;
  if (bad) log.append(el("li", {}, el("div", { className: "failure", role: "alert" }, text)));
  if (bad) toEnd(true);
}

function toEnd(force = false) {
  const near = log.scrollHeight - log.scrollTop - log.clientHeight < 120;
  if (near || force) log.scrollTop = log.scrollHeight;
}

// ---- views

const PLAN = "#checkpoint";
const tabs = [...document.querySelectorAll('[role="tab"]')];

function show(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  for (const id of ["new", "settings-toggle"]) $(id).hidden = tab.id !== "tab-chat";
  history.replaceState(null, "", tab.id === "tab-plan" ? PLAN : location.pathname);
  if (tab.id === "tab-plan") drawPlan($("plan"));
}

for (const tab of tabs) {
  tab.onclick = () => show(tab);
  tab.onkeydown = (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs[(tabs.indexOf(tab) + 1) % tabs.length];
    other.focus();
    show(other);
  };
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("settings-toggle").setAttribute("aria-expanded", open);
  (open ? $("system") : $("settings-toggle")).focus();
}

$("settings-toggle").onclick = () => openSettings($("settings").hidden);
$("settings-close").onclick = () => openSettings(false);
$("reset").onclick = () => settings.reset();
$("settings").onkeydown = (event) => {
  if (event.key !== "Escape") return;
  event.stopPropagation(); // it would stop an answer, too
  openSettings(false);
};

// ---- the conversation

$("new").onclick = () => {
  running?.abort();
  messages = [];
  log.replaceChildren();
  prompt.focus();
};

// What cannot be sent stays in the composer.
async function submit() {
  const text = prompt.value.trim();
  const { items } = attachments;
  if (running || (!text && !items.length)) return;
  const parts = [...items.map((item) => item.part), ...(text ? [{ type: "text", text }] : [])];
  const asked = [...messages, { role: "user", content: items.length ? parts : text }];
  if (!(await requestFor(asked))) return;
  messages = asked;
  prompt.value = "";
  grow();
  log.append(userTurn(text, attachments.take()));
  answer();
}

// The fields of a request, or nothing where the page has said why there can be none.
async function requestFor(messages) {
  try {
    model ??= await meet();
    return { ...settings.request(messages), model: model.id };
  } catch (error) {
    say(error.message, true);
    return null;
  }
}

async function answer() {
  const turn = new Answer();
  const request = await requestFor(messages);
  if (!request) return;
  log.append(turn.node);
  toEnd(true);
  busy(new AbortController());
  say("Answering");
  let note = "";
  try {
    await follow(turn, chat(request, running.signal));
  } catch (error) {
    note = error.name === "AbortError" ? "stopped" : "";
    if (!note) turn.node.append(el("div", { className: "failure", role: "alert" }, error.message));
  }
  busy(null);
  finish(turn, note);
}

// Draws at most once a frame, however fast the tokens come.
async function follow(turn, chunks) {
  let due = 0;
  const draw = () => {
    due = 0;
    turn.draw();
    toEnd();
    $("live").textContent = turn.rate ? `${turn.rate.toFixed(1)} tokens/s` : "";
  };
  try {
    for await (const chunk of chunks) {
      turn.take(chunk);
      due ||= requestAnimationFrame(draw);
    }
  } finally {
    cancelAnimationFrame(due);
  }
}

function finish(turn, note) {
  const before = messages.length;
  messages.push(turn.message);
  const again = button("Try again", () => {
    messages.length = before;
    while (log.lastChild && log.lastChild !== turn.node) log.lastChild.remove();
    turn.node.remove();
    answer();
  });
  const copy = button("Copy", async () => {
    await navigator.clipboard.writeText(turn.text);
    say("Copied");
  });
  turn.end(note, turn.text ? [copy, again] : [again]);
  if (turn.calls.length && !note) log.append(el("li", {}, results(turn.calls, sendResults)));
  toEnd();
  say(turn.text ? `Answer: ${turn.text.slice(0, 400)}` : "The answer has ended");
}

function sendResults(answers) {
  messages.push(...answers);
  answer();
}

function button(label, action) {
  const made = el("button", { type: "button", className: "plain" }, label);
  made.onclick = action;
  return made;
}

function busy(controller) {
  running = controller;
  $("stop").hidden = !controller;
  $("send").hidden = Boolean(controller);
  for (const other of log.querySelectorAll(".foot button")) other.disabled = Boolean(controller);
  if (!controller) $("live").textContent = "";
}

// ---- the composer

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  submit();
};

prompt.oninput = grow;
prompt.onkeydown = (event) => {
  const touch = matchMedia("(pointer: coarse)").matches;
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
};
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
$("stop").onclick = () => {
  running?.abort();
  prompt.focus();
};
for (const choice of document.querySelectorAll("#suggestions button"))
  choice.onclick = () => {
    prompt.value = choice.textContent;
    $("composer").requestSubmit();
  };

$("attach").onclick = () => $("file").click();
$("file").onchange = async () => {
  await attachments.add($("file").files);
  $("file").value = "";
  prompt.focus();
};
document.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  attachments.add(event.clipboardData.files);
});
for (const kind of ["dragover", "dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("composer").classList.toggle("over", kind === "dragover");
    if (kind === "drop") attachments.add(event.dataTransfer.files);
  });

// ---- the beginning

const SENSES = [
  ["vision", "pictures", "image/png,image/jpeg,image/webp,image/gif,image/bmp"],
  ["audio", "sounds", "audio/*"],
  ["video", "videos", "video/*"],
];

setUpTheme($("theme"));
if (location.hash === PLAN) show($("tab-plan"));
else prompt.focus();
addEventListener("hashchange", () => show($(location.hash === PLAN ? "tab-plan" : "tab-chat")));
// Asks who is served, and offers no more than that model can do.
async function meet() {
  const card = (await get("/v1/models")).data[0];
  const can = card.capabilities;
  $("model").textContent = $("model").title = card.id;
  $("thinking").closest("label").hidden = !can.thinking;
  if (!can.thinking) $("thinking").checked = false;
  $("tools").disabled = !can.tools;
  $("attach").hidden = !(can.vision || can.audio);
  const kinds = SENSES.filter(([name]) => can[name]);
  $("file").accept = kinds.map(([, , types]) => types).join();
  const named = new Intl.ListFormat("en").format(kinds.map(([, things]) => things));
  $("senses").textContent = named && `Paste, drop or attach ${named}. `;
  return card;
}

try {
  model = await meet();
} catch (error) {
  say(error.message, true);
}
