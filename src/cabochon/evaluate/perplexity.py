"""Perplexity on a text file, window by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from cabochon.errors import UnreadableError
from cabochon.llm import LLM

Progress = Callable[[int, int], None]  # done, and in all

WINDOW = 512  # tokens that are predicted with what stands before them in the window


def losses(
    llm: LLM, text: str, limit: int | None = None, progress: Progress | None = None
) -> Iterator[float]:
    """The mean loss in nats of each window of the text's tokens, of the first `limit` windows.

    Each window begins anew with the beginning-of-sequence token. The last one, if it is not full,
    is left out, unless it is the only one.

    Raises:
        UnreadableError: the text has less than two tokens.
    """
    tokens = llm.prompts.tokenizer.encode(text)
    if len(tokens) < 2:
        raise UnreadableError(f"the text has {len(tokens)} tokens, too few to predict any")
    start = llm.prompts.tokenizer.token_id("<bos>")
    first = [] if start is None else [start]
    windows = list(_windows(tokens, _size(llm)))[:limit]
    for done, window in enumerate(windows, 1):
        yield _loss(llm, [*first, *window])
        if progress is not None:
            progress(done, len(windows))


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
    return math.exp(loss) if loss < 700 else math.inf  # what floats hold ends at 709
