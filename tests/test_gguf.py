"""GGUF models made by llama.cpp: loaded exactly, by gguf-py's decoding and transformers' model."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import load_model
from conftest import FIXTURES, hiss, noise
from gguf import GGMLQuantizationType
from gguf_models import FOLDER, MODELS, decoded, text_weights
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cabochon import LLM
from cabochon.checkpoint.folder import Checkpoint
from cabochon.config import read_config
from cabochon.load.describe import describe
from cabochon.load.execute import tensors_of
from cabochon.load.places import places
from cabochon.load.plan import SiteRead
from cabochon.load.report import inspect_checkpoint
from cabochon.nn.gguf_blocks import BlockWeight
from cabochon.nn.linear import Embedding, Linear
from cabochon.nn.weight import Stack, Weight
from cabochon.quant.gguf import GgufBlocks

F32 = torch.float32
TOWERS = ("e2b", "12b", "26b")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[tuple[str, LLM]]:
    with LLM(MODELS[request.param][0], dtype="float32") as llm:
        yield request.param, llm


@cache
def upstream(name: str) -> Any:
    """transformers' model with what gguf-py decodes of the file, in float32."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    path, folder = MODELS[name]
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    made = AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    weights = text_weights(path, made.state_dict())
    left = made.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    assert not [n for n in left.missing_keys if "language_model" in n], left.missing_keys
    return made.eval()


def ordinary(llm: LLM, count: int) -> list[int]:
    """Random tokens that stand for text, more than a sliding window of them."""
    usable = sorted(set(range(llm.config.text.vocab_size)) - llm.prompts.tokenizer.special)
    return [2, *random.Random(0).choices(usable, k=count - 1)]


def test_logits_are_those_of_the_decoded_weights(model: tuple[str, LLM]) -> None:
    name, llm = model
    tokens = ordinary(llm, 60)
    ours = llm.logits(tokens)
    with torch.inference_mode():
        theirs = upstream(name)(input_ids=torch.tensor([tokens])).logits[0]
    assert cosine_similarity(ours, theirs, dim=-1).min() > 0.9999
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def matrices(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear | Embedding) and "language_model" in name:
            yield name, module.weight


def test_matrices_are_decoded_exactly(model: tuple[str, LLM]) -> None:
    name, llm = model
    state = upstream(name).state_dict()
    for module, weight in matrices(llm.runner.model):
        stored = state.get(f"{module}.weight", state.get(module))
        assert stored is not None, module
        dense = weight.dense(torch.float32).view(stored.shape)
        if name == "26b nvfp4":  # a third factor, and which two are multiplied first is not said
            torch.testing.assert_close(dense, stored, rtol=2e-7, atol=0)
        else:
            assert torch.equal(dense, stored), module


@pytest.mark.parametrize("name", MODELS)
def test_weights_keep_their_stored_bits(name: str) -> None:
    """Without kernels, what is held is as large as what is stored, and made of blocks."""
    model, report = load_model(MODELS[name][0], dtype=F32)
    assert report.plan is not None
    held = sum(t.nbytes for _, weight in matrices(model) for t in weight.buffers())
    reads = [read for read in report.plan.sites if "language_model" in read.site.name]
    assert held == sum(read.nbytes for read in reads)
    kinds = {
        part.kind
        for _, weight in matrices(model)
        for part in (weight.parts if isinstance(weight, Stack) else [weight])
        if isinstance(part, BlockWeight)
    }
    assert kinds == {read.scheme.type for read in reads if isinstance(read.scheme, GgufBlocks)}
    assert kinds
    assert not [note for note in report.notes if "GGUF" in note.detail]


def test_the_configuration_is_that_of_config_json() -> None:
    for name, (path, folder) in MODELS.items():
        expected, _ = read_config(folder)
        found, _ = describe(Checkpoint.open(path))
        if path.parent.name in TOWERS:
            assert found == expected, name
            continue
        # No projector lies beside it, so that it is not said how pictures are seen.
        layers = tuple(replace(layer, pictures="causal") for layer in expected.text.layers)
        assert found.text == replace(expected.text, layers=layers), name
        assert found.vision is None
        assert found.architecture == "Gemma4ForCausalLM"


