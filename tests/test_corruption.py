"""Whatever is wrong with a checkpoint, it is refused, or said; nothing loads wrong in silence.

A damaged copy of a fixture ends in one of three ways: an error for users that names the place; a
model that is the sound one to the bit, since what was changed means nothing; or, where the change
is one that a file may have, a report that says something it does not say of the sound file.

`CABOCHON_CASES=10000` tries more than the fixed sample.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from corruption import WOUNDS, Copy, Unfit, sound
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import nn

from cabochon.errors import CabochonError
from cabochon.load.execute import execute, tensors_of
from cabochon.load.report import Report, plan_checkpoint

CASES = int(os.environ.get("CABOCHON_CASES", "0"))
SECONDS = 30  # a load of a fixture takes less than one
ROOM = 1 << 30  # bytes beyond the file's own size


def load(folder: Path) -> tuple[nn.Module, Report]:
    report = plan_checkpoint(folder)
    assert report.plan is not None
    return execute(report.plan, dtype=torch.float32), report


def digest(model: nn.Module, report: Report) -> str:
    """Of every tensor of the model by name, and of what is done to activations."""
    assert report.plan is not None
    found = hashlib.sha256("".join(site.stored_as for site in report.plan.sites).encode())
    for name, tensor in tensors_of(model):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def said(report: Report) -> set[str]:
    """Everything that the report tells a user beyond its tables."""
    found = (*report.notes, *report.dropped)
    return {f"{where}: {finding.detail}" for finding in found for where in finding.where}


@cache
def original(folder: Path) -> tuple[str, frozenset[str]]:
    model, report = load(folder)
    return digest(model, report), frozenset(said(report))


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """Neither a hang nor memory far beyond what the file takes."""

    def stop(*_: object) -> None:
        pytest.fail(f"still not done after {SECONDS} s")

    before = _peak(reset=True)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
    assert _peak() - before < size + ROOM


def _peak(*, reset: bool = False) -> int:
    """Bytes of memory this process has had at most, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


@settings(
    max_examples=CASES or 300,
    deadline=None,
    derandomize=not CASES,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.sampled_from(sorted(WOUNDS)),
    st.sampled_from(sound(folders=True)),
    st.integers(0, 2**32 - 1),
)
def test_a_damaged_folder_never_loads_in_silence(wound: str, source: Path, seed: int) -> None:
    with TemporaryDirectory() as room:
        copy = Copy(source, Path(room) / source.name)
        try:
            place = WOUNDS[wound](copy, random.Random(seed))
        except Unfit:
            reject()
        judge(copy.folder, source, place)


def judge(damaged: Path, source: Path, place: str) -> None:
    sound_digest, sound_words = original(source)
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    with bounded(size):
        found = attempt(damaged)
    if isinstance(found, str):
        assert place in found
        return
    model, report = found
    assert digest(model, report) == sound_digest or said(report) - sound_words, "loaded in silence"


def attempt(folder: Path) -> tuple[nn.Module, Report] | str:
    """The model, or the words with which it is refused."""
    try:
        return load(folder)
    except CabochonError as error:
        return str(error)
