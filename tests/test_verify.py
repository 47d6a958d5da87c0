"""`cabochon verify` names planted faults, and passes what is sound."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FIXTURES, Tensors, altered, tensors_of
from command import cabochon
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from ct_writer import compress
from thin import fixture
from torch import nn

from cabochon.assembly import open_text
from cabochon.engine.request import Prompt
from cabochon.errors import UnreadableError
from cabochon.files import DEMO
from cabochon.gemma4.model import Gemma4
from cabochon.kernels.choose import Kernels
from cabochon.kernels.library import library
from cabochon.load.in_file import InFile, in_file
from cabochon.load.report import plan_checkpoint
from cabochon.nn.weight import DenseWeight
from cabochon.verify.against import Models, modules_against, weights_against
from cabochon.verify.alive import is_alive
from cabochon.verify.probes import probes
from cabochon.verify.truth import kernels_tell_the_truth
from cabochon.verify.verification import Subject, verify

E2B, HEAD, MOE = map(fixture, ("e2b-w4a16", "e2b-w4a16-head", "26b-w4a16"))
LAYER = "model.language_model.layers.1"
GATE, UP = f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"
KEYS = f"{LAYER}.self_attn.k_proj"
EXPERTS = f"{LAYER}.experts"


def dense(folder: Path) -> Path:
    return FIXTURES / f"{folder.name.partition('-')[0]}-bf16"


@cache
def shown(folder: Path) -> Mapping[str, Prompt]:
    prompts, _ = open_text(plan_checkpoint(folder))
    return probes(prompts)


def scaled(tensors: Tensors) -> None:
    tensors[f"{GATE}.weight_scale"] *= 1.5


def exchanged(tensors: Tensors, *pairs: tuple[str, str]) -> None:
    for first, second in pairs:
        for leaf in ("weight_packed", "weight_scale"):
            a, b = f"{first}.{leaf}", f"{second}.{leaf}"
            tensors[a], tensors[b] = tensors[b], tensors[a]


def nibbles(tensors: Tensors) -> None:
    octets = tensors[f"{GATE}.weight_packed"].view(torch.uint8)
    octets.copy_(octets >> 4 | octets << 4)


def lost_expert(tensors: Tensors) -> None:
    for projection in ("gate", "up", "down"):
        tensors[f"{EXPERTS}.3.{projection}_proj.weight_scale"].zero_()


def exchanged_experts(tensors: Tensors) -> None:
    projections = ("gate_proj", "up_proj", "down_proj")
    exchanged(tensors, *((f"{EXPERTS}.2.{p}", f"{EXPERTS}.5.{p}") for p in projections))


def scale_of_ones(tensors: Tensors) -> None:
    tensors[f"{KEYS}.weight_scale"].fill_(1.0)


def drift(tensors: Tensors) -> None:
    """A rank of one, as fine-tuning adds it, on a matrix that is stored as floats."""
    name = "model.language_model.embed_tokens_per_layer.weight"
    table = tensors[name].float()
    torch.manual_seed(0)
    left, right = torch.randn(len(table)), torch.randn(table.shape[1])
    part = torch.outer(left, right)
    tensors[name] = (table + 0.05 * table.norm() / part.norm() * part).bfloat16()


def drift_before_rounding(tensors: Tensors) -> None:
    """The same on a matrix that compressed-tensors rounds to four bits afterwards."""
    weight = tensors_of(dense(E2B))[f"{UP}.weight"].float()
    torch.manual_seed(0)
    left, right = torch.randn(len(weight)), torch.randn(weight.shape[1])
    part = torch.outer(left, right)
    weight += 0.1 * weight.norm() / part.norm() * part
    arguments = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
    made = compress(weight.bfloat16(), QuantizationScheme(targets=["Linear"], weights=arguments))
    tensors.update({f"{UP}.{leaf}": tensor for leaf, tensor in made.items()})


def another_head(tensors: Tensors) -> None:
    packed = tensors["lm_head.weight_packed"]
    tensors["lm_head.weight_packed"] = packed[torch.randperm(len(packed))]


# Of the file: its weights tell.
IN_THE_FILE: Mapping[str, tuple[Path, Callable[[Tensors], object], set[str]]] = {
    "scales half too large": (E2B, scaled, {GATE}),
    "gate and up exchanged": (E2B, lambda t: exchanged(t, (GATE, UP)), {GATE, UP}),
    "nibbles exchanged": (E2B, nibbles, {GATE}),
    "an expert lost": (MOE, lost_expert, {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}),
    "two experts exchanged": (
        MOE,
        exchanged_experts,
        {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"},
    ),
    "keys without their scales": (E2B, scale_of_ones, {KEYS}),
    "a drift of rank one": (E2B, drift, {"model.language_model.embed_tokens_per_layer"}),
    "a drift of rank one, then rounded": (E2B, drift_before_rounding, {UP}),
    "the head of another checkpoint": (HEAD, another_head, {"lm_head"}),
}


@pytest.mark.parametrize("fault", IN_THE_FILE)
def test_weights_tell(tmp_path: Path, fault: str) -> None:
    source, change, guilty = IN_THE_FILE[fault]
    folder = altered(tmp_path, source, change)
    plans = [plan_checkpoint(path).plan for path in (dense(source), folder)]
    assert plans[0] is not None
    assert plans[1] is not None
    found = weights_against(plans[0], plans[1], None)
    assert set(found.data["suspects"]) == guilty


@pytest.mark.parametrize("fault", ["scales half too large", "gate and up exchanged"])
def test_modules_tell_too(tmp_path: Path, fault: str) -> None:
    source, change, guilty = IN_THE_FILE[fault]
    folder = altered(tmp_path, source, change)
    found = side_by_side(source, Subject(folder).model, folder)
    assert set(found["suspects"]) == guilty
    assert found["first"] in guilty


def side_by_side(source: Path, model: Gemma4, folder: Path) -> dict[str, Any]:
    plan = plan_checkpoint(folder).plan
    assert plan is not None
    models = Models(Subject(dense(source)).model, model, plan)
    return modules_against(models, shown(source)).data


def bytes_for_pixels(model: Gemma4) -> str:
    """Pixels cast to integers, as a packed weight's dtype would have it."""
    tower = model.model.vision_tower
    tower.register_forward_pre_hook(lambda _, given: (given[0].byte().float(), *given[1:]))
    return "model.vision_tower.patch_embedder.input_proj"


