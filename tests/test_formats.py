"""docs/formats.md says what the tests hold, and no row of it is older than they are."""

from __future__ import annotations

from formats import PAGE, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/formats.py"
