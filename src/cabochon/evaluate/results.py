"""What several models scored on the same questions, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cabochon.evaluate.perplexity import perplexity
from cabochon.evaluate.statistics import Interval, mean, paired, share
from cabochon.evaluate.tasks import Question

SCHEMA = 1  # of the JSON

Table = list[list[str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one question, and whether that was right."""

    text: str
    finish_reason: str
    right: bool
    tokens: tuple[int, ...] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {"text": self.text, "finish_reason": self.finish_reason, "right": self.right}


@dataclass(frozen=True, slots=True)
class Scores:
    """One model's answers, in the order of the questions."""

    model: str
    answers: tuple[Answer, ...]
    seconds: float

    @property
    def right(self) -> list[bool]:
        return [answer.right for answer in self.answers]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Models on a task, the first of which the others are compared with."""

    task: str
    questions: tuple[Question, ...]
    scores: tuple[Scores, ...]

    def tables(self) -> Iterator[Table]:
        yield self._models()
        if len({question.kind for question in self.questions}) > 1:
            yield self._kinds()

    def _kinds(self) -> Table:
        """What each model scored on questions of each kind, the most frequent first."""
        kinds = [question.kind for question in self.questions]
        rows = [["kind", "questions", *(scores.model for scores in self.scores)]]
        for kind, count in Counter(kinds).most_common():
            right = (
                sum(good for good, of in zip(scores.right, kinds, strict=True) if of == kind)
                for scores in self.scores
            )
            rows.append([kind or "other", str(count), *(f"{n / count:.2%}" for n in right)])
        return rows

    def _models(self) -> Table:
        first = self.scores[0]
        rows = [
            ["model", "right", "accuracy", "95 %", "against the first", "95 %", "lost", "gained",
             "McNemar p", "cut off", "refused"]
        ]  # fmt: skip
        for scores in self.scores:
            found = share(sum(scores.right), len(scores.right))
            right = f"{sum(scores.right)}/{len(scores.right)}"
            reasons = Counter(answer.finish_reason for answer in scores.answers)
            row = [scores.model, right, f"{found.value:.2%}", _bounds(found)]
            if scores is first:
                row += [""] * 5
            else:
                gap = paired(first.right, scores.right)
                row += [f"{gap.difference.value:+.2%}", _bounds(gap.difference)]
                row += [str(gap.lost), str(gap.gained), f"{gap.p:.3f}"]
            rows.append([*row, str(reasons["length"]), str(reasons["refused"])])
        return rows

    def as_dict(self) -> dict[str, Any]:
        first = self.scores[0]
        return {
            "schema": SCHEMA,
            "task": self.task,
            "questions": [
                {"where": q.where, "text": q.text, "wanted": q.wanted, "kind": q.kind}
                for q in self.questions
            ],
            "models": [
                {
                    "model": scores.model,
                    "seconds": scores.seconds,
                    "accuracy": asdict(share(sum(scores.right), len(scores.right))),
                    "against_first": None
                    if scores is first
                    else asdict(paired(first.right, scores.right)),
                    "answers": [answer.as_dict() for answer in scores.answers],
                }
                for scores in self.scores
            ],
        }


@dataclass(frozen=True, slots=True)
class Losses:
    """One model's mean loss in nats for each window of a text."""

    model: str
    windows: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Perplexities:
    """Models on a text, the first of which the others are compared with."""

    task: str
    scores: tuple[Losses, ...]

    def tables(self) -> Iterator[Table]:
        rows = [["model", "windows", "perplexity", "95 %", "loss against the first", "95 %"]]
        first = self.scores[0]
        for scores in self.scores:
            found = mean(scores.windows)
            bounds = Interval(0, perplexity(found.low), perplexity(found.high))
            value = f"{perplexity(found.value):.3f}"
            row = [scores.model, str(len(scores.windows)), value, _range(bounds)]
            if scores is not first:
                gap = mean(self._gaps(scores))
                row += [f"{gap.value:+.4f}", f"{gap.low:+.4f} to {gap.high:+.4f}"]
            rows.append(row)
        yield [row + [""] * (len(rows[0]) - len(row)) for row in rows]

    def _gaps(self, scores: Losses) -> Sequence[float]:
        first = self.scores[0].windows
        return [b - a for a, b in zip(first, scores.windows, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "task": self.task,
            "models": [
                {
                    "model": scores.model,
                    "perplexity": perplexity(mean(scores.windows).value),
                    "losses": list(scores.windows),
                }
                for scores in self.scores
            ],
        }


def text_of(table: Sequence[Sequence[str]]) -> str:
    """A table for terminals that is Markdown too, so that it can go into a document as it is."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(_lines(table, widths))


def _lines(table: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    head, *rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    yield head
    yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    yield from rows


def _bounds(interval: Interval) -> str:
    return f"{interval.low:.2%} to {interval.high:.2%}"


def _range(interval: Interval) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}"
