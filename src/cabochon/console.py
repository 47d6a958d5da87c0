"""What a server says on stderr. A disk that is full, or a reader that left, must not end it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def tell(text: str) -> None:
    """Write a line to stderr, or lose it. Python's own stream would raise, at exit once more."""
    left = f"{text}\n".encode(errors="backslashreplace")
    with suppress(OSError, ValueError):  # ValueError: there is no stderr, or none with a number
        number = sys.stderr.fileno()
        while left:
            left = left[os.write(number, left) :]
