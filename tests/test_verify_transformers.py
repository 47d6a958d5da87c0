"""`cabochon verify --reference transformers`: faults of ours, each named by its module."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoints import FIXTURES
from command import ENVIRONMENT, cabochon
from conftest import MEMBERS
from thin import fixture
from torch import nn

from cabochon.assembly import open_text
from cabochon.config.types import PictureSight
from cabochon.errors import UnreadableError
from cabochon.gemma4.model import Gemma4
from cabochon.nn.attention import KeyValues, visible
from cabochon.nn.experts import Experts
from cabochon.nn.weight import DenseWeight
from cabochon.verify.probes import probes
from cabochon.verify.reference import against_transformers
from cabochon.verify.stage import Finding
from cabochon.verify.upstream import blank, fill
from cabochon.verify.verification import Subject, verify

References = Callable[[str], Any]

LAYER = "model.language_model.layers.0"
FULL = "model.language_model.layers.2"
SENSES = {"e2b": 3, "12b": 3, "26b": 2, "31b": 2}  # text, pictures, and sounds


def beside(theirs: Any, subject: Subject) -> Finding:
    prompts, _ = open_text(subject.report)
    return against_transformers(theirs, subject.model, probes(prompts))


def filled(subject: Subject) -> Any:
    """transformers' model with what our model holds, as the command has it."""
    theirs = blank(subject.report.checkpoint.folder)
    fill(theirs, subject.model)
    return theirs


@pytest.mark.parametrize("member", MEMBERS)
def test_what_is_sound_passes(member: str) -> None:
    subject = Subject(fixture(f"{member}-w4a16"))
    found = beside(filled(subject), subject)
    assert not found.faults
    assert len(found.data["ends"]) == SENSES[member]
    assert len({module["name"] for module in found.data["modules"]}) > 100
    assert all(float(ends["KL divergence"]) < 1e-9 for ends in found.data["ends"])


def test_the_model_that_is_filled_is_the_one_that_is_loaded(references: References) -> None:
    """The checkpoint is bfloat16: nothing that we decode has a part in what transformers loads."""
    from reference import logits

    subject = Subject(FIXTURES / "e2b-bf16")
    prompt = probes(open_text(subject.report)[0])["picture"]
    assert torch.equal(logits(filled(subject), prompt), logits(references("e2b"), prompt))


class Fault(NamedTuple):
    """A mistake that no loader can see, and the modules that are to be named."""

    member: str
    inject: Callable[[Gemma4], None]
    guilty: set[str]
    report: str  # of an engine that made it
    of_weights: bool = False  # which a model that is filled with ours would have, too


FAULTS: dict[str, Fault] = {}


def fault(
    member: str, *guilty: str, report: str = "", of_weights: bool = False
) -> Callable[[Any], Any]:
    def register(inject: Callable[[Gemma4], None]) -> Callable[[Gemma4], None]:
        name = f"{report} {inject.__name__}" if report else f"{inject.__name__} of {member}"
        FAULTS[name] = Fault(member, inject, set(guilty), report, of_weights)
        return inject

    return register


@fault("e2b", LAYER)
def layer_scalar_left_out(model: Gemma4) -> None:
    layer: Any = model.get_submodule(LAYER)
    plain = layer.forward
    layer.forward = lambda *given: plain(*given) / layer.layer_scalar


@fault("e2b", f"{LAYER}.mlp")
@fault("31b", f"{LAYER}.mlp")
def silu_for_gelu(model: Gemma4) -> None:
    mlp: Any = model.get_submodule(f"{LAYER}.mlp")
    silu = nn.functional.silu
    mlp.forward = lambda x: mlp.down_proj(silu(mlp.gate_proj(x)) * mlp.up_proj(x))


