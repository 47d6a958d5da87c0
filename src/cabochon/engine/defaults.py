"""What a checkpoint asks of generation, in `generation_config.json` or in metadata of GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cabochon.engine.request import SamplingParams
from cabochon.errors import ConfigError, RequestError
from cabochon.files import read_json_object
from cabochon.text.tokenizer import Tokenizer

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_END_OF_TURN = "<turn|>"

# Where GGUF keeps the same. Its converter knows one end only; these are all of Gemma's.
_GGUF_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_GGUF_TOKENS = {
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "eot_token_id": "tokenizer.ggml.eot_token_id",
    "suppress_tokens": "tokenizer.ggml.suppress_tokens",
}
_TOOL_RESPONSE = "<|tool_response>"
_ENDS = ("<eos>", _END_OF_TURN, _TOOL_RESPONSE)
_RECOMMENDED = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}  # by Gemma's model cards


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling where a request does not say otherwise, and tokens that end or never occur."""

    sampling: SamplingParams
    ends: frozenset[int]
    suppressed: tuple[int, ...]  # never drawn

    @classmethod
    def open(cls, folder: Path, tokenizer: Tokenizer) -> GenerationDefaults:
        """Read `generation_config.json`, and `config.json` for what it leaves out.

        A checkpoint that names no end ends with its turn: quantizers lose this file at times. Every
        one ends where the result of a tool is to stand, which is not the model's to write.

        Raises:
            ConfigError: a value that is not of its kind, or a token outside of the vocabulary.
        """
        path = folder / "generation_config.json"
        raw = read_json_object(path)
        ends = _tokens(raw, "eos_token_id", path, tokenizer)
        if not ends:
            config = folder / "config.json"
            ends = _tokens(read_json_object(config), "eos_token_id", config, tokenizer)
        if not ends:
            turn = tokenizer.token_id(_END_OF_TURN)
            ends = (1,) if turn is None else (1, turn)
        response = tokenizer.token_id(_TOOL_RESPONSE)
        if response in tokenizer.special:
            ends = (*ends, response)
        suppressed = _tokens(raw, "suppress_tokens", path, tokenizer)
        return cls(_sampling(raw, path), frozenset(ends), suppressed)

    @classmethod
    def of_gguf(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> GenerationDefaults:
        """Of the metadata of a GGUF model, which has few of them: Gemma's own for the others.

        Raises:
            ConfigError: a value that is not of its kind, or a token outside of the vocabulary.
        """
        path = Path("metadata")
        given = {key: metadata[at] for key, at in _GGUF_SAMPLING.items() if at in metadata}
        raw = {key: metadata[at] for key, at in _GGUF_TOKENS.items() if at in metadata}
        suppressed = raw.pop("suppress_tokens", ())
        if not isinstance(suppressed, tuple):
            raise ConfigError(f"metadata: {_GGUF_TOKENS['suppress_tokens']} is {suppressed!r}")
        ends = {id_ for key in raw for id_ in _tokens(raw, key, path, tokenizer)}
        ends |= {id_ for token in _ENDS if (id_ := tokenizer.token_id(token)) is not None}
        never = _tokens({"suppress_tokens": [*suppressed]}, "suppress_tokens", path, tokenizer)
        return cls(_sampling({**_RECOMMENDED, **given}, path), frozenset(ends), never)


def _sampling(raw: Mapping[str, Any], path: Path) -> SamplingParams:
    given = {key: raw[key] for key in _SAMPLING if raw.get(key) is not None}
    if raw.get("do_sample") is False:
        given["temperature"] = 0.0
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{path}: {key} is {value!r}, expected a number")
    try:
        return SamplingParams(**given)
    except RequestError as error:
        raise ConfigError(f"{path}: {error}") from None


def _tokens(raw: Mapping[str, Any], key: str, path: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """One token id or a list of them; none if the key is absent or null."""
    value = raw.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for id_ in ids:
        if type(id_) is not int or not 0 <= id_ < tokenizer.vocab_size:
            raise ConfigError(
                f"{path}: {key} has {id_!r}, expected token ids below {tokenizer.vocab_size}"
            )
    return tuple(ids)
