"""The page in a real Chromium: what people do with it, and that it asks nobody but its server.

With SCREENSHOTS=docs/pictures the pictures of the documentation are taken anew.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from browser import CHROMIUM, Browser, browser
from serving import HTTP, picture_bytes, serving, until

from cabochon.llm import LLM
from cabochon.serve.pages import STATIC

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (apt install chromium)"
)

# Of WCAG 2: the texts whose colour and ground differ by less than 4.5 to 1.
CONTRASTS = """(root) => {
    const light = (rgb) => rgb.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const colour = parts(getComputedStyle(node).backgroundColor);
            if (colour.length < 4 || colour[3] > 0) return colour.slice(0, 3);
        }
    };
    return [...root.querySelectorAll('*')].filter((node) => node.checkVisibility() && !node.disabled
        && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
        .map((node) => {
            const both = [light(parts(getComputedStyle(node).color).slice(0, 3)), light(ground(node))];
            return [node.textContent.trim().slice(0, 30), (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05)];
        }).filter(([, contrast]) => contrast < 4.5);
}"""  # noqa: E501

ANSWERED = "!![...document.querySelectorAll('#log .model .foot')].at(-1)?.childElementCount"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, url: str) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page
        strangers = [asked for asked in page.asked if not asked.startswith((f"{url}/", "data:"))]
        assert strangers in ([], ["about:blank"])
        assert page.complaints == []  # a breach of the page's policy is one


def shoot(page: Browser, name: str) -> None:
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(Path(folder) / f"{name}.webp")


def ask(page: Browser, words: str) -> None:
    page.until("document.getElementById('model').textContent === 'cabochon-demo'")
    page.run("document.getElementById('prompt').focus()")
    page.type(words)
    page.press("Enter", 13, "\r")


def test_pages_name_nobody_else(url: str) -> None:
    """Neither in what they load nor in what they may load."""
    for path in ("/", "/docs", *(f"/static/{file.name}" for file in STATIC.iterdir())):
        response = HTTP.get(f"{url}{path}")
        assert response.status_code == 200
        text = response.text.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert "://" not in text.replace("https?:\\/\\/", "")
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy
        again = HTTP.get(f"{url}{path}", headers={"if-none-match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


@needs_chromium
def test_a_picture_is_uploaded_and_the_answer_streams(
    page: Browser, url: str, tmp_path: Path
) -> None:
    page.open(url)
    page.until("document.getElementById('model').textContent === 'cabochon-demo'")
    file = tmp_path / "red.png"
    file.write_bytes(picture_bytes("red", (240, 160)))
    page.choose("#file", file)
    page.until("document.querySelectorAll('#attachments li').length === 1")
    page.run("""window.seen = new Set(); new MutationObserver(() => {
        const body = document.querySelector('.model .body');
        if (body) seen.add(body.innerText);
    }).observe(document.getElementById('log'), {childList: true, subtree: true})""")
    page.type("What colour is this rectangle?")  # the field has the focus from the start
    page.press("Enter", 13, "\r")
    page.until(ANSWERED)
    assert "red" in page.run("document.querySelector('.model .body').innerText").lower()
    growing = page.run("[...seen].sort((a, b) => a.length - b.length)")
    assert len(growing) > 2
    assert all(longer.startswith(shorter.rstrip()) for shorter, longer in pairwise(growing))
    foot = page.run("document.querySelector('.model .foot').innerText")
    for fact in ("tokens read", "written", "tokens/s", "first after"):
        assert fact in foot
    assert page.run("document.querySelector('.user img').naturalWidth") == 240
    shoot(page, "chat")


@needs_chromium
def test_a_pasted_picture_and_a_second_question(page: Browser, url: str) -> None:
    page.open(url)
    blue = list(picture_bytes("blue"))
    page.run(f"""(() => {{ const data = new DataTransfer();
        data.items.add(new File([new Uint8Array({blue})], 'blue.png', {{type: 'image/png'}}));
        document.dispatchEvent(new ClipboardEvent('paste', {{clipboardData: data}})); }})()""")
    page.until("document.querySelectorAll('#attachments li').length === 1")
    ask(page, "What colour is this rectangle?")
    page.until(ANSWERED)
    assert "blue" in page.run("document.querySelector('.model .body').innerText").lower()
    ask(page, "Who are you?")
    page.until("document.querySelectorAll('.model').length === 2 && " + ANSWERED)
    assert page.run("document.getElementById('status').textContent").startswith("Answer: ")


@needs_chromium
def test_a_sound_is_uploaded_and_heard(page: Browser, tiny: LLM, tmp_path: Path) -> None:
    """By a tiny model with random weights: what it says is nothing, but it says it of the sound."""
    heard: list[Any] = []
    file = tmp_path / "noise.wav"
    noise = np.random.default_rng(0).normal(0, 0.1, 8000).astype(np.float32)
    soundfile.write(file, noise, 16000)
    with serving(tiny) as url, pytest.MonkeyPatch.context() as patch:
        hear = tiny.prompts.sound
        patch.setattr(tiny.prompts, "sound", lambda data: heard.append(data) or hear(data))
        page.open(url)
        page.until(f"document.getElementById('model').textContent === {json.dumps(tiny.name)}")
        assert "sounds" in page.run("document.getElementById('senses').textContent")
        page.choose("#file", file)
        page.until("document.querySelectorAll('#attachments li').length === 1")
        page.run("document.getElementById('set-max_tokens').value = '3'")
        page.type("What do you hear?")
        page.press("Enter", 13, "\r")
        page.until(ANSWERED)
        page.run("document.getElementById('set-max_tokens').value = ''")
        assert page.run("document.querySelectorAll('.failure').length") == 0
        assert page.run("document.querySelector('.user audio').controls")
        page.until("document.querySelector('.user audio').duration === 0.5")
        page.open("about:blank")
    page.asked = [asked for asked in page.asked if not asked.startswith(url)]
    assert len(heard) == 1


@needs_chromium
def test_the_keyboard_is_enough(page: Browser, url: str, llm: LLM) -> None:
    page.open(url)
    page.until("document.getElementById('model').textContent === 'cabochon-demo'")
    focus = "document.activeElement.id || document.activeElement.innerText"
    assert page.run(focus) == "prompt"
    # Once through: all that can be used, in the order of the page, and nothing that cannot.
    page.run("document.querySelector('.skip').focus()")
    order = []
    while page.run("document.activeElement !== document.body"):
        order.append(page.run(focus))
        assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", order
        page.press("Tab", 9)
    assert order == [
        "Skip to the message field", "tab-chat", "new", "settings-toggle", "theme", "Who are you?",
        "What is 3 plus 4?", "What can you see?", "prompt", "attach", "thinking", "send",
    ]  # fmt: skip
    page.run("document.querySelector('.skip').focus()")
    page.press("Enter", 13, "\r")
    assert page.run(focus) == "prompt"

    page.type("Who")
    page.press("Enter", 13, "\r", modifiers=8)  # with Shift: a line more
    page.type("are you?")
    assert page.run("document.getElementById('prompt').value") == "Who\nare you?"
    assert page.run("document.querySelectorAll('#log li').length") == 0
    generate = llm.engine.ends
    llm.engine.ends = frozenset()  # an answer that never ends by itself
    try:
        page.press("Enter", 13, "\r")
        page.until("(document.querySelector('.model .body')?.innerText.length ?? 0) > 20")
        assert page.run("document.querySelector('.user .body').innerText") == "Who\nare you?"
        page.run("document.getElementById('settings-toggle').focus()")
        page.press("Enter", 13, "\r")
        assert page.run(focus) == "system"
        page.press("Escape", 27)  # closes the settings, and leaves the answer alone
        assert page.run(focus) == "settings-toggle"
        assert page.run("document.getElementById('settings').hidden") is True
        assert llm.engine.load == 1
        page.press("Escape", 27)
        page.until(ANSWERED)
        assert until(lambda: llm.engine.load == 0)
    finally:
        llm.engine.ends = generate
    assert "stopped" in page.run("document.querySelector('.model .foot').innerText")


@needs_chromium
@pytest.mark.parametrize("chosen", ["system", "page"])
def test_it_is_dark_and_legible(page: Browser, url: str, chosen: str) -> None:
    """By the system's choice or by the page's own; all text stands out from what is behind it."""
    page.open(url, scheme="dark" if chosen == "system" else "light")
    page.until("document.getElementById('model').textContent === 'cabochon-demo'")
    if chosen == "page":
        for _ in range(2):  # automatic, light, dark
            page.run("document.getElementById('theme').click()")
        page.open("about:blank")
        page.open(url)  # it is remembered
    page.run("document.querySelector('#suggestions button').click()")
    page.until(ANSWERED)
    page.run("document.getElementById('settings-toggle').click()")
    if chosen == "page":
        assert "Dark" in page.run("document.getElementById('theme').textContent")
    assert page.run(f"({CONTRASTS})(document.body)") == []
    page.run("document.getElementById('model').style.color = '#444'")
    assert [words for words, _ in page.run(f"({CONTRASTS})(document.body)")] == ["cabochon-demo"]
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", ground))) < 60
    page.run("localStorage.removeItem('cabochon-theme')")


@needs_chromium
def test_what_cannot_be_sent_stays_where_it_is(page: Browser, url: str) -> None:
    page.open(url)
    page.until("document.getElementById('model').textContent === 'cabochon-demo'")
    page.run("document.getElementById('tools').value = 'no JSON'")
    ask(page, "Who are you?")
    page.until("!!document.querySelector('[role=alert]')")
    assert page.run("document.getElementById('prompt').value") == "Who are you?"
    page.run("document.getElementById('tools').value = ''")
    page.press("Enter", 13, "\r")
    page.until(ANSWERED)
    assert page.run("document.querySelectorAll('.user').length") == 1


@needs_chromium
def test_stop_ends_the_answer_here_and_there(page: Browser, url: str, llm: LLM) -> None:
    page.open(url)
    generate = llm.engine.ends
    llm.engine.ends = frozenset()  # an answer that never ends by itself
    try:
        ask(page, "Who are you?")
        page.until(
            "!document.getElementById('stop').hidden && "
            "(document.querySelector('.model .body')?.innerText.length ?? 0) > 20"
        )
        assert llm.engine.load == 1
        page.run("document.getElementById('stop').click()")
        page.until(ANSWERED)
        assert until(lambda: llm.engine.load == 0)
    finally:
        llm.engine.ends = generate
    assert "stopped" in page.run("document.querySelector('.model .foot').innerText")
    assert len(page.run("document.querySelector('.model .body').innerText")) > 20
    assert page.run("document.getElementById('stop').hidden") is True


@needs_chromium
def test_what_is_wrong_is_said_in_the_servers_words(page: Browser, url: str) -> None:
    page.open(url)
    page.run("document.getElementById('settings-toggle').click()")
    page.run("document.getElementById('set-temperature').value = '9'")
    page.run("document.getElementById('settings-close').click()")
    page.run("document.getElementById('prompt').focus()")
    ask(page, "Who are you?")
    page.until("!!document.querySelector('[role=alert]')")
    assert "Temperature" in page.run("document.querySelector('[role=alert]').innerText")
    page.run("document.getElementById('set-temperature').value = ''")


@needs_chromium
def test_thoughts_are_folded_and_calls_are_shown(page: Browser, url: str) -> None:
    """What a stream may hold, by the page's own code, whatever the demo has learnt."""
    page.open(url)
    page.run("""(async () => {
        const {Answer, results} = await import('/static/turn.js');
        const turn = new Answer();
        const delta = (delta, reason = null) =>
            turn.take({choices: [{index: 0, delta, finish_reason: reason}]});
        delta({reasoning_content: 'Let me '});
        delta({reasoning_content: 'look it up.'});
        delta({tool_calls: [{index: 0, id: 'c1', function: {name: 'weather', arguments: '{"to'}}]});
        delta({tool_calls: [{index: 0, function: {arguments: 'wn": "Bern"}'}}]});
        delta({content: '**Bold** `code` <img src=x onerror=alert(1)>\\n\\n- one\\n- two'});
        delta({}, 'tool_calls');
        document.getElementById('log').append(turn.node);
        turn.end('', []);
        window.turn = turn;
        const form = results(turn.calls, (messages) => { window.sent = messages; });
        document.getElementById('log').append(form);
        form.querySelector('textarea').value = 'rain';
        form.requestSubmit();
    })()""")
    assert page.run("document.querySelector('.thoughts').open") is False
    assert page.run("document.querySelector('.thoughts pre').textContent") == "Let me look it up."
    assert "weather" in page.run("document.querySelector('.call summary').innerText")
    assert '"town": "Bern"' in page.run("document.querySelector('.call pre').textContent")
    assert page.run("document.querySelector('.model .body strong').innerText") == "Bold"
    assert page.run("document.querySelectorAll('.model .body li').length") == 2
    assert page.run("document.querySelectorAll('.model .body img').length") == 0
    sent = page.run("window.sent")
    assert sent == [{"role": "tool", "tool_call_id": "c1", "content": "rain"}]
    assert page.run("turn.message.tool_calls[0].function.arguments") == '{"town": "Bern"}'
    assert page.run("turn.message.reasoning_content") == "Let me look it up."
    # Folded until somebody opens it, with the keyboard if they like.
    assert page.run("document.querySelector('.thoughts pre').checkVisibility()") is False
    page.run("document.querySelector('.thoughts summary').focus()")
    page.press("Enter", 13, "\r")
    assert page.run("document.querySelector('.thoughts pre').checkVisibility()") is True


