// OpenAI's client for JavaScript against a running server of the demo: `node check.mjs URL`.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const model = "cabochon-demo";
const messages = [{ role: "user", content: "Who are you?" }];
const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const { version } = JSON.parse(readFileSync(new URL("./node_modules/openai/package.json", import.meta.url)));
const says = (what, found) => console.log(`openai for JavaScript ${version}: ${what}: ${JSON.stringify(found).slice(0, 100)}`);

const ids = [];
for await (const one of client.models.list()) ids.push(one.id);
assert.deepEqual(ids, [model]);
says("models", ids);

const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
const text = whole.choices[0].message.content;
assert.match(text, /Cabochon demo/);
says("chat", text);

let streamed = "";
const stream = await client.chat.completions.create({ model, messages, temperature: 0, stream: true, stream_options: { include_usage: true } });
let usage;
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(streamed, text);
assert.deepEqual(usage, whole.usage);
says("stream", usage);

const parameters = { type: "object", properties: { city: { type: "string", enum: ["Paris", "Rome"] } }, required: ["city"], additionalProperties: false };
const tools = [{ type: "function", function: { name: "get_weather", parameters, strict: true } }];
const runner = client.chat.completions.stream({ model, messages, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 100 });
const called = (await runner.finalChatCompletion()).choices[0];
assert.equal(called.finish_reason, "tool_calls");
const call = called.message.tool_calls[0];
assert.match(JSON.parse(call.function.arguments).city, /Paris|Rome/);
says("tools, streamed", call.function);

const history = [...messages, called.message, { role: "tool", tool_call_id: call.id, content: "sunny" }];
const after = await client.chat.completions.create({ model, messages: history, tools, max_tokens: 20 });
says("a tool's result", after.choices[0].message);

const response_format = { type: "json_schema", json_schema: { name: "city", schema: parameters, strict: true } };
const parsed = await client.chat.completions.parse({ model, messages, response_format, max_tokens: 100 });
assert.match(JSON.parse(parsed.choices[0].message.content).city, /Paris|Rome/);
says("parse", parsed.choices[0].message.content);

const response = await client.responses.create({ model, input: "Who are you?", temperature: 0 });
assert.equal(response.output_text, text);
const events = [];
for await (const event of await client.responses.create({ model, input: "Who are you?", temperature: 0, stream: true })) events.push(event.type);
assert.equal(events.at(-1), "response.completed");
says("responses", `${events.length} events`);

await assert.rejects(client.chat.completions.create({ model, messages, temperature: 9 }), (error) => error.status === 400 && error.param === "temperature");
says("errors", "400, param temperature");
