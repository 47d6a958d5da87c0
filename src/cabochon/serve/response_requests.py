"""Requests of `/v1/responses`, and the chat that each of them is.

Nothing is kept between requests: what refers to an earlier response is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, Tag, ValidationError

from cabochon.errors import RequestError
from cabochon.serve.fields import (
    MAX_PARTS,
    STRICT,
    FunctionName,
    InputAudio,
    by_type,
    either,
    text_or_parts,
)
from cabochon.serve.protocol import MAX_ARGUMENTS, MAX_MESSAGES, MAX_TOOLS, ChatRequest, Effort
from cabochon.serve.requests import LABELS, Fields, as_request_error, parse, parse_json

_KNOWN = Fields(
    not_served={
        "background": (False,),
        "context_management": (),
        "conversation": (),
        # Reasoning is given as it is, and may be sent back so: there is nothing to encrypt.
        "include": ([], ["reasoning.encrypted_content"]),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "stream_options": ({}, {"include_obfuscation": False}),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    },
    no_effect=LABELS - {"metadata"},
)
_Status = Literal["in_progress", "completed", "incomplete"]
_Id = Annotated[str, Field(min_length=1, max_length=256)]


class InputText(BaseModel):
    model_config = STRICT

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputImage(BaseModel):
    model_config = STRICT

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None
    file_id: None = None


class InputSound(BaseModel):
    model_config = STRICT

    type: Literal["input_audio"]
    input_audio: InputAudio


def _part_tag(value: Any) -> str | None:
    tag = by_type(value)
    return "<text>" if tag in ("<input_text>", "<output_text>", "<text>") else tag


InputPart = Annotated[
    Annotated[InputText, Tag("<text>")]
    | Annotated[InputImage, Tag("<input_image>")]
    | Annotated[InputSound, Tag("<input_audio>")],
    either(_part_tag, "a part of type 'input_text', 'input_image' or 'input_audio'"),
]
InputContent = Annotated[
    Annotated[str, Tag("<str>")]
    | Annotated[list[InputPart], Field(min_length=1, max_length=MAX_PARTS), Tag("<parts>")],
    either(text_or_parts, "a string or a list of parts"),
]


class InputMessage(BaseModel):
    model_config = STRICT

    type: Literal["message"] | None = None
    role: Literal["user", "system", "developer", "assistant"]
    content: InputContent
    id: str | None = None
    status: _Status | None = None
    phase: str | None = None


class InputCall(BaseModel):
    model_config = STRICT

    type: Literal["function_call"]
    call_id: _Id
    name: FunctionName
    arguments: str = Field(max_length=MAX_ARGUMENTS)
    id: str | None = None
    status: _Status | None = None


class CallOutput(BaseModel):
    model_config = STRICT

    type: Literal["function_call_output"]
    call_id: _Id
    output: InputContent
    id: str | None = None
    status: _Status | None = None


class ReasoningPart(BaseModel):
    model_config = STRICT

    type: Literal["reasoning_text"]
    text: str


class InputReasoning(BaseModel):
    model_config = STRICT

    type: Literal["reasoning"]
    summary: list[Any] | None = None
    content: list[ReasoningPart] | None = None
    encrypted_content: None = None
    id: str | None = None
    status: _Status | None = None


def _item_tag(value: Any) -> str | None:
    if isinstance(value, dict) and value.get("type") is None:
        return "<message>"
    return by_type(value)


Item = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[InputCall, Tag("<function_call>")]
    | Annotated[CallOutput, Tag("<function_call_output>")]
    | Annotated[InputReasoning, Tag("<reasoning>")],
    either(
        _item_tag, "an item of type 'message', 'function_call', 'function_call_output', 'reasoning'"
    ),
]


class ResponseTool(BaseModel):
    model_config = STRICT

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunctionTool(BaseModel):
    model_config = STRICT

    type: Literal["function"]
    name: FunctionName


class AllowedFunctions(BaseModel):
    model_config = STRICT

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunctionTool] = Field(min_length=1, max_length=MAX_TOOLS)


def _choice_tag(value: Any) -> str | None:
    return "<mode>" if isinstance(value, str) else by_type(value)


class Format(BaseModel):
    """As in chats, but that a schema stands beside its type."""

    model_config = STRICT

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    name: str | None = Field(None, min_length=1, max_length=128)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    regex: str | None = None
    grammar: str | None = None


class TextOptions(BaseModel):
    model_config = STRICT

    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(BaseModel):
    model_config = STRICT

    effort: Effort | None = None
    summary: Literal["auto"] | None = None  # whether there is one is left to us: there is none
    generate_summary: Literal["auto"] | None = None


class ResponseRequest(BaseModel):
    """A response that can be made."""

    model_config = STRICT

    model: str = Field(min_length=1, max_length=1024)
    input: Annotated[
        Annotated[str, Tag("<str>")]
        | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES), Tag("<parts>")],
        either(text_or_parts, "a string or a list of items"),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    tools: list[ResponseTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
            | Annotated[NamedFunctionTool, Tag("<function>")]
            | Annotated[AllowedFunctions, Tag("<allowed_tools>")],
            either(_choice_tag, "'none', 'auto', 'required', a function, or allowed_tools"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    stream: bool | None = None


_COPIED = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty",
    "frequency_penalty", "parallel_tool_calls", "stream",
)  # fmt: skip


def parse_response(body: bytes) -> tuple[ResponseRequest, ChatRequest]:
    """The response that `body` asks for, and the same as a chat.

    Raises:
        RequestError: no JSON object, a field that is unknown or not served, a value out of range.
    """
    asked = parse(parse_json(body), ResponseRequest, _KNOWN)
    fields: dict[str, Any] = {name: getattr(asked, name) for name in _COPIED}
    fields["max_completion_tokens"] = asked.max_output_tokens
    fields["messages"] = _messages(asked)
    if asked.tools:
        fields["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"})}
            for tool in asked.tools
        ]
    fields["tool_choice"] = _choice(asked)
    fields["response_format"] = _format(asked.text.format if asked.text else None)
    fields["reasoning_effort"] = asked.reasoning.effort if asked.reasoning else None
    try:
        return asked, ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise in_response_words(as_request_error(error)) from None


def in_response_words(error: RequestError) -> RequestError:
    """`error` of the chat, by the names that the fields have in a response."""
    where = error.param
    if where is None:
        return error
    if where.startswith("messages"):
        where = "input"
    for ours, theirs in (
        ("response_format.json_schema", "text.format"),
        ("response_format", "text.format"),
        ("reasoning_effort", "reasoning.effort"),
        (".function", ""),
    ):
        where = where.replace(ours, theirs)
    return RequestError(str(error), where)


def _messages(asked: ResponseRequest) -> list[dict[str, Any]]:
    items: list[Any] = asked.input if isinstance(asked.input, list) else []
    messages: list[dict[str, Any]] = []
    if asked.instructions:
        messages.append({"role": "system", "content": asked.instructions})
    if isinstance(asked.input, str):
        messages.append({"role": "user", "content": asked.input})
    turn: dict[str, Any] = {}  # of the assistant: several items are one message
    for item in items:
        match item:
            case InputReasoning():
                text = "".join(part.text for part in item.content or ())
                turn = _turn(messages, turn, new=bool(turn.get("tool_calls")))
                if text:
                    turn["reasoning_content"] = turn.get("reasoning_content", "") + text
            case InputMessage(role="assistant"):
                turn = _turn(messages, turn, new="content" in turn or "tool_calls" in turn)
                turn["content"] = _content(item.content)
            case InputCall():
                turn = _turn(messages, turn)
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                turn["tool_calls"] = [*turn.get("tool_calls", []), call]
            case InputMessage():
                turn = {}
                messages.append({"role": item.role, "content": _content(item.content)})
            case CallOutput():
                turn = {}
                content = _content(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
    return messages


def _turn(
    messages: list[dict[str, Any]], turn: dict[str, Any], *, new: bool = False
) -> dict[str, Any]:
    """The assistant's message that goes on; a new one if there is none."""
    if not turn or new:
        turn = {"role": "assistant"}
        messages.append(turn)
    return turn


def _content(content: str | list[Any]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [_part(part) for part in content]


def _part(part: InputText | InputImage | InputSound) -> dict[str, Any]:
    match part:
        case InputText():
            return {"type": "text", "text": part.text}
        case InputImage():
            return {"type": "image_url", "image_url": {"url": part.image_url}}
        case InputSound():
            return {"type": "input_audio", "input_audio": part.input_audio.model_dump()}


def _choice(asked: ResponseRequest) -> Any:
    match asked.tool_choice:
        case NamedFunctionTool(name=name):
            return {"type": "function", "function": {"name": name}}
        case AllowedFunctions(mode=mode, tools=tools):
            named = [{"type": "function", "function": {"name": tool.name}} for tool in tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
        case choice:
            return choice


def _format(given: Format | None) -> dict[str, Any] | None:
    if given is None:
        return None
    fields = given.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
    if given.type == "json_schema":
        return {"type": given.type, "json_schema": fields}
    return {"type": given.type, **fields}
