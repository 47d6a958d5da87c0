"""Running a task: one model after the other, each in batches through the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from cabochon.engine.request import Prompt, SamplingParams
from cabochon.errors import UnreadableError
from cabochon.evaluate.perplexity import losses
from cabochon.evaluate.results import Accuracy, Answer, Losses, Perplexities, Scores
from cabochon.evaluate.tasks import TASKS, Question, read
from cabochon.llm import LLM

TASK_NAMES = (*TASKS, "perplexity")
BATCH = 64  # questions whose pictures are in memory together

Progress = Callable[[str, int, int], None]  # of a model, questions done, and in all
Loader = Callable[[Path], LLM]


def evaluate(
    models: Sequence[Path],
    task: str,
    data: Path,
    *,
    load: Loader,
    params: SamplingParams,
    limit: int | None = None,
    thinking: bool = False,
    progress: Progress | None = None,
) -> Accuracy | Perplexities:
    """Score `models` on `task` with the questions, or the text, in `data`.

    Args:
        load: makes a model ready; one is loaded at a time.
        params: how to answer; greedily, if figures should come out the same again.
        limit: take the first so many questions.
        thinking: let the model think first; what it thinks is not judged.

    Raises:
        UnreadableError: the data is not in the task's format; LoadError and others from loading.
    """
    if task == "perplexity":
        return Perplexities(task, tuple(_text_losses(path, data, load) for path in models))
    questions = list(read(task, data))[:limit]
    return Accuracy(
        task,
        tuple(_scores(path, questions, load, params, thinking, progress) for path in models),
    )


def _text_losses(path: Path, data: Path, load: Loader) -> Losses:
    with load(path) as llm:
        return Losses(str(path), tuple(losses(llm, data)))


def _scores(
    path: Path,
    questions: Sequence[Question],
    load: Loader,
    params: SamplingParams,
    thinking: bool,
    progress: Progress | None,
) -> Scores:
    answers: list[Answer] = []
    started = time.monotonic()
    with load(path) as llm:
        for batch in _batches(questions):
            prompts = [_prompt(llm, question, thinking) for question in batch]
            for question, made in zip(batch, llm.generate(prompts, params), strict=True):
                right = made.finish_reason == "stop" and question.right(made.text)
                answers.append(Answer(made.text, made.finish_reason, right))
            if progress is not None:
                progress(path.name, len(answers), len(questions))
    return Scores(str(path), tuple(answers), time.monotonic() - started)


def _batches(questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), BATCH):
        yield questions[start : start + BATCH]


def _prompt(llm: LLM, question: Question, thinking: bool) -> Prompt:
    parts: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
    if question.image is not None:
        parts.insert(0, {"type": "image", "image": _open(question.image)})
    template = {"enable_thinking": True} if thinking else {}
    prompt = llm.prompts.chat([{"role": "user", "content": parts}], **template)
    return replace(prompt, turn=True)  # so that thoughts are told from the answer


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except OSError as error:
        raise UnreadableError(f"{path} is no picture that can be read: {error}") from None
