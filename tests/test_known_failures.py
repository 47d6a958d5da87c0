"""What broke other engines whatever the producer: names, missing and superfluous tensors, rules.

Each row bears the report it comes from. Rows that belong to one producer stand with its format.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import FIXTURES, Config, Tensors, tensors_of
from known import Known
from thin import fixture

E2B, E2B_DENSE = FIXTURES / "e2b-w4a16", FIXTURES / "e2b-bf16"
UNIFIED, UNIFIED_DENSE = fixture("12b-w4a16"), FIXTURES / "12b-bf16"
MOE, MOE_DENSE = FIXTURES / "26b-w4a16", FIXTURES / "26b-bf16"
LARGE = FIXTURES / "31b-w4a16"
FP8 = fixture("26b-fp8-all")  # a recipe without an ignore list

TEXT = "model.language_model"
LAYER = f"{TEXT}.layers.0"


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def without(*parts: str) -> Callable[[Tensors], object]:
    """Leave out every tensor whose name has one of `parts` in it; there must be some."""

    def change(tensors: Tensors) -> None:
        for part in parts:
            found = [name for name in tensors if part in name]
            assert found, part
            for name in found:
                del tensors[name]

    return change


def with_shared_keys(tensors: Tensors) -> None:
    """Google's first release has keys and values in layers that use those of an earlier one."""
    for layer in (3, 4, 5):
        source = 2 if layer == 5 else 1
        for leaf in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
            name = f"{TEXT}.layers.{{}}.self_attn.{leaf}"
            tensors[name.format(layer)] = tensors[name.format(source)].clone()


def dense_experts(tensors: Tensors) -> None:
    """Experts stay floats beside int4 attention: a quantizer that visits linear layers only."""
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]
    stacked = {n: t for n, t in tensors_of(MOE_DENSE).items() if ".experts." in n}
    tensors.update(stacked)


def physical_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors[f"{TEXT}.embed_tokens.weight"].clone()


def zero_experts(tensors: Tensors) -> None:
    """Integers with a scale for each row, in the names of another producer."""
    for name in [n for n in tensors if n.startswith(f"{LAYER}.experts.")]:
        del tensors[name]
    for projection, rows, width in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        at = f"{LAYER}.experts.{projection}"
        tensors[f"{at}.weight"] = torch.zeros(8, rows, width, dtype=torch.int8)
        tensors[f"{at}.weight_scales"] = torch.ones(8, rows)


def experts_elsewhere(tensors: Tensors) -> None:
    for name in [n for n in tensors if ".experts." in n and ".down_proj." in n]:
        tensors[name.replace(".down_proj.", ".w2.")] = tensors.pop(name)


def explicit_values(tensors: Tensors) -> None:
    """Values of their own in a layer whose keys are its values."""
    for name in [n for n in tensors if f"{TEXT}.layers.2.self_attn.k_proj." in n]:
        tensors[name.replace(".k_proj.", ".v_proj.")] = tensors[name].clone()