PAINT = [
    {
        "type": "function",
        "function": {
            "name": "paint",
            "parameters": {
                "type": "object",
                "properties": {"colour": {"enum": ["red", "blue"]}},
                "required": ["colour"],
                "additionalProperties": False,
            },
        },
    }
]


@needs_chromium
def test_a_tool_is_called_and_answered(page: Browser, url: str) -> None:
    page.open(url)
    page.until("document.getElementById('model').textContent === 'cabochon-demo'")
    page.run(f"document.getElementById('tools').value = {json.dumps(json.dumps(PAINT))}")
    page.run("document.getElementById('tool-choice').value = 'required'")
    ask(page, "Paint it red.")
    page.until(ANSWERED)
    assert "paint" in page.run("document.querySelector('.call summary').innerText")
    arguments = json.loads(page.run("document.querySelector('.call pre').textContent"))
    assert arguments["colour"] in ("red", "blue")
    page.run("document.getElementById('tool-choice').value = 'none'")
    # The model may have called it more than once.
    fields = "document.querySelectorAll('form.call textarea')"
    page.run(f"{fields}.forEach((field) => {{ field.value = 'It is painted.'; }})")
    page.run("document.querySelector('form.call').requestSubmit()")
    page.until("document.querySelectorAll('.model').length === 2 && " + ANSWERED)
    assert page.run("document.querySelectorAll('.failure').length") == 0
    assert page.run("[...document.querySelectorAll('.model .body')].at(-1).innerText")
    page.run("document.getElementById('tools').value = ''")


