"""Google's own format against transformers' reader of it, module by module and as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google
import pytest
import torch
from checkpoints import Config, Tensors, altered, config_of, plan_of, tensors_of
from conftest import FIXTURES
from ct import on_disk
from guided import prompt_of, same_logits, seam
from known import load, refusal
from reference import logits, relative_error
from torch.nn.functional import cosine_similarity
from transformers.integrations import gemma_quant
from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear, apply_srq

from cabochon import LLM
from cabochon.load.report import inspect_checkpoint
from cabochon.nn.activations import RoundedWeight

PLE = "model.language_model.embed_tokens_per_layer"
GATE = "model.language_model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gemma")
    shutil.copytree(google.SOURCE, made, dirs_exist_ok=True)
    return google.checkpoint(made)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """transformers' own model. Its reader has no blocks in the per-layer table; its decoder has."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    mismatched = info.pop("mismatched_keys")
    assert [entry[0] for entry in mismatched] == [f"{PLE}.embedding_scale"]
    assert not any(info.values()), info
    scale = tensors_of(folder)[f"{PLE}.embedding_scale"]
    model.get_submodule(PLE).embedding_scale = torch.nn.Parameter(scale, requires_grad=False)
    return model.eval()


def test_every_matrix_is_upstreams(folder: Path, theirs: Any) -> None:
    """Upstream multiplies in the dtype of the activations, with the scale rounded to it first."""
    report, found = load(folder)
    seen = {"linear": 0, "table": 0}
    for name, module in theirs.named_modules():
        if not isinstance(module, QuantizedLinear | QuantizedEmbedding):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            if isinstance(module, QuantizedLinear):
                seen["linear"] += 1
                expected = module._dequantize_weights(dtype)
            else:
                seen["table"] += 1
                module.output_dtype = dtype
                expected = module.weight
                module.output_dtype = torch.float32
            assert torch.equal(found[name].dense(dtype), expected), name
            ids = torch.tensor([[3, 1], [7, 7]])
            assert torch.equal(found[name].rows(ids, dtype), expected[ids]), name
    assert seen == {"linear": 2 * 83, "table": 2 * 2}
    assert not report.notes
    schemes = {read.scheme.name for read in plan_of(folder).sites}
    assert schemes == {
        "bf16",
        "gemma int2 channel",
        "gemma int4 channel",
        "gemma int8 channel",
        "gemma int4 g32",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_product_is_upstreams(folder: Path, theirs: Any, dtype: torch.dtype) -> None:
    """Rounding in front and behind, to the last bit; 0.0 leaves activations as they are."""
    found = load(folder)[1]
    generator = torch.Generator().manual_seed(0)
    rounded = 0
    for name, module in theirs.named_modules():
        if isinstance(module, QuantizedLinear):
            x = torch.randn(5, module.in_features, generator=generator).to(dtype)
            weight = found[name]
            assert isinstance(weight, RoundedWeight)
            assert torch.equal(weight.linear(x), module(x)), name
            rounded += weight.inputs is not None
    assert rounded == 82  # all but the head


def same_answers(folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are those of transformers' model, which is guided where it rounds."""
    names = {
        id(getattr(module, f"{end}_activation_scale")): f"{on_disk(name, model)}.{end}s"
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
        for end in ("input", "output")
    }

    def rounding(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return apply_srq(seam(names[id(scale)], x) if scale != 0 else x, scale)

    monkeypatch.setattr(gemma_quant, "apply_srq", rounding)
    same_logits(folder, model)


def test_answers(folder: Path, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    same_answers(folder, theirs, monkeypatch)


@pytest.mark.parametrize("member", ["12b", "26b", "31b"])
def test_other_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str) -> None:
    """Google has published E2B and E4B; its reader takes the others all the same."""
    from transformers import AutoModelForImageTextToText

    source = FIXTURES / f"{member}-bf16"
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    folder = google.checkpoint(tmp_path, dense=source)
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    _, found = load(folder)
    modules = {on_disk(name, model): module for name, module in model.named_modules()}
    quantized = {n: m for n, m in modules.items() if isinstance(m, QuantizedLinear)}
    assert len(quantized) > 20
    for name, module in quantized.items():
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(found[name].dense(dtype), module._dequantize_weights(dtype)), name
    same_answers(folder, model.eval(), monkeypatch)


def test_weights_only(folder: Path, theirs: Any) -> None:
    """Without the rounding, as transformers computes with scales of 0.0; and it does matter."""
    with LLM(folder, dtype="float32", weights_only=True) as llm:
        prompt = prompt_of(llm)
        ours = llm.logits(prompt)
    rounded = logits(theirs, prompt)
    kept = {}
    for name, parameter in theirs.named_parameters():
        if name.endswith("activation_scale"):
            kept[name] = parameter.data
            parameter.data = torch.zeros_like(parameter)
    plain = logits(theirs, prompt)
    for name, data in kept.items():
        theirs.get_parameter(name).data = data
    assert cosine_similarity(ours, plain, dim=-1).min() > 0.9999
    assert relative_error(ours, plain) < 1e-4
    assert cosine_similarity(rounded, plain, dim=-1).min() < 0.999


def test_rules_match_as_upstream_matches_them(folder: Path, theirs: Any) -> None:
    """What is claimed are the widths that transformers' own alternation gives modules."""
    from cabochon.quant.configs import read_rules

    rules = read_rules(config_of(folder))
    for read in plan_of(folder).sites:
        claim = rules.claim(read.site, [read.site.name])
        module = theirs.get_submodule(read.site.name)
        bits = getattr(module, "num_bits", None)
        if read.site.kind == "embedding":
            assert claim.deferred, read.site.name
        else:
            assert (claim.scheme and claim.scheme.bits) == bits, read.site.name


def test_without_calibration(tmp_path: Path) -> None:
    found = load(google.checkpoint(tmp_path, calibrated=False))[1]
    rounded = [w for w in found.values() if isinstance(w, RoundedWeight)]
    assert rounded
    assert all(weight.inputs is weight.outputs is None for weight in rounded)


Change = Callable[[Tensors], object]


def swap_nibbles(tensors: Tensors) -> None:
    codes = tensors[f"{GATE}.weight"]
    tensors[f"{GATE}.weight"] = codes >> 4 | codes << 4


def invert_scale(tensors: Tensors) -> None:
    tensors[f"{GATE}.weight_scale"] = 1 / tensors[f"{GATE}.weight_scale"]


@pytest.mark.parametrize("change", [swap_nibbles, invert_scale])
def test_wrong_conventions_are_seen(
    tmp_path: Path, folder: Path, theirs: Any, change: Change
) -> None:
    wrong = altered(tmp_path, folder, tensors=change)
    with pytest.raises(AssertionError, match="gate_proj"):
        test_every_matrix_is_upstreams(wrong, theirs)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{GATE}.input_activation_scale"), "input_activation_scale"),
        (lambda t: t.pop(f"{GATE}.output_activation_scale"), "output_activation_scale is missing"),
        (lambda t: t.pop(f"{GATE}.weight_scale"), "weight_scale is missing"),
        (lambda t: t.pop(f"{PLE}.embedding_scale"), "embedding_scale is missing"),
        (put(f"{GATE}.input_activation_scale", lambda s: s * torch.nan), "is nan"),
        (put(f"{GATE}.output_activation_scale", lambda s: -s), "expected a positive number"),
        (put(f"{GATE}.weight_scale", lambda s: s * torch.inf), "not finite"),
        (put(f"{GATE}.weight", lambda w: w[:, :-1]), "weight has shape"),
        (put(f"{GATE}.weight", lambda w: w.to(torch.int8)), "weight is I8, expected U8"),
        (put(f"{PLE}.embedding_scale", lambda s: s[:, :-1]), "embedding_scale has shape"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("lm_head")], "tie_word_embeddings"),
    ],
)
def test_damage(tmp_path: Path, folder: Path, change: Change, words: str) -> None:
    assert words in refusal(altered(tmp_path, folder, tensors=change))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_bits": 3}, "quantization_config.num_bits is 3, expected one of (2, 4, 8)"),
        ({"module_quant_configs": {"(": {}}}, "'(' is no regular expression"),
        ({"module_quant_configs": {"a": {"num_bits": "2"}}}, "expected a whole number"),
        ({"module_quant_configs": {r"(?:\w|\w\w|\.)+[!?]": {}}}, "takes longer than 1 s"),
        ({"modules_to_not_convert": "vision"}, "expected a list of names"),
    ],
)
def test_claims_that_cannot_be(
    tmp_path: Path, folder: Path, values: dict[str, Any], words: str
) -> None:
    def change(config: Config) -> None:
        config["quantization_config"] = {**config["quantization_config"], **values}

    assert words in refusal(altered(tmp_path, folder, config=change))


def test_a_width_that_the_tensors_belie_is_told(tmp_path: Path, folder: Path) -> None:
    def change(config: Config) -> None:
        config["quantization_config"] = {
            **config["quantization_config"],
            "module_quant_configs": {},
        }

    report = inspect_checkpoint(altered(tmp_path, folder, config=change))
    assert report.loads
    assert "says gemma int4 channel, the tensors are gemma int8 channel" in report.text()
