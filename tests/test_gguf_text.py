"""Tokenizer and chat template from GGUF metadata are those that were converted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from conftest import FIXTURES
from gguf import SpecialVocab, TokenType
from gguf.vocab import LlamaHfVocab
from gguf_models import FOLDER, MODELS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from cabochon import LLM
from cabochon.checkpoint.gguf import read_gguf
from cabochon.engine.defaults import GenerationDefaults
from cabochon.text import tokenizer as ours
from cabochon.text.chat import ChatTemplate
from cabochon.text.gguf import read_template, read_tokenizer

TINY = FIXTURES / "e2b-bf16"
CORPUS = "The cabochon is  polished.\n\n\n\tdef f(x):\n        return x  # é 你好\n" * 20

# What the converter calls user-defined, so that it is written into answers.
VISIBLE = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'}


@cache
def converted() -> Mapping[str, Any]:
    return read_gguf(MODELS["e2b q4_1"][0]).metadata


@cache
def tiny() -> tuple[Tokenizer, ours.Tokenizer]:
    return Tokenizer.from_file(str(TINY / "tokenizer.json")), read_tokenizer(converted())


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, ours.Tokenizer]:
    """A tokenizer with all that Gemma's has beside structure, and what the converter makes of it.

    Runs of newlines and of ▁, tags and unused tokens are added to the vocabulary as they are.
    """
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    structure = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", *sorted(VISIBLE)]
    plain = ["\n" * n for n in range(2, 6)] + ["<table>", "<unused0>", "[multimodal]"]
    octets = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*structure, *plain, *octets], show_progress=False
    )
    inner.train_from_iterator(re.findall(r" ?\w+| +|[^\w ]", CORPUS), trainer)
    content = json.loads(inner.to_str())
    content["added_tokens"] = []
    inner = Tokenizer.from_str(json.dumps(content))
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in structure])
    inner.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    folder = tmp_path_factory.mktemp("rich")
    inner.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    described = {**names, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "config.json").write_text("{}")
    return inner, read_tokenizer(as_the_converter_writes(folder))


def as_the_converter_writes(folder: Path) -> Mapping[str, Any]:
    """By gguf-py's own reader of tokenizers, as llama.cpp's conversion/gemma.py uses it."""
    tokens, types = [], []
    for text, _, kind in LlamaHfVocab(folder).all_tokens():
        token = text.decode()
        tokens.append(token)
        types.append(int(TokenType.USER_DEFINED if token in VISIBLE else kind))
    special = SpecialVocab(folder, load_merges=True)
    ids = {"unk": "unknown", "pad": "padding"}
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tuple(tokens),
        "tokenizer.ggml.token_type": tuple(types),
        "tokenizer.ggml.merges": tuple(special.merges),
        **{
            f"tokenizer.ggml.{ids.get(name, name)}_token_id": id_
            for name, id_ in special.special_token_ids.items()
        },
    }


PIECES = (
    "the cabochon", " is", "  ", "    ", "\n", "\n\n", "\n\n\n\n\n\n\n", "\t", "é", "你好", "🙂",
    "\x00", "\u2581", "<0x41>", "<|turn>", "<turn|>", "<|turn>user\n", "<bos>", "<table>",
    "</table>", "<unused0>", "[multimodal]", "<|channel>", '<|"|>', "<|image|>", "<unk>", "<|turn",
    "ﬁ", "A\u0301",
)  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=8).map("".join))


def same(pair: tuple[tokenizers.Tokenizer, ours.Tokenizer], text: str) -> None:
    theirs, made = pair
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert made.encode(text) == ids
    assert made.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("".join(PIECES))
def test_tokens_are_those_of_the_original(text: str) -> None:
    same(tiny(), text)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("".join(PIECES))
def test_tokens_matched_as_a_whole_are_found_again(
    rich: tuple[Tokenizer, ours.Tokenizer], text: str
) -> None:
    same(rich, text)


def test_vocabulary_and_structure_are_those_of_the_original(
    rich: tuple[Tokenizer, ours.Tokenizer],
) -> None:
    for theirs, made in (tiny(), rich):
        added = theirs.get_added_tokens_decoder()
        assert made.special == {id_ for id_, token in added.items() if token.special}
        assert made.vocab_size == theirs.get_vocab_size()
        for id_ in range(made.vocab_size):
            assert made.token(id_) == theirs.id_to_token(id_)
    assert {"<table>", "\n\n\n"} <= {token.content for token in added.values()}


def test_the_chat_template_writes_the_same() -> None:
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    ]
    theirs, made = ChatTemplate.open(TINY), read_template(converted())
    assert made.render(messages) == theirs.render(messages)
    assert made.render(messages).startswith("<bos>")


def test_ends_are_all_of_gemmas() -> None:
    """The converter knows one; without the others an answer goes on behind its turn."""
    _, tokenizer = tiny()
    made = GenerationDefaults.of_gguf(converted(), tokenizer)
    assert {tokenizer.token(id_) for id_ in made.ends} == {"<eos>", "<turn|>", "<|tool_response>"}
    assert (made.sampling.temperature, made.sampling.top_k, made.sampling.top_p) == (1.0, 64, 0.95)
    described = {**converted(), "general.sampling.temp": 0.25, "general.sampling.top_k": 7}
    described["tokenizer.ggml.suppress_tokens"] = (20, 21)
    made = GenerationDefaults.of_gguf(described, tokenizer)
    assert (made.sampling.temperature, made.sampling.top_k) == (0.25, 7)
    assert made.suppressed == (20, 21)


def test_prompts_are_those_of_the_original() -> None:
    messages = [{"role": "user", "content": "How many shapes are there?"}]
    with LLM(FOLDER / "e2b") as made, LLM(TINY) as theirs:
        assert made.prompts.chat(messages).tokens == theirs.prompts.chat(messages).tokens
