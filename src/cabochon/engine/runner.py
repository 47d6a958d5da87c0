"""Turns a schedule into tensors, and tensors into logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cabochon.engine.cache import CacheStep, PagedCache
from cabochon.engine.prediction import Prediction, predictions
from cabochon.engine.request import Prompt
from cabochon.engine.scheduler import Scheduled, TokenSequence
from cabochon.errors import RequestError
from cabochon.gemma4.model import Batch, Gemma4
from cabochon.gemma4.pictures import Picture
from cabochon.gemma4.sounds import Sound


class Runner:
    """A model in its compute dtype on its device; keys and values are kept in `kv_dtype`.

    Who runs it does so in `torch.inference_mode`, once for all steps.
    """

    def __init__(
        self,
        model: Gemma4,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self.device = device
        ids = model.config.tokens
        self._media = {ids.image, ids.audio, ids.video}
        self._no_soft = torch.empty(
            0, model.config.text.hidden_size, dtype=self.dtype, device=self.device
        )
        self._not_finite: str | None = None

    def encode(self, scheduled: Scheduled) -> None:
        """Turn the pictures and sounds that a chunk reaches into soft tokens, and let them go."""
        sequence = scheduled.sequence
        chunk = scheduled.chunk
        for position, item in list(sequence.media.items()):
            if not (position < chunk.stop and chunk.start < position + item.soft_tokens):
                continue
            soft = self.see(item) if isinstance(item, Picture) else self.hear(item)
            assert len(soft) == item.soft_tokens
            sequence.soft[position] = soft
            del sequence.media[position]

    def see(self, picture: Picture) -> Tensor:
        """The soft tokens of a picture."""
        pixels = torch.from_numpy(picture.patches).to(self.device, self.dtype)
        return self.model.see(pixels, torch.from_numpy(picture.positions).to(self.device))

    def hear(self, sound: Sound) -> Tensor:
        """The soft tokens of a sound."""
        return self.model.hear(torch.from_numpy(sound.features).to(self.device, self.dtype))

    def run(self, cache: PagedCache, step: Sequence[Scheduled], *, every: bool = False) -> Tensor:
        """What logits are made of: `[rows, hidden_size]`, for each sequence as many as it wants.

        With `every`, of every position of the step. Guesses are computed, but count for nothing
        until they have been judged.
        """
        hidden: Tensor = self.model(
            self.batch(step, every), CacheStep(cache, [s.chunk for s in step])
        )
        for scheduled in step:
            sequence = scheduled.sequence
            sequence.computed = min(scheduled.chunk.stop, len(sequence.tokens))
            cache.settle(sequence.table, sequence.computed)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """`[rows, vocab_size]`, float32."""
        return self.model.logits(hidden)

    def predict(self, hidden: Tensor, few: Sequence[bool]) -> list[Prediction]:
        """What each row says of the next token; `few`: whether its likeliest tokens will do."""
        return predictions(self.model, hidden, few)

    def watch(self) -> None:
        """From now on, notice which module is the first to give what is not finite; it costs."""

        def look(name: str, output: object) -> None:
            if self._not_finite is None and isinstance(output, Tensor):
                self._not_finite = None if output.isfinite().all() else name

        for name, module in self.model.named_modules():
            module.register_forward_hook(lambda _, __, output, name=name: look(name, output))

    def not_finite(self) -> str | None:
        """The module that was the first since this was asked, if anybody watches."""
        name, self._not_finite = self._not_finite, None
        return name

    def batch(self, step: Sequence[Scheduled], every: bool) -> Batch:
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        soft_at: list[int] = []
        soft: list[Tensor] = []
        padding = self.model.config.text.pad_token_id
        for scheduled in step:
            start, stop = scheduled.chunk.start, scheduled.chunk.stop
            for place, rows in _soft_parts(scheduled):
                first = len(tokens) + place - start
                soft_at.extend(range(first, first + len(rows)))
                soft.append(rows)
            sequence = scheduled.sequence
            own = (sequence.tokens[start:stop] + sequence.guesses.tokens)[: stop - start]
            # The ids of media count for nothing, not even where the model itself wrote one.
            tokens.extend(padding if token in self._media else token for token in own)
            positions.extend(range(start, stop))
            wanted.extend(range(len(tokens) - scheduled.rows, len(tokens)))
        all_wanted = every or len(wanted) == len(tokens)
        ids, places = torch.tensor((tokens, positions), device=self.device)
        return Batch(
            tokens=ids,
            positions=places,
            soft_at=self._indices(soft_at),
            soft=torch.cat(soft) if soft else self._no_soft,
            wanted=None if all_wanted else self._indices(wanted),
        )

    def _indices(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.device)


def _soft_parts(scheduled: Scheduled) -> list[tuple[int, Tensor]]:
    """The soft tokens that fall into a chunk: first position and rows of each part."""
    parts = []
    for place, rows in scheduled.sequence.soft.items():
        first = max(place, scheduled.chunk.start)
        last = min(place + len(rows), scheduled.chunk.stop)
        if first < last:
            parts.append((first, rows[first - place : last - place]))
    return parts


def new_sequence(model: Gemma4, prompt: Prompt, cache: PagedCache) -> TokenSequence:
    """A sequence that has computed nothing yet.

    Raises:
        RequestError: no tokens, or some that are not in the vocabulary; media that the model has no
            sense for, or that do not fit into a step.
    """
    config = model.config
    vocab = config.text.vocab_size
    if not prompt.tokens:
        raise RequestError("the prompt is empty", "messages")
    if min(prompt.tokens) < 0 or max(prompt.tokens) >= vocab:
        raise RequestError(f"token ids must be 0 to {vocab - 1}", "prompt")
    spans = []
    for position, item in prompt.media:
        if isinstance(item, Sound):
            _check(config.audio is not None, "hear sounds", "audio")
        else:
            _check(config.vision is not None, "see pictures", "vision")
            spans.append((position, position + item.soft_tokens))
    whole = tuple(spans) if any(n.pictures != "causal" for n in config.text.layers) else ()
    longest = max((last - first for first, last in whole), default=0)
    if longest > cache.plan.longest_step:
        raise RequestError(
            f"a picture of {longest} soft tokens cannot be computed in one step, which has"
            f" {cache.plan.longest_step}: raise prefill_chunk",
            "messages",
        )
    return TokenSequence(cache.new_table(), list(prompt.tokens), dict(prompt.media), whole)


def _check(able: bool, what: str, part: str) -> None:
    if not able:
        raise RequestError(f"this model does not {what}: it has no {part} part", "messages")
