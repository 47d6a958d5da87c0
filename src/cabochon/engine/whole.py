"""Logits at every position of a prompt, beside whatever the engine does."""

from __future__ import annotations

import torch
from torch import Tensor

from cabochon.engine.cache import CachePlan, PagedCache
from cabochon.engine.request import Prompt
from cabochon.engine.runner import Runner, new_sequence
from cabochon.engine.scheduler import Scheduled
from cabochon.errors import RequestError


@torch.inference_mode()
def every_logits(
    runner: Runner, prompt: Prompt, *, prefill_chunk: int, longest_step: int
) -> Tensor:
    """After the soft-cap, `[tokens, vocab_size]`, float32, by a cache of its own.

    It is filled in the chunks in which serving would compute the prompt.
    """
    text, length = runner.model.config.text, len(prompt.tokens)
    if length > text.max_positions:
        raise RequestError(
            f"the prompt has {length:,} tokens, the model knows {text.max_positions:,}", "prompt"
        )
    cache = PagedCache(CachePlan.single(text, length, longest_step), runner.kv_dtype, runner.device)
    sequence = new_sequence(runner.model, prompt, cache)
    logits = torch.empty(length, text.vocab_size)
    while sequence.computed < length:
        chunk = sequence.chunk(prefill_chunk)
        reserved = cache.reserve(chunk)
        assert reserved
        step = [Scheduled(sequence, chunk)]
        runner.encode(step[0])
        hidden = runner.run(cache, step, every=True)
        logits[chunk.start : chunk.stop] = runner.logits(hidden)
    return logits
