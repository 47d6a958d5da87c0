// The checkpoint's load plan as a picture: each group of matrices an area, each scheme a colour.

import { get } from "./api.js";
import { el } from "./markdown.js";

const COLOURS = ["#e9a6a0", "#a9c7e8", "#c7dba0", "#e3c88f", "#c9b4e4", "#9fd8cb", "#e6b1d0", "#c9c3bd"];
const WIDTH = 960; // at most; on a phone the picture is as wide as the page, so that its words stay legible
const HEIGHT = 420;

export function size(bytes) {
  for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (bytes >= scale) return `${(bytes / scale).toFixed(2)} ${unit}`;
  return `${bytes} B`;
}

export async function drawPlan(panel) {
  if (panel.childElementCount) return;
  try {
    const [plan, models] = await Promise.all([get("/plan"), get("/v1/models")]);
    const width = Math.min(WIDTH, panel.clientWidth - 32);
    panel.replaceChildren(...sections(plan, models.data[0].id, width));
  } catch (error) {
    panel.replaceChildren(el("p", { className: "failure", role: "alert" }, error.message));
  }
}

function* sections(plan, model, width) {
  yield el("h2", {}, model);
  yield el("p", { className: "verdict" }, `${plan.architecture}: ${plan.verdict}, ${size(plan.bytes)} read.`);
  const colours = new Map();
  for (const { scheme } of plan.groups)
    if (!colours.has(scheme)) colours.set(scheme, COLOURS[colours.size % COLOURS.length]);
  yield treemap(plan, colours, width);
  yield legend(plan, colours);
  yield el("h2", {}, "What is read");
  yield groupTable(plan, colours);
  if (plan.kv_cache?.length) {
    yield el("h2", {}, "What a conversation keeps");
    yield cacheTable(plan.kv_cache);
  }
  yield* findings("Notes", plan.notes, "There is nothing to note.");
  yield* findings("Left out", plan.dropped, "Every stored tensor is used.");
  yield* certificate(plan);
}

// ---- the picture

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function treemap(plan, colours, width) {
  const rows = plan.groups.filter((row) => row.bytes > 0).sort((a, b) => b.bytes - a.bytes);
  const said = rows.map((row) => `${row.group} ${row.scheme} ${size(row.bytes)}`).join("; ");
  const picture = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": `Bytes by group and scheme: ${said}` });
  for (const { item, x, y, w, h } of squarify(rows, width, HEIGHT)) {
    const share = `${((100 * item.bytes) / plan.bytes).toFixed(1)} %`;
    const box = svg("g", {});
    box.append(
      svg("rect", { x: x + 1, y: y + 1, width: Math.max(0, w - 2), height: Math.max(0, h - 2), rx: 4, fill: colours.get(item.scheme) }),
      svg("title", {}, `${item.group}: ${item.count} × ${item.scheme}, ${item.bits} bits, ${size(item.bytes)} (${share})`),
    );
    if (w > 60 && h > 40) {
      const fits = Math.floor((w - 16) / 6.6);
      const name = item.group.length > fits ? `${item.group.slice(0, fits - 1)}…` : item.group;
      const facts = [`${size(item.bytes)}, ${share}`, share, ""].find((words) => words.length <= fits);
      box.append(svg("text", { x: x + 9, y: y + 20 }, name));
      box.append(svg("text", { x: x + 9, y: y + 36, class: "small" }, facts));
    }
    picture.append(box);
  }
  return picture;
}

// Squarified treemap (Bruls, Huizing, van Wijk 2000): rows along the shorter side, each as long as
// the worst of its shapes gets better.
function squarify(items, width, height) {
  const total = items.reduce((sum, item) => sum + item.bytes, 0) || 1;
  let left = items.map((item) => ({ item, area: (item.bytes / total) * width * height }));
  const placed = [];
  let [x, y, w, h] = [0, 0, width, height];
  while (left.length) {
    const side = Math.min(w, h);
    let row = [left[0]];
    while (row.length < left.length && worst([...row, left[row.length]], side) <= worst(row, side))
      row = left.slice(0, row.length + 1);
    const thick = row.reduce((sum, one) => sum + one.area, 0) / side;
    let along = 0;
    for (const { item, area } of row) {
      const long = area / thick;
      placed.push(w >= h ? { item, x, y: y + along, w: thick, h: long } : { item, x: x + along, y, w: long, h: thick });
      along += long;
    }
    if (w >= h) [x, w] = [x + thick, w - thick];
    else [y, h] = [y + thick, h - thick];
    left = left.slice(row.length);
  }
  return placed;
}

