"""How far a model's probabilities are from another's, token by token of the other's answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cabochon.engine.request import Prompt
from cabochon.evaluate.results import Accuracy, Table
from cabochon.evaluate.run import Subject, Watch, picture_of, prompt_of
from cabochon.llm import LLM


@dataclass(frozen=True, slots=True)
class Divergence:
    """A model against the first, over the first one's own answers.

    Attributes:
        nats: the Kullback-Leibler divergence from the first model at each token.
        agreed: how many of these tokens this model finds likeliest, too.
    """

    model: str
    nats: tuple[float, ...]
    agreed: int

    def row(self) -> list[str]:
        found = torch.tensor(self.nats, dtype=torch.float64)
        figures = (found.mean(), found.quantile(0.99), found.max())
        values = [f"{float(figure):.2e}" for figure in figures]
        return [self.model, str(len(self.nats)), *values, f"{self.agreed / len(self.nats):.3%}"]

    def as_dict(self) -> dict[str, Any]:
        return {"model": self.model, "nats": list(self.nats), "agreed": self.agreed}


COLUMNS = ["model", "tokens", "KL mean", "KL 99 %", "KL most", "same likeliest token"]


def table_of(divergences: Sequence[Divergence]) -> Table:
    return [COLUMNS, *(divergence.row() for divergence in divergences)]


def divergences(
    subjects: Sequence[Subject], found: Accuracy, *, thinking: bool, watch: Watch
) -> Iterator[Divergence]:
    """Each model after the first against it: both read the first one's answers, none writes.

    Two models are in memory together.
    """
    first, *others = subjects
    for other in others:
        with ExitStack() as stack:
            pair = tuple(stack.enter_context(subject.load()) for subject in (first, other))
            progress = stack.enter_context(watch(f"{other.name}, divergence"))
            nats: list[float] = []
            agreed = 0
            answers = found.scores[0].answers
            for index, (question, answer) in enumerate(zip(found.questions, answers, strict=True)):
                progress(index, len(answers))
                if not answer.tokens:  # it was refused
                    continue
                prompt = prompt_of(pair[0], question.text, picture_of(question), thinking)
                ours, theirs = (_read(llm, prompt, answer.tokens) for llm in pair)
                nats += _divergence(ours, theirs).tolist()
                agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            yield Divergence(other.name, tuple(nats), agreed)


def _read(llm: LLM, prompt: Prompt, answer: Sequence[int]) -> Tensor:
    """Logits before each token of the answer: `[tokens, vocab_size]`."""
    whole = replace(prompt, tokens=(*prompt.tokens, *answer))
    return llm.logits(whole)[len(prompt.tokens) - 1 : -1]


def _divergence(first: Tensor, other: Tensor) -> Tensor:
    p, q = (logits.double().log_softmax(-1) for logits in (first, other))
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)
