"""The report: its JSON, its text, and that it costs neither torch nor a second."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from checkpoints import (
    DENSE,
    FIXTURES,
    NVFP4,
    QUANTIZED,
    W4A16,
    Config,
    Tensors,
    altered,
    plan_of,
    tensors_of,
)
from thin import fixture

import cabochon.load
from cabochon.engine.cache import CachePlan
from cabochon.errors import CabochonError, UnreadableError
from cabochon.load.explain import EXPLANATIONS, explain
from cabochon.load.findings import collapse
from cabochon.load.fingerprint import plan_hash
from cabochon.load.forecast import KV_DTYPES, PROGRAM, Forecast
from cabochon.load.places import places
from cabochon.load.plan import Kind
from cabochon.load.report import inspect_checkpoint, plan_checkpoint

SCHEMA = json.loads((Path(cabochon.load.__file__).parent / "report.schema.json").read_text())
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "int8": torch.int8}


def lose_scales(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.endswith("mlp.up_proj.weight_scale")]:
        del tensors[name]


def test_the_json_of_a_checkpoint_that_loads() -> None:
    report = inspect_checkpoint(fixture("e2b-w4a16-head")).as_dict()
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
    report = inspect_checkpoint(altered(tmp_path, W4A16, tensors=lose_scales))
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


def foreign(config: Config) -> None:
    config["architectures"] = ["Gemma3ForConditionalGeneration"]


@pytest.mark.parametrize("folder", [DENSE, *QUANTIZED, *NVFP4], ids=lambda folder: folder.name)
def test_the_json_is_as_its_schema_says(folder: Path) -> None:
    found = inspect_checkpoint(folder).as_dict()
    jsonschema.validate(found, SCHEMA)
    assert found["memory"]["fits"]
    assert found["model"]["parameters"] > found["model"]["parameters_active"]


def test_the_json_of_a_drafter_is_as_the_schema_says() -> None:
    """It takes nothing by itself, keeps nothing, and needs the memory of its target."""
    found = inspect_checkpoint(FIXTURES / "e2b-assistant").as_dict()
    jsonschema.validate(found, SCHEMA)
    assert found["verdict"] == "loads"
    assert found["model"]["name"] == "a drafter, which guesses for a Gemma 4 of 64"
    assert found["memory"] is None


def test_the_json_of_refusals_is_as_the_schema_says(tmp_path: Path) -> None:
    broken = altered(tmp_path / "broken", W4A16, tensors=lose_scales)
    other = altered(tmp_path / "other", W4A16, config=foreign)
    for folder in (broken, other):
        report = inspect_checkpoint(folder)
        found = report.as_dict()
        found["tensors"] = [row.as_dict() for row in places(report.checkpoint.tensors, report.plan)]
        jsonschema.validate(found, SCHEMA)
        assert found["verdict"] == "refused"
        assert found["memory"] is None
        assert found["plan_hash"] is None
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found | {"more": 1}, SCHEMA)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (DENSE, "no quantization"),
        (W4A16, "compressed-tensors"),
        (NVFP4[0], "compressed-tensors"),
    ],
)
def test_the_producer_is_told_from_what_it_left(folder: Path, name: str) -> None:
    producer = inspect_checkpoint(folder).producer
    assert name in producer.name
    if name != "no quantization":
        words = "\n".join(producer.evidence)
        assert "quant_method 'compressed-tensors'" in words
        assert "weight_packed" in words


def test_a_config_of_another_producer_is_told(tmp_path: Path) -> None:
    def lie(config: Config) -> None:
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}

    report = inspect_checkpoint(altered(tmp_path, W4A16, config=lie))
    assert "config.json says bitsandbytes, the tensors are those of compressed-tensors" in (
        report.producer.evidence
    )
    assert "compressed-tensors" in report.producer.name


def test_what_stays_in_high_precision_is_told(tmp_path: Path) -> None:
    def some(tensors: Tensors) -> None:
        name = "model.language_model.layers.1.mlp.up_proj"
        for leaf in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{name}.{leaf}"]
        tensors[f"{name}.weight"] = tensors_of(DENSE)[f"{name}.weight"]

    report = inspect_checkpoint(altered(tmp_path, W4A16, tensors=some))
    kept = {row.group: row for row in report.high_precision}
    assert kept["vision tower"].whole
    assert not kept["mlp"].whole
    assert kept["mlp"].where == ("model.language_model.layers.1.mlp.up_proj",)
    assert "in high precision of mlp (bf16, 1): model.language_model.layers.1.mlp.up_proj" in (
        report.text()
    )
    assert inspect_checkpoint(DENSE).high_precision == ()


@pytest.mark.parametrize("name", KV_DTYPES)
@pytest.mark.parametrize("folder", ["e2b-w4a16", "12b-w4a16", "26b-w4a16", "31b-w4a16"])
def test_the_forecast_is_what_the_cache_then_finds(folder: str, name: str) -> None:
    """For budgets that hold all of the model's context, some of it, and none."""
    plan = plan_of(fixture(folder))
    weights = Forecast.of(plan, 0).weights
    assert weights >= plan.nbytes
    found = set()
    for budget in (10**5, 5 * 10**5, 10**6, 2 * 10**6, 10**9):
        forecast = Forecast.of(plan, weights + PROGRAM + budget)
        assert forecast.free == budget
        tokens = forecast.largest_context(KV_DTYPES[name])
        found.add(tokens)
        try:
            cache = CachePlan.fit(plan.config.text, DTYPES[name], budget, 1, 512)
        except CabochonError:  # it wants room for two steps
            assert tokens < 1024
        else:
            assert cache.max_context == tokens
    assert max(found) == plan.config.text.max_positions
    assert min(found) < max(found)


