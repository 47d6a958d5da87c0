"""Settings of engine and server: one model for flags, environment variables and file keys.

`max_batch` is `--max-batch` on the command line, `CABOCHON_MAX_BATCH` in the environment and
`max_batch` in a TOML file. A flag wins over the environment, the environment over the file, the
file over the default. A name that does not exist is an error wherever it stands.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)

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


def _parse_names(value: Any) -> Any:
    """Names behind each other with commas, as a flag and the environment write a list."""
    names = value.split(",") if isinstance(value, str) else value
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return value
    return tuple(name.strip() for name in names if name.strip())


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Names = Annotated[tuple[str, ...], BeforeValidator(_parse_names)]

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#]+", re.IGNORECASE)


class EngineSettings(BaseModel):
    """What `LLM` takes beside the checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="What activations are computed in: auto, float32 or bfloat16"
    )
    activations: Literal["auto", "int8", "int16", "float32"] = Field(
        "auto",
        description="What the inputs of quantized matrices are rounded to, 32 at a time: int8,"
        " int16, or float32 for not at all; int8 without it, float32 where dtype is named",
    )
    kv_dtype: Literal["auto", "float16", "float32", "int8"] = Field(
        "auto",
        description="What keys and values are kept in: float16, float32, or int8, which is half of"
        " float16 and less exact; float16 without it, float32 where dtype is named",
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
    picture_tokens: int | None = Field(
        None,
        ge=70,
        le=1120,
        description="Tokens that a picture may take: 70, 140, 280, 560 or 1120; as the checkpoint"
        " says without it, and 280 where it says nothing, as a GGUF does",
    )
    drafter: str | None = Field(
        None,
        min_length=1,
        description="A small model made to guess for this one, such as org/name-assistant or its"
        " folder",
    )
    draft_tokens: int | None = Field(
        None,
        ge=0,
        le=63,
        description="Tokens guessed, from what a text repeats or by the drafter, and checked in one"
        " step, among all requests; without it 15 with a drafter (of a drafter 3 where there are"
        " experts) and where that changes no bit of an answer, else 0",
    )
    weights_only: bool = Field(
        False, description="Leave activations as they are where a recipe quantizes them"
    )
    debug_nan: bool = Field(
        False,
        description="Name the module that first gave numbers that are none; slows every step",
    )

    def engine_options(self) -> dict[str, Any]:
        """The keyword arguments of `LLM`."""
        return {name: getattr(self, name) for name in EngineSettings.model_fields}


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
    api_key_file: Path | None = Field(
        None, description="File of keys that clients may send, one a line, beside api_key"
    )
    insecure: bool = Field(False, description="Listen beyond this machine without a key")
    allow_origins: Names = Field(
        (),
        description="Sites whose pages may use the server from a browser, such as"
        " https://chat.example.com; only its own without it",
    )
    max_queue: int = Field(
        256, ge=0, le=100_000, description="Requests that may wait; more are answered with 429"
    )
    max_queue_tokens: int = Field(
        2**20,
        ge=1,
        le=2**40,
        description="Tokens of prompts that may wait; more are answered with 429",
    )
    max_connections: int = Field(1024, ge=1, le=2**16, description="Connections open at once")
    max_body_bytes: Bytes = Field(
        64 * 2**20, ge=2**10, le=2**32, description="Size of a request's body, such as 64MiB"
    )
    request_seconds: float = Field(
        600.0, gt=0, le=86_400, description="After which a request is ended, answered or not"
    )
    drain_seconds: float = Field(
        30.0, ge=0, le=3600, description="That running answers get to end after SIGTERM"
    )
    media_urls: bool = Field(
        False, description="Fetch pictures, sounds and videos that requests name by URL"
    )
    media_hosts: Names = Field(
        (), description="Hosts that media may be fetched from; any public one without it"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="text, or json: an object a line"
    )

    @field_validator("allow_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin, such as https://chat.example.com")
        return origins

    @property
    def loopback(self) -> bool:
        """Whether the server can be reached from this machine only."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check_exposure(self) -> None:
        """Refuse to listen beyond this machine without a key, unless told to.

        Raises:
            SettingsError: `host` is not a loopback address, and there is neither a key nor consent.
            UnreadableError: `api_key_file` cannot be read, or holds no key.
        """
        if not (self.api_keys() or self.loopback or self.insecure):
            raise SettingsError(
                f"host {self.host} can be reached from other machines, and no api_key is set: set"
                f" {variable('api_key')}, or pass --insecure to serve everybody"
            )

    def api_keys(self) -> tuple[str, ...]:
        """Every key that a client may send; none if there is no need of one.

        Raises:
            UnreadableError: `api_key_file` cannot be read, or holds no key.
        """
        keys = [self.api_key.get_secret_value()] if self.api_key else []
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                raise UnreadableError(f"api_key_file cannot be read: {error}") from None
            found = [key for key in map(str.strip, lines) if key and not key.startswith("#")]
            if not found:
                raise UnreadableError(f"api_key_file {self.api_key_file} holds no key")
            keys += found
        return tuple(keys)


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings, and where each value comes from that is not its default."""

    settings: Settings
    sources: Mapping[str, str]

    def text(self, model: type[EngineSettings]) -> str:
        """The fields of `model` as a settings file that says where each comes from.

        What is not set, and secrets, stand there as comments.
        """
        lines = []
        for name in model.model_fields:
            value = getattr(self.settings, name)
            source = self.sources.get(name, "default")
            if isinstance(value, SecretStr):
                lines.append(f"# {name} = (not shown)  # {source}")
            elif value is None:
                lines.append(f"# {name} =  # {source}")
            else:
                lines.append(f"{name} = {_as_toml(value)}  # {source}")
        return "\n".join(lines)


def _as_toml(value: Any) -> str:
    # JSON's numbers, strings, booleans and lists of strings are TOML's too
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def load_settings(flags: Mapping[str, Any], file: Path | None = None) -> Settings:
    """Settings from `flags` (those given, by name), the environment and a TOML file.

    Raises:
        SettingsError: an unknown name, or a value of the wrong kind or out of its range.
        UnreadableError: the file cannot be read as TOML.
    """
    return resolve_settings(flags, file).settings


def resolve_settings(flags: Mapping[str, Any], file: Path | None = None) -> Resolved:
    """`load_settings`, with the source of each value."""
    layers = (
        (_read_file(file) if file else {}, lambda name: f"{file}: {name}"),
        (_read_environment(os.environ), variable),
        (flags, flag),
    )
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer, spell in layers:
        values |= layer
        sources |= {name: spell(name) for name in layer}
    try:
        return Resolved(Settings.model_validate(values), sources)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        found = "" if name == "api_key" else f" is {values[name]!r}"
        raise SettingsError(f"{sources[name]}{found}: {first['msg']}") from None


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
