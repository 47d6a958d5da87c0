"""The demo's chat template: what transformers renders of it, calls and their results included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cabochon.files import DEMO
from cabochon.llm import LLM

ASK = {"role": "user", "content": " What is the weather? "}
CALLS = [
    {
        "id": "a",
        "type": "function",
        "function": {
            "name": "weather",
            "arguments": {"city": "Zürich <b>", "days": [1, 2.5, True, None, {"k": "v"}], "B": 0},
        },
    },
    {"id": "b", "type": "function", "function": {"name": "clock", "arguments": {}}},
]
CALLING = {"role": "assistant", "content": "", "tool_calls": CALLS, "reasoning_content": "Hm."}
RESULTS = [
    {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "12:00"}]},
]
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "It is sunny."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Zürich", "Rome"]}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "clock"}},
]
HISTORIES: dict[str, list[dict[str, Any]]] = {
    "one turn": [ASK],
    "a system": [SYSTEM, ASK],
    "a call": [ASK, CALLING, *RESULTS],
    "an answer after calls": [SYSTEM, ASK, CALLING, *RESULTS, ANSWER, ASK],
    "calls after calls": [ASK, CALLING, *RESULTS, CALLING, *RESULTS],
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", kv_cache_bytes=32 * 2**20) as llm:
        yield llm


@pytest.mark.parametrize("name", HISTORIES)
@pytest.mark.parametrize(
    "variables", [{}, {"tools": TOOLS}, {"tools": TOOLS, "enable_thinking": True}]
)
def test_prompts_are_what_transformers_renders(
    llm: LLM, name: str, variables: dict[str, Any]
) -> None:
    """Token by token: through our renderer, our guard and our tokenizer."""
    template = (DEMO / "chat_template.jinja").read_text()
    (text,), _ = render_jinja_template(
        [HISTORIES[name]],
        chat_template=template,
        bos_token="<bos>",
        add_generation_prompt=True,
        **variables,
    )
    tokens = llm.prompts.chat(HISTORIES[name], **variables).tokens
    assert list(tokens) == llm.prompts.tokenizer.encode(text)
    assert llm.prompts.tokenizer.spell(tokens) == text


def test_the_format_is_gemmas(llm: LLM) -> None:
    """As the published template writes it, checked once against that; here word for word."""
    prompt = llm.prompts.chat([ASK, CALLING, *RESULTS], tools=TOOLS[1:], enable_thinking=True)
    assert llm.prompts.tokenizer.spell(prompt.tokens) == (
        "<bos><|turn>system\n<|think|>\n"
        '<|tool>declaration:clock{description:<|"|><|"|>}<tool|><turn|>\n'
        "<|turn>user\nWhat is the weather?<turn|>\n"
        "<|turn>model\n<|channel>thought\nHm.\n<channel|>"
        '<|tool_call>call:weather{B:0,city:<|"|>Zürich <b><|"|>,'
        'days:[1,2.5,true,None,{k:<|"|>v<|"|>}]}<tool_call|>'
        "<|tool_call>call:clock{}<tool_call|>"
        '<|tool_response>response:weather{value:<|"|>sunny<|"|>}<tool_response|>'
        '<|tool_response>response:clock{value:<|"|>12:00<|"|>}<tool_response|>'
    )
