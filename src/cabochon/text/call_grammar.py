"""Tools to a grammar of one call in Gemma 4's syntax, in llguidance's dialect of Lark.

A tool whose schema binds it gets the grammar of that schema: everything the grammar derives obeys
the schema. Keys come in the order in which the chat template writes them, which the model learnt;
keys that the schema does not name come only where it allows them outright. What cannot be enforced
is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cabochon.errors import RequestError
from cabochon.text.parser import Structure

_MOST_RULES = 5000
_BARE_KEY = re.compile(r"[A-Za-z_$][A-Za-z0-9_.$-]*")
# Keywords that say nothing about which values are valid.
_ANNOTATIONS = frozenset(
    {
        "$anchor", "$comment", "$defs", "$id", "$schema", "contentEncoding", "contentMediaType",
        "default", "definitions", "deprecated", "description", "example", "examples", "format",
        "nullable", "readOnly", "title", "writeOnly",
    }
)  # fmt: skip
_OF_KIND: Mapping[str, frozenset[str]] = {
    "string": frozenset({"minLength", "maxLength", "pattern"}),
    "number": frozenset(
        {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    ),
    "integer": frozenset(
        {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    ),
    "boolean": frozenset(),
    "null": frozenset(),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
}
_KINDS = tuple(_OF_KIND)

# Any value, of a tool whose schema does not bind it.
_ANYTHING = r"""
value: text | NUMBER | "true" | "false" | "null" | object | array
object: "{" (pair ("," pair)*)? "}"
array: "[" (value ("," value)*)? "]"
pair: (KEY | text) ":" value
text: QUOTE TEXT? QUOTE
TEXT: /(?s:.+)/
KEY: /[A-Za-z_$][A-Za-z0-9_.$-]{0,63}/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/
"""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `bound`: only with arguments that its schema allows."""

    name: str
    parameters: Mapping[str, Any] | None
    bound: bool


def call_grammar(tools: Sequence[Tool], structure: Structure, where: str = "tools") -> str:
    """A grammar of one call of one of `tools`, with the tokens around it.

    Raises:
        RequestError: the vocabulary has no tokens for calls, or a schema that binds has a keyword
            that cannot be enforced.
    """
    if None in (structure.call, structure.call_end, structure.quote):
        raise RequestError("this checkpoint's vocabulary has no tokens for tool calls", where)
    quote = f"<[{structure.quote}]>"
    rules: list[str] = []
    names = []
    for i, tool in enumerate(tools):
        if tool.bound:
            writer = _Writer(
                tool.parameters or {"type": "object"}, quote, f"f{i}_", f"{where}[{i}]"
            )
            try:
                arguments = writer.mapping(writer.root, "parameters")
            except RecursionError:
                raise writer.refuse("the schema is nested too deep", "parameters") from None
            rules += writer.rules
        else:
            arguments = "object"
        names.append(f"{_quoted(tool.name)} {arguments}")
    start = f'start: <[{structure.call}]> "call:" ({" | ".join(names)}) <[{structure.call_end}]>'
    return "\n".join([start, _ANYTHING.replace("QUOTE", quote), *rules])


def _quoted(text: str) -> str:
    """`text` as Lark writes a string, apart from the empty one, which it does not have."""
    return json.dumps(text, ensure_ascii=False)