@needs_chromium
def test_the_checkpoint_is_drawn(page: Browser, url: str, llm: LLM) -> None:
    page.open(url, scheme="dark")
    page.run("document.getElementById('tab-chat').focus()")
    page.press("ArrowRight", 39)
    page.until("!!document.querySelector('#plan svg')")
    report = llm.report.as_dict()
    assert page.run("document.querySelectorAll('#plan svg rect').length") == len(report["groups"])
    areas = page.run("""[...document.querySelectorAll('#plan svg g')].map((g) => [
        g.querySelector('title').textContent.split(':')[0],
        g.querySelector('rect').getBBox()]).map(([name, box]) => [name, box.width * box.height])""")
    by_size = sorted(report["groups"], key=lambda row: -row["bytes"])
    assert [name for name, _ in areas] == [row["group"] for row in by_size]
    for (_, area), row in zip(areas, by_size, strict=True):
        assert area / (960 * 420) == pytest.approx(row["bytes"] / report["bytes"], abs=0.02)
    shown = page.run("document.getElementById('plan').innerText")
    for row in report["groups"]:
        assert row["group"] in shown
        assert row["scheme"] in shown
    assert report["plan_hash"] in shown
    assert llm.certificate.fingerprint in shown
    page.run("location.hash = ''")
    page.until("!document.getElementById('chat').hidden")
    page.run("location.hash = '#checkpoint'")
    page.until("!document.getElementById('plan').hidden")
    shoot(page, "checkpoint")


