"""The checkpoint's tokenizer: text to token ids and back, with nothing added in between.

Gemma's tokenizer writes a space as ▁ and what it has no token for as bytes, `<0xE2>`. Its decoder
undoes both and strips nothing. Incremental detokenization rests on that, so a checkpoint with
another decoder is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from cabochon.errors import ConfigError, RequestError

# No context holds more; tokenizing takes some 140 bytes of memory for a character, at worst.
MAX_CHARACTERS = 8_000_000
MAX_TOKENS = 2**20

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

DECODER_STEPS = ("Replace", "ByteFallback", "Fuse")


class Tokenizer:
    """Of one checkpoint; stateless, so threads may share it.

    `special` are the ids that stand for structure rather than text; `names` finds what would become
    one of them in a text, and what begins a name where a text ends: templates may trim a text and
    put another behind it.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        # A file saved by a training run may carry these; they would cut prompts in silence.
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        added = inner.get_added_tokens_decoder()
        self.special = frozenset(id_ for id_, token in added.items() if token.special)
        self.names = _pattern([token.content for token in added.values() if token.special])
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """Read `folder/tokenizer.json`.

        Raises:
            ConfigError: no such file, not a tokenizer, or not one that decodes like Gemma's.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{folder} has no tokenizer.json; text cannot become tokens without it"
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in the library's Rust code is no Exception
            raise ConfigError(f"{path} cannot be read as a tokenizer: {error}") from None
        steps = _decoder_steps(inner)
        if steps != DECODER_STEPS:
            raise ConfigError(
                f"{path} decodes by {' + '.join(steps) or 'nothing'};"
                f" expected Gemma's {' + '.join(DECODER_STEPS)}"
            )
        return cls(inner)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Special tokens written out in it become their ids.

        Raises:
            RequestError: `text` is not valid Unicode, or longer than any context.
        """
        if len(text) > MAX_CHARACTERS:
            raise RequestError(
                f"the text has {len(text):,} characters, expected at most {MAX_CHARACTERS:,}"
            )
        try:
            # As a batch of one: unlike `encode`, it lets other threads run meanwhile.
            encoded = self._inner.encode_batch_fast([text], add_special_tokens=False)
        except (TypeError, UnicodeError):
            raise RequestError(
                "the text holds half a surrogate pair, which is no character"
            ) from None
        if len(encoded[0]) > MAX_TOKENS:
            raise RequestError(
                f"the text has {len(encoded[0]):,} tokens, expected at most {MAX_TOKENS:,}"
            )
        ids: list[int] = encoded[0].ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._inner.decode(ids, skip_special_tokens=True)
        return text

    def spell(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens by their names."""
        # As a batch of one, for the same reason as above.
        text: str = self._inner.decode_batch([ids], skip_special_tokens=False)[0]
        return text

    def as_json(self) -> str:
        """The whole tokenizer, as its file has it."""
        text: str = self._inner.to_str()
        return text

    def token(self, id_: int) -> str | None:
        """The token with this id as the vocabulary writes it, if there is one."""
        token: str | None = self._inner.id_to_token(id_)
        return token

    def piece(self, id_: int) -> bytes:
        """The bytes that a token stands for; a special one for its name."""
        token = self.token(id_) or ""
        if _BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return (token if id_ in self.special else token.replace("▁", " ")).encode()

    def token_id(self, token: str) -> int | None:
        """The id of a token written as in the vocabulary, if there is one."""
        id_: int | None = self._inner.token_to_id(token)
        return id_


def _decoder_steps(inner: tokenizers.Tokenizer) -> tuple[str, ...]:
    if inner.decoder is None:
        return ()
    state = json.loads(inner.decoder.__getstate__())
    return tuple(step["type"] for step in state.get("decoders", [state]))


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    beginnings = {name[:n] for name in names for n in range(1, len(name))}

    def either(words: Iterable[str]) -> str:
        return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))

    return re.compile(
        rf"(?:{either(names)})|(?:{either(beginnings)})(?=\s*\Z)" if names else r"(?!)"
    )
