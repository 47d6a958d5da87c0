"""From a chat request to what the engine runs: a prompt, and what the answer must look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cabochon.engine.grammar import Grammar
from cabochon.engine.guide import TurnRules
from cabochon.engine.request import Prompt, SamplingParams
from cabochon.errors import RequestError
from cabochon.llm import LLM
from cabochon.serve.messages import Fetch, Media, chat_messages
from cabochon.serve.protocol import (
    AllowedToolsChoice,
    AssistantMessage,
    ChatRequest,
    GrammarFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    RegexFormat,
    ToolMessage,
)
from cabochon.text.call_grammar import Tool, call_grammar
from cabochon.text.parser import Structure

# Gemma has one way of thinking; an effort bounds it.
BUDGETS: Mapping[str, int | None] = {
    "none": None,
    "minimal": 512,
    "low": 2048,
    "medium": 8192,
    "high": None,
    "xhigh": None,
}


def turn_prompt(chat: ChatRequest, llm: LLM, fetch: Fetch | None) -> Prompt:
    """The prompt of `chat`, as the checkpoint's template renders it.

    Raises:
        RequestError: the template refuses it, or knows nothing of what it asks for.
    """
    variables: dict[str, Any] = {}
    if chat.tools:
        variables["tools"] = [tool.model_dump(exclude_none=True) for tool in chat.tools]
    thinking = _thinking(chat)
    if thinking is not None:
        variables["enable_thinking"] = thinking
    _check_template(chat, llm, thinking)
    return llm.prompts.chat(chat_messages(chat.messages, Media(llm.prompts, fetch)), **variables)


def turn_params(chat: ChatRequest, llm: LLM) -> list[SamplingParams]:
    """Sampling parameters for each choice.

    Raises:
        RequestError: token ids that are none, or a format, schema or tool that cannot be enforced.
    """
    check_tokens(chat.logit_bias, chat.stop_token_ids, llm)
    return chat.sampling(
        llm.defaults,
        max_tokens=chat.max_completion_tokens or chat.max_tokens,
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        rules=_rules(chat, llm),
    )


def check_tokens(bias: Mapping[str, float] | None, stops: list[int] | None, llm: LLM) -> None:
    vocab = llm.config.text.vocab_size
    if any(token >= vocab for token in stops or ()):
        raise RequestError(f"stop_token_ids must be 0 to {vocab - 1}", "stop_token_ids")
    if any(int(token) >= vocab for token in bias or ()):
        raise RequestError(f"logit_bias has token ids beyond {vocab - 1}", "logit_bias")


def _thinking(chat: ChatRequest) -> bool | None:
    """Whether thinking is asked for; None leaves it to the template."""
    given = chat.chat_template_kwargs
    wished = given.enable_thinking if given else None
    if chat.reasoning_effort is None:
        return wished
    by_effort = chat.reasoning_effort != "none"
    if wished is not None and wished != by_effort:
        raise RequestError(
            f"reasoning_effort is {chat.reasoning_effort!r}, but enable_thinking says otherwise",
            "reasoning_effort",
        )
    return by_effort


def _check_template(chat: ChatRequest, llm: LLM, thinking: bool | None) -> None:
    known = llm.prompts.template.variables
    used = any(
        isinstance(m, ToolMessage) or (isinstance(m, AssistantMessage) and m.tool_calls)
        for m in chat.messages
    )
    if (chat.tools or used) and "tools" not in known:
        where = "tools" if chat.tools else "messages"
        raise RequestError("this checkpoint's chat template knows no tools", where)
    if thinking and "enable_thinking" not in known:
        field = "reasoning_effort" if chat.reasoning_effort else "chat_template_kwargs"
        raise RequestError("this checkpoint's chat template cannot ask for thoughts", field)
    if chat.thinking_token_budget is not None and not thinking:
        raise RequestError(
            "thinking_token_budget needs enable_thinking or a reasoning_effort",
            "thinking_token_budget",
        )


def _rules(chat: ChatRequest, llm: LLM) -> TurnRules:
    structure = Structure.of(llm.prompts.tokenizer)
    budget = chat.thinking_token_budget
    if budget is None and chat.reasoning_effort:
        budget = BUDGETS[chat.reasoning_effort]
    calls, must_call = _calls(chat, llm, structure)
    return TurnRules(
        structure=structure,
        special=llm.prompts.tokenizer.special,
        text=_text(chat, llm),
        calls=calls,
        must_call=must_call,
        parallel=chat.parallel_tool_calls is not False,
        thinking=bool(_thinking(chat)),
        thinking_budget=budget,
    )


def _calls(chat: ChatRequest, llm: LLM, structure: Structure) -> tuple[Grammar | None, bool]:
    """The grammar of a call if any may be made, and whether one must."""
    tools, choice = chat.tools or [], chat.tool_choice or "auto"
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("two tools have the same name", "tools")
    match choice:
        case NamedTool():
            mode, names = "required", [choice.function.name]
        case AllowedToolsChoice():
            mode = choice.allowed_tools.mode
            names = [tool.function.name for tool in choice.allowed_tools.tools]
        case _:
            mode = choice
    unknown = set(names) - {tool.function.name for tool in tools}
    if unknown:
        raise RequestError(f"there is no tool {min(unknown)[:64]!r}", "tool_choice")
    if mode == "required" and not tools:
        raise RequestError("a call is required, but there are no tools", "tool_choice")
    if mode == "none" or not tools:
        return None, False
    allowed = [
        Tool(
            tool.function.name,
            tool.function.parameters,
            bound=mode == "required" or tool.function.strict is True,
        )
        for tool in tools
        if tool.function.name in names
    ]
    return llm.grammars.lark(call_grammar(allowed, structure), "tools"), mode == "required"


def _text(chat: ChatRequest, llm: LLM) -> Grammar | None:
    """The grammar that the answer's text must obey, if any."""
    match chat.response_format:
        case JsonObjectFormat():
            return llm.grammars.json_object()
        case JsonSchemaFormat(json_schema=given):
            where = "response_format.json_schema.schema"
            return llm.grammars.json_schema(given.schema_ or {}, where)
        case RegexFormat(regex=pattern):
            return llm.grammars.regex(pattern, "response_format.regex")
        case GrammarFormat(grammar=grammar):
            return llm.grammars.lark(grammar, "response_format.grammar")
        case _:
            return None
