"""Arguments that several commands share, and flags made from the fields of a dataclass."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer


@dataclasses.dataclass(slots=True)
class State:
    """What holds for the whole process: the object of typer's context."""

    debug: bool = False


def _set_debug(context: typer.Context, value: bool) -> None:
    if value:
        context.ensure_object(State).debug = True


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A checkpoint's folder or file, or org/name[@revision] on the hub; the demo without",
        show_default=False,
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks of errors", callback=_set_debug)
]


def with_flags(name: str, options: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a command that takes `name`: it gets a flag for each field of `options` instead.

    `options` is a dataclass whose fields are annotated as typer wants parameters to be.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        hints = get_type_hints(options, include_extras=True)
        fields = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in dataclasses.fields(options)
        ]

        def run(**given: Any) -> Any:
            values = {field.name: given.pop(field.name) for field in fields}
            return command(**{name: options(**values)}, **given)

        parameters = [
            made
            for parameter in signature.parameters.values()
            for made in (fields if parameter.name == name else [parameter])
        ]
        parameters.sort(key=lambda parameter: parameter.kind)
        run.__name__ = command.__name__
        run.__doc__ = command.__doc__
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # what inspect.signature reads
        return run

    return decorate