def test_a_machine_too_small_is_told() -> None:
    forecast = Forecast.of(plan_of(W4A16), PROGRAM)
    assert forecast.free < 0
    assert forecast.largest_context(4) == 0
    assert not forecast.as_dict()["fits"]


def test_weights_are_forecast_as_they_lie_in_memory(tmp_path: Path) -> None:
    plan = plan_of(DENSE)
    norms = sum(read.tensor.nbytes for read in plan.parameters)
    assert Forecast.of(plan, 0).weights == plan.nbytes + norms  # bfloat16, held in float32


def test_every_stored_tensor_has_a_place_or_none(tmp_path: Path) -> None:
    def more(tensors: Tensors) -> None:
        tensors["model.language_model.layers.1.extra"] = torch.ones(1)
        tensors["model.language_model.layers.1.self_attn.k_scale"] = torch.ones(1)

    report = inspect_checkpoint(altered(tmp_path, W4A16, tensors=more))
    rows = {row.tensor.name: row for row in places(report.checkpoint.tensors, report.plan)}
    assert rows.keys() == tensors_of(tmp_path).keys()
    gate = "model.language_model.layers.1.mlp.gate_proj"
    assert (rows[f"{gate}.weight_scale"].fate, rows[f"{gate}.weight_scale"].scheme) == (
        "matrix",
        "int4 g32",
    )
    assert gate in rows[f"{gate}.weight_scale"].where
    assert rows["model.language_model.norm.weight"].fate == "parameter"
    assert rows["model.language_model.layers.1.extra"].fate == "refused"
    assert rows["model.language_model.layers.1.self_attn.k_scale"].fate == "dropped"


def test_things_that_others_run_are_named_and_ignored(tmp_path: Path) -> None:
    def mapped(config: Config) -> None:
        config["auto_map"] = {"AutoModel": "modeling.Gemma"}

    folder = altered(tmp_path, W4A16, config=mapped)
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    report = inspect_checkpoint(folder)
    assert report.loads
    found = {row.where: row.what for row in report.executables}
    assert "modeling.Gemma" in found["config.json: auto_map"]
    assert "Python" in found["modeling.py"]
    assert "pickle" in found["optimizer.pt"]
    assert "modeling.py" in report.text()
    assert inspect_checkpoint(DENSE).executables == ()


def test_each_kind_of_problem_is_explained() -> None:
    kinds = set(Kind.__args__)  # type: ignore[attr-defined]
    assert kinds <= EXPLANATIONS.keys()
    for code in EXPLANATIONS:
        assert explain(code.lower()).startswith(code)
    with pytest.raises(CabochonError, match="the codes are FOREIGN"):
        explain("E42")


def test_the_hash_of_a_plan_is_of_what_is_loaded(tmp_path: Path) -> None:
    plan = plan_of(W4A16)
    assert plan_hash(plan) == plan_hash(plan_of(shutil.copytree(W4A16, tmp_path / "moved")))

    def rope(config: Config) -> None:
        config["text_config"]["rope_parameters"]["full_attention"]["rope_theta"] = 1e5

    def widen(tensors: Tensors) -> None:
        name = "model.language_model.norm.weight"
        tensors[name] = tensors[name].float()

    changes: list[dict[str, Any]] = [{"config": rope}, {"tensors": widen}]
    others = [
        plan_of(altered(tmp_path / str(i), W4A16, **change)) for i, change in enumerate(changes)
    ]
    hashes = {plan_hash(p) for p in (plan, *others, plan_of(DENSE))}
    assert len(hashes) == 4


def test_saved_headers_are_inspected_and_never_loaded(tmp_path: Path) -> None:
    whole = inspect_checkpoint(W4A16)
    folder = shutil.copytree(W4A16, tmp_path / "saved")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    end = 8 + int.from_bytes(content[:8], "little")
    (folder / "model.safetensors.header").write_bytes(content[:end])
    report = inspect_checkpoint(folder)
    assert report.as_dict() == whole.as_dict() | {"source": str(folder)}
    with pytest.raises(UnreadableError, match="headers without their tensors"):
        plan_checkpoint(folder)
