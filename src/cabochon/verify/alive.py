"""Whether a model is alive: finite, not pinned at its soft-cap, and every sense matters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cabochon.engine.cache import CachePlan, PagedCache
from cabochon.engine.request import Prompt
from cabochon.engine.runner import Runner, new_sequence
from cabochon.engine.scheduler import Scheduled
from cabochon.gemma4.model import Gemma4
from cabochon.gemma4.pictures import Picture
from cabochon.prompts import Prompts
from cabochon.verify.distance import distance
from cabochon.verify.probes import HEARD, QUESTION, asked, rectangle, tone
from cabochon.verify.stage import Finding, Progress, Table

PINNED = 0.999  # of the soft-cap
TOO_SURE, TOO_UNSURE = 1e-4, 0.9995  # mean entropy in nats; and as a share of the most there is
SAME = 1e-4  # relative difference below which two answers are one
ANSWER = 12  # tokens that are written


@dataclass(frozen=True, slots=True)
class Said:
    """What a model writes after a prompt, and the logits of every position that was looked at.

    These are the last of the prompt, or all where it is text alone, and those of the answer.
    """

    logits: Tensor  # [positions, vocab_size]
    first: Tensor  # [vocab_size], which the first token of the answer is the likeliest of
    answer: str
    ended: bool
    repeats: bool  # one token over and over


def is_alive(
    model: Gemma4, prompts: Prompts, ends: frozenset[int], progress: Progress | None = None
) -> Finding:
    """Run the probes through `model`, all of them side by side."""
    finding = Finding("")
    said = _say(model, prompts, _questions(prompts), ends, progress)
    rows = []
    for name, what in said.items():
        finding.faults += [f"{name}: {fault}" for fault in _faults(model, what.logits)]
        if name == NOTHING and not finding.faults:
            finding.faults += [f"{name}: {fault}" for fault in _unsound(what.logits)]
        rows.append([name, _printable(what.answer), _entropy(what.logits), _end(what)])
        if what.repeats:
            finding.facts.append(f"{name}: it writes one token over and over")
    columns = ("asked about", "it says", "entropy", "end")
    finding.tables["Answers, greedily, cut short"] = Table(columns, rows)
    finding.faults += _soft_tokens(model, prompts)
    finding.faults += _answers(said)
    finding.summary = f"{len(rows)} prompts" + ("" if finding.faults else "; every sense is felt")
    return finding


def _questions(prompts: Prompts) -> Mapping[str, Prompt]:
    made = {NOTHING: prompts.chat([{"role": "user", "content": "Who are you?"}])}
    if prompts.config.vision is not None:
        for colour in ("red", "blue"):
            made[f"a {colour} rectangle"] = asked(prompts, "image", rectangle(colour), QUESTION)
    if prompts.config.audio is not None:
        for pitch, hertz in (("low", 220.0), ("high", 1760.0)):
            made[f"a {pitch} tone"] = asked(prompts, "audio", tone(hertz), HEARD)
    return made


NOTHING = "nothing"
PAIRS = (("a red rectangle", "a blue rectangle"), ("a low tone", "a high tone"))


def _faults(model: Gemma4, logits: Tensor) -> Iterator[str]:
    if not logits.isfinite().all():
        yield "logits that are no numbers"
        return
    cap = model.config.text.softcap
    pinned = 0.0 if cap is None else float((logits.abs() > PINNED * cap).float().mean())
    if pinned > 0.01:
        yield f"{pinned:.0%} of all logits are pinned at the soft-cap of {cap:g}"


def _unsound(logits: Tensor) -> Iterator[str]:
    """Of a prompt's own words: an answer may well be one that a model is sure of."""
    vocab = logits.shape[-1]
    entropy = float(torch.distributions.Categorical(logits=logits).entropy().mean())
    if entropy < TOO_SURE:
        yield f"it is sure of every token (entropy {entropy:.2g} nats)"
    if entropy > TOO_UNSURE * math.log(vocab):
        yield f"it finds all tokens alike (entropy {entropy:.2f} of {math.log(vocab):.2f} nats)"


def _entropy(logits: Tensor) -> str:
    return f"{float(torch.distributions.Categorical(logits=logits).entropy().mean()):.2f}"