def trellis(tensors: Tensors) -> None:
    """EXL3 stores states of a trellis, and signs of rows and columns."""
    name = f"{LAYER}.per_layer_input_gate"
    out, width = tensors.pop(f"{name}.weight").shape
    tensors[f"{name}.trellis"] = torch.zeros(width // 16, out // 16, 64, dtype=torch.int16)
    tensors[f"{name}.suh"], tensors[f"{name}.svh"] = torch.ones(width), torch.ones(out)


def drafter_inside(tensors: Tensors) -> None:
    tensors["mtp.pre_projection.weight"] = torch.ones(8, 8)


def text(**values: object) -> Callable[[Config], object]:
    return lambda config: config["text_config"].update(values)


def vision_without(key: str) -> Callable[[Config], object]:
    return lambda config: config["vision_config"].pop(key, None)


def quantization(**values: object) -> Callable[[Config], object]:
    return lambda config: config["quantization_config"].update(values)


def ignore(*entries: str) -> Callable[[Config], object]:
    return quantization(ignore=list(entries))


def architecture(name: str) -> Callable[[Config], object]:
    return lambda config: config.update(architectures=[name])


def older_schema(config: Config) -> None:
    """`global_head_dim` and `num_global_key_value_heads`, as first released."""
    text_config = config["text_config"]
    (full, *_) = text_config.pop("per_layer_config").values()
    text_config["global_head_dim"] = full["head_dim"]
    if "num_key_value_heads" in full:
        text_config["num_global_key_value_heads"] = full["num_key_value_heads"]


def unclipped(config: Config) -> None:
    for tower in ("vision_config", "audio_config"):
        config[tower]["use_clipped_linears"] = False


def expanded(config: Config) -> None:
    """Full names of the linear layers of towers, which end in `.linear`."""
    names = {n.removesuffix(".weight") for n in tensors_of(E2B) if n.endswith(".linear.weight")}
    assert names
    config["quantization_config"]["ignore"] = ["lm_head", *sorted(names)]


def no_method(config: Config) -> None:
    config["quantization_config"] = {"quantization_status": "unquantized"}


KNOWN = (
    # Experts
    Known(
        "Model-Optimizer #1219",
        "experts left as stacked floats beside int4 linears",
        MOE,
        tensors=dense_experts,
        swapped=(".experts.", MOE_DENSE),
    ),
    Known(
        "a report on Quark 0.12",
        "INT8 experts with a leaf that no scheme has",
        MOE,
        tensors=zero_experts,
        config=quantization(quant_method="quark"),
        refused=("experts.gate_up_proj", "quark"),
    ),
    Known(
        "SGLang #22929",
        "an expert without its up projection",
        MOE,
        tensors=without(".layers.0.experts.3.up_proj."),
        refused=("MISSING", "experts.gate_up_proj", "3.up_proj"),
    ),
    Known(
        "vLLM #42250",
        "per_expert_scale missing",
        MOE,
        tensors=without(".layers.2.router.per_expert_scale"),
        refused=("MISSING", "router.per_expert_scale"),
    ),
    Known(
        "vLLM #13784, #54052",
        "experts whose matrices bear names of another model's",
        MOE,
        tensors=experts_elsewhere,
        refused=("UNUSED", "experts.0.w2", "MISSING", "experts.down_proj"),
    ),
    Known(
        "vLLM #41574",
        "experts with another activation than Gemma 4's",
        MOE,
        config=text(hidden_activation="silu"),
        refused=("text_config.hidden_activation", "gelu_pytorch_tanh"),
    ),
    # Keys and values
    Known(
        "vLLM #44788, #41385, #41504, #44797, #40117, #54917",
        "no k_norm, k_proj and v_proj in layers that share keys and values",
        E2B_DENSE,
    ),
    Known(
        "tpu-inference #3225",
        "the same in Google's qat-q4_0-unquantized, whose quantization_config says nothing",
        E2B_DENSE,
        config=no_method,
        noted=("no quant_method",),
    ),
    Known("tpu-inference #3225", "the same in the form of compressed-tensors", E2B),
    Known(
        "tpu-inference #3225",
        "redundant keys and values in layers that share them",
        E2B_DENSE,
        tensors=with_shared_keys,
        noted=("use the keys and values of an earlier one",),
    ),
    Known(
        "TensorRT-LLM #16867",
        "no v_proj where values are keys",
        UNIFIED,
    ),
    Known(
        "TensorRT-LLM #16797",
        "a v_proj of its own where values are keys",
        UNIFIED,
        tensors=explicit_values,
        refused=("UNUSED", "layers.2.self_attn.v_proj", "take their values from k_proj"),
    ),
    Known(
        "vLLM #40606",
        "no v_proj where they are not",
        E2B,
        tensors=without(".layers.1.self_attn.v_proj."),
        refused=("MISSING", "layers.1.self_attn.v_proj"),
    ),
    Known(
        "vLLM #47473, #47507",
        "ignore and target entries for q_proj and k_proj alone",
        LARGE,
        config=ignore("re:.*self_attn\\.(q|k)_proj$", "lm_head"),
        noted=("the tensors are int4 g32",),
    ),
    # Embeddings and head
    Known(
        "omlx #1775",
        "a head of its own though config.json says tied",
        LARGE,
        tensors=physical_head,
    ),
    Known(
        "vLLM #53170",
        "the same, under a tied configuration of the text model",
        E2B,
        tensors=physical_head,
        config=text(tie_word_embeddings=True),
    ),
    Known(
        "larql #49",
        "no tensors for the inputs of layers",
        E2B,
        tensors=without("embed_tokens_per_layer", "per_layer"),
        refused=("MISSING", "per_layer"),
    ),
    Known(
        "exllamav3 #253",
        "a per_layer_input_gate of EXL3, whose quantization costs most there",
        E2B_DENSE,
        tensors=trellis,
        config=lambda config: config.update(quantization_config={"quant_method": "exl3"}),
        refused=("exl3", f"{LAYER}.per_layer_input_gate"),
    ),
    # Towers and projectors
    Known(
        "vLLM #38875",
        "clip bounds beside the tower's linears, NVFP4",
        FIXTURES / "e2b-nvfp4a16",
    ),
    Known(
        "mlx-lm gemma4",
        "clip bounds that the configuration switches off",
        E2B_DENSE,
        config=unclipped,
        noted=("use_clipped_linears is false",),
    ),
    Known("vLLM #43798", "quantized towers", FP8),
    Known(
        "vLLM #44571",
        "a vision embedder in floats under rules that do not name it",
        UNIFIED,
        config=ignore("lm_head"),
        noted=("the file stores it dense",),
    ),
    Known(
        "vLLM #44494",
        "no num_soft_tokens in the vision configuration",
        UNIFIED,
        config=vision_without("num_soft_tokens"),
    ),
    Known(
        "SGLang #28018, #33988",
        "ignore entries without .linear",
        E2B,
        config=ignore("lm_head", "re:.*vision_tower.*self_attn\\.[qkvo]_proj$"),
        noted=("the file stores it dense",),
    ),
    Known("SGLang #33988", "ignore entries that are full names with .linear", E2B, config=expanded),
    Known(
        "llm-compressor #1306, vLLM #20066",
        "a quantized tower that the rules leave out, in an older namespace or this one",
        FP8,
        config=ignore("re:vision_model\\..*", "re:.*vision_tower.*"),
        noted=("matches nothing", "the tensors are fp8 channel"),
    ),
    Known(
        "llm-compressor #1306",
        "ignore entries of an older namespace",
        E2B,
        config=ignore("lm_head", "re:vision_model\\..*"),
        noted=("matches nothing",),
    ),
    Known(
        "google-deepmind/gemma #189",
        "the projector of a tower is not in the file",
        E2B_DENSE,
        tensors=without("embed_vision.embedding_projection"),
        refused=("MISSING", "embed_vision.embedding_projection"),
    ),
    Known(
        "vLLM #44796",
        "full layers with the head size of sliding ones",
        UNIFIED,
        config=lambda config: config["text_config"].update(per_layer_config={}),
        refused=("CONFIG", "head_dim of full layers"),
    ),
    # Configuration
    Known(
        "omlx #1690",
        "quantization_config without quant_method beside floats",
        E2B_DENSE,
        config=no_method,
        noted=("no quant_method",),
    ),
    Known("vLLM #51744, #49797", "the first schema of config.json", UNIFIED, config=older_schema),
    Known(
        "axolotl #3394",
        "keys under language_model. of the wrong wrapper class",
        E2B_DENSE,
        tensors=rename("model.language_model.", "language_model.model."),
    ),
    Known(
        "SGLang #31274",
        "a method in config.json that is not the file's",
        E2B,
        config=quantization(quant_method="modelopt_fp4"),
        refused=("modelopt_fp4",),
    ),
    # Drafters
    Known(
        "vLLM #41745, #46426, #47091",
        "a drafter, whose own quantization engines mix up with its target's",
        FIXTURES / "31b-assistant",
    ),
    Known(
        "omlx #3536",
        "a drafter merged into the file of its target",
        E2B,
        tensors=drafter_inside,
        refused=("UNUSED", "mtp"),
    ),
    Known(
        "vLLM #45163",
        "DiffusionGemma, under the same prefixes",
        MOE_DENSE,
        config=architecture("DiffusionGemmaForCausalLM"),
        refused=("FOREIGN", "diffusion"),
    ),
)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_known(tmp_path: Path, known: Known) -> None:
    known.check(tmp_path)
