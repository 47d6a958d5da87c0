"""Chat templates: the text that transformers renders, within limits that hold."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from cabochon.errors import ConfigError, RequestError
from cabochon.text import sandbox
from cabochon.text.chat import ChatTemplate

# The turn format of Gemma 4 with the constructs that templates of its kind use.
TEMPLATE = """
{%- macro strip_thinking(text) -%}
    {%- set ns = namespace(result='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- set ns.result = ns.result + part.split('<|channel>')[0] -%}
    {%- endfor -%}
    {{- ns.result | trim -}}
{%- endmacro -%}
{%- macro argument(value) -%}
    {%- if value is mapping -%}
        {
        {%- for key, item in value | dictsort -%}
            {{ key }}:{{ argument(item) }}{{ ',' if not loop.last }}
        {%- endfor -%}
        }
    {%- elif value is string -%}<|"|>{{ value }}<|"|>
    {%- else -%}{{ value | tojson }}
    {%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- set ns = namespace(last=none) -%}
{%- if enable_thinking is defined and enable_thinking or tools -%}
    {{- '<|turn>system\\n' -}}
    {%- if enable_thinking %}<|think|>{% endif -%}
    {%- for tool in tools or [] %}<|tool>{{ tool | tojson(indent=2) }}<tool|>{% endfor -%}
    {{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'skip' %}{% continue %}{% endif -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{ raise_exception('no such role: ' + message['role']) }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- for call in message['tool_calls'] or [] -%}
        {{- '<|tool_call>call:' + call['function']['name'] -}}
        {{- argument(call['function']['arguments']) }}<tool_call|>
    {%- endfor -%}
    {%- if message['content'] is string -%}
        {%- if role == 'model' -%}
            {% generation %}{{ strip_thinking(message['content']) }}{% endgeneration %}
        {%- else -%}
            {{ message['content'] | trim }}
        {%- endif -%}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' %}{{ item['text'] | trim }}
            {%- elif item['type'] == 'image' %}{{ '\\n\\n<|image|>\\n\\n' }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "image_token": "<|image|>"}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": " What is this?\n"}],
    "system and history": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Ünïcödé 🐈 <b>&amp;</b>"},
        {"role": "skip", "content": "not shown"},
        {"role": "assistant", "content": "<|channel>thought\nhm<channel|>Yes. "},
        {"role": "user", "content": "\ud83d and why?"},
    ],
    "pictures": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": " Compare "},
                {"type": "image", "image": Image.new("RGB", (1, 1))},
                {"type": "image"},
                {"type": "text", "text": "these."},
            ],
        }
    ],
    "tool calls": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"function": {"name": "f", "arguments": {"z": [1, None], "a": {"b": "<c>"}}}}
            ],
        },
    ],
}


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(TEMPLATE, TOKENS)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"add_generation_prompt": False},
        {"enable_thinking": True},
        {"tools": [{"type": "function", "function": {"name": "f", "description": "é"}}]},
    ],
)
def test_text_is_what_transformers_renders(
    template: ChatTemplate, name: str, variables: dict[str, Any]
) -> None:
    given = {"add_generation_prompt": True, **variables}
    (expected,), _ = render_jinja_template(
        [CONVERSATIONS[name]], chat_template=TEMPLATE, **given, **TOKENS
    )
    assert template.render(CONVERSATIONS[name], **variables) == expected


@pytest.mark.parametrize("place", ["jinja", "json", "config", "named"])
def test_template_and_tokens_are_found_where_transformers_finds_them(
    tmp_path: Path, place: str
) -> None:
    from test_text import build_tokenizer

    config: dict[str, Any] = {
        "bos_token": {"__type": "AddedToken", "content": "<bos>"},
        "image_token": "<|image|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    written = "{{ bos_token }}{{ eos_token }}{{ image_token }}{{ messages[0].content }}"
    match place:
        case "jinja":
            (tmp_path / "chat_template.jinja").write_text(written)
        case "json":
            (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": written}))
        case "config":
            config["chat_template"] = written
        case "named":
            other = {"name": "other", "template": "no"}
            config["chat_template"] = [other, {"name": "default", "template": written}]
    build_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<eos>"}))

    messages = [{"role": "user", "content": "hi"}]
    text = ChatTemplate.open(tmp_path).render(messages)
    assert text == "<bos><eos><|image|>hi"
    if place != "json":  # transformers' tokenizer leaves that file to its processors
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert text == theirs.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.at_all }}", "UndefinedError"),
        ("{{ ().__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception.__globals__['json'] }}", "SecurityError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself too often"),
        ("{{ messages[0].content * 2000000000 }}", "more memory than"),
        ("{{ '%2000000000d' | format(1) }}", "more memory than"),
        ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "10,000,000 characters"),
        ("{% for i in range(999999999) %}{% endfor %}", "OverflowError"),
    ],
)
def test_misbehaving_templates_fail_alone(source: str, reason: str) -> None:
    template = ChatTemplate(f"{{% if not calm %}}{source}{{% endif %}}fine", {})
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(RequestError, match=reason):
        template.render(messages)
    assert template.render(messages, calm=True) == "fine"


NESTED_LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# A list that holds itself twice, forty times over: one call that no check inside Python interrupts.
DOUBLING = (
    "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x == [] or (ns.x | tojson | length) }}"
)


@pytest.mark.parametrize("source", [NESTED_LOOPS, DOUBLING])
def test_endless_templates_are_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(f"{{% if not calm %}}{source}{{% endif %}}fine", {})
    monkeypatch.setattr(sandbox, "TIME_LIMIT", 1.0)
    start = time.monotonic()
    with pytest.raises(RequestError, match=r"longer than 1 s|more memory than"):
        template.render([])
    assert time.monotonic() - start < 3.0
    assert template.render([], calm=True) == "fine"


def test_no_file_can_be_opened_behind_the_sandbox() -> None:
    """Even code that got out of Jinja's sandbox, as the process itself stands in for here."""
    from subprocess import run
    from sys import executable

    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import renderer; renderer._confine(); "
        "open(sys.argv[1] + '/renderer.py')"
    )
    folder = str(Path(sandbox.__file__).parent)
    ended = run(
        [executable, "-P", "-c", script, folder], capture_output=True, text=True, check=False
    )
    assert "Too many open files" in ended.stderr


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ 'a' | no_such_filter }}", "{% for x in y %}", "{{ '" + "a" * 9]
)
def test_templates_that_do_not_compile_are_refused_when_opened(source: str) -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        ChatTemplate(source, {})


def test_a_template_that_lacks_its_first_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="bos_token"):
        ChatTemplate("{{ bos_token }}", {})


def test_a_checkpoint_without_template_opens_but_does_not_chat(tmp_path: Path) -> None:
    template = ChatTemplate.open(tmp_path)
    with pytest.raises(RequestError, match="no chat template"):
        template.render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": 3}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "other", "template": ""}]}'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_unreadable_templates_are_refused(tmp_path: Path, file: str, content: str | bytes) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ConfigError, match=r"cannot be read|expected an object|names no default"):
        ChatTemplate.open(tmp_path)


def test_deeply_nested_messages_are_refused(template: ChatTemplate) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RequestError, match="not JSON"):
        template.render([{"role": "user", "content": deep}])
