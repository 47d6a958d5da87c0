"""Whether a model is alive: finite, not pinned at its soft-cap, and every sense matters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
from cabochon.verify.stage import Finding, Table

PINNED = 0.999  # of the soft-cap
TOO_SURE, TOO_UNSURE = 1e-4, 0.9995  # mean entropy in nats; and as a share of the most there is
SAME = 1e-4  # relative difference below which two answers are one
ANSWER = 12  # tokens that are written


@dataclass(frozen=True, slots=True)
class Said:
    """What a model makes of a prompt: logits of its last position, and what it writes then."""

    logits: Tensor  # [tokens, vocab_size]
    answer: str
    ended: bool
    repeats: bool  # one token over and over


def is_alive(model: Gemma4, prompts: Prompts, ends: frozenset[int]) -> Finding:
    """Run the probes through `model`."""
    finding = Finding("")
    rows = []
    for name, prompt in _questions(prompts).items():
        said = _say(model, prompts, prompt, ends)
        finding.faults += [f"{name}: {fault}" for fault in _faults(model, said.logits)]
        rows.append([name, _printable(said.answer), _entropy(said.logits), _end(said)])
        if said.repeats:
            finding.facts.append(f"{name}: it writes one token over and over")
    columns = ("asked about", "it says", "entropy", "end")
    finding.tables["Answers, greedily, cut short"] = Table(columns, rows)
    finding.faults += _senses(model, prompts)
    finding.summary = f"{len(rows)} prompts" + ("" if finding.faults else "; every sense is felt")
    return finding


def _questions(prompts: Prompts) -> Mapping[str, Prompt]:
    made = {"nothing": prompts.chat([{"role": "user", "content": "Who are you?"}])}
    if prompts.config.vision is not None:
        made["a red rectangle"] = asked(prompts, "image", rectangle("red"), QUESTION)
        made["a blue rectangle"] = asked(prompts, "image", rectangle("blue"), QUESTION)
    if prompts.config.audio is not None:
        made["a tone"] = asked(prompts, "audio", tone(440.0), HEARD)
    return made


def _faults(model: Gemma4, logits: Tensor) -> Iterator[str]:
    vocab = logits.shape[-1]
    if not logits.isfinite().all():
        yield "logits that are no numbers"
        return
    cap = model.config.text.softcap
    pinned = 0.0 if cap is None else float((logits.abs() > PINNED * cap).float().mean())
    if pinned > 0.01:
        yield f"{pinned:.0%} of all logits are pinned at the soft-cap of {cap:g}"
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


def _senses(model: Gemma4, prompts: Prompts) -> Iterator[str]:
    """Different things must look and sound different, in soft tokens and in what follows."""
    config = prompts.config
    if config.vision is not None:
        red, blue = (prompts.picture(rectangle(colour)) for colour in ("red", "blue"))
        runner = Runner(model, torch.float32, torch.device("cpu"))
        if distance(runner.see(red), runner.see(blue)).relative < SAME:
            yield "a red and a blue rectangle have the same soft tokens: pictures do not matter"
        if distance(runner.see(red), runner.see(_shuffled(red))).relative < SAME:
            yield "a picture with its patches shuffled has the same soft tokens"
        answers = [asked(prompts, "image", rectangle(c), QUESTION) for c in ("red", "blue")]
        yield from _alike(model, answers, "a red and a blue rectangle")
    if config.audio is not None:
        answers = [asked(prompts, "audio", tone(hertz), HEARD) for hertz in (220.0, 1760.0)]
        yield from _alike(model, answers, "a low and a high tone")


def _alike(model: Gemma4, pair: list[Prompt], what: str) -> Iterator[str]:
    first, second = (_logits(model, prompt)[-1] for prompt in pair)
    if distance(first, second).relative < SAME:
        yield f"{what} are answered alike: the decoder does not look"


def _shuffled(picture: Picture) -> Picture:
    order = torch.randperm(len(picture.patches), generator=torch.Generator().manual_seed(0))
    return Picture(picture.patches[order.numpy()], picture.positions, picture.soft_tokens)


@torch.inference_mode()
def _logits(model: Gemma4, prompt: Prompt) -> Tensor:
    return _Writer(model, prompt, 0).step()


@torch.inference_mode()
def _say(model: Gemma4, prompts: Prompts, prompt: Prompt, ends: frozenset[int]) -> Said:
    writer, tokens = _Writer(model, prompt, ANSWER), list[int]()
    logits = last = writer.step()
    while len(tokens) < ANSWER and int(last[-1].argmax()) not in ends:
        tokens.append(int(last[-1].argmax()))
        last = writer.step(tokens[-1])
    ended = len(tokens) < ANSWER
    answer = prompts.tokenizer.decode(tokens)
    return Said(logits, answer, ended, len(tokens) == ANSWER and len(set(tokens)) == 1)


class _Writer:
    """One sequence in a cache of its own."""

    def __init__(self, model: Gemma4, prompt: Prompt, more: int) -> None:
        length = len(prompt.tokens)
        plan = CachePlan.single(model.config.text, length + more, length)
        self._runner = Runner(model, torch.float32, torch.device("cpu"))
        self._cache = PagedCache(plan, self._runner.dtype, self._runner.device)
        self._sequence = new_sequence(model, prompt, self._cache)

    def step(self, token: int | None = None) -> Tensor:
        """Logits of every position that had not been computed, `token` among them."""
        if token is not None:
            self._sequence.tokens.append(token)
        chunk = self._sequence.chunk(len(self._sequence.tokens))
        reserved = self._cache.reserve(chunk)
        assert reserved
        scheduled = Scheduled(self._sequence, chunk)
        self._runner.encode(scheduled)
        return self._runner.run(self._cache, [scheduled], every=True)
