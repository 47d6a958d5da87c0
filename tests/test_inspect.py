"""The report: its JSON, its text, and that it costs neither torch nor a second."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import DENSE, FIXTURES, QUANTIZED, W4A16, altered, tensors_of

from cabochon.load.report import collapse, inspect_checkpoint


def test_the_json_of_a_checkpoint_that_loads() -> None:
    report = inspect_checkpoint(FIXTURES / "e2b-w4a16-head").as_dict()
    assert report == json.loads(json.dumps(report))
    assert report["verdict"] == "loads"
    assert report["architecture"] == "Gemma4ForConditionalGeneration"
    assert report["problems"] == []
    assert report["notes"] == []
    assert report["dropped"] == []
    found = {(row["group"], row["scheme"], row["bits"]): row["count"] for row in report["groups"]}
    assert found == {
        ("embeddings", "bf16", 16): 1,
        ("per-layer embeddings", "bf16", 16): 1,
        ("per-layer inputs", "int4 g32", 4): 2 * 6 + 1,
        ("attention", "int4 g32", 4): 2 * 6 + 2 * 3,  # three layers have no keys and values
        ("mlp", "int4 g32", 4): 3 * 6,
        ("vision tower", "bf16", 16): 7 * 2 + 1,
        ("vision projector", "bf16", 16): 1,
        ("audio tower", "bf16", 16): 11 * 2 + 2,
        ("audio projector", "bf16", 16): 1,
        ("head", "int4 g32", 4): 1,
        ("norms and scalars", "bf16", 16): 223,
    }


@pytest.mark.parametrize("folder", [DENSE, *QUANTIZED], ids=lambda folder: folder.name)
def test_bytes_are_those_of_the_tensors_read(folder: Path) -> None:
    report = inspect_checkpoint(folder).as_dict()
    expected = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    assert report["bytes"] == expected
    assert sum(row["bytes"] for row in report["groups"]) == expected


def test_one_error_in_many_layers_is_one_finding(tmp_path: Path) -> None:
    def lose(tensors: dict[str, object]) -> None:
        for name in [n for n in tensors if n.endswith("mlp.up_proj.weight_scale")]:
            del tensors[name]

    report = inspect_checkpoint(altered(tmp_path, W4A16, tensors=lose))
    (problem,) = report.as_dict()["problems"]
    assert problem["kind"] == "SCHEME"
    assert problem["where"] == ["model.language_model.layers.{0-5}.mlp.up_proj"]
    assert "weight_scale is missing" in problem["detail"]
    assert report.as_dict()["verdict"] == "refused"
    text = report.text()
    assert text.count("weight_scale is missing") == 1
    assert text.count("up_proj") == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.b", "a.1.b", "a.2.b", "a.7.b"], ("a.{0-2,7}.b",)),
        (["a.3.b"], ("a.3.b",)),
        (["norm", "a.1.b", "a.1.c"], ("norm", "a.1.b", "a.1.c")),
        (["a.1", "a.0", "a.1"], ("a.{0-1}",)),
        (["v2.x", "v3.x"], ("v2.x", "v3.x")),
        ([], ()),
    ],
)
def test_collapse(names: list[str], expected: tuple[str, ...]) -> None:
    assert collapse(names) == expected


def test_inspecting_imports_no_torch_and_takes_no_second() -> None:
    """Half a second of processor time is twice what it takes, and no clock of a busy machine."""
    program = (
        "import sys, time; from pathlib import Path; from cabochon.load.report import"
        " inspect_checkpoint; r = inspect_checkpoint(Path(sys.argv[1])); r.text(); r.as_dict();"
        " print({'torch', 'numpy', 'fastapi'} & {*sys.modules}, time.process_time())"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, str(W4A16)], capture_output=True, text=True, check=True
    ).stdout
    imported, _, seconds = out.rpartition(" ")
    assert imported == "set()"
    assert float(seconds) < 0.5
