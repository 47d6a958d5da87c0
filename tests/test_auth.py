"""Who may ask: keys in every header that clients use, sites in a browser, nobody by accident."""

from __future__ import annotations

import hmac
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY
from serving import HTTP, refused, serving

from cabochon.errors import UnreadableError
from cabochon.llm import LLM
from cabochon.serve.auth import Gatekeeper
from cabochon.settings import Settings

SITE = "https://chat.example.com"
EVERYTHING = (
    "/", "/docs", "/static/index.html", "/openapi.json", "/metrics", "/plan", "/v1/models", "/no",
)  # fmt: skip


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(TINY, dtype="float32", kv_cache_bytes=8 * 2**20) as llm:
        yield llm


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# of the team\nfirst-key\n\n  second-key\n")
    return file


@pytest.fixture(scope="module")
def locked(llm: LLM, keys: Path) -> Iterator[str]:
    with serving(llm, api_key="third-key", api_key_file=keys) as url:
        yield url


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    with serving(llm, allow_origins=[SITE]) as url:
        yield url


@pytest.mark.parametrize("key", ["first-key", "second-key", "third-key"])
def test_every_key_opens_in_every_header(locked: str, key: str) -> None:
    basic = b64encode(f"anybody:{key}".encode()).decode()
    for headers in (
        {"authorization": f"Bearer {key}"},
        {"authorization": f"Basic {basic}"},
        {"x-api-key": key},
    ):
        assert HTTP.get(f"{locked}/v1/models", headers=headers).status_code == 200


def test_everything_but_health_wants_a_key(locked: str) -> None:
    assert HTTP.get(f"{locked}/health").status_code == 200
    for path in EVERYTHING:
        response = HTTP.get(f"{locked}{path}")
        refused(response, 401, None, "Bearer")
        asks = "Basic" if path in ("/", "/docs") else "Bearer"
        assert response.headers["www-authenticate"].startswith(asks)
    nothing = b64encode(b"anybody:").decode()
    for headers in (
        {"authorization": "Bearer"},
        {"authorization": f"Basic {nothing}"},
        {"authorization": "Basic ****"},
        {"authorization": "Bearer # of the team"},
        {"x-api-key": ""},
        {"x-api-key": "first-key "[:-2]},
    ):
        refused(HTTP.get(f"{locked}/v1/models", headers=headers), 401, None)


@pytest.mark.parametrize("key", ["first-key", "wrong"])
def test_every_key_is_compared_in_constant_time(
    keys: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    compare = hmac.compare_digest
    gatekeeper = Gatekeeper(Settings(api_key_file=keys, api_key="third-key"))
    watched = lambda a, b: compared.append((a, b)) or compare(a, b)  # noqa: E731
    monkeypatch.setattr(hmac, "compare_digest", watched)
    headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {key}".encode())]
    refusal = gatekeeper.refusal({"type": "http", "path": "/plan", "headers": headers})
    assert (refusal is None) == (key == "first-key")
    assert len(compared) == 3
    assert {len(value) for pair in compared for value in pair} == {32}  # digests, not keys


def test_a_key_file_of_no_use_is_told_before_the_model_is_read(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("# nothing yet\n")
    for file in (empty, tmp_path / "missing", tmp_path):
        with pytest.raises(UnreadableError, match="api_key_file"):
            Settings(api_key_file=file).check_exposure()


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "file://"]
)
def test_a_page_of_another_site_may_not_ask(url: str, origin: str) -> None:
    """A browser sends such a POST without asking first, if its body claims to be plain text."""
    headers = {"origin": origin, "content-type": "text/plain"}
    response = HTTP.post(f"{url}/v1/chat/completions", content=b"{}", headers=headers)
    refused(response, 403, None, "allow_origins")
    asking = {"origin": origin, "access-control-request-method": "POST"}
    response = HTTP.options(f"{url}/v1/chat/completions", headers=asking)
    assert response.status_code == 403
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_its_own_page_may(url: str) -> None:
    response = HTTP.get(f"{url}/v1/models", headers={"origin": url})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


def test_a_site_that_was_named_may(url: str) -> None:
    headers = {
        "origin": SITE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    allowed = HTTP.options(f"{url}/v1/chat/completions", headers=headers)
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-origin"] == SITE
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    answer = HTTP.get(f"{url}/v1/models", headers={"origin": SITE})
    assert answer.headers["access-control-allow-origin"] == SITE
    failed = HTTP.get(f"{url}/nowhere", headers={"origin": SITE})
    assert (failed.status_code, failed.headers["access-control-allow-origin"]) == (404, SITE)
