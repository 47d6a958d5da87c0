"""The tokenizer and the chat template that a GGUF model has in its metadata.

Gemma's is byte-pair encoding with merges, over text in which ▁ stands for a space, and with tokens
for the bytes of what it does not know; the metadata has its tokens and merges. Which tokens are
matched as a whole it has in part only: the converter calls most of them normal. Those are found by
what they are, tokens that no merge makes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from cabochon.errors import ConfigError
from cabochon.text.chat import ChatTemplate
from cabochon.text.tokenizer import Tokenizer

Metadata = Mapping[str, Any]

MODEL = "gemma4"

# Types of tokens in ggml.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6

# Structure, whatever type it has: `<|turn>`, `<turn|>`, `<|image|>`. The converter calls some of
# them user-defined, so that llama.cpp writes them into its answers.
_STRUCTURE = re.compile(r"<\|[^<>\s]+\|?>|<[^<>|\s]+\|>")

# What tokenizer_config.json calls those that templates may write.
_NAMES = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}


def read_tokenizer(metadata: Metadata) -> Tokenizer:
    """The tokenizer in the metadata of a GGUF model.

    Raises:
        ConfigError: there is none, or it is not Gemma 4's.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != MODEL:
        raise ConfigError(
            f"metadata: tokenizer.ggml.model is {kind!r}, expected {MODEL!r}; convert the model"
            " again with a current llama.cpp"
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    vocabulary = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocabulary) < len(tokens):
        raise ConfigError("metadata: tokenizer.ggml.tokens has a token twice")
    merges = _merges(_strings(metadata, "tokenizer.ggml.merges"))
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, tuple) or len(types) != len(tokens):
        raise ConfigError(
            f"metadata: tokenizer.ggml.token_type is not a type for each of {len(tokens)} tokens"
        )
    inner = tokenizers.Tokenizer(_model(vocabulary, merges, _unknown(metadata, tokens)))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    whole = _whole(vocabulary, types, merges)
    inner.add_tokens(
        [
            AddedToken(tokens[id_], special=_is_special(tokens[id_], types[id_]), normalized=False)
            for id_ in whole
        ]
    )
    return Tokenizer(inner)


def read_template(metadata: Metadata) -> ChatTemplate:
    """The chat template in the metadata of a GGUF model; a model without one has none.

    Raises:
        ConfigError: it is no text, does not compile, or writes a token that is not named.
    """
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ConfigError("metadata: tokenizer.chat_template is no text")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    known = set(_NAMES.values()).intersection(tokens)
    special = {name: token for name, token in _NAMES.items() if token in known}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        id_ = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if id_ is not None:
            special[f"{name}_token"] = _token(tokens, id_, f"tokenizer.ggml.{key}_token_id")
    return ChatTemplate(template, special)


def _strings(metadata: Metadata, key: str) -> Sequence[str]:
    found = metadata.get(key)
    if not isinstance(found, tuple) or not set(map(type, found)) <= {str}:
        raise ConfigError(
            f"metadata: {key} is not there, or no list of texts; text cannot become tokens"
        )
    return found


def _merges(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Both halves of each; of a vocabulary's quarter of a million nearly all are plain."""
    return [
        (first, second) if first and second else _merge(first + space + second)
        for first, space, second in map(str.partition, texts, repeat(" "))
    ]


def _merge(merge: str) -> tuple[str, str]:
    """Both halves; the space between them is not the first character."""
    at = merge.find(" ", 1)
    if at < 0 or at == len(merge) - 1:
        raise ConfigError(f"metadata: tokenizer.ggml.merges has {merge!r}, expected two tokens")
    return merge[:at], merge[at + 1 :]


def _unknown(metadata: Metadata, tokens: Sequence[str]) -> str:
    key = "tokenizer.ggml.unknown_token_id"
    return _token(tokens, metadata.get(key, 3), key)


def _token(tokens: Sequence[str], id_: Any, key: str) -> str:
    if type(id_) is not int or not 0 <= id_ < len(tokens):
        raise ConfigError(f"metadata: {key} is {id_!r}, expected an id below {len(tokens)}")
    return tokens[id_]


def _model(vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str) -> models.BPE:
    try:
        return models.BPE(
            vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the library's Rust code is no Exception
        raise ConfigError(f"metadata: tokens and merges make no tokenizer: {error}") from None


def _whole(
    vocabulary: Mapping[str, int], types: Sequence[int], merges: Iterable[tuple[str, str]]
) -> list[int]:
    """Ids of tokens that are matched as they are, before anything is merged."""
    unmade = dict(vocabulary)
    for token in map("".join, merges):
        unmade.pop(token, None)
    # Runs of newlines are tokens of their own, even where merges would lead to them too.
    runs = {token for token in vocabulary if not token.strip("\n")}
    normal = {vocabulary[token] for token in unmade.keys() | runs if len(token) > 1}
    named = {id_ for id_, kind in enumerate(types) if kind not in (_NORMAL, _BYTE)}
    return sorted(named | {id_ for id_ in normal if types[id_] == _NORMAL})


def _is_special(token: str, kind: int) -> bool:
    return kind in (_CONTROL, _UNKNOWN) or _STRUCTURE.fullmatch(token) is not None
