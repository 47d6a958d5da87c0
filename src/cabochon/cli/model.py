"""From the MODEL of a command line to a loaded `LLM`, with a word on how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cabochon.console import tell
from cabochon.settings import Settings

if TYPE_CHECKING:
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
    with progress_bar("loading") as progress:
        llm = LLM(source, **settings.engine_options(), progress=progress)
    for note in llm.certificate.notes:
        tell("\n".join(("the weights look odd:", *note.lines())))
    return llm


@contextmanager
def progress_bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A bar at a terminal; elsewhere a line every few seconds of what takes long."""
    if not sys.stderr.isatty():
        yield _Lines(doing)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    SECONDS = 5.0

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._said >= self.SECONDS:
            self._said = time.monotonic()
            tell(f"{self._doing}: {done / 2**30:.1f} of {total / 2**30:.1f} GiB")