def norm_behind_projection(model: Gemma4) -> str:
    embedder: Any = model.model.embed_vision
    norm, projection = embedder.embedding_pre_projection_norm, embedder.embedding_projection
    embedder.forward = lambda x: norm(projection(x))
    return "model.embed_vision.embedding_projection"


# Of the code: what runs is not what the original does.
IN_THE_MODEL: Mapping[str, Callable[[Gemma4], str]] = {
    "pixels cast to integers": bytes_for_pixels,
    "the projector's norm behind it": norm_behind_projection,
}


@pytest.mark.parametrize("fault", IN_THE_MODEL)
def test_modules_tell_what_weights_cannot(fault: str) -> None:
    plan = plan_checkpoint(E2B).plan
    assert plan is not None
    model = in_file(plan, dtype=torch.float32)
    guilty = IN_THE_MODEL[fault](model)
    found = side_by_side(E2B, model, E2B)
    assert found["suspects"] == [guilty]
    assert found["first"] == guilty


@pytest.mark.parametrize("name", ["e2b-w4a16", "e2b-w8a16", "12b-w4a16", "26b-w4a16", "31b-w4a16"])
def test_what_is_sound_passes(name: str) -> None:
    subject, original = Subject(fixture(name)), Subject(dense(fixture(name)))
    assert not weights_against(original.plan, subject.plan, None).faults
    models = Models(original.model, subject.model, subject.plan)
    found = modules_against(models, {"text": shown(dense(fixture(name)))["text"]})
    assert not found.faults
    assert found.data["first"] is None


