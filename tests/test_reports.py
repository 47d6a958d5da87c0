"""The pages of `verify` and `compare` in a real Chromium: whole, readable, and on their own."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser
from checkpoints import DENSE, W4A16
from command import cabochon

from cabochon.load.report import plan_checkpoint
from cabochon.verify.page import Page, verdict

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")

COMMANDS = {
    "verify": ("verify", W4A16, "--against", DENSE),
    "compare": ("compare", W4A16, DENSE),
    "signs": ("compare", W4A16),
}
PAGES = (*COMMANDS, "failed")
PHONE, DESK = 390, 1000


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {name: folder / f"{name}.html" for name in PAGES}
    for name, command in COMMANDS.items():
        done = cabochon(*command, "--html", made[name])
        assert done.returncode == 0, done.stdout + done.stderr
    made["failed"].write_text(failed())
    return made


def failed() -> str:
    """What a page looks like that has bad news, and markup in its names."""
    page = Page("Verification of <b>it</b>")
    page.facts({"verdict": verdict(False, "Not verified"), "checkpoint": "a & <script>x</script>"})
    page.table("Title", ("stage", "verdict"), [("alive", verdict(False, "failed"))])
    page.paragraph(f"model.layers.1.{'very_' * 30}long: it is wrong")
    return page.text()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page
        assert page.complaints == []
        assert {asked.partition(":")[0] for asked in page.asked} == {"file", "data"}
        assert {asked.rpartition("/")[2] for asked in page.asked if asked.startswith("file")} == {
            f"{name}.html" for name in PAGES
        }


def texts(page: Browser, selector: str) -> list[str]:
    found: list[str] = page.run(
        f"[...document.querySelectorAll({selector!r})].map(e => e.textContent.trim())"
    )
    return found


def rows(page: Browser, title: str) -> list[str]:
    """The first cells of the table under a caption."""
    captions = "[...document.querySelectorAll('caption')]"
    found: list[str] = page.run(
        f"[...{captions}.find(c => c.textContent === {title!r}).parentElement.tBodies[0].rows]"
        ".map(row => row.cells[0].textContent)"
    )
    return found


def test_a_verification_has_all_that_it_promises(page: Browser, pages: dict[str, Path]) -> None:
    page.open(pages["verify"].as_uri(), width=DESK, height=900)
    facts = dict(zip(texts(page, "dt"), texts(page, "dd"), strict=True))
    report = plan_checkpoint(W4A16)
    assert facts["verdict"] == "Verified"
    assert facts["plan"] == report.hash
    assert (facts["checkpoint"], facts["against"]) == (str(W4A16), str(DENSE))
    assert "parameters" in facts["model"]
    command = " ".join(texts(page, "pre"))
    assert shlex.split(command)[:3] == ["cabochon", "verify", str(W4A16)]
    assert {group.group for group in report.groups} <= set(texts(page, "td"))
    charts = page.run("[...document.querySelectorAll('svg.chart')].map(c => c.ariaLabel)")
    assert {"error added over layer", "dB over bits"} <= set(charts)
    assert all(page.run("[...document.images].map(i => i.complete && i.naturalWidth > 0)"))
    assert len(texts(page, "img")) == 2
    assert rows(page, "Loss by kind")
    assert len(rows(page, "The modules that add most")) == 10


def test_a_comparison_has_all_that_it_promises(page: Browser, pages: dict[str, Path]) -> None:
    page.open(pages["compare"].as_uri(), width=DESK, height=900)
    assert shlex.split(texts(page, "pre")[0])[:4] == ["cabochon", "compare", str(W4A16), str(DENSE)]
    assert page.run("document.querySelector('svg.chart').ariaLabel") == "dB over layer"
    assert {"By kind", "Loss along depth", "The worst matrices"} <= set(texts(page, "h2"))


def test_names_are_no_markup(page: Browser, pages: dict[str, Path]) -> None:
    page.open(pages["failed"].as_uri())
    assert texts(page, "h1") == ["Verification of <b>it</b>"]
    assert "a & <script>x</script>" in texts(page, "dd")
    assert texts(page, "script, b") == []


# The least contrast of any text with the ground it stands on, as WCAG 2 computes it.
CONTRAST = """(() => {
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => {
    const [r, g, b] = parts(c).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (parts(c)[3] !== 0) return c;
    }
  };
  return Math.min(...[...document.body.querySelectorAll('*')]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    .filter(e => e.tagName !== 'title')
    .map(e => {
      const style = getComputedStyle(e);
      const ink = e.namespaceURI.endsWith('svg') ? style.fill : style.color;
      const pair = [light(ink), light(ground(e))].sort((a, b) => b - a);
      return (pair[0] + 0.05) / (pair[1] + 0.05);
    }));
})()"""


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_readable_by_day_and_night(
    page: Browser, pages: dict[str, Path], name: str, scheme: str
) -> None:
    page.open(pages[name].as_uri(), scheme=scheme, width=DESK, height=900)
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert page.run(CONTRAST) >= 4.5


@pytest.mark.parametrize("name", PAGES)
def test_pages_fit_a_phone(page: Browser, pages: dict[str, Path], name: str) -> None:
    """What is wider scrolls in a box of its own."""
    page.open(pages[name].as_uri(), width=PHONE, height=844)
    assert page.run("document.documentElement.scrollWidth") <= PHONE


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_printed_black_on_white_and_whole(
    page: Browser, pages: dict[str, Path], name: str
) -> None:
    page.open(pages[name].as_uri(), width=680, scheme="dark")  # A4 between its margins
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.send("Emulation.setEmulatedMedia", media="print", features=features)
    assert page.run("getComputedStyle(document.body).color") == "rgb(29, 31, 36)"
    assert page.run("document.documentElement.scrollWidth") <= 680
    assert page.run("[...document.querySelectorAll('.wide')].every(e => e.scrollWidth <= 680)")
    paper = base64.b64decode(page.send("Page.printToPDF", printBackground=True)["data"])
    page.send("Emulation.setEmulatedMedia", media="")
    assert paper.startswith(b"%PDF")
    assert 1 <= paper.count(b"/Type /Page\n") <= 6
