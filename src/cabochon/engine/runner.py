"""Turns a schedule into tensors, and tensors into logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cabochon.engine.cache import CacheStep, PagedCache
from cabochon.engine.scheduler import Scheduled, TokenSequence
from cabochon.errors import RequestError
from cabochon.gemma4.model import Batch, Gemma4


class Runner:
    """A model in its compute dtype on its device."""

    def __init__(self, model: Gemma4, dtype: torch.dtype, device: torch.device) -> None:
        self.model = model
        self.dtype = dtype
        self.device = device

    @torch.inference_mode()
    def see(self, sequence: TokenSequence) -> None:
        """Encode the pictures of a sequence, once, and note where their soft tokens go."""
        image = self.model.config.image_token_id
        places = [i for i, token in enumerate(sequence.prompt.tokens) if token == image]
        for picture in sequence.prompt.pictures:
            pixels = torch.from_numpy(picture.patches).to(self.device, self.dtype)
            soft = self.model.see(pixels, torch.from_numpy(picture.positions).to(self.device))
            assert len(soft) == picture.soft_tokens
            sequence.soft.append((places[0], soft))
            places = places[len(soft) :]

    @torch.inference_mode()
    def run(self, cache: PagedCache, step: Sequence[Scheduled], *, every: bool = False) -> Tensor:
        """Logits `[rows, vocab_size]` of the last position of each complete sequence, in order.

        With `every`, of every position of the step.
        """
        logits: Tensor = self.model(
            self._batch(step, every), CacheStep(cache, [s.chunk for s in step])
        )
        for scheduled in step:
            scheduled.sequence.computed = scheduled.chunk.stop
        return logits

    def _batch(self, step: Sequence[Scheduled], every: bool) -> Batch:
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        soft_at: list[int] = []
        hidden = self.model.config.text.hidden_size
        soft = [torch.empty(0, hidden, dtype=self.dtype, device=self.device)]
        for scheduled in step:
            start, stop = scheduled.chunk.start, scheduled.chunk.stop
            for place, rows in _soft_parts(scheduled):
                first = len(tokens) + place - start
                soft_at.extend(range(first, first + len(rows)))
                soft.append(rows)
            tokens.extend(scheduled.sequence.tokens[start:stop])
            positions.extend(range(start, stop))
            if scheduled.complete:
                wanted.append(len(tokens) - 1)
        if every:
            wanted = list(range(len(tokens)))
        integers = [torch.tensor(x, dtype=torch.int64, device=self.device)
                    for x in (tokens, positions, soft_at, wanted)]
        return Batch(
            tokens=integers[0],
            positions=integers[1],
            soft_at=integers[2],
            soft=torch.cat(soft),
            wanted=integers[3],
        )


def _soft_parts(scheduled: Scheduled) -> list[tuple[int, Tensor]]:
    """The soft tokens that fall into a chunk: first position and rows of each part."""
    parts = []
    for place, rows in scheduled.sequence.soft:
        first = max(place, scheduled.chunk.start)
        last = min(place + len(rows), scheduled.chunk.stop)
        if first < last:
            parts.append((first, rows[first - place : last - place]))
    return parts


def check_pictures(model: Gemma4, sequence: TokenSequence) -> None:
    """Refuse a prompt whose pictures and image tokens do not belong together.

    Raises:
        RequestError: the model sees no pictures, or the numbers differ.
    """
    prompt = sequence.prompt
    if prompt.pictures and model.config.vision is None:
        raise RequestError("this model does not see pictures: it has no vision tower", "messages")
    expected = sum(picture.soft_tokens for picture in prompt.pictures)
    found = prompt.tokens.count(model.config.image_token_id)
    if expected != found:
        raise RequestError(
            f"the prompt has {found} image tokens, but its {len(prompt.pictures)} pictures fill"
            f" {expected}: write one image token for each picture",
            "messages",
        )
