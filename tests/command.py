"""The command as a process, for tests of what it prints and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import TINY

TALKATIVE = TINY  # random weights never end a turn
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("CABOCHON_")}


def cabochon(
    *arguments: str | Path, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cabochon", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**ENVIRONMENT, **environment},
    )


def fails(result: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """One error on stderr, nothing on stdout, no traceback."""
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in result.stderr