def _printable(text: str) -> str:
    """A model may write anything, what steers a terminal too."""
    return "".join(character if character.isprintable() else " " for character in text)


def _end(said: Said) -> str:
    return "ends its turn" if said.ended else "goes on"


@torch.inference_mode()
def _soft_tokens(model: Gemma4, prompts: Prompts) -> Iterator[str]:
    """Different pictures must look different to the decoder."""
    if prompts.config.vision is None:
        return
    red, blue = (prompts.picture(rectangle(colour)) for colour in ("red", "blue"))
    runner = Runner(model, torch.float32, torch.device("cpu"))
    seen = runner.see(red)
    if distance(seen, runner.see(blue)).relative < SAME:
        yield "a red and a blue rectangle have the same soft tokens: pictures do not matter"
    if distance(seen, runner.see(_shuffled(red))).relative < SAME:
        yield "a picture with its patches shuffled has the same soft tokens"


def _answers(said: Mapping[str, Said]) -> Iterator[str]:
    """Different pictures and sounds must make a difference to what is said of them."""
    for one, other in PAIRS:
        if one in said and distance(said[one].first, said[other].first).relative < SAME:
            yield f"{one} and {other} are answered alike: the decoder does not look"


def _shuffled(picture: Picture) -> Picture:
    order = torch.randperm(len(picture.patches), generator=torch.Generator().manual_seed(0))
    return Picture(picture.patches[order.numpy()], picture.positions, picture.soft_tokens)


@torch.inference_mode()
def _say(
    model: Gemma4,
    prompts: Prompts,
    asked: Mapping[str, Prompt],
    ends: frozenset[int],
    progress: Progress | None,
) -> dict[str, Said]:
    """The greedy answers to `asked`, cut off after `ANSWER` tokens."""
    writers = _Writers(model, list(asked.values()))
    logits: list[list[Tensor]] = [[] for _ in asked]
    answers: list[list[int]] = [[] for _ in asked]
    going = list(range(len(asked)))
    while going:
        for index, rows in zip(going, writers.step(going), strict=True):
            logits[index].append(rows)
            likeliest = int(rows[-1].argmax())
            if len(answers[index]) < ANSWER and likeliest not in ends:
                answers[index].append(likeliest)
                writers.write(index, likeliest)
        if progress is not None:
            progress(max(map(len, logits)), ANSWER + 1)
        going = [i for i in going if len(logits[i]) == len(answers[i])]
    return {
        name: Said(
            torch.cat(rows),
            rows[0][-1],
            prompts.tokenizer.decode(tokens),
            len(tokens) < ANSWER,
            len(tokens) == ANSWER and len(set(tokens)) == 1,
        )
        for name, rows, tokens in zip(asked, logits, answers, strict=True)
    }


class _Writers:
    """Sequences in a cache of their own, which go on together: weights are read once for all."""

    def __init__(self, model: Gemma4, prompts: Sequence[Prompt]) -> None:
        lengths = [len(prompt.tokens) for prompt in prompts]
        plan = CachePlan.single(model.config.text, max(lengths) + ANSWER, sum(lengths))
        plan = replace(plan, pages=tuple(len(prompts) * pages for pages in plan.pages))
        self._runner = Runner(model, torch.float32, torch.device("cpu"))
        self._cache = PagedCache(plan, self._runner.dtype, self._runner.device)
        self._sequences = [new_sequence(model, prompt, self._cache) for prompt in prompts]
        for sequence, prompt in zip(self._sequences, prompts, strict=True):
            sequence.scored = not prompt.media

    def write(self, index: int, token: int) -> None:
        self._sequences[index].tokens.append(token)

    def step(self, going: Sequence[int]) -> Sequence[Tensor]:
        """Logits of each of `going`: of its last position, or of all new ones of text alone."""
        step = []
        for sequence in (self._sequences[index] for index in going):
            chunk = sequence.chunk(len(sequence.tokens))
            reserved = self._cache.reserve(chunk)
            assert reserved
            step.append(Scheduled(sequence, chunk))
            self._runner.encode(step[-1])
        rows = self._runner.logits(self._runner.run(self._cache, step))
        parts: Sequence[Tensor] = rows.split([scheduled.rows for scheduled in step])
        return parts
