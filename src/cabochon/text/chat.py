"""From a conversation to the text of a prompt, by the checkpoint's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cabochon.errors import ConfigError, RequestError
from cabochon.files import read_json_object
from cabochon.text.sandbox import Renderer


class ChatTemplate:
    """A checkpoint's chat template and the special tokens it may write.

    A checkpoint without one, a pretrained model that was never taught turns, opens all the same;
    only rendering is refused.
    """

    def __init__(self, template: str | None, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._renderer = None if template is None else Renderer(template)
        if self._renderer and "bos_token" in self._renderer.variables - special_tokens.keys():
            raise ConfigError(
                "the chat template writes bos_token, which tokenizer_config.json does not name;"
                " prompts would start without it"
            )

    @property
    def variables(self) -> frozenset[str]:
        """What the template takes from outside: `tools` and `enable_thinking`, if it knows them."""
        return self._renderer.variables if self._renderer else frozenset()

    @classmethod
    def open(cls, folder: Path) -> ChatTemplate:
        """Read `chat_template.jinja`, else `chat_template.json`, else `tokenizer_config.json`.

        Raises:
            ConfigError: an unreadable file, a template that does not compile or lacks a token.
        """
        config = read_json_object(folder / "tokenizer_config.json")
        legacy = read_json_object(folder / "special_tokens_map.json")
        return cls(_find_template(folder, config), {**_tokens(legacy), **_tokens(config)})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt's text, special tokens written out.

        Args:
            messages: Each with a `role` and a `content`, a string or a list of parts.
            add_generation_prompt: Open the assistant's turn at the end.
            **variables: For the template, `enable_thinking` or `tools` for example.

        Raises:
            RequestError: there is no template, or it refuses or fails on these messages.
        """
        if self._renderer is None:
            raise RequestError("this checkpoint has no chat template; give it a prompt instead")
        given = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **variables,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        return self._renderer.render(given)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
    found = read_json_object(folder / "chat_template.json").get("chat_template")
    if found is None:
        found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default", found)
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"{folder} has a chat_template that is no text and names no default")
    return found


def _tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `image_token` and so on; a token is a string or an object with its content."""
    nested = [config.get("extra_special_tokens"), config.get("model_specific_special_tokens")]
    tables = [config, *(table for table in nested if isinstance(table, dict))]
    tokens = {}
    for name, token in (item for table in tables for item in table.items()):
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens
