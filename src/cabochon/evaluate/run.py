"""Running a task: one model after the other, each with many questions in the engine at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cabochon.engine.request import Completion, Prompt, SamplingParams
from cabochon.engine.stream import Stream
from cabochon.errors import CabochonError, RequestError
from cabochon.evaluate.perplexity import Progress, losses
from cabochon.evaluate.results import Accuracy, Answer, Losses, Perplexities, Scores
from cabochon.evaluate.tasks import TASKS, Question, read, read_text
from cabochon.gemma4.pictures import decode_picture
from cabochon.llm import LLM

TASK_NAMES = (*TASKS, "perplexity")
AHEAD = 64  # questions whose pictures are in memory together

Watch = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under test: a name for tables, and what makes it ready. One is loaded at a time."""

    name: str
    load: Callable[[], LLM]


def _unwatched(_: str) -> AbstractContextManager[Progress]:
    return nullcontext(lambda done, total: None)


def evaluate(
    subjects: Sequence[Subject],
    task: str,
    data: Path,
    *,
    params: SamplingParams,
    limit: int | None = None,
    thinking: bool = False,
    watch: Watch = _unwatched,
) -> Accuracy | Perplexities:
    """Score models on `task` with the questions, or the text, in `data`.

    Args:
        params: how to answer; greedily, if figures should come out the same again.
        limit: take the first so many questions, or windows of text.
        thinking: let the model think first; what it thinks is not judged.
        watch: makes what is told how far a model is, by its name.

    Raises:
        UnreadableError: the data is not in the task's format, which is found before a model is
            loaded; LoadError and others from loading.
        CabochonError: a picture is damaged, or a model does not see at all. A single question that
            a model refuses is not answered rightly, and counted.
    """
    if task == "perplexity":
        text = read_text(data)
        return Perplexities(task, tuple(_text_losses(one, text, limit, watch) for one in subjects))
    questions = tuple(read(task, data))[:limit]
    scores = tuple(_scores(one, questions, params, thinking, watch) for one in subjects)
    return Accuracy(task, questions, scores)


def _text_losses(subject: Subject, text: str, limit: int | None, watch: Watch) -> Losses:
    with subject.load() as llm, watch(subject.name) as progress:
        return Losses(subject.name, tuple(losses(llm, text, limit, progress)))


def _scores(
    subject: Subject,
    questions: Sequence[Question],
    params: SamplingParams,
    thinking: bool,
    watch: Watch,
) -> Scores:
    answers: list[Answer] = []
    with subject.load() as llm, watch(subject.name) as progress:
        started = time.monotonic()
        made = _completions(llm, questions, params, thinking)
        for question, completion in zip(questions, made, strict=True):
            answers.append(_judged(question, completion))
            progress(len(answers), len(questions))
        return Scores(subject.name, tuple(answers), time.monotonic() - started)


def _judged(question: Question, made: Completion | RequestError) -> Answer:
    """An answer that was cut off is not right, whatever it says."""
    if isinstance(made, RequestError):
        return Answer(str(made), "refused", False, ())
    right = made.finish_reason == "stop" and question.right(made.text)
    return Answer(made.text, made.finish_reason, right, made.tokens)


def _completions(
    llm: LLM, questions: Sequence[Question], params: SamplingParams, thinking: bool
) -> Iterator[Completion | RequestError]:
    """Answers in the order of the questions, `AHEAD` of which the engine always has."""
    if any(question.image for question in questions):
        llm.prompts.check_sense("image")
    running: deque[Stream | RequestError] = deque()
    try:
        for question in questions:
            running.append(_asked(llm, question, params, thinking))
            if len(running) == AHEAD:
                yield _answer(running.popleft())
        while running:
            yield _answer(running.popleft())
    finally:
        for stream in running:
            if isinstance(stream, Stream):
                stream.close()


def _asked(
    llm: LLM, question: Question, params: SamplingParams, thinking: bool
) -> Stream | RequestError:
    image = picture_of(question)
    try:
        return llm.stream(prompt_of(llm, question.text, image, thinking), params)
    except RequestError as error:
        return error


def _answer(asked: Stream | RequestError) -> Completion | RequestError:
    return asked.collect() if isinstance(asked, Stream) else asked


def picture_of(question: Question) -> Image.Image | None:
    """The picture, upright.

    Raises:
        CabochonError: the file is damaged, or larger than what servers take.
    """
    if question.image is None:
        return None
    try:
        return decode_picture(question.image.read_bytes())
    except (RequestError, OSError) as error:
        raise CabochonError(f"{question.where}: {error}") from None


def prompt_of(llm: LLM, text: str, image: Image.Image | None, thinking: bool) -> Prompt:
    """A question as a user's turn."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        parts.insert(0, {"type": "image", "image": image})
    template = {"enable_thinking": True} if thinking else {}
    return llm.prompts.chat([{"role": "user", "content": parts}], **template)
