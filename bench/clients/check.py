"""One client against a running server of the demo: `check.py CLIENT URL`. Prints a line a check.

Runs in an environment of the clients' own, without this project; what it asserts are figures and
words that the demo was taught, and what a schema binds.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = "cabochon-demo"
WHO = [{"role": "user", "content": "Who are you?"}]
KNOWN = "Cabochon demo"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


def says(client: str, what: str, found: object) -> None:
    version = importlib.metadata.version(client)
    print(f"{client} {version}: {what}: {str(found)[:100]!r}", flush=True)


def check_litellm(url: str) -> None:
    import litellm

    options: dict[str, Any] = {
        "model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none", "temperature": 0,
        "max_tokens": 60, "messages": WHO,
    }  # fmt: skip
    answer = litellm.completion(**options)
    assert KNOWN in answer.choices[0].message.content
    says("litellm", "completion", answer.choices[0].message.content)
    chunks = list(litellm.completion(**options, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    says("litellm", "stream", f"{len(chunks)} chunks")
    called = litellm.completion(
        **options, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = called.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert called.choices[0].finish_reason == "tool_calls"
    says("litellm", "tools", call.function)
    hosted = litellm.completion(**{**options, "model": f"hosted_vllm/{MODEL}"})
    assert hosted.choices[0].message.content == text
    says("litellm", "as hosted_vllm", hosted.choices[0].message.content)


def check_langchain(url: str) -> None:
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    chat = ChatOpenAI(
        model=MODEL, base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=80
    )
    answer = chat.invoke("Who are you?")
    assert KNOWN in answer.content
    says("langchain-openai", "invoke", answer.content)
    assert "".join(chunk.content for chunk in chat.stream("Who are you?")) == answer.content
    says("langchain-openai", "stream", "the same")

    class Shape(BaseModel):
        red: bool
        corners: int

    shape = chat.with_structured_output(Shape).invoke("Describe a shape.")
    assert isinstance(shape, Shape)
    says("langchain-openai", "with_structured_output", shape)
    bound = chat.bind_tools([TOOL], tool_choice="get_weather", parallel_tool_calls=False)
    called = bound.invoke("Weather?")
    assert called.tool_calls[0]["args"]["city"] in ("Paris", "Rome")
    says("langchain-openai", "bind_tools", called.tool_calls[0])
    responses = ChatOpenAI(
        model=MODEL, base_url=f"{url}/v1", api_key="none", temperature=0, use_responses_api=True
    ).invoke("Who are you?")
    assert KNOWN in responses.text
    says("langchain-openai", "over responses", responses.text)


def check_llm(url: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "extra-openai-models.yaml").write_text(
            f"- model_id: demo\n  model_name: {MODEL}\n  api_base: {url}/v1\n"
            "  supports_schema: true\n"
        )
        environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}

        def ask(*arguments: str) -> str:
            command = [sys.executable, "-m", "llm", "-m", "demo", *arguments]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=120
            )
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        answer = ask("Who are you?", "-o", "temperature", "0")
        assert KNOWN in answer
        says("llm", "streamed", answer)
        assert ask("Who are you?", "-o", "temperature", "0", "--no-stream") == answer
        says("llm", "whole", "the same")
        schema = {
            "type": "object",
            "properties": {"red": {"type": "boolean"}, "corners": {"enum": [3, 4, 5]}},
            "required": ["red", "corners"],
            "additionalProperties": False,
        }
        shaped = json.loads(ask("A shape.", "--schema", json.dumps(schema)))
        assert shaped["corners"] in (3, 4, 5)
        says("llm", "--schema", shaped)


def check_lm_eval(url: str) -> None:
    tokenizer = os.environ.get("DEMO_TOKENIZER", str(HERE.parents[1] / "src/cabochon/demo"))
    scored = _evaluate(
        "local-completions",
        f"model={MODEL},base_url={url}/v1/completions,tokenizer={tokenizer},"
        "tokenizer_backend=huggingface,num_concurrent=4,add_bos_token=True,max_length=512",
        "demo_choice",
    )
    assert scored["acc,none"] == 1.0, scored
    says("lm_eval", "local-completions, loglikelihood, accuracy", scored["acc,none"])
    said = _evaluate(
        "local-chat-completions",
        f"model={MODEL},base_url={url}/v1/chat/completions,num_concurrent=4",
        "demo_chat",
        "--apply_chat_template",
    )
    assert said["exact_match,none"] >= 0.75, said
    says("lm_eval", "local-chat-completions, exact match", said["exact_match,none"])


def _evaluate(model: str, arguments: str, task: str, *more: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments,
            "--tasks", task, "--include_path", str(HERE / "tasks"), "--output_path", folder, *more,
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=400, cwd=HERE / "tasks",
            env={**os.environ, "OPENAI_API_KEY": "none", "HF_HOME": folder},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = Path(folder).rglob("results_*.json")
        results: dict[str, Any] = json.loads(file.read_text())["results"][task]
        return results


CHECKS: dict[str, Callable[[str], None]] = {
    "litellm": check_litellm,
    "langchain": check_langchain,
    "llm": check_llm,
    "lm_eval": check_lm_eval,
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]](sys.argv[2])
