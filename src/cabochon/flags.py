"""Command-line flags made from the settings, so that no setting is written down twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from cabochon.settings import EngineSettings, flag, resolve_settings, variable

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
PrintConfig = Annotated[
    bool,
    typer.Option(
        "--print-config",
        help="Show each setting, as a settings file, with where it comes from; do nothing else",
        rich_help_panel="Settings",
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

        def run(config: Path | None, print_config: bool, **given: Any) -> Any:
            flags = {name: given.pop(name) for name in model.model_fields}
            set_flags = {name: value for name, value in flags.items() if value is not None}
            resolved = resolve_settings(set_flags, config)
            if print_config:
                print(resolved.text(model))
                return None
            return command(settings=resolved.settings, **given)

        parameters = [
            *own,
            *(_parameter(name, field) for name, field in model.model_fields.items()),
            _option("config", None, Config),
            _option("print_config", False, PrintConfig),
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
    return _option(name, None, Annotated[(bool if switch else str) | None, option])


def _option(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _help(field: FieldInfo) -> str:
    default = "" if field.default in (None, False, ()) else f" (default {field.default})"
    return f"{field.description}{default}"
