"""A setting is one thing, wherever it is set; what is wrong is said by the name it was given."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from cabochon.errors import UnreadableError
from cabochon.llm import LLM
from cabochon.settings import (
    EngineSettings,
    Settings,
    SettingsError,
    load_settings,
    parse_bytes,
    variable,
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


def test_engine_settings_are_what_llm_takes() -> None:
    taken = set(inspect.signature(LLM).parameters) - {"model", "progress"}
    assert taken == set(EngineSettings.model_fields) == set(Settings().engine_options())
    for name in taken:
        default = inspect.signature(LLM).parameters[name].default
        assert Settings.model_fields[name].default == default


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('max_batch = 1\nport = 1\nhost = "::1"\nkv_cache_bytes = "1GiB"\n')
    monkeypatch.setenv("CABOCHON_MAX_BATCH", "2")
    monkeypatch.setenv("CABOCHON_PORT", "2")
    settings = load_settings({"max_batch": "3"}, file)
    assert (settings.max_batch, settings.port, settings.host) == (3, 2, "::1")
    assert settings.kv_cache_bytes == 2**30
    assert settings.max_queue == Settings().max_queue


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("64KiB", 2**16),
        ("2GiB", 2**31),
        ("2 gib", 2**31),
        ("1.5MiB", 3 * 2**19),
        ("500MB", 500_000_000),
        ("3G", 3_000_000_000),
        ("10B", 10),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1e9", "1TiB", "1.GiB", "2 GiB 3", "²GiB", "0x10"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="expected bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float16"),
        ("threads", 0),
        ("kv_cache_bytes", "-1"),
        ("kv_cache_bytes", 2**46),
        ("max_batch", 1025),
        ("prefill_chunk", 1.5),
        ("max_context", 1),
        ("port", 65536),
        ("host", ""),
        ("api_key", ""),
        ("max_queue", -1),
        ("max_body_bytes", "1KB"),
        ("log_level", "loud"),
        ("insecure", "perhaps"),
    ],
)
def test_values_out_of_range(
    name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(SettingsError, match=rf"^{flag}\b"):
        load_settings({name: value})
    file = tmp_path / "settings.toml"
    file.write_text(f"{name} = {value!r}\n")
    with pytest.raises(SettingsError, match=rf"settings\.toml: {name}\b"):
        load_settings({}, file)
    monkeypatch.setenv(variable(name), str(value))
    with pytest.raises(SettingsError, match=rf"^{variable(name)}\b"):
        load_settings({})


def test_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("max_bacth = 2\n")
    with pytest.raises(SettingsError, match=r"max_bacth; did you mean max_batch\?"):
        load_settings({}, file)
    monkeypatch.setenv("CABOCHON_HOTS", "::1")
    with pytest.raises(SettingsError, match=r"CABOCHON_HOTS; did you mean CABOCHON_HOST\?"):
        load_settings({})


@pytest.mark.parametrize("text", ["port", "port = ", "[port", "port = 1\nport = 2"])
def test_a_file_that_is_no_toml(tmp_path: Path, text: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(UnreadableError, match=r"settings\.toml"):
        load_settings({}, file)
    with pytest.raises(UnreadableError, match="No such file"):
        load_settings({}, tmp_path / "nothing.toml")


def test_a_key_is_never_shown() -> None:
    settings = load_settings({"api_key": "sesame"})
    assert "sesame" not in f"{settings!r} {settings} {settings.model_dump_json()}"
    with pytest.raises(SettingsError) as refused:
        load_settings({"api_key": "s" * 2000})
    assert "ssss" not in str(refused.value)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.1", "example.com", "127.0.0.1.nip.io"]
)
def test_beyond_this_machine_only_with_a_key(host: str) -> None:
    with pytest.raises(SettingsError, match="CABOCHON_API_KEY"):
        Settings(host=host).check_exposure()
    load_settings({"host": host, "api_key": "sesame"}).check_exposure()
    Settings(host=host, insecure=True).check_exposure()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str) -> None:
    Settings(host=host).check_exposure()
