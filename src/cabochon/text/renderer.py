"""The far side of `sandbox`: a process that renders one chat template and can do nothing else.

Run as a script, it imports nothing of this package. It reads a JSON object a line and answers each
with one: first the template, then the variables of every rendering. A template comes with the
checkpoint, from a stranger. Jinja's sandbox keeps it from Python's internals; the limits that this
process sets itself keep it from memory, files and other programs; its parent watches the clock.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from contextlib import suppress
from typing import Any

from jinja2 import Environment, Template, TemplateError, UndefinedError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_LIMIT = 1 << 30  # bytes, all of this process
OUTPUT_LIMIT = 10_000_000  # characters of one rendering
MESSAGE_LIMIT = 500  # characters of one error


class Refusal(TemplateError):
    """The template called `raise_exception`: these messages are not what it was written for."""


class GenerationBlock(Extension):
    """`{% generation %}`, with which training marks the assistant's words, changes no text."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def main() -> None:
    environment = _environment()
    _warm_up(environment)
    _confine()
    template: Template | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if template is None:
                template, answer = _compiled(environment, request["template"])
            else:
                answer = {"text": _render(template, request)}
        except Exception as error:
            answer = {"error": _message(error)}
        print(json.dumps(answer), flush=True)


def _warm_up(environment: Environment) -> None:
    """Read what Python and Jinja only read when it is first used: later no file opens any more."""
    environment.from_string(r"{{ strftime_now('%c\n') | pprint | wordwrap }}").render()
    with suppress(UndefinedError):
        environment.from_string("{{ missing.attribute }}").render()


def _confine() -> None:
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))
    ceiling = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = MEMORY_LIMIT if ceiling == resource.RLIM_INFINITY else min(MEMORY_LIMIT, ceiling)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _environment() -> Environment:
    """What transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = time.strftime
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise Refusal(message)


def _compiled(environment: Environment, source: str) -> tuple[Template, dict[str, Any]]:
    """The template, and the names it takes from outside."""
    names = meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), {"variables": sorted(names)}


def _render(template: Template, variables: dict[str, Any]) -> str:
    pieces = []
    size = 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > OUTPUT_LIMIT:
            raise Refusal(f"the text is longer than {OUTPUT_LIMIT:,} characters")
    return "".join(pieces)


def _message(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"it takes more memory than the {MEMORY_LIMIT >> 20} MiB it may have"
    if isinstance(error, RecursionError):
        return "it calls itself too often"
    text = str(error)[:MESSAGE_LIMIT]
    return text if isinstance(error, Refusal) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
