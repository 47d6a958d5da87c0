"""`cabochon serve`: the OpenAI-compatible server."""

from __future__ import annotations

import json
import logging
import shlex

from cabochon.cli.model import load
from cabochon.cli.options import Debug, Model
from cabochon.console import tell
from cabochon.flags import with_settings
from cabochon.settings import Settings, variable

logger = logging.getLogger(__name__)


@with_settings(Settings)
def serve(model: Model = None, debug: Debug = False, *, settings: Settings) -> None:
    """Serve an OpenAI-compatible API."""
    settings.check_exposure()
    from cabochon.serve import journal, server

    journal.set_up(settings.log_level, settings.log_format)
    say = tell if settings.log_format == "text" else logger.info

    # Bound before the model is read: a port that is taken should not cost a minute to find out.
    with server.bind(settings.host, settings.port) as listener, load(model, settings) as llm:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{host}:{listener.getsockname()[1]}"
        say(f"{llm.told()}\n\n{llm.capacity}")

        def ready() -> None:
            say(f"ready: {url} (page at /, docs at /docs)\n\n{_curl(url, llm.name, settings)}\n")

        server.serve(llm, settings, listener, ready)


def _curl(url: str, name: str, settings: Settings) -> str:
    body = {"model": name, "messages": [{"role": "user", "content": "Who are you?"}]}
    key = f' -H "authorization: Bearer ${variable("api_key")}"' if settings.api_key else ""
    return (
        f"curl {url}/v1/chat/completions{key} -H 'content-type: application/json'"
        f" -d {shlex.quote(json.dumps(body))}"
    )
