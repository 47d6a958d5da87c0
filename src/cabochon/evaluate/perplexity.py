"""Perplexity on a text file, window by window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from cabochon.errors import UnreadableError
from cabochon.evaluate.tasks import read_text
from cabochon.llm import LLM

WINDOW = 512  # tokens that are predicted with what stands before them in the window


def losses(llm: LLM, data: Path) -> list[float]:
    """The mean loss in nats of each window of the text's tokens.

    Each window begins anew with the beginning-of-sequence token. The last one, if it is not full,
    is left out, unless it is the only one.

    Raises:
        UnreadableError: the file cannot be read, or holds less than two tokens.
    """
    tokens = llm.prompts.tokenizer.encode(read_text(data))
    if len(tokens) < 2:
        raise UnreadableError(f"{data} holds {len(tokens)} tokens, too few to predict any")
    start = llm.prompts.tokenizer.token_id("<bos>")
    first = [] if start is None else [start]
    return [_loss(llm, [*first, *window]) for window in _windows(tokens, _size(llm))]


def _size(llm: LLM) -> int:
    return min(WINDOW, llm.config.text.max_positions - 1)


def _windows(tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    full = max(1, len(tokens) // size)
    return (tokens[start * size : (start + 1) * size] for start in range(full))


def _loss(llm: LLM, tokens: Sequence[int]) -> float:
    logits = llm.logits(tokens)[:-1]
    wanted = torch.tensor(tokens[1:])
    return float(torch.nn.functional.cross_entropy(logits, wanted))


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
