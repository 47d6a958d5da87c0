"""Tokens to text, piece by piece, and stop strings: held to the tokenizer's own decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from cabochon.errors import ConfigError, RequestError
from cabochon.text.detokenizer import Detokenizer, StopStrings
from cabochon.text.tokenizer import Tokenizer

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|image|>")
WORDS = ("▁", "▁the", "a", "b", "c", "ab", "é", "日", "▁▁", "\n", "<0xZZ>", "<0x1>", "x")


def build_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer with Gemma's parts: spaces as ▁, byte fallback, structure in special tokens."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: id_ for id_, token in enumerate(tokens)},
            merges=[("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    inner.add_special_tokens(list(SPECIAL))
    inner.add_tokens(["<added>"])
    return inner


INNER = build_tokenizer()
TOKENIZER = Tokenizer(INNER)
SIZE = TOKENIZER.vocab_size
BYTES = st.integers(len(SPECIAL), len(SPECIAL) + 255)


def pieces(ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER)
    return [*(detokenizer.push(id_) for id_ in ids), detokenizer.flush()]


def byte_ids(text: str) -> list[int]:
    return [len(SPECIAL) + byte for byte in text.encode()]


@given(st.lists(st.one_of(st.integers(0, SIZE + 3), BYTES)))
def test_pieces_join_to_the_whole_decoding(ids: list[int]) -> None:
    assert "".join(pieces(ids)) == INNER.decode(ids, skip_special_tokens=True)


@given(st.text())
def test_text_survives_tokens_and_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == INNER.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(ids)) == INNER.decode(ids, skip_special_tokens=True)


def test_a_character_of_several_bytes_comes_whole() -> None:
    assert pieces([*byte_ids("🐈"), TOKENIZER.encode("a")[0]]) == ["", "", "", "", "🐈a", ""]


def test_special_tokens_between_bytes_do_not_end_the_character() -> None:
    first, *rest = byte_ids("é")
    assert "".join(pieces([first, 1, *rest])) == "é"


def test_a_broken_character_becomes_replacement_marks() -> None:
    assert "".join(pieces([*byte_ids("é")[:1], TOKENIZER.encode("a")[0]])) == "\ufffda"


def test_special_tokens_have_ids_and_no_text() -> None:
    ids = TOKENIZER.encode("<bos><|turn>ab<turn|><added>")
    assert ids[:2] == [2, 4]
    assert TOKENIZER.decode(ids) == "ab<added>"
    assert set(range(len(SPECIAL))) == TOKENIZER.special
    assert TOKENIZER.token_id("<|image|>") == SPECIAL.index("<|image|>")
    assert TOKENIZER.token_id("no such token") is None


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        TOKENIZER.encode("\ud800")


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    inner = build_tokenizer()
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.open(tmp_path).encode("abcabcabc")) == 6


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "has no tokenizer.json"),
        ("{", "cannot be read as a tokenizer"),
        (
            {"model": {**json.loads(INNER.to_str())["model"], "continuing_subword_prefix": "##"}},
            "cannot be read as a tokenizer",
        ),
        ({"decoder": None}, "decodes by nothing"),
        ({"decoder": json.loads(decoders.ByteLevel().__getstate__())}, "decodes by ByteLevel"),
    ],
)
def test_unusable_tokenizers_are_refused(
    tmp_path: Path, content: str | dict[str, Any] | None, expected: str
) -> None:
    if isinstance(content, dict):
        content = json.dumps({**json.loads(INNER.to_str()), **content})
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=expected):
        Tokenizer.open(tmp_path)


def stopped(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    """All the text that a stream of `chunks` shows, and whether it was stopped."""
    filter_ = StopStrings(stops)
    shown = ""
    for chunk in chunks:
        text, hit = filter_.push(chunk)
        shown += text
        if hit:
            return shown, True
    return shown + filter_.flush(), False


def first_complete(stops: list[str], text: str) -> tuple[str, bool]:
    """The definition, one character at a time: cut at the longest stop when any is complete."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


SHORT = st.text("abc", min_size=1, max_size=4)


@given(st.lists(SHORT, max_size=4), st.lists(st.text("abc", max_size=5)))
def test_stops_do_not_depend_on_how_text_is_cut(stops: list[str], chunks: list[str]) -> None:
    assert stopped(stops, chunks) == first_complete(stops, "".join(chunks))


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    filter_ = StopStrings(["\n\nUser:"])
    assert filter_.push("Hello\n") == ("Hello", False)
    assert filter_.push("\nUs") == ("", False)
    assert filter_.push("ed") == ("\n\nUsed", False)
    assert filter_.push("\n\nUser: hi") == ("", True)
