"""What broke other engines in files of bitsandbytes, ModelOpt and block-wise FP8, a row each."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from changes import dense_experts, reciprocal, rename, reshaped, unclaimed, without
from checkpoints import FIXTURES, Config, Tensors, tensors_of
from known import Known
from thin import fixture
from written import fp8_config, fp8_tensors, written

from cabochon.checkpoint.headers import TensorMeta
from cabochon.quant.modelopt_schemes import RowPairs
from cabochon.quant.scheme import Site, differences

NF4 = FIXTURES / "31b-bnb-nf4"
MODELOPT = FIXTURES / "modelopt"
MOE = MODELOPT / "26b-nvfp4"
MIXED = MODELOPT / "26b-mixed"
DENSE_MOE = FIXTURES / "26b-bf16"
LAYERS = "model.language_model.layers"
PROJECTOR = "model.embed_vision.embedding_projection"


def as_bfloat16(tensors: Tensors) -> None:
    """`bnb_4bit_quant_storage: bfloat16`: the same bytes under the name of another dtype."""
    for name in [n for n in tensors if f"{n}.absmax" in tensors]:
        tensors[name] = tensors[name].view(-1).view(torch.bfloat16).view(-1, 1)


def claiming_bfloat16(config: Config) -> None:
    config["quantization_config"]["bnb_4bit_quant_storage"] = "bfloat16"


def cast_to_floats(tensors: Tensors) -> None:
    """Codes by their values, as an engine read them that had a plain projector."""
    tensors[f"{PROJECTOR}.weight"] = tensors[f"{PROJECTOR}.weight"].bfloat16()


def int8_without_scales(tensors: Tensors) -> None:
    name = f"{LAYERS}.0.mlp.down_proj"
    dense = tensors_of(FIXTURES / "31b-bf16")[f"{name}.weight"]
    for leaf in [n for n in tensors if n.startswith(f"{name}.weight")]:
        del tensors[leaf]
    tensors[f"{name}.weight"] = bnb.int8_vectorwise_quant(dense.half())[0]
    tensors[f"{name}.weight_format"] = torch.tensor(0, dtype=torch.uint8)


def engines_layers(config: Config) -> None:
    said = config["quantization_config"]
    said["quantized_layers"] = {
        name.replace("model.language_model.", "language_model.model."): layer
        for name, layer in said["quantized_layers"].items()
    }


def claiming_modelopt(config: Config) -> None:
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}


KNOWN = (
    Known(
        "vLLM #40437, #40606",
        "NF4, full layers whose values are their keys: no v_proj, no state of one",
        NF4,
    ),
    Known(
        "vLLM #42813",
        "NF4 vision tower and projector",
        NF4,
        tensors=as_bfloat16,
        config=claiming_bfloat16,
    ),
    Known(
        "vLLM #42825",
        "NF4 projector whose bytes were cast to floats",
        NF4,
        tensors=cast_to_floats,
        refused=(PROJECTOR,),
    ),
    Known(
        "unsloth #482, #688",
        "NF4 without a quantization configuration",
        NF4,
        config=unclaimed,
        noted=("the tensors are nf4 g64",),
    ),
    Known(
        "vLLM #11803",
        "LLM.int8 without a quantization configuration",
        partial(written, "bitsandbytes int8", "31b"),
        config=unclaimed,
        noted=("the tensors are llm.int8",),
    ),
    Known(
        "vLLM #11803",
        "LLM.int8 without SCB",
        NF4,
        tensors=int8_without_scales,
        refused=(f"{LAYERS}.0.mlp.down_proj",),
    ),
    Known(
        "vLLM #41206",
        "ModelOpt NVFP4 experts under moe.experts",
        MOE,
        tensors=rename(".experts.", ".moe.experts."),
    ),
    Known(
        "SGLang #22929",
        "ModelOpt NVFP4 experts of which one lacks its scales",
        MOE,
        tensors=without("layers.2.experts.5.up_proj.weight_scale_2"),
        refused=("layers.2.experts.5.up_proj", "weight_scale_2 is missing"),
    ),
    Known(
        "vLLM #48563",
        "ModelOpt MIXED_PRECISION, quantized_layers name the parents of experts as an engine does",
        MIXED,
        config=engines_layers,
        beside=lambda folder: (folder / "hf_quant_config.json").unlink(),
    ),
    Known(
        "NVIDIA/Model-Optimizer #1219",
        "ModelOpt NVFP4 that left its experts in bfloat16",
        MOE,
        tensors=dense_experts(DENSE_MOE),
        swapped=(".experts.", DENSE_MOE),
        noted=("the file stores it dense: loaded dense",),
    ),
    Known(
        "TensorRT-LLM #16797",
        "ModelOpt W4A8_AWQ, full layers without v_proj and its scales",
        MODELOPT / "31b-w4a8-awq",
    ),
    Known(
        "TensorRT-LLM #16797",
        "ModelOpt AWQ whose smoothing is missing in one of 12 matrices",
        MODELOPT / "31b-w4a16-awq",
        tensors=without("layers.1.mlp.down_proj.pre_quant_scale"),
        refused=("layers.1.mlp.down_proj", "pre_quant_scale is missing, but 5 of 6"),
    ),
    Known(
        "TensorRT-LLM #16867",
        "ModelOpt NVFP4 of the encoder-free model, full layers without v_proj",
        partial(fixture, "12b-modelopt-nvfp4-weights"),
    ),
    Known(
        "SGLang #25792, #25794, vLLM #22771",
        "ModelOpt FP8 with k_proj.k_scale and v_proj.v_scale, the latter without a v_proj too",
        MODELOPT / "31b-fp8-rows-kv",
        noted=("scales of a quantized KV cache", "kv_cache_scheme is not used"),
    ),
    Known(
        "modular #6697, #6699",
        "ModelOpt NVFP4 with compressed-tensors' reciprocal of the global scale",
        MOE,
        tensors=reciprocal(".weight_scale_2"),
        refused=("weight_scale_2", "reciprocal"),
    ),
    Known(
        "modular #6773",
        "ModelOpt NVFP4 whose single numbers are lists of one",
        MOE,
        tensors=reshaped((1,), ".weight_scale_2", ".input_scale"),
    ),
    Known(
        "SGLang #31274",
        "compressed-tensors NVFP4 under a configuration of ModelOpt's",
        FIXTURES / "26b-nvfp4a16",
        config=claiming_modelopt,
        noted=("says nvfp4 modelopt, the tensors are nvfp4",),
    ),
    Known(
        "tpu-inference #3072",
        "FP8 by block, its weight_scale_inv lost",
        FIXTURES / "31b-bf16",
        tensors=lambda t: (
            fp8_tensors((16, 32))(t),
            without("1.mlp.down_proj.weight_scale_inv")(t),
        ),
        config=fp8_config((16, 32)),
        refused=("layers.1.mlp.down_proj", "weight_scale_inv is missing"),
    ),
)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_known_failures(known: Known, tmp_path: Path) -> None:
    known.check(tmp_path)


def test_modelopt_1690_a_tower_of_4304_columns_is_in_no_whole_groups_of_128() -> None:
    """ModelOpt cannot write it; with the last group left out, it is refused."""
    site, scheme = Site("w", "linear", 1152, 4304), RowPairs(128)
    shapes = {"weight": ("U8", (576, 4304)), "weight_scale": ("BF16", (1152, 4304 // 128))}
    metas = {
        leaf: TensorMeta(leaf, dtype, shape, Path("w"), (0, 0))
        for leaf, (dtype, shape) in shapes.items()
    }
    (difference,) = differences(scheme, metas, site)
    assert "weight_scale has shape [1152, 33]" in str(difference)
