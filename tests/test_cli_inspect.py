"""`cabochon inspect` as people run it: its flags, its exit status, what it imports."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
from checkpoints import DENSE, W4A16, Tensors, altered, tensors_of
from command import cabochon as command
from command import fails

import cabochon.load

SCHEMA = json.loads((Path(cabochon.load.__file__).parent / "report.schema.json").read_text())


def test_tensors_are_listed_as_text_and_json() -> None:
    names = tensors_of(W4A16).keys()
    lines = command("inspect", W4A16, "--tensors").stdout.splitlines()
    assert {line.split()[0] for line in lines} == names
    found = json.loads(command("inspect", W4A16, "--tensors", "--json").stdout)
    jsonschema.validate(found, SCHEMA)
    assert {row["name"] for row in found["tensors"]} == names


def test_a_code_is_explained_without_a_model() -> None:
    result = command("inspect", "--explain", "twice")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("TWICE\n")
    fails(command("inspect", "--explain", "E1"), 2, "SCHEME")


def test_a_card_is_a_markdown_table() -> None:
    text = command("inspect", W4A16, "--card").stdout
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert any("int4 g32" in row for row in rows)
    assert "Kept in high precision: embeddings" in text


def test_a_certificate_is_of_the_weights(tmp_path: Path) -> None:
    result = command("inspect", W4A16, "--certificate", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    jsonschema.validate(found, SCHEMA)
    certificate = found["certificate"]
    assert certificate["slots_planned"] == certificate["slots_filled"]
    assert all(site["seen"] == site["entries"] for site in certificate["sites"])
    assert certificate["plan_hash"] == found["plan_hash"]

    def spoil(tensors: Tensors) -> None:
        tensors["model.language_model.norm.weight"][0] = float("nan")

    broken = altered(tmp_path, DENSE, tensors=spoil)
    assert command("inspect", broken).returncode == 0
    told = ("model.language_model.norm.weight", "--explain VALUE")
    fails(command("inspect", broken, "--certificate"), 1, *told)


def test_what_excludes_each_other() -> None:
    fails(command("inspect", "--card", "--json"), 2, "--card")
    fails(command("inspect", "--card", "--tensors"), 2, "--card")
