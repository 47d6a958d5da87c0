"""`/v1/chat/completions`, and the prompt that a chat becomes, without running it."""

from __future__ import annotations

from typing import Any

from cabochon.serve.answers import ChatAnswer
from cabochon.serve.requests import parse_chat
from cabochon.serve.service import Job, Service
from cabochon.serve.turns import turn_params, turn_prompt


def chat_job(service: Service, body: bytes) -> Job:
    """What a body asks for.

    Raises:
        CabochonError: it is refused.
    """
    chat, llm = parse_chat(body), service.llm
    service.check_model(chat.model)
    params = turn_params(chat, llm)
    prompt = turn_prompt(chat, llm, service.fetch)
    answer = ChatAnswer(chat, len(prompt.tokens), service.fingerprint, llm.prompts.tokenizer)
    return Job([(prompt, one) for one in params], answer, bool(chat.stream))


def rendered(service: Service, body: bytes) -> dict[str, Any]:
    """The exact prompt of a chat: its text with special tokens by their names, and its tokens.

    Raises:
        CabochonError: it would be refused.
    """
    chat, llm = parse_chat(body), service.llm
    service.check_model(chat.model)
    turn_params(chat, llm)
    tokens = list(turn_prompt(chat, llm, service.fetch).tokens)
    return {
        "object": "chat.completion.prompt",
        "model": chat.model,
        "prompt": llm.prompts.tokenizer.spell(tokens),
        "tokens": tokens,
        "count": len(tokens),
        "max_context": llm.max_context,
    }