class _Writer:
    """Writes the rules of one tool's schema; `quote` is the token of quotes, as Lark has it."""

    def __init__(self, root: Mapping[str, Any], quote: str, prefix: str, where: str) -> None:
        self.root = root
        self.rules: list[str] = []
        self._quote = quote
        self._prefix = prefix
        self._where = where
        self._references: dict[str, str] = {}

    def refuse(self, what: str, path: str) -> RequestError:
        return RequestError(f"{path}: {what}", f"{self._where}.function.{path}")

    def mapping(self, schema: Any, path: str) -> str:
        """A rule for the arguments as a whole, which are an object whatever the schema says."""
        if "$ref" in schema:
            schema = self._resolved(schema["$ref"], path)
        if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
            raise self.refuse("arguments are an object", path)
        return self._value({**schema, "type": "object"}, path)

    def _rule(self, body: str, name: str | None = None) -> str:
        if len(self.rules) >= _MOST_RULES:
            raise self.refuse("the schema is too large", "parameters")
        name = name or f"{self._prefix}{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _value(self, schema: Any, path: str) -> str:
        """A rule for the values that `schema` allows."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, Mapping):
            raise self.refuse(f"{schema!r} is a schema that allows nothing", path)
        if "$ref" in schema:
            return self._reference(schema, path)
        body = self._choice(schema, path)
        if schema.get("nullable") is True:
            body = f'{body} | "null"'
        return self._rule(body)

    def _choice(self, schema: Mapping[str, Any], path: str) -> str:
        if "const" in schema or "enum" in schema:
            self._only(schema, {"const", "enum", "type"}, path)
            values = [schema["const"]] if "const" in schema else schema["enum"]
            if not isinstance(values, list) or not values:
                raise self.refuse("enum is a list with at least one value", path)
            return " | ".join(self._literal(value) for value in values)
        for name in ("anyOf", "allOf"):
            if name in schema:
                self._only(schema, {name}, path)
                branches = schema[name]
                if not isinstance(branches, list) or not branches:
                    raise self.refuse(f"{name} is a list of schemas", path)
                if name == "allOf" and len(branches) > 1:
                    raise self.refuse("allOf of several schemas cannot be enforced", path)
                found = [self._value(b, f"{path}.{name}[{i}]") for i, b in enumerate(branches)]
                return " | ".join(found)
        kinds = schema.get("type", list(_KINDS))
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or not kinds or not all(kind in _KINDS for kind in kinds):
            raise self.refuse(f"type is {schema.get('type')!r}", path)
        known = frozenset[str]().union(*(_OF_KIND[kind] for kind in kinds))
        self._only(schema, known | {"type"}, path)
        return " | ".join(self._of_kind(kind, schema, path) for kind in kinds)

    def _only(self, schema: Mapping[str, Any], known: set[str] | frozenset[str], path: str) -> None:
        unknown = sorted(set(schema) - known - _ANNOTATIONS)
        if unknown:
            raise self.refuse(f"{unknown[0]!r} cannot be enforced here", path)

    def _of_kind(self, kind: str, schema: Mapping[str, Any], path: str) -> str:
        match kind:
            case "string":
                return self._string(schema, path)
            case "number" | "integer":
                bounds = {key: schema[key] for key in sorted(_OF_KIND[kind]) if key in schema}
                return self._rule(f"%json {json.dumps({'type': kind, **bounds})}")
            case "boolean":
                return '"true" | "false"'
            case "null":
                return '"null"'
            case "array":
                return self._array(schema, path)
            case _:
                return self._object(schema, path)

    def _string(self, schema: Mapping[str, Any], path: str) -> str:
        least, most = self._bounds(schema, "minLength", "maxLength", path)
        if "pattern" in schema:
            if least or most is not None:
                raise self.refuse("a pattern and a length cannot be enforced together", path)
            return self._between_quotes(self._terminal(_whole(schema["pattern"])))
        if not least and most is None:
            return "text"
        if most == 0:
            return self._between_quotes("")
        letters = self._terminal(f"(?s:.{{{max(1, least)},{'' if most is None else most}}})")
        return self._between_quotes(f"{letters}{'' if least else '?'}")

    def _between_quotes(self, body: str) -> str:
        return f"{self._quote} {body} {self._quote}"

    def _text(self, text: str) -> str:
        return self._between_quotes(_quoted(text) if text else "")

    def _terminal(self, pattern: str) -> str:
        written = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern).replace("\n", "\\n")
        return self._rule(f"/{written}/", f"{self._prefix.upper()}{len(self.rules)}")

    def _array(self, schema: Mapping[str, Any], path: str) -> str:
        least, most = self._bounds(schema, "minItems", "maxItems", path)
        if most == 0:
            return '"[" "]"'
        item = self._value(schema.get("items", True), f"{path}.items")
        more = "" if most is None else str(most - 1)
        some = item if most == 1 else f'{item} ("," {item}){{{max(0, least - 1)},{more}}}'
        return f'"[" {some} "]"' if least else f'"[" ({some})? "]"'

    def _bounds(
        self, schema: Mapping[str, Any], low: str, high: str, path: str
    ) -> tuple[int, int | None]:
        least, most = schema.get(low, 0), schema.get(high)
        for bound in (least, most):
            if bound is not None and (type(bound) is not int or not 0 <= bound <= 100_000):
                raise self.refuse(f"{low} and {high} are integers from 0 to 100000", path)
        if most is not None and most < least:
            raise self.refuse(f"{low} is more than {high}: nothing is allowed", path)
        return least, most

    def _object(self, schema: Mapping[str, Any], path: str) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise self.refuse("properties is an object and required a list", path)
        more = schema.get("additionalProperties", not properties)
        for name in required:
            if not isinstance(name, str) or name not in properties:
                raise self.refuse(f"{name!r} is required, but not among the properties", path)
        rest = {False: '""', True: '""'}  # what follows, behind no member and behind some
        if more is not False:
            value = self._value(more, f"{path}.additionalProperties")
            pair = f'(KEY | text) ":" {value}'
            rest = {False: f'({pair} ("," {pair})*)?', True: f'("," {pair})*'}
        for name in sorted(properties, key=str.lower, reverse=True):
            value = self._value(properties[name], f"{path}.properties.{name}")
            member = f'{self._key(name)} ":" {value} {rest[True]}'
            needed = name in required
            rest = {
                some: self._rule(
                    f"{comma}{member}" if needed else f"{comma}{member} | {rest[some]}"
                )
                for some, comma in ((False, ""), (True, '"," '))
            }
        return f'"{{" {rest[False]} "}}"'

    def _literal(self, value: Any) -> str:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list):
            items = ' "," '.join(self._literal(item) for item in value)
            return f'"[" {items} "]"'
        if isinstance(value, Mapping):
            keys = sorted(value, key=str.lower)
            members = [f'{self._key(key)} ":" {self._literal(value[key])}' for key in keys]
            pairs = ' "," '.join(members)
            return f'"{{" {pairs} "}}"'
        return _quoted(json.dumps(value))

    def _key(self, name: str) -> str:
        return _quoted(name) if _BARE_KEY.fullmatch(name) else self._text(name)

    def _reference(self, schema: Mapping[str, Any], path: str) -> str:
        self._only(schema, {"$ref"}, path)
        target = schema["$ref"]
        if not isinstance(target, str):
            raise self.refuse(f"$ref is {target!r}, expected a string", path)
        if target not in self._references:
            name = f"{self._prefix}ref{len(self._references)}"
            found = self._resolved(target, path)
            self._references[target] = name
            self._rule(self._value(found, path), name)
        return self._references[target]

    def _resolved(self, target: Any, path: str) -> Any:
        found: Any = self.root
        steps = target[1:].split("/")[1:] if isinstance(target, str) and target[:1] == "#" else [""]
        for step in steps:
            key = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or key not in found:
                raise self.refuse(f"$ref {target!r} is not in the schema", path)
            found = found[key]
        return found


def _whole(pattern: Any) -> str:
    """A pattern that must match a whole text, of one that is searched for in it."""
    text = str(pattern)
    head, text = ("", text[1:]) if text.startswith("^") else ("(?s:.*)", text)
    if text.endswith("$") and not text.endswith("\\$"):
        return f"{head}(?:{text[:-1]})"
    return f"{head}(?:{text})(?s:.*)"
