"""Requests of Anthropic's `/v1/messages`, and the chat that each of them is."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, Tag, ValidationError

from cabochon.errors import RequestError
from cabochon.serve.fields import (
    MAX_PARTS,
    STRICT,
    FunctionName,
    StopString,
    by_type,
    either,
    text_or_parts,
)
from cabochon.serve.protocol import MAX_MESSAGES, MAX_TOOLS, ChatRequest
from cabochon.serve.requests import Fields, as_request_error, parse, parse_json

_KNOWN = Fields(
    not_served={
        "container": (),
        "context_management": (),
        "diagnostics": (),
        "inference_geo": (),
        "mcp_servers": ([],),
        "service_tier": ("auto", "standard_only"),
        "speed": ("standard",),
    },
    no_effect=frozenset({"cache_control", "metadata", "user_profile_id", "workspace_id"}),
)
_Id = Annotated[str, Field(min_length=1, max_length=256)]


class _Block(BaseModel):
    """A hint where a prefix ends that may be kept: every prefix is."""

    model_config = STRICT

    cache_control: dict[str, Any] | None = None


class TextBlock(_Block):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = Field(None, max_length=0)


class ImageSource(BaseModel):
    model_config = STRICT

    type: Literal["base64", "url"]
    media_type: str | None = Field(None, max_length=64)
    data: str | None = None
    url: str | None = None


class ImageBlock(_Block):
    type: Literal["image"]
    source: ImageSource


class ThinkingBlock(_Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(_Block):
    type: Literal["tool_use"]
    id: _Id
    name: FunctionName
    input: dict[str, Any]


ResultContent = Annotated[
    Annotated[str, Tag("<str>")]
    | Annotated[list[TextBlock], Field(max_length=MAX_PARTS), Tag("<parts>")],
    either(text_or_parts, "a string or a list of blocks of type 'text'"),
]


class ToolResultBlock(_Block):
    type: Literal["tool_result"]
    tool_use_id: _Id
    content: ResultContent | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    either(by_type, "a block of type 'text', 'image', 'thinking', 'tool_use' or 'tool_result'"),
]


class Turn(BaseModel):
    model_config = STRICT

    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<str>")]
        | Annotated[list[Block], Field(min_length=1, max_length=MAX_PARTS), Tag("<parts>")],
        either(text_or_parts, "a string or a list of blocks"),
    ]


class AnthropicTool(_Block):
    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class Choice(BaseModel):
    model_config = STRICT

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(BaseModel):
    model_config = STRICT

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, lt=2**31)
    display: Literal["summarized"] | None = None  # it is shown whole


class OutputFormat(BaseModel):
    model_config = STRICT

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    model_config = STRICT

    effort: Literal["low", "medium", "high", "xhigh"] | None = None
    format: OutputFormat | None = None


class AnthropicRequest(BaseModel):
    """A message that can be made."""

    model_config = STRICT

    model: str = Field(min_length=1, max_length=1024)
    max_tokens: int = Field(ge=1, lt=2**31)
    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: (
        Annotated[
            Annotated[str, Tag("<str>")]
            | Annotated[list[TextBlock], Field(max_length=MAX_PARTS), Tag("<parts>")],
            either(text_or_parts, "a string or a list of blocks of type 'text'"),
        ]
        | None
    ) = None
    stop_sequences: list[StopString] | None = Field(None, max_length=16)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    tools: list[AnthropicTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    stream: bool | None = None


class CountRequest(AnthropicRequest):
    """The same, where only its tokens are counted."""

    max_tokens: int = Field(1, ge=1, lt=2**31)


def parse_anthropic(body: bytes, *, count: bool = False) -> tuple[AnthropicRequest, ChatRequest]:
    """The message that `body` asks for, and the same as a chat.

    Raises:
        RequestError: no JSON object, a field that is unknown or not served, a value out of range.
    """
    asked = parse(parse_json(body), CountRequest if count else AnthropicRequest, _KNOWN)
    if asked.messages[-1].role == "assistant":
        raise RequestError(
            "the last message is the assistant's: an answer cannot be begun for the model",
            f"messages[{len(asked.messages) - 1}]",
        )
    choice = asked.tool_choice
    fields: dict[str, Any] = {
        "model": asked.model,
        "max_tokens": asked.max_tokens,
        "messages": _messages(asked),
        "stop": asked.stop_sequences,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "tools": _tools(asked),
        "tool_choice": _choice(choice),
        "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
        **_thinking(asked),
    }
    if asked.output_config and asked.output_config.format:
        schema = {"name": "output", "schema": asked.output_config.format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    try:
        return asked, ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise in_anthropic_words(as_request_error(error)) from None


def in_anthropic_words(error: RequestError) -> RequestError:
    """`error` of the chat, by the names that the fields have here."""
    where = error.param
    for ours, theirs in (
        ("response_format.json_schema.schema", "output_config.format.schema"),
        ("thinking_token_budget", "thinking.budget_tokens"),
        ("chat_template_kwargs", "thinking"),
        ("function.parameters", "input_schema"),
        ("reasoning_effort", "output_config.effort"),
    ):
        where = where and where.replace(ours, theirs)
    if where and where.startswith("messages"):  # one of theirs is several of a chat
        where = "messages"
    return RequestError(str(error), where)


def _tools(asked: AnthropicRequest) -> list[dict[str, Any]] | None:
    if not asked.tools:
        return None
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
                "strict": tool.strict,
            },
        }
        for tool in asked.tools
    ]


def _choice(choice: Choice | None) -> Any:
    if choice is None:
        return None
    if choice.type == "tool":
        if choice.name is None:
            raise RequestError("tool_choice.name is missing", "tool_choice.name")
        return {"type": "function", "function": {"name": choice.name}}
    if choice.name is not None:
        raise RequestError(f"tool_choice of type {choice.type!r} takes no name", "tool_choice.name")
    return "required" if choice.type == "any" else choice.type


def _thinking(asked: AnthropicRequest) -> dict[str, Any]:
    thinking, fields = asked.thinking, dict[str, Any]()
    effort = asked.output_config.effort if asked.output_config else None
    if thinking is not None:
        on = thinking.type != "disabled"
        if thinking.budget_tokens is not None and not on:
            raise RequestError("thinking is disabled: it has no budget", "thinking.budget_tokens")
        fields["chat_template_kwargs"] = {"enable_thinking": on}
        fields["thinking_token_budget"] = thinking.budget_tokens if on else None
    if effort is not None and (thinking is None or thinking.type != "disabled"):
        fields["reasoning_effort"] = effort
    return fields


def _messages(asked: AnthropicRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if asked.system:
        system = asked.system
        text = system if isinstance(system, str) else "\n".join(block.text for block in system)
        messages.append({"role": "system", "content": text})
    for i, turn in enumerate(asked.messages):
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        elif turn.role == "user":
            messages += _user(turn.content, f"messages[{i}].content")
        else:
            messages.append(_assistant(turn.content, f"messages[{i}].content"))
    return messages


def _user(blocks: list[Any], where: str) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for j, block in enumerate(blocks):
        match block:
            case ToolResultBlock():
                results.append(_result(block))
            case TextBlock():
                parts.append({"type": "text", "text": block.text})
            case ImageBlock():
                url = _image_url(block.source, f"{where}[{j}].source")
                parts.append({"type": "image_url", "image_url": {"url": url}})
            case _:
                raise RequestError("a user has no such blocks", f"{where}[{j}].type")
    return [*results, *([{"role": "user", "content": parts}] if parts else [])]


def _result(block: ToolResultBlock) -> dict[str, Any]:
    content = block.content or ""
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    if block.is_error:
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}


def _image_url(source: ImageSource, where: str) -> str:
    if source.type == "url" and source.url is not None and source.data is None:
        return source.url
    if source.type == "base64" and source.data is not None and source.url is None:
        return f"data:{source.media_type or 'image/png'};base64,{source.data}"
    raise RequestError(
        f"a source of type {source.type!r} has 'url' or 'data' alone, by its type", where
    )


def _assistant(blocks: list[Any], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for j, block in enumerate(blocks):
        match block:
            case TextBlock():
                message["content"] += block.text
            case ThinkingBlock():
                message["reasoning_content"] = message.get("reasoning_content", "") + block.thinking
            case ToolUseBlock():
                function = {"name": block.name, "arguments": json.dumps(block.input)}
                call = {"id": block.id, "type": "function", "function": function}
                message["tool_calls"] = [*message.get("tool_calls", []), call]
            case _:
                raise RequestError("an assistant has no such blocks", f"{where}[{j}].type")
    return message