@fault("26b", f"{LAYER}.experts", report="vLLM #41574")
def silu_for_gelu_in_experts(model: Gemma4) -> None:
    experts: Any = model.get_submodule(f"{LAYER}.experts")
    silu, count = nn.functional.silu, experts.count

    def run(expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = experts.gate_up_proj.part(x, expert, count).chunk(2, dim=-1)
        made: torch.Tensor = experts.down_proj.part(silu(gate) * up, expert, count)
        return made

    experts._run = run


@fault("e2b", f"{LAYER}.self_attn")
def attention_scaled(model: Gemma4) -> None:
    attention: Any = model.get_submodule(f"{LAYER}.self_attn")
    plain = attention.forward

    class Scaled:
        def __init__(self, kv: KeyValues) -> None:
            self.write = kv.write
            self.attend = lambda layer, q: kv.attend(layer, q * q.shape[-1] ** -0.5)

    attention.forward = lambda x, rotation, kv: plain(x, rotation, Scaled(kv))


@fault("e2b", f"{FULL}.self_attn", "model.language_model.layers.5.self_attn")
def all_pairs_rotated(model: Gemma4) -> None:
    text: Any = model.get_submodule("model.language_model")
    whole = replace(text.config.rope["full"], fraction=1.0)
    text.config = replace(text.config, rope={**text.config.rope, "full": whole})


@fault("31b", f"{FULL}.self_attn.v_norm")
def values_without_their_norm(model: Gemma4) -> None:
    norm: Any = model.get_submodule(f"{FULL}.self_attn.v_norm")
    norm.forward = lambda x: x


@fault("31b", f"{FULL}.self_attn")
def values_after_the_key_norm(model: Gemma4) -> None:
    attention: Any = model.get_submodule(f"{FULL}.self_attn")
    norm = attention.k_norm
    attention.v_norm.register_forward_pre_hook(lambda _, given: (norm.forward(given[0]),))


@fault("26b", f"{LAYER}.router")
def router_scale_left_out(model: Gemma4) -> None:
    router: Any = model.get_submodule(f"{LAYER}.router")
    router.proj.register_forward_pre_hook(lambda _, given: (given[0] / router.scale,))


@fault("26b", f"{LAYER}.router", report="vLLM #42250")
def expert_scale_left_out(model: Gemma4) -> None:
    router: Any = model.get_submodule(f"{LAYER}.router")
    plain = router.forward

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shares, numbers = plain(x)
        return shares / router.per_expert_scale[numbers], numbers

    router.forward = forward


@fault("26b", LAYER)
def experts_see_the_norm_of_the_mlp(model: Gemma4) -> None:
    layer: Any = model.get_submodule(LAYER)
    experts, norm = layer.experts, layer.pre_feedforward_layernorm
    experts.register_forward_pre_hook(lambda _, given: (norm.forward(given[0]), *given[1:]))


@fault("e2b", "model.language_model.embed_tokens_per_layer", report="transformers #45207")
def inputs_of_layers_not_scaled(model: Gemma4) -> None:
    """The table's rows are multiplied with the root of their width, 16 in the real ones."""
    table: Any = model.get_submodule("model.language_model.embed_tokens_per_layer")
    table.scale = 1.0


@fault("e2b", "model.embed_vision", report="vLLM #40411")
@fault("12b", "model.embed_vision")
@fault("26b", "model.embed_vision")
def norm_behind_the_projection(model: Gemma4) -> None:
    embedder: Any = model.get_submodule("model.embed_vision")
    norm, projection = embedder.embedding_pre_projection_norm, embedder.embedding_projection
    embedder.forward = lambda x: norm(projection(x))


@fault("e2b", "model.audio_tower.layers.0.lconv1d")
def a_convolution_that_runs_backwards(model: Gemma4) -> None:
    part: Any = model.get_submodule("model.audio_tower.layers.0.lconv1d")
    plain = part.forward
    part.forward = lambda x: plain(x.flip(0)).flip(0)


@fault("e2b", f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj", of_weights=True)
def gate_and_up_swapped(model: Gemma4) -> None:
    mlp: Any = model.get_submodule(f"{LAYER}.mlp")
    mlp.gate_proj.weight, mlp.up_proj.weight = mlp.up_proj.weight, mlp.gate_proj.weight


@fault("26b", f"{LAYER}.experts", of_weights=True)
def halves_of_experts_swapped(model: Gemma4) -> None:
    experts = model.get_submodule(f"{LAYER}.experts")
    assert isinstance(experts, Experts)
    data = experts.gate_up_proj.weight.dense(torch.float32)
    halves = data.unflatten(0, (experts.count, 2, -1)).flip(1)
    experts.gate_up_proj.weight = DenseWeight(halves.flatten(0, 2))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_ours_is_named(references: References, name: str) -> None:
    fault = FAULTS[name]
    subject = Subject(FIXTURES / f"{fault.member}-bf16")
    fault.inject(subject.model)
    theirs = references(fault.member) if fault.of_weights else filled(subject)
    found = beside(theirs, subject)
    assert set(found.data["suspects"]) == fault.guilty
    assert all(
        "differs from transformers' by" in text or "only one" in text for text in found.faults
    )


@pytest.mark.parametrize(("sight", "layers"), [("causal", (0, 1, 3, 4)), ("window", (2, 5))])
def test_vllm_40534_47217_pictures_are_seen_forwards_in_sliding_layers_alone(
    monkeypatch: pytest.MonkeyPatch, sight: PictureSight, layers: tuple[int, ...]
) -> None:
    """One sight in all layers shows in those whose own is another."""

    def other(*given: Any) -> torch.Tensor:
        queries, keys, window, _, *spans = given
        return visible(queries, keys, window, sight, *spans)

    subject = Subject(FIXTURES / "31b-bf16")
    monkeypatch.setattr("cabochon.engine.cache.visible", other)
    found = beside(filled(subject), subject)
    guilty = {f"model.language_model.layers.{layer}.self_attn" for layer in layers}
    assert set(found.data["suspects"]) == guilty


def test_activations_are_not_rounded_here() -> None:
    """transformers' model of decoded weights rounds nothing; a recipe that does is no fault."""
    found = verify(fixture("e2b-w8a8"), reference="transformers")
    assert found.report.recipe
    assert [stage.name for stage in found.stages if stage.verdict == "passed"][-1] == "transformers"
    assert found.passed


def test_the_command_runs_the_stage() -> None:
    done = cabochon("verify", FIXTURES / "31b-w4a16", "--reference", "transformers")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok    transformers: " in done.stdout


def test_without_transformers_it_says_what_to_install() -> None:
    """Before anything is run."""
    program = (
        "import sys; sys.modules['transformers'] = None; sys.argv[0] = 'cabochon';"
        "from cabochon.cli import main; main()"
    )
    folder = str(FIXTURES / "e2b-w4a16")
    done = subprocess.run(
        [sys.executable, "-c", program, "verify", folder, "--reference", "transformers"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'cabochon[verify]' adds it" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_configuration_it_says_what_is_missing(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "gguf" / "e2b", tmp_path, dirs_exist_ok=True)
    with pytest.raises(UnreadableError, match=r"needs a config\.json"):
        verify(tmp_path / "e2b-q4_1.gguf", reference="transformers")
