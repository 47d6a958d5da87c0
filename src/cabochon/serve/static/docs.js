// The API as its own description has it.

import { get } from "./api.js";
import { el, markdown } from "./markdown.js";
import { setUpTheme } from "./theme.js";

setUpTheme(document.getElementById("theme"));
const main = document.getElementById("docs");

function resolve(schema, api) {
  const name = schema?.$ref?.split("/").pop();
  return name ? (api.components?.schemas?.[name] ?? schema) : (schema ?? {});
}

// A schema's type in few words.
function kind(schema) {
  if (!schema) return "anything";
  if (schema.$ref) return schema.$ref.split("/").pop();
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return [...new Set(choices.map(kind))].join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${kind(schema.items)}`;
  return schema.type ?? "anything";
}

function fields(schema, api) {
  const known = resolve(schema, api);
  const rows = Object.entries(known.properties ?? {}).map(([name, field]) => {
    const needed = known.required?.includes(name) ? ", required" : "";
    const words = field.description ? `: ${field.description}` : "";
    return el("li", {}, el("code", {}, name), ` ${kind(field)}${needed}${words}`);
  });
  return rows.length ? el("ul", {}, ...rows) : el("p", { className: "muted" }, kind(schema));
}

function operation(path, verb, described, api) {
  const head = el("summary", {}, el("span", { className: "verb" }, verb.toUpperCase()), el("code", {}, path), ` ${described.summary ?? ""}`);
  const node = el("details", {}, head);
  if (described.description) node.append(markdown(described.description));
  for (const one of described.parameters ?? [])
    node.append(el("p", {}, el("code", {}, one.name), ` in the ${one.in}: ${kind(one.schema)}`));
  const body = described.requestBody?.content?.["application/json"]?.schema;
  if (body) node.append(el("h3", {}, "Body"), fields(body, api));
  for (const [status, answer] of Object.entries(described.responses ?? {})) {
    node.append(el("h3", {}, `${status} ${answer.description ?? ""}`));
    for (const [type, { schema }] of Object.entries(answer.content ?? {}))
      node.append(el("p", {}, el("code", {}, type)), schema ? fields(schema, api) : "");
  }
  return node;
}

try {
  const api = await get("/openapi.json");
  const model = (await get("/v1/models")).data[0].id;
  const request = { model, messages: [{ role: "user", content: "Who are you?" }] };
  const example = `curl ${location.origin}/v1/chat/completions -H 'content-type: application/json' \\\n  -d '${JSON.stringify(request)}'`;
  main.replaceChildren(
    el("h2", {}, "The API"),
    el("p", {}, "OpenAI's clients work with the base URL ", el("code", {}, `${location.origin}/v1`), "."),
    el("pre", { tabIndex: 0 }, example),
    ...Object.entries(api.paths).flatMap(([path, verbs]) =>
      Object.entries(verbs).map(([verb, described]) => operation(path, verb, described, api)),
    ),
  );
} catch (error) {
  main.replaceChildren(el("p", { className: "failure", role: "alert" }, error.message));
}