function worst(row, side) {
  const sum = row.reduce((total, { area }) => total + area, 0);
  return Math.max(...row.map(({ area }) => Math.max((side * side * area) / (sum * sum), (sum * sum) / (side * side * area))));
}

function swatch(colour) {
  const node = el("span", { className: "swatch" });
  node.style.background = colour;
  node.setAttribute("aria-hidden", "true");
  return node;
}

function legend(plan, colours) {
  const items = [...colours].map(([scheme, colour]) => {
    const bytes = plan.groups.filter((row) => row.scheme === scheme).reduce((sum, row) => sum + row.bytes, 0);
    return el("li", {}, swatch(colour), `${scheme} ${size(bytes)}`);
  });
  return el("ul", { className: "legend", ariaLabel: "Schemes" }, ...items);
}

// ---- the same in words

function table(heads, rows) {
  const cells = (kind, row) => row.map((cell, i) => el(kind, { className: heads[i].n ? "n" : "" }, cell));
  const head = el("tr", {}, ...cells("th", heads.map((head) => head.name)));
  const body = rows.map((row) => el("tr", {}, ...cells("td", row)));
  return el("div", { className: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)));
}

const text = (name) => ({ name });
const number = (name) => ({ name, n: true });

function groupTable(plan, colours) {
  const heads = [text("Group"), text("Scheme"), number("Bits"), number("Count"), number("Bytes")];
  return table(
    heads,
    plan.groups.map((row) => [
      row.group,
      el("span", {}, swatch(colours.get(row.scheme)), row.scheme),
      String(row.bits),
      row.count.toLocaleString("en"),
      size(row.bytes),
    ]),
  );
}

function cacheTable(rows) {
  const heads = [text("Layers"), text("Of"), number("Heads × size"), number("A token, bf16"), number("A token, f32")];
  return table(
    heads,
    rows.map((row) => [
      `${row.layers} ${row.kind}`,
      row.window ? `the last ${row.window} tokens` : "all tokens",
      `${row.kv_heads} × ${row.head_dim}`,
      size(row.bytes_per_token.bf16),
      size(row.bytes_per_token.f32),
    ]),
  );
}

function* findings(title, found, nothing) {
  yield el("h2", {}, title);
  if (!found?.length) yield el("p", { className: "muted" }, nothing);
  for (const { where, count, detail } of found ?? []) {
    const places = where.map((place) => el("code", {}, place));
    const times = count > 1 ? ` ×${count}` : "";
    yield el("div", { className: "finding" }, ...places, times, el("div", { className: "muted" }, detail));
  }
}

// What the load itself proved.
function* certificate({ certificate: found }) {
  const sum = (name) => found.sites.reduce((total, site) => total + site[name], 0);
  const many = (count) => count.toLocaleString("en");
  const largest = found.sites.reduce((most, site) => (site.largest > most.largest ? site : most), { largest: -1 });
  const facts = {
    Fingerprint: found.fingerprint,
    Filled: `${many(found.slots_filled)} of ${many(found.slots_planned)} planned matrices and parameters`,
    Plan: found.plan_hash,
    Weights: found.weights_hash,
    "Looked at": `${many(sum("seen"))} of ${many(sum("entries"))} entries, none of them NaN or infinite`,
    Zeros: `${((100 * sum("zeros")) / Math.max(1, sum("seen"))).toFixed(2)} % of the entries`,
    Scales: `${many(sum("scales"))}, ${many(sum("dead_groups"))} of them zero`,
    "Largest entry": `${largest.largest?.toPrecision(4)} in ${largest.name}`,
  };
  yield el("h2", {}, "Certificate");
  const list = el("dl");
  for (const [name, value] of Object.entries(facts)) list.append(el("dt", {}, name), el("dd", {}, value));
  yield list;
  yield* findings("What looks odd", found.notes, "Nothing.");
}
