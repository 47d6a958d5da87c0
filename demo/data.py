"""Training batches: pictures once, and after each as many questions about it as fit in a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from model import WINDOW
from questions import Question, ask
from scenes import (
    LABEL_CLASSES,
    MAX_SOFT_TOKENS,
    POOL,
    draw,
    patches,
    random_scene,
    soft_token_labels,
)
from smalltalk import SYSTEM, chat
from transformers import PreTrainedTokenizerFast

IGNORED = -100
MAX_PATCHES = MAX_SOFT_TOKENS * POOL * POOL


@dataclass(frozen=True)
class Mix:
    """What a batch holds: rows with a picture, rows without, and how many shapes to draw."""

    picture_rows: int
    text_rows: int
    counts: tuple[int, ...]
    length: int = 224


class Row:
    """A shared beginning, then separate conversations that see it but not each other.

    A question is thus answered exactly as if it were the only one, while the picture, the costly
    part, is computed once. `part` tells the conversations apart; the beginning is part 0.
    """

    def __init__(self, start: list[int], length: int) -> None:
        self.length, self.begin = length, len(start)
        self.ids, self.part = list(start), [0] * len(start)
        self.position = list(range(len(start)))
        self.target = [IGNORED] * len(start)

    def add(self, pieces: list[tuple[list[int], bool]]) -> bool:
        """Append one conversation, made of pieces to read (False) or to answer (True)."""
        size = sum(len(ids) for ids, _ in pieces)
        if len(self.ids) + size > self.length:
            return False
        self.position += range(self.begin, self.begin + size)
        self.part += [self.part[-1] + 1] * size
        for ids, answered in pieces:
            self.target += ids if answered else [IGNORED] * len(ids)
            self.ids += ids
        return True


class Encoder:
    """Turns questions into token ids in the turn format of the chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.cache[text]

    def start(self, system: str | None, soft_tokens: int) -> list[int]:
        text = "<bos>" + (f"<|turn>system\n{system}<turn|>\n" if system else "") + "<|turn>user\n"
        if not soft_tokens:
            return self(text)
        return [
            *self(text),
            *self("<|image>"),
            *(self("<|image|>") * soft_tokens),
            *self("<image|>"),
        ]

    def conversation(self, questions: list[Question]) -> list[tuple[list[int], bool]]:
        pieces: list[tuple[list[int], bool]] = []
        for question in questions:
            before = "\n<|turn>user\n" if pieces else ""
            pieces.append((self(f"{before}{question.text}<turn|>\n<|turn>model\n"), False))
            pieces.append((self(f"{question.answer}<turn|>"), True))
        return pieces


def _fill(row: Row, encode: Encoder, rng: Random, source: Iterator[Question]) -> Row:
    """Conversations of one turn mostly, until one does not fit any more."""
    turns = 1
    while row.add(encode.conversation([next(source) for _ in range(turns)])):
        turns = rng.choice((1, 1, 1, 1, 1, 2))
    return row


def masks(part: torch.Tensor, position: torch.Tensor) -> dict[str, torch.Tensor]:
    """Who sees whom, for both kinds of attention, from what `Row` wrote down."""
    order = torch.arange(part.shape[1])
    same = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
    full = same & (order[:, None] >= order[None, :])
    near = position[:, :, None] - position[:, None, :] < WINDOW
    return {"full_attention": full[:, None], "sliding_attention": (full & near)[:, None]}


def collate_patches(arrays: list[np.ndarray], grids: list[tuple[int, int]]) -> dict:
    """Pictures as the model takes them; always padded to the same size, to compile only once."""
    pixels = np.zeros((len(arrays), MAX_PATCHES, arrays[0].shape[1]), np.uint8)
    places = np.full((len(arrays), MAX_PATCHES, 2), -1, np.int64)
    for n, (array, (columns, _)) in enumerate(zip(arrays, grids, strict=True)):
        pixels[n, : len(array)] = array
        index = np.arange(len(array))
        places[n, : len(array), 0] = index % (columns * POOL)
        places[n, : len(array), 1] = index // (columns * POOL)
    return {"pixels": torch.from_numpy(pixels), "image_position_ids": torch.from_numpy(places)}


def batch(rng: Random, encode: Encoder, mix: Mix) -> dict:
    rows, arrays, grids, labels = [], [], [], []
    for _ in range(mix.picture_rows):
        scene = random_scene(rng, mix.counts)
        array, columns, high = patches(draw(scene))
        arrays.append(array)
        grids.append((columns, high))
        labels.append(soft_token_labels(scene, columns, high))
        row = Row(encode.start(_system(rng), columns * high), mix.length)
        rows.append(_fill(row, encode, rng, (ask(rng, scene) for _ in iter(int, 1))))
    for _ in range(mix.text_rows):
        row = Row(encode.start(_system(rng), 0), mix.length)
        rows.append(_fill(row, encode, rng, (chat(rng) for _ in iter(int, 1))))

    def stack(name: str, padding: int) -> torch.Tensor:
        filled = [[*getattr(r, name), *[padding] * (mix.length - len(r.ids))] for r in rows]
        return torch.tensor(filled)

    part, position = stack("part", -1), stack("position", 0)
    return {
        "input_ids": stack("ids", 0),
        "position_ids": position,
        "attention_mask": masks(part, position),
        "target": stack("target", IGNORED),
        **collate_patches(arrays, grids),
        "labels": {
            name: torch.from_numpy(np.concatenate([label[name] for label in labels]))
            for name in LABEL_CLASSES
        },
    }


def _system(rng: Random) -> str | None:
    return rng.choice(SYSTEM) if rng.random() < 0.1 else None


class Batches(torch.utils.data.IterableDataset):
    """An endless stream of fresh batches, drawn in a process of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, mix: Mix, seed: str) -> None:
        self.tokenizer, self.mix, self.seed = tokenizer, mix, seed

    def __iter__(self) -> Iterator[dict]:
        torch.set_num_threads(1)
        rng, encode = Random(self.seed), Encoder(self.tokenizer)
        while True:
            yield batch(rng, encode, self.mix)
