"""The command as a process, for tests of what it prints and how it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Served:
    """A server process, its address, the command that it proposes, and what it says after that."""

    process: subprocess.Popen[str]
    url: str
    curl: str
    log: list[str]
    reader: threading.Thread

    def ended(self, seconds: float) -> int:
        """Its exit status; `log` is whole then."""
        status = self.process.wait(seconds)
        self.reader.join(seconds)
        return status


@contextmanager
def served(*arguments: str, **environment: str) -> Iterator[Served]:
    process = subprocess.Popen(
        [sys.executable, "-m", "cabochon", "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **environment},
    )
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        said = ""
        while not (ready := re.search(r"ready: (\S+)[^\0]*?(curl .*)", said)):
            line = next(lines)
            said += json.loads(line)["message"] + "\n" if line.startswith("{") else line
        url, curl = ready[1], ready[2]
        log: list[str] = []
        reader = threading.Thread(target=log.extend, args=(lines,), daemon=True)
        reader.start()
        yield Served(process, url, curl, log, reader)
    finally:
        process.kill()
        process.wait()
