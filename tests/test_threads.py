"""Threads that share the work of the kernels: every piece is done, however many there are of both.

Compiled for the test: between jobs that Python asks for, threads have the time to go to rest, and
what goes wrong goes wrong when one job follows the other at once, as in a layer.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import cabochon.kernels

COMPILER = shutil.which("c++")
SOURCES = Path(cabochon.kernels.__file__).parent / "csrc"
SECONDS = 120  # after which a caller is thought to wait for a piece that was lost


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("threads", [2, 5, 16])
def test_every_piece_is_done_once(threads: int, tmp_path: Path) -> None:
    assert COMPILER is not None
    program, own = tmp_path / "threads", Path(__file__).with_name("threads.cpp")
    options = ["-std=c++17", "-O2", "-pthread", f"-I{SOURCES}", "-o", str(program)]
    subprocess.run([COMPILER, *options, str(own), str(SOURCES / "pool.cpp")], check=True)
    told = subprocess.run([program, str(threads)], capture_output=True, text=True, timeout=SECONDS)
    assert (told.returncode, told.stdout) == (0, "")
