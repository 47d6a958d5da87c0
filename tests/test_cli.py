"""The command as people run it: a process, its streams and its exit status."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from command import ENVIRONMENT, TALKATIVE, cabochon, fails, served
from serving import picture_bytes, until

from cabochon.errors import CabochonError
from cabochon.serve.server import bind

WHAT = "What colour is this rectangle?"
DEMO = Path(__file__).parents[1] / "src" / "cabochon" / "demo"


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    path.write_bytes(picture_bytes("red"))
    return path


@pytest.fixture
def blue(tmp_path: Path) -> Path:
    path = tmp_path / "blue.jpg"
    path.write_bytes(picture_bytes("blue", kind="JPEG"))
    return path


def test_version() -> None:
    result = cabochon("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"cabochon \d+\.\d+\.\d+\n", result.stdout)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "--help"], ["serve", "--help"]])
def test_help(arguments: list[str]) -> None:
    result = cabochon(*arguments, NO_COLOR="1")
    assert result.returncode == 0
    assert "Usage:" in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["inspect"]])
def test_what_reads_no_weight_imports_neither_torch_nor_fastapi(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from cabochon.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'fastapi', 'uvicorn', 'tokenizers', 'transformers', 'huggingface_hub'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr


def test_inspect_tells_how_the_demo_loads() -> None:
    result = cabochon("inspect", DEMO)
    assert (result.returncode, result.stderr) == (0, "")
    assert "loads" in result.stdout


def test_inspect_as_json() -> None:
    result = cabochon("inspect", "--json")
    assert result.returncode == 0
    assert "demo" in result.stderr
    report = json.loads(result.stdout)
    assert report["verdict"] == "loads"
    assert report["architecture"] == "Gemma4ForConditionalGeneration"
    assert report["problems"] == []
    for name in ("notes", "dropped"):
        assert isinstance(report[name], list)
    for group in report["groups"]:
        assert {"group", "scheme", "bits", "count", "bytes"} <= set(group)
    assert report["bytes"] >= sum(group["bytes"] for group in report["groups"]) > 0


def test_inspect_refuses(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "cut")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    result = cabochon("inspect", folder, "--json")
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert report["verdict"] == "refused"
    assert report["problems"]
    refused = cabochon("run", folder, "-p", "Hello")
    fails(refused, 1)


def test_inspect_cannot_read(tmp_path: Path) -> None:
    fails(cabochon("inspect", tmp_path / "nowhere", "--json"), 2, "nowhere")
    fails(cabochon("inspect", tmp_path), 2, str(tmp_path))
    fails(cabochon("run", tmp_path / "nowhere", "-p", "Hello"), 2, "nowhere")


def test_run_answers_about_a_picture(red: Path) -> None:
    result = cabochon("run", "-p", WHAT, "--image", red, "--temperature", "0")
    assert result.returncode == 0, result.stderr
    assert "red" in result.stdout.lower()
    assert result.stderr.count("\n") == 1
    assert "demo" in result.stderr


def test_run_takes_settings_and_sampling(tmp_path: Path) -> None:
    file = tmp_path / "cabochon.toml"
    file.write_text('kv_cache_bytes = "16MiB"\nport = 9999\n')
    arguments = ["run", DEMO, "-p", "Who are you?", "--config", file, "--max-batch", "2"]
    drawn = [
        cabochon(*arguments, "--temperature", "2", "--max-tokens", "4", "--seed", "7", "--verbose")
        for _ in range(2)
    ]
    assert [result.returncode for result in drawn] == [0, 0]
    assert drawn[0].stdout == drawn[1].stdout
    assert "4 answered" in drawn[0].stderr
    assert "tokens/s" in drawn[0].stderr


def test_a_conversation_through_a_pipe(red: Path, blue: Path) -> None:
    lines = ["Who are you?", f"/image {blue}", WHAT, "/help", "", "/nonsense", "/clear", WHAT]
    result = cabochon("run", "--temperature", "0", stdin="\n".join([*lines, "/exit", "not read"]))
    assert result.returncode == 0, result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == 3
    assert "blue" in answers[1].lower()
    assert "/nonsense" in result.stderr
    assert "/clear" in result.stderr


def test_an_error_in_a_pipe_is_told_and_counts(tmp_path: Path) -> None:
    lines = f"/image {tmp_path / 'nothing.png'}\nWho are you?\n"
    result = cabochon("run", "--temperature", "0", stdin=lines)
    assert result.returncode == 2
    assert "nothing.png" in result.stderr
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["srve"], "serve"),
        (["run", "--temprature", "1"], "--temperature"),
        (["run", "--max-tokens", "many"], "--max-tokens"),
        (["run", "-p", "Hello", "--max-batch", "0"], "--max-batch"),
        (["run", "-p", "Hello", "--dtype", "int4"], "--dtype"),
        (["run", "-p", "Hello", "--kv-cache-bytes", "lots"], "--kv-cache-bytes"),
        (["run", "-p", "Hello", "--temperature", "1000"], "temperature"),
        (["run", "-p", "Hello", "--image", "/nowhere/cat.png"], "cat.png"),
        (["run", "-p", "Hello", "--image", __file__], "PNG"),
        (["run", "-p", "Hello", "--config", "/nowhere/cabochon.toml"], "cabochon.toml"),
        (["serve", "--port", "70000"], "--port"),
        (["serve", "--host", "0.0.0.0"], "--insecure"),
        (["inspect", "a", "b"], "b"),
    ],
)
def test_errors(arguments: list[str], words: str) -> None:
    fails(cabochon(*arguments), 2, words)


def test_settings_nobody_knows(tmp_path: Path) -> None:
    fails(cabochon("run", "-p", "Hello", CABOCHON_MAX_BACH="2"), 2, "CABOCHON_MAX_BATCH")
    file = tmp_path / "cabochon.toml"
    file.write_text("prot = 8000\n")
    fails(cabochon("run", "-p", "Hello", "--config", file), 2, "did you mean port")


def test_debug_shows_the_traceback() -> None:
    result = cabochon("run", "--debug", "-p", "Hello", "--image", "/nowhere/cat.png")
    assert result.returncode == 2
    assert "Traceback" in result.stderr


def test_serve_proposes_a_request_and_drains_when_told_to_end() -> None:
    with served() as server:
        process, url = server.process, server.url
        words = shlex.split(server.curl)
        body = json.loads(words[words.index("-d") + 1])
        assert words[1] == f"{url}/v1/chat/completions"
        answer = httpx.post(words[1], json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"]

        long = {**body, "stream": True, "ignore_eos": True, "max_tokens": 150}
        with httpx.stream("POST", words[1], json=long, timeout=60) as stream:
            events = stream.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            assert [event for event in events if event][-1] == "data: [DONE]"
        assert process.wait(10) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""


def test_serve_ends_with_ctrl_c_and_hides_its_key() -> None:
    with served(CABOCHON_API_KEY="sesame") as server:
        process, url, curl = server.process, server.url, server.curl
        assert "sesame" not in curl
        assert "$CABOCHON_API_KEY" in curl
        assert httpx.get(f"{url}/v1/models").status_code == 401
        taken = cabochon("serve", "--port", url.rpartition(":")[2])
        fails(taken, 2, "in use")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


def test_a_port_is_taken_before_a_model_is_loaded() -> None:
    """As between two servers of which neither serves yet: the other one has bound the port."""
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        fails(cabochon("serve", "/nowhere/at/all", "--port", str(port)), 2, "in use", str(port))
        with pytest.raises(CabochonError, match="in use"):
            bind("127.0.0.1", port)
    with bind("127.0.0.1", port):
        pass


def test_of_two_servers_started_together_one_ends() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "cabochon", "serve", "--port", str(port)]
    both = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for _ in range(2)
    ]
    try:
        assert until(lambda: any(process.poll() is not None for process in both), 60)
        lost = next(process for process in both if process.poll() is not None)
        assert lost.stderr is not None
        errors = lost.stderr.read()
        assert lost.returncode == 2
        assert errors.startswith(f"error: cannot listen on 127.0.0.1 port {port}: Address already")
        assert errors.count("\n") == 1
        assert until(lambda: health(port), 60)
    finally:
        for process in both:
            process.kill()
            process.communicate()


def health(port: int) -> bool:
    return httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200


def reads(descriptor: int, pattern: str, seconds: float = 60) -> bool:
    """Whether what comes within this time matches `pattern`."""
    seen = ""
    end = time.monotonic() + seconds
    while not re.search(pattern, seen) and time.monotonic() < end:
        if select.select([descriptor], [], [], 0.1)[0]:
            seen += os.read(descriptor, 4096).decode(errors="replace")
    return re.search(pattern, seen) is not None


def interrupted(process: subprocess.Popen[bytes], descriptor: int, pattern: str) -> bool:
    """Whether Ctrl-C brings `pattern`; one between prompt and readline waits for the next."""
    for _ in range(10):
        process.send_signal(signal.SIGINT)
        if reads(descriptor, pattern, 3):
            return True
    return False


def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves() -> None:
    control, terminal = pty.openpty()
    process = subprocess.Popen(
        # In float32 the answer takes its time: it must not have ended before it is stopped.
        [
            sys.executable,
            "-m",
            "cabochon",
            "run",
            TALKATIVE,
            "--temperature",
            "0",
            "--dtype",
            "float32",
        ],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env={**ENVIRONMENT, "TERM": "xterm"},
    )
    os.close(terminal)
    try:
        assert reads(control, ">>> ")
        assert interrupted(process, control, r"\(Ctrl-D leaves\)\r\n>>> ")

        def stopped() -> bool:
            os.write(control, b"Hello\n")
            assert reads(control, r"Hello\r\n.")  # the answer has begun
            process.send_signal(signal.SIGINT)
            return reads(control, r"\(stopped\)\r\n>>> ", 3)

        # Where other work delays the signal, the answer may have ended before it comes.
        assert any(stopped() for _ in range(5))
        os.write(control, b"\x04")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(control)


def test_ctrl_c_ends_an_answer_with_130() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cabochon", "run", TALKATIVE, "-p", "Hello", "--temperature", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in errors