@needs_chromium
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_everything_to_act_on_has_a_name(page: Browser, url: str, path: str) -> None:
    page.open(f"{url}{path}")
    page.until("document.querySelectorAll('#docs details, #sampling input').length > 2")
    page.run("document.getElementById('settings-toggle')?.click()")
    tree = page.send("Accessibility.getFullAXTree")["nodes"]
    acting = [
        node for node in tree
        if not node["ignored"]
        and node["role"]["value"] in ("button", "textbox", "tab", "checkbox", "spinbutton", "link")
    ]  # fmt: skip
    assert len(acting) > 2
    assert [node for node in acting if not node.get("name", {}).get("value")] == []


@needs_chromium
def test_a_phone_shows_it_whole(page: Browser, url: str) -> None:
    page.open(url, 390, 780)
    assert page.run("document.documentElement.scrollWidth") == 390
    page.run("document.querySelector('#suggestions button').click()")
    page.until(ANSWERED)
    shoot(page, "phone")
    assert page.run(f"({CONTRASTS})(document.body)") == []
    for name in ("prompt", "send", "attach"):
        box = page.run(f"document.getElementById('{name}').getBoundingClientRect().toJSON()")
        assert box["height"] >= 40, name
        assert box["right"] <= 390
        assert box["bottom"] <= 780


@needs_chromium
def test_a_browser_asks_for_the_key_once(llm: LLM, tmp_path: Path) -> None:
    with serving(llm, api_key="sesame") as url, browser(tmp_path) as page:
        page.log_in("sesame")
        page.open(url)
        page.until("document.getElementById('model').textContent === 'cabochon-demo'")
        page.run("document.querySelector('#suggestions button').click()")
        page.until(ANSWERED)
        assert page.run("document.querySelectorAll('.failure').length") == 0
