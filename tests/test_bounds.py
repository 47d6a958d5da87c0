"""Every number of every request has bounds on both sides, and a value beyond them is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, get_args

import annotated_types
import pytest
from pydantic import BaseModel

from cabochon.errors import RequestError
from cabochon.serve.anthropic_requests import AnthropicRequest, parse_anthropic
from cabochon.serve.protocol import ChatRequest
from cabochon.serve.requests import parse_chat, parse_json
from cabochon.serve.response_requests import ResponseRequest, parse_response
from cabochon.serve.text_completions import CompletionRequest, parse_completion

SAY = [{"role": "user", "content": "Hi"}]
REQUESTS: list[tuple[type[BaseModel], Callable[[bytes], Any], dict[str, Any]]] = [
    (ChatRequest, parse_chat, {"model": "m", "messages": SAY, "logprobs": True}),
    (CompletionRequest, parse_completion, {"model": "m", "prompt": "Hi"}),
    (ResponseRequest, parse_response, {"model": "m", "input": "Hi"}),
    (AnthropicRequest, parse_anthropic, {"model": "m", "messages": SAY, "max_tokens": 5}),
]


def numbers(model: type[BaseModel]) -> Iterator[tuple[str, bool, dict[str, float]]]:
    """Fields that are a number: name, whether it is an integer, and its bounds."""
    for name, field in model.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        if kinds & {int, float} and bool not in kinds:
            bounds = {}
            for bound in field.metadata:
                for mark in ("ge", "gt", "le", "lt"):
                    if isinstance(bound, getattr(annotated_types, mark.capitalize())):
                        bounds[mark] = getattr(bound, mark)
            yield name, int in kinds, bounds


CASES = [
    pytest.param(parse, body, name, integer, bounds, id=f"{model.__name__}.{name}")
    for model, parse, body in REQUESTS
    for name, integer, bounds in numbers(model)
]


@pytest.mark.parametrize(("parse", "body", "name", "integer", "bounds"), CASES)
def test_a_number_has_bounds(
    parse: Callable[[bytes], Any],
    body: dict[str, Any],
    name: str,
    integer: bool,
    bounds: dict[str, float],
) -> None:
    least = bounds.get("ge", bounds.get("gt"))
    most = bounds.get("le", bounds.get("lt"))
    assert least is not None, f"{name} has no lower bound"
    assert most is not None, f"{name} has no upper bound"
    step = 1 if integer else 0.001
    wrong: list[Any] = [
        least - step, most + step, 2**63, -(2**63) - 1, 10**400, "1", True, [1], {"a": 1},
        *([1.5] if integer else []), *([least] if "gt" in bounds else []),
        *([most] if "lt" in bounds else []),
    ]  # fmt: skip
    for value in wrong:
        refused(parse, json.dumps({**body, name: value}), name)
    for literal in ("1e309", "-1e309"):
        text = json.dumps({**body, name: 0.125}).replace("0.125", literal)
        refused(parse, text, name)
    for literal in ("NaN", "Infinity", "-Infinity"):
        with pytest.raises(RequestError, match="JSON"):
            parse_json(json.dumps({**body, name: 0.125}).replace("0.125", literal).encode())


def refused(parse: Callable[[bytes], Any], text: str, name: str) -> None:
    with pytest.raises(RequestError) as error:
        parse(text.encode())
    # A number that no float holds may be refused as JSON already.
    assert error.value.param in (name, None), text[:200]
    assert len(str(error.value)) < 600


def test_there_are_numbers() -> None:
    assert len(CASES) > 35