@pytest.mark.parametrize("member", TOWERS)
def test_towers_are_those_that_were_converted(member: str) -> None:
    """Layouts that the converter changes are changed back: to the bit, but for a logarithm."""
    ours, _ = load_model(FOLDER / member if member != "26b" else MODELS["26b q4_0"][0], dtype=F32)
    theirs, _ = load_model(FIXTURES / f"{member}-bf16", dtype=F32)
    rounded = torch.float16 if member == "12b" else torch.bfloat16
    checked = 0
    for name, expected in tensors_of(theirs):
        if "language_model" not in name and "weight." not in name:
            found = dict(tensors_of(ours))[name]
            if name.endswith("per_dim_scale"):
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(found.to(rounded), expected.to(rounded)), name
            checked += 1
    for name, module in theirs.named_modules():
        if isinstance(module, Linear) and "language_model" not in name:
            found = ours.get_submodule(name).weight.dense(F32)
            assert torch.equal(found.to(rounded), module.weight.dense(F32).to(rounded)), name
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("member", TOWERS)
def test_pictures_and_sounds_become_the_same_soft_tokens(member: str) -> None:
    path = MODELS["26b q4_0"][0] if member == "26b" else FOLDER / member
    with LLM(path, dtype="float32") as ours, LLM(FIXTURES / f"{member}-bf16", dtype="float32") as t:
        picture = ours.prompts.picture(noise(96, 192))
        pixels, places = torch.from_numpy(picture.patches), torch.from_numpy(picture.positions)
        with torch.inference_mode():
            seen = [llm.runner.model.see(pixels, places) for llm in (ours, t)]
        assert cosine_similarity(*seen, dim=-1).min() > 0.9999
        if ours.config.audio is not None:
            frames = torch.from_numpy(ours.prompts.sound(hiss(16_000)).features)
            with torch.inference_mode():
                heard = [llm.runner.model.hear(frames) for llm in (ours, t)]
            assert cosine_similarity(*heard, dim=-1).min() > 0.9999
        answer = ours.chat([{"role": "user", "content": "How many shapes?"}])
        assert answer.tokens


def test_a_folder_with_one_model_is_that_model() -> None:
    report = inspect_checkpoint(FOLDER / "12b")
    assert report.loads
    assert report.architecture == "Gemma4UnifiedForConditionalGeneration"
    files = {meta.file.name for meta in report.checkpoint.tensors.values()}
    assert len(files) == 4  # three parts and the projector
    assert inspect_checkpoint(FOLDER / "12b" / "12b-q8_0-00003-of-00003.gguf").hash == report.hash


def test_a_folder_with_several_models_is_refused() -> None:
    with pytest.raises(Exception, match=r"several models: 26b-mxfp4.gguf, 26b-q4_0.gguf"):
        inspect_checkpoint(FOLDER / "26b")


def test_inspect_imports_no_torch() -> None:
    program = (
        "import sys; from cabochon.cli import main; sys.argv.insert(1, 'inspect')\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules or 'numpy' in sys.modules, file=sys.stderr)"
    )
    path = str(MODELS["e2b every type"][0])
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=False
    )
    assert "gguf iq4_xs" in done.stdout
    assert done.stderr.strip() == "False"


@pytest.mark.parametrize(
    ("name", "count"),
    [("e2b every type", 17), *((f"{m} every type", 14) for m in ("12b", "26b", "31b"))],
)
def test_every_type_is_in_the_fixtures(name: str, count: int) -> None:
    """The plan names them as gguf-py does. In E2B alone matrices are floats beside."""
    plan = inspect_checkpoint(MODELS[name][0]).plan
    assert plan is not None
    names = {m.dtype for read in plan.sites for m in read.stored.values()}
    assert len(names if name.startswith("e2b") else names - {"F32", "F16", "BF16"}) == count
    assert names <= {kind.name for kind in GGMLQuantizationType}


def test_experts_of_nvfp4_have_their_own_scales() -> None:
    """Folded with the router's per-expert scale, which is applied once."""
    path, _ = MODELS["26b nvfp4"]
    stored = decoded(path)
    model, report = load_model(path, dtype=F32)
    router = model.get_submodule("model.language_model.layers.0.router")
    scale: Tensor = router.per_expert_scale
    assert torch.equal(scale, stored["blk.0.ffn_down_exps.scale"])
    assert scale.max() < 0.1  # a product with scales of weights, not a share by itself
    assert report.plan is not None
    parts = [r for r in report.plan.sites if r.site.name.endswith("0.experts.gate_up_proj")]
    assert all(isinstance(r, SiteRead) and r.scheme.name == "gguf nvfp4" for r in parts)
    assert len(parts) == 8


def test_a_tensor_of_several_matrices_is_listed_with_all() -> None:
    report = inspect_checkpoint(MODELS["31b fused"][0])
    rows = {row.tensor.name: row for row in places(report.checkpoint.tensors, report.plan)}
    for projection in "qkv":
        assert f"layers.0.self_attn.{projection}_proj" in rows["blk.0.attn_qkv.weight"].where
    report = inspect_checkpoint(MODELS["26b nvfp4"][0])
    rows = {row.tensor.name: row for row in places(report.checkpoint.tensors, report.plan)}
    assert "and 3 others up to" in rows["blk.0.ffn_up_exps.weight"].where


def test_saved_headers_are_planned(tmp_path: Path) -> None:
    path = MODELS["26b q4_0"][0]
    whole = inspect_checkpoint(path)
    start = min(m.span[0] for m in whole.checkpoint.tensors.values() if m.file == path)
    (tmp_path / "26b-q4_0.gguf.header").write_bytes(path.read_bytes()[:start])
    report = inspect_checkpoint(tmp_path)
    assert report.loads
    assert report.checkpoint.saved_headers
    assert json.loads(json.dumps(report.as_dict()))["producer"]["name"] == "GGUF"
