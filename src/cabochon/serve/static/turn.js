// One message of the conversation as it stands on the page.

import { preview } from "./attachments.js";
import { el, markdown } from "./markdown.js";

export function userTurn(text, items) {
  const media = items.length ? el("div", { className: "media" }, ...items.map(preview)) : null;
  return el(
    "li",
    { className: "user" },
    el("p", { className: "who" }, "You"),
    media,
    text ? el("div", { className: "body" }, text) : null,
  );
}

// The model's turn while it is written: reasoning, text and tool calls grow with each chunk.
export class Answer {
  constructor() {
    this.text = "";
    this.reasoning = "";
    this.calls = [];
    this.reason = null;
    this.usage = null;
    this.chunks = 0;
    this.begun = performance.now();
    this.first = null;
    this.last = null;
    this.thoughts = el("details", { className: "thoughts", hidden: true });
    this.thoughts.append(el("summary"), el("pre", { tabIndex: 0 }));
    this.body = el("div", { className: "body waiting" });
    this.tools = el("div");
    this.foot = el("div", { className: "foot" });
    this.node = el("li", { className: "model" }, el("p", { className: "who" }, "Model"));
    this.node.append(this.thoughts, this.body, this.tools, this.foot);
  }

  take(chunk) {
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const delta = choice.delta ?? {};
    this.reason = choice.finish_reason ?? this.reason;
    const thought = delta.reasoning_content ?? delta.reasoning ?? "";
    if (!delta.content && !thought && !delta.tool_calls) return;
    this.last = performance.now();
    this.first ??= this.last;
    this.chunks += 1;
    this.reasoning += thought;
    this.text += delta.content ?? "";
    for (const call of delta.tool_calls ?? []) this.#call(call);
  }

  #call({ index, id, function: named }) {
    const call = (this.calls[index] ??= { id: "", name: "", arguments: "" });
    call.id ||= id ?? "";
    call.name += named?.name ?? "";
    call.arguments += named?.arguments ?? "";
  }

  get rate() {
    const tokens = this.usage?.completion_tokens ?? this.chunks;
    const seconds = (this.last - this.first) / 1000;
    return tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
  }

  draw() {
    this.thoughts.hidden = !this.reasoning;
    const thinking = !this.text && !this.calls.length && !this.reason;
    this.thoughts.firstChild.textContent = thinking ? "Thinking…" : "Thoughts";
    this.thoughts.lastChild.textContent = this.reasoning;
    this.body.replaceChildren(markdown(this.text));
    this.tools.replaceChildren(...this.calls.map(callCard));
  }

  // The last state: what it took, and what can be done with it.
  end(note, actions) {
    this.draw();
    this.body.classList.remove("waiting");
    const facts = [note, ...this.#facts()].filter(Boolean).map((fact) => el("span", {}, fact));
    this.foot.replaceChildren(...facts, ...actions);
  }

  #facts() {
    const facts = [];
    if (this.reason === "length") facts.push("cut off: too long");
    if (this.usage) {
      const cached = this.usage.prompt_tokens_details?.cached_tokens;
      facts.push(`${this.usage.prompt_tokens} tokens read${cached ? `, ${cached} of them cached` : ""}`);
      facts.push(`${this.usage.completion_tokens} written`);
    }
    if (this.rate) facts.push(`${this.rate.toFixed(1)} tokens/s`);
    if (this.first) facts.push(`first after ${((this.first - this.begun) / 1000).toFixed(2)} s`);
    return facts;
  }

  // The message as the next request's history has it.
  get message() {
    const message = { role: "assistant", content: this.text || (this.calls.length ? null : "") };
    // The model goes on from its thoughts once it has the results; of other turns it has no use for them.
    if (this.calls.length && this.reasoning) message.reasoning_content = this.reasoning;
    if (this.calls.length)
      message.tool_calls = this.calls.map((call) => ({
        id: call.id,
        type: "function",
        function: { name: call.name, arguments: call.arguments },
      }));
    return message;
  }
}

function callCard(call) {
  let shown = call.arguments;
  try {
    shown = JSON.stringify(JSON.parse(call.arguments), null, 2);
  } catch {
    // not whole yet
  }
  const head = el("summary", {}, "Calls ", el("code", { className: "name" }, call.name));
  return el("details", { className: "call", open: true }, head, el("pre", { tabIndex: 0 }, shown));
}

// Fields for what the tools answer; `send` gets the messages once all are filled in.
export function results(calls, send) {
  const form = el("form", { className: "call" });
  const fields = calls.map((call, i) => {
    const field = el("textarea", { rows: 2, className: "code", required: true, id: `${call.id}-${i}` });
    form.append(el("label", { htmlFor: field.id }, `What ${call.name} answers`), field);
    return field;
  });
  form.append(el("button", {}, "Send results"));
  form.onsubmit = (event) => {
    event.preventDefault();
    form.remove();
    send(fields.map((field, i) => ({ role: "tool", tool_call_id: calls[i].id, content: field.value })));
  };
  return form;
}
