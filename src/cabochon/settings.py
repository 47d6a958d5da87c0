"""Settings of engine and server: one model for flags, environment variables and file keys.

`max_batch` is `--max-batch` on the command line, `CABOCHON_MAX_BATCH` in the environment and
`max_batch` in a TOML file. A flag wins over the environment, the environment over the file, the
file over the default. A name that does not exist is an error wherever it stands.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from cabochon.errors import CabochonError, UnreadableError

PREFIX = "CABOCHON_"

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class SettingsError(CabochonError):
    """A flag, an environment variable or a key of a settings file that cannot be used."""


def parse_bytes(value: Any) -> Any:
    """A number of bytes from `2GiB`, `500 MB` or `1048576`; what is no string is left as it is.

    Raises:
        ValueError: the string is no size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMG]I?|)B?\s*", value.upper())
    if match is None:
        raise ValueError("expected bytes, such as 2GiB, 500MB or 1048576")
    return int(float(match[1]) * _UNITS[match[2]])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class EngineSettings(BaseModel):
    """What `LLM` takes beside the checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="What activations are computed in: auto, float32 or bfloat16"
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="Threads that compute; torch's own choice without it"
    )
    kv_cache_bytes: Bytes | None = Field(
        None,
        ge=2**16,
        le=2**45,
        description="For keys and values, such as 2GiB; sized to the machine without it",
    )
    max_batch: int = Field(16, ge=1, le=1024, description="Requests computed together")
    prefill_chunk: int = Field(
        512, ge=1, le=2**17, description="Prompt tokens computed in one step"
    )
    max_context: int | None = Field(
        None,
        ge=2,
        le=2**24,
        description="Tokens of prompt and answer; what the model allows without it",
    )
    weights_only: bool = Field(
        False, description="Leave activations as they are where a recipe quantizes them"
    )


class Settings(EngineSettings):
    """Everything that can be set. What only the server reads stands here."""

    host: str = Field(
        "127.0.0.1", min_length=1, max_length=253, description="Address that the server listens on"
    )
    port: int = Field(
        8000, ge=0, le=65535, description="Port that the server listens on; 0 takes a free one"
    )
    api_key: SecretStr | None = Field(
        None,
        min_length=1,
        max_length=1024,
        description="Key that clients must send; set it in the environment or the file, since"
        " flags show in the process list",
    )
    insecure: bool = Field(False, description="Listen beyond this machine without a key")
    max_queue: int = Field(
        256, ge=0, le=100_000, description="Requests that may wait; more are answered with 429"
    )
    max_body_bytes: Bytes = Field(
        64 * 2**20, ge=2**10, le=2**32, description="Size of a request's body, such as 64MiB"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error"
    )

    @property
    def loopback(self) -> bool:
        """Whether the server can be reached from this machine only."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    def engine_options(self) -> dict[str, Any]:
        """The keyword arguments of `LLM`."""
        return {name: getattr(self, name) for name in EngineSettings.model_fields}

    def check_exposure(self) -> None:
        """Refuse to listen beyond this machine without a key, unless told to.

        Raises:
            SettingsError: `host` is not a loopback address, and there is neither a key nor consent.
        """
        if not (self.loopback or self.api_key or self.insecure):
            raise SettingsError(
                f"host {self.host} can be reached from other machines, and no api_key is set: set"
                f" {variable('api_key')}, or pass --insecure to serve everybody"
            )


def load_settings(flags: Mapping[str, Any], file: Path | None = None) -> Settings:
    """Settings from `flags` (those given, by name), the environment and a TOML file.

    Raises:
        SettingsError: an unknown name, or a value of the wrong kind or out of its range.
        UnreadableError: the file cannot be read as TOML.
    """
    from_file = _read_file(file) if file else {}
    from_environment = _read_environment(os.environ)
    values = {**from_file, **from_environment, **flags}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if name in flags:
            where = flag(name)
        elif name in from_environment:
            where = variable(name)
        else:
            where = f"{file}: {name}"
        found = "" if name == "api_key" else f" is {values[name]!r}"
        raise SettingsError(f"{where}{found}: {first['msg']}") from None


def flag(name: str) -> str:
    """The command line's spelling of a setting."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """The environment's spelling of a setting."""
    return PREFIX + name.upper()


def _read_file(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UnreadableError(f"settings file {file} cannot be read as TOML: {reason}") from None
    _refuse_unknown(values, str(file), str)
    return values


def _read_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values = {
        key.removeprefix(PREFIX).lower(): value
        for key, value in environment.items()
        if key.startswith(PREFIX)
    }
    _refuse_unknown(values, "environment", variable)
    return values


def _refuse_unknown(names: Iterable[str], where: str, spell: Callable[[str], str]) -> None:
    for name in names:
        if name not in Settings.model_fields:
            close = get_close_matches(name, Settings.model_fields, n=1)
            hint = f"; did you mean {spell(close[0])}?" if close else ""
            raise SettingsError(f"{where}: there is no setting {spell(name)}{hint}")
