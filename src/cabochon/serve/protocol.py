"""Requests of `/v1/chat/completions`, after OpenAI's description of the API (2.3.0).

`ChatRequest` has the fields that are served; `requests.py` says what happens to all others.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, Tag

from cabochon.engine.request import MAX_LOGPROBS
from cabochon.serve.fields import (
    STRICT,
    Content,
    FunctionName,
    SamplingFields,
    TextContent,
    by_type,
    either,
)

MAX_MESSAGES = 4096
MAX_TOOLS = 512
MAX_CALLS = 256
MAX_ARGUMENTS = 2_000_000  # characters of one call
MAX_GRAMMAR = 200_000  # characters

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class FunctionCall(BaseModel):
    model_config = STRICT

    name: FunctionName
    arguments: str = Field(max_length=MAX_ARGUMENTS)
    parsed_arguments: Any = None  # what clients made of `arguments` and send back with them


class MessageToolCall(BaseModel):
    """A call of an earlier turn."""

    model_config = STRICT

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"]
    function: FunctionCall
    index: int | None = None  # what clients copy from a stream


class UserMessage(BaseModel):
    model_config = STRICT

    role: Literal["user"]
    content: Content


class SystemMessage(BaseModel):
    model_config = STRICT

    role: Literal["system", "developer"]
    content: Content


class AssistantMessage(BaseModel):
    """An earlier answer. Reasoning is shown to the model where its template shows it."""

    model_config = STRICT

    role: Literal["assistant"]
    content: TextContent | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # another spelling of the same
    tool_calls: list[MessageToolCall] | None = Field(None, max_length=MAX_CALLS)
    parsed: Any = None  # what clients made of `content`


class ToolMessage(BaseModel):
    """What a call of the message before gave."""

    model_config = STRICT

    role: Literal["tool"]
    content: TextContent
    tool_call_id: str = Field(min_length=1, max_length=256)
    name: str | None = Field(None, max_length=128)


def _by_role(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else None
    return f"<{'system' if role == 'developer' else role}>"


ChatMessage = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    either(_by_role, "a message of role 'system', 'developer', 'user', 'assistant' or 'tool'"),
]


class Function(BaseModel):
    model_config = STRICT

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(BaseModel):
    model_config = STRICT

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    model_config = STRICT

    name: FunctionName


class NamedTool(BaseModel):
    model_config = STRICT

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(BaseModel):
    model_config = STRICT

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolsChoice(BaseModel):
    model_config = STRICT

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_tag(value: Any) -> str | None:
    return "<mode>" if isinstance(value, str) else by_type(value)


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[NamedTool, Tag("<function>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed_tools>")],
    either(_choice_tag, "'none', 'auto', 'required', a function's name, or allowed_tools"),
]


class TextFormat(BaseModel):
    model_config = STRICT

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    model_config = STRICT

    type: Literal["json_object"]


class JsonSchema(BaseModel):
    model_config = STRICT

    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(BaseModel):
    model_config = STRICT

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(BaseModel):
    """The whole answer matches; beyond OpenAI's."""

    model_config = STRICT

    type: Literal["regex"]
    regex: str = Field(min_length=1, max_length=MAX_GRAMMAR)


class GrammarFormat(BaseModel):
    """The answer is derived by a grammar in llguidance's dialect of Lark; beyond OpenAI's."""

    model_config = STRICT

    type: Literal["grammar"]
    grammar: str = Field(min_length=1, max_length=MAX_GRAMMAR)


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")]
    | Annotated[RegexFormat, Tag("<regex>")]
    | Annotated[GrammarFormat, Tag("<grammar>")],
    either(by_type, "type 'text', 'json_object', 'json_schema', 'regex' or 'grammar'"),
]


class TemplateVariables(BaseModel):
    model_config = STRICT

    enable_thinking: bool | None = None


class ChatRequest(SamplingFields):
    """A chat completion that can be served."""

    model: str = Field(min_length=1, max_length=1024)
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateVariables | None = None
    thinking_token_budget: int | None = Field(None, ge=0, lt=2**31)
