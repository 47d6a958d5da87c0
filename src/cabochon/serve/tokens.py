"""`/tokenize` and `/detokenize`: text to token ids and back, as prompts have them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from cabochon.errors import RequestError
from cabochon.serve.completions import rendered
from cabochon.serve.fields import STRICT, TokenId
from cabochon.serve.requests import Fields, parse, parse_json
from cabochon.serve.service import Service
from cabochon.serve.text_completions import BOS
from cabochon.text.tokenizer import MAX_TOKENS

_KNOWN = Fields(not_served={})


class TokenizeRequest(BaseModel):
    """A text, special tokens by their names."""

    model_config = STRICT

    model: str | None = Field(None, min_length=1, max_length=1024)
    prompt: str
    add_special_tokens: bool | None = None  # the beginning of a sequence; None: yes
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    model_config = STRICT

    model: str | None = Field(None, min_length=1, max_length=1024)
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS)


def tokenized(service: Service, body: bytes) -> dict[str, Any]:
    """Token ids of a text, or of what a chat with `messages` becomes.

    Raises:
        CabochonError: the body is refused.
    """
    raw = parse_json(body)
    tokenizer = service.llm.prompts.tokenizer
    names = False
    if "messages" in raw:
        made = rendered(service, body)
        tokens: list[int] = made["tokens"]
    else:
        asked = parse(raw, TokenizeRequest, _KNOWN)
        service.check_model(asked.model or service.llm.name)
        begin = asked.add_special_tokens is not False and not asked.prompt.startswith(BOS)
        tokens = tokenizer.encode(BOS + asked.prompt if begin else asked.prompt)
        names = asked.return_token_strs is True
    answer = {"count": len(tokens), "max_model_len": service.llm.max_context, "tokens": tokens}
    if names:
        answer["token_strs"] = [tokenizer.token(token) for token in tokens]
    return answer


def detokenized(service: Service, body: bytes) -> dict[str, Any]:
    """The text of token ids, special tokens by their names.

    Raises:
        CabochonError: the body is refused.
    """
    asked = parse(parse_json(body), DetokenizeRequest, _KNOWN)
    service.check_model(asked.model or service.llm.name)
    tokenizer = service.llm.prompts.tokenizer
    for i, token in enumerate(asked.tokens):
        if token >= tokenizer.vocab_size:
            raise RequestError(f"token ids must be 0 to {tokenizer.vocab_size - 1}", f"tokens[{i}]")
    return {"prompt": tokenizer.spell(asked.tokens)}
