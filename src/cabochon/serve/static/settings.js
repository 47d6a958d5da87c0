// Sampling and the rest of what a request says beside its messages; kept by this browser.

import { el } from "./markdown.js";

const STORE = "cabochon-settings";

const FIELDS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.1 }],
  ["max_tokens", "Longest answer", { min: 1, step: 1 }],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01 }],
  ["top_k", "Top k", { min: 0, step: 1 }],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01 }],
  ["seed", "Seed", { step: 1 }],
  ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: 0.1 }],
  ["frequency_penalty", "Frequency penalty", { min: -2, max: 2, step: 0.1 }],
  ["repetition_penalty", "Repetition penalty", { min: 0.01, max: 100, step: 0.01 }],
];

export class Settings {
  constructor(panel, grid, thinking) {
    for (const [name, label, limits] of FIELDS) {
      const field = el("input", { type: "number", id: `set-${name}`, inputMode: "decimal", placeholder: "default", ...limits });
      field.dataset.setting = name;
      grid.append(el("div", {}, el("label", { htmlFor: field.id }, label), field));
    }
    this.fields = [...panel.querySelectorAll("[data-setting]")];
    this.tools = panel.querySelector('[data-setting="tools"]');
    this.thinking = thinking;
    this.#load();
    panel.addEventListener("change", () => this.#save());
    thinking.addEventListener("change", () => this.#save());
  }

  #load() {
    const kept = JSON.parse(localStorage.getItem(STORE) ?? "{}");
    for (const field of this.fields) field.value = kept[field.dataset.setting] ?? "";
    this.thinking.checked = kept.thinking ?? false;
  }

  #save() {
    const kept = Object.fromEntries(this.fields.map((f) => [f.dataset.setting, f.value]));
    localStorage.setItem(STORE, JSON.stringify({ ...kept, thinking: this.thinking.checked }));
  }

  reset() {
    for (const field of this.fields) field.value = "";
    this.#save();
  }

  // The fields of a request. Throws an error in words if one of them is of no use.
  request(messages) {
    const given = Object.fromEntries(this.fields.map((f) => [f.dataset.setting, f.value.trim()]));
    const wrong = this.fields.find((f) => !f.checkValidity());
    if (wrong) throw new Error(`${wrong.labels[0].textContent}: ${wrong.validationMessage}`);
    const request = {};
    for (const [name] of FIELDS) if (given[name] !== "") request[name] = Number(given[name]);
    if (given.tools && !this.tools.disabled) {
      request.tools = parseTools(given.tools);
      if (given.tool_choice) request.tool_choice = given.tool_choice;
    }
    if (this.thinking.checked) request.chat_template_kwargs = { enable_thinking: true };
    const system = given.system ? [{ role: "system", content: given.system }] : [];
    return { ...request, messages: [...system, ...messages] };
  }
}

function parseTools(text) {
  try {
    const tools = JSON.parse(text);
    if (Array.isArray(tools)) return tools;
  } catch (error) {
    throw new Error(`Tools are not JSON: ${error.message}`);
  }
  throw new Error("Tools are not a list.");
}
