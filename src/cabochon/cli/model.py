"""From the MODEL of a command line to a loaded `LLM`, with a word on how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cabochon.console import tell
from cabochon.settings import Settings

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from cabochon.llm import LLM


def given(model: str | None) -> str | None:
    """`model`; what is used without one is told."""
    if model is None:
        tell("no MODEL given: using the demo that comes with cabochon")
    return model


def obtained(model: str | None) -> Path:
    """Where the checkpoint is, after a download if it has to be."""
    from cabochon.load.obtain import obtain

    with progress_bar("downloading") as progress:
        return obtain(model, progress).path


def load(model: str | None, settings: Settings) -> LLM:
    """The model, ready; on the way bars on stderr."""
    from cabochon.llm import LLM
    from cabochon.load.obtain import obtain

    with progress_bar("downloading") as progress:
        source = obtain(given(model), progress, weights_only=settings.weights_only)
    options = settings.engine_options()
    if settings.drafter is not None:
        with progress_bar("downloading the drafter") as progress:
            options["drafter"] = obtain(
                settings.drafter, progress, weights_only=settings.weights_only
            )
    with progress_bar("loading") as progress:
        llm = LLM(source, **options, progress=progress)
    for note in llm.notes:
        tell("\n".join(("the weights look odd:", *note.lines())))
    return llm


Progress = Callable[[int, int], None]


def progress_bar(doing: str) -> AbstractContextManager[Progress]:
    """How many bytes are done: a bar at a terminal; elsewhere a line every few seconds."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    columns = (DownloadColumn(), TransferSpeedColumn())
    return _bar(doing, columns, lambda n, of: f"{n / 2**20:,.0f} of {of / 2**20:,.0f} MiB")


def counter(doing: str) -> AbstractContextManager[Progress]:
    """How many of a number of things are done, in the same way."""
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), TimeRemainingColumn())
    return _bar(doing, columns, lambda n, of: f"{n:,} of {of:,}")


@contextmanager
def _bar(
    doing: str, columns: Iterable[ProgressColumn], said: Callable[[int, int], str]
) -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield _Lines(doing, said)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    shown = (TextColumn("{task.description}"), BarColumn(), *columns)
    with Progress(*shown, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    SECONDS = 5.0

    def __init__(self, doing: str, said: Callable[[int, int], str]) -> None:
        self._doing, self._said = doing, said
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last >= self.SECONDS:
            self._last = time.monotonic()
            tell(f"{self._doing}: {self._said(done, total)}")