def test_a_large_checkpoint_stays_in_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables do even while it answers, for which its other matrices are held as served."""
    monkeypatch.setattr("cabochon.verify.verification.IN_MEMORY", 0)
    subject = Subject(E2B)
    table = subject.model.model.language_model.embed_tokens.weight
    served = subject.served(Kernels(library(), "int8")).model.language_model
    assert isinstance(table, InFile)
    assert isinstance(served.embed_tokens.weight, InFile)
    assert not isinstance(served.get_submodule("layers.1.mlp.gate_proj").weight, InFile)
    found = verify(E2B, dense(E2B))
    assert found.passed
    assert [stage.verdict for stage in found.stages] == ["passed"] * 5


class Deaf(DenseWeight):
    """A kernel that leaves out the last column."""

    def linear(self, x: torch.Tensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return x[..., :-1] @ self.data[start:stop, :-1].float().T


class Broken(Kernels):
    def for_weight(self, weight: Any) -> Any:
        return Deaf(weight.dense(torch.float32))


def test_a_kernel_that_lies_is_found() -> None:
    plan = plan_checkpoint(E2B).plan
    assert plan is not None
    assert not kernels_tell_the_truth(plan, Kernels(None, "float32")).faults
    faults = kernels_tell_the_truth(plan, Broken(None, "float32")).faults
    assert len(faults) == 6
    assert "relative error" in faults[0]


def test_a_model_that_does_not_look_is_found() -> None:
    report = plan_checkpoint(DEMO)
    subject = Subject(DEMO)
    prompts, defaults = open_text(report)
    blind: nn.Module = subject.model.model.embed_vision
    blind.register_forward_hook(lambda _, __, out: torch.ones_like(out))
    faults = "\n".join(is_alive(subject.model, prompts, frozenset(defaults.ends)).faults)
    assert "a red and a blue rectangle have the same soft tokens" in faults
    assert "with its patches shuffled" in faults
    assert "are answered alike" in faults


def test_logits_at_the_soft_cap_are_found() -> None:
    """vLLM #39407: every logit at 23.6 of 30, and the same letter for ever."""
    report = plan_checkpoint(DEMO)
    subject = Subject(DEMO)
    prompts, defaults = open_text(report)
    norm = subject.model.model.language_model.norm
    norm.register_forward_hook(lambda _, __, out: out * 1000)
    faults = "\n".join(is_alive(subject.model, prompts, frozenset(defaults.ends)).faults)
    assert "pinned at the soft-cap" in faults


def test_the_command_verifies_and_reports(tmp_path: Path) -> None:
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    options = ("--against", dense(E2B), "--html", page, "--json", data)
    done = cabochon("verify", E2B, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified" in done.stdout.splitlines()[0]
    found = json.loads(data.read_text())
    assert found["verified"]
    assert [stage["name"] for stage in found["stages"]] == [
        "plan and certificate", "kernels", "alive", "weights", "modules",
    ]  # fmt: skip
    text = page.read_text()
    assert "cabochon verify" in text
    assert text.count("<svg") > 1
    assert "<script" not in text


def test_a_checkpoint_that_is_not_verified_ends_with_1(tmp_path: Path) -> None:
    done = cabochon("verify", altered(tmp_path, E2B, scaled), "--against", dense(E2B))
    assert done.returncode == 1
    assert "not verified" in done.stdout.splitlines()[0]
    assert GATE in done.stdout
    assert "modules: an earlier stage failed" in done.stdout


def test_an_original_of_another_model_is_no_original() -> None:
    with pytest.raises(UnreadableError, match="describe different models"):
        verify(E2B, FIXTURES / "31b-bf16")


def test_a_tensor_that_is_no_number_ends_the_first_stage(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{GATE}.weight_scale"][0] = torch.nan

    found = verify(altered(tmp_path, E2B, change))
    assert not found.passed
    assert [stage.verdict for stage in found.stages] == ["failed", "not run", "not run"]
    assert GATE in found.stages[0].finding.faults[0]
