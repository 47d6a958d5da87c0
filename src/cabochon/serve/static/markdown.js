// Markdown as models write it, made of DOM nodes: no HTML of an answer is ever parsed, and nothing
// in it is loaded. What is not understood stays as it was written.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ROW = /^\s*\|(.+)\|\s*$/;
const DIVIDER = /^\s*\|(\s*:?-+:?\s*\|)+\s*$/;

export function markdown(text) {
  const out = document.createDocumentFragment();
  const lines = text.split("\n");
  let at = 0;
  while (at < lines.length) at = block(lines, at, out);
  return out;
}

// Appends the block that begins in line `at` and returns the line behind it.
function block(lines, at, out) {
  const line = lines[at];
  const fence = line.match(FENCE);
  if (fence) return codeBlock(lines, at, fence, out);
  if (!line.trim()) return at + 1;
  const heading = line.match(HEADING);
  if (heading) {
    // The page has h1 and h2 of its own.
    out.append(el(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2])));
    return at + 1;
  }
  if (RULE.test(line)) {
    out.append(el("hr"));
    return at + 1;
  }
  if (ITEM.test(line)) return list(lines, at, out);
  if (/^\s*>/.test(line)) return quote(lines, at, out);
  if (ROW.test(line) && DIVIDER.test(lines[at + 1] ?? "")) return table(lines, at, out);
  return paragraph(lines, at, out);
}

function codeBlock(lines, at, fence, out) {
  const code = [];
  for (at += 1; at < lines.length && !lines[at].trim().startsWith(fence[1]); at++) code.push(lines[at]);
  out.append(el("pre", { tabIndex: 0 }, el("code", { className: fence[2].trim() }, code.join("\n"))));
  return at + 1;
}

function list(lines, at, out) {
  const indent = lines[at].match(ITEM)[1].length;
  const numbered = /\d/.test(lines[at].match(ITEM)[2]);
  const node = el(numbered ? "ol" : "ul");
  if (numbered) node.start = parseInt(lines[at].match(ITEM)[2], 10);
  while (at < lines.length) {
    const item = lines[at].match(ITEM);
    if (!item || item[1].length < indent) break;
    if (item[1].length > indent + 1) {
      at = list(lines, at, node.lastChild ?? node);
      continue;
    }
    if (/\d/.test(item[2]) !== numbered) break;
    const words = [item[3]];
    for (at += 1; at < lines.length && /^\s{2,}\S/.test(lines[at]) && !ITEM.test(lines[at]); at++)
      words.push(lines[at].trim());
    node.append(el("li", {}, ...inline(words.join(" "))));
  }
  out.append(node);
  return at;
}

function quote(lines, at, out) {
  const inner = [];
  for (; at < lines.length && /^\s*>/.test(lines[at]); at++) inner.push(lines[at].replace(/^\s*>\s?/, ""));
  out.append(el("blockquote", {}, markdown(inner.join("\n"))));
  return at;
}

function table(lines, at, out) {
  const cells = (line) => line.match(ROW)[1].split("|").map((cell) => cell.trim());
  const row = (kind, line) => el("tr", {}, ...cells(line).map((cell) => el(kind, {}, ...inline(cell))));
  const head = el("thead", {}, row("th", lines[at]));
  const body = el("tbody");
  for (at += 2; at < lines.length && ROW.test(lines[at]); at++) body.append(row("td", lines[at]));
  out.append(el("div", { className: "scroll" }, el("table", {}, head, body)));
  return at;
}

function paragraph(lines, at, out) {
  const node = el("p");
  const first = at;
  for (; at < lines.length && lines[at].trim(); at++) {
    if (at > first && (FENCE.test(lines[at]) || ITEM.test(lines[at]) || HEADING.test(lines[at]))) break;
    if (at > first) node.append(el("br"));
    node.append(...inline(lines[at]));
  }
  out.append(node);
  return at;
}

const INLINE =
  /(`+)(.+?)\1|\*\*(\S(?:.*?\S)?)\*\*|\*(\S(?:.*?\S)?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/;

// Nodes of one line.
function inline(text) {
  const nodes = [];
  for (let found; (found = text.match(INLINE)); text = text.slice(found.index + found[0].length)) {
    if (found.index) nodes.push(text.slice(0, found.index));
    const [, , code, strong, emphasis, label, address] = found;
    if (code !== undefined) nodes.push(el("code", {}, code.trim() || code));
    else if (strong !== undefined) nodes.push(el("strong", {}, ...inline(strong)));
    else if (emphasis !== undefined) nodes.push(el("em", {}, ...inline(emphasis)));
    else nodes.push(el("a", { href: address, rel: "noreferrer noopener", target: "_blank" }, label));
  }
  if (text) nodes.push(text);
  return nodes;
}
