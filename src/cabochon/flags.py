"""Command-line flags made from the settings, so that no setting is written down twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from cabochon.settings import EngineSettings, flag, load_settings, variable

SETTINGS_HELP = (
    f"Each setting is an environment variable too (--max-batch: {variable('max_batch')}), and a key"
    " of the settings file (max_batch = 8). A flag wins over the environment, that over the file."
)

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="TOML file of settings", rich_help_panel="Settings"
    ),
]


def with_settings(
    model: type[EngineSettings],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a command that takes `settings`: it gets a flag for each field of `model` instead.

    Values stay strings up to `load_settings`, which checks flags, environment and file alike.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "settings"]

        def run(config: Path | None, **given: Any) -> Any:
            flags = {name: given.pop(name) for name in model.model_fields}
            set_flags = {name: value for name, value in flags.items() if value is not None}
            return command(settings=load_settings(set_flags, config), **given)

        parameters = [
            *own,
            *(_parameter(name, field) for name, field in model.model_fields.items()),
            inspect.Parameter(
                "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Config
            ),
        ]
        run.__name__ = command.__name__
        run.__doc__ = command.__doc__
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # what inspect.signature reads
        return run

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    switch = field.annotation is bool
    option = typer.Option(
        flag(name),
        help=_help(field),
        metavar=None if switch else "VALUE",
        rich_help_panel="Settings",
        show_default=False,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[(bool if switch else str) | None, option],
    )


def _help(field: FieldInfo) -> str:
    default = "" if field.default in (None, False) else f" (default {field.default})"
    return f"{field.description}{default}"
