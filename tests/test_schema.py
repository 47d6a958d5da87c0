"""The API's own description: what it generates is answered as it says, and never with a 500."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import CHECKS
from schemathesis.core.result import Ok
from serving import HTTP, serving

from cabochon.llm import LLM

# Of each operation. SCHEMA_CASES=225 makes more than 2,000; docs/clients.md has what came of them.
CASES = int(os.environ.get("SCHEMA_CASES", "10"))

# A schema cannot say that a call has a result, or that a grammar compiles: such requests get a 400.
NOT_CHECKED = "positive_data_acceptance"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    # What is generated asks for as many tokens as there may be.
    with (
        LLM(dtype="float32", kv_cache_bytes=64 * 2**20, max_context=192) as llm,
        serving(llm) as url,
    ):
        yield url


def test_what_is_generated_is_answered_as_described(url: str) -> None:
    api = schemathesis.openapi.from_url(f"{url}/openapi.json")
    excluded = [CHECKS.get_one(NOT_CHECKED)]
    seen: Counter[int] = Counter()
    operations = 0
    for found in api.get_all_operations():
        assert isinstance(found, Ok)
        operations += 1

        @hypothesis.given(case=found.ok().as_strategy())
        @hypothesis.settings(
            max_examples=CASES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: schemathesis.Case) -> None:
            response = case.call(headers={"connection": "close"})
            seen[response.status_code] += 1
            case.validate_response(response, excluded_checks=excluded)

        ask()
    print(f"{seen.total()} cases of {operations} operations: {dict(seen)}")
    assert operations >= 14
    assert set(seen) <= {200, 400, 404}
    assert seen[200] > CASES


def test_every_path_has_bodies_answers_and_errors(url: str) -> None:
    api = HTTP.get(f"{url}/openapi.json").json()
    for path, methods in api["paths"].items():
        for verb, operation in methods.items():
            assert operation["description"], path
            assert {"200", "400", "401", "429", "500"} <= set(operation["responses"])
            if verb == "post":
                (kind,) = operation["requestBody"]["content"].values()
                name = kind["schema"]["$ref"].rpartition("/")[2]
                assert api["components"]["schemas"][name]["additionalProperties"] is False
