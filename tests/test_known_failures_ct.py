"""What broke other engines in files of compressed-tensors, a row each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from changes import TEXT, reciprocal, rename, reshaped
from checkpoints import (
    DENSE,
    FIXTURES,
    NVFP4,
    QUANTIZED,
    Config,
    Tensors,
    altered,
    config_of,
    load_model,
    tensors_of,
)
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from known import Known
from test_schemes import check, compressed, upstream
from thin import fixture
from written import written

from cabochon.quant.packed_int import PackedInt
from cabochon.quant.scheme import Site

MOE = FIXTURES / "26b-w4a16"
MOE_NVFP4 = fixture("26b-nvfp4")
MIXED = fixture("12b-mixed")
FP8 = fixture("26b-fp8-all")
MOBILE = fixture("e2b-mobile")
FP8_HEAD = preset_name_to_scheme("FP8_DYNAMIC", ["lm_head"])


def underscored(tensors: Tensors) -> None:
    """`experts.3.down_proj_packed`, `experts.3.down_proj_input_global_scale`."""
    for name in [n for n in tensors if ".experts." in n]:
        module, _, leaf = name.rpartition(".")
        tensors[f"{module}_{leaf.removeprefix('weight_')}"] = tensors.pop(name)


def claiming_awq(config: Config) -> None:
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}


def cached(*leaves: str) -> Callable[[Tensors], object]:
    """Scales of keys and values beside each attention layer that has its own."""

    def change(tensors: Tensors) -> None:
        norms = [n for n in tensors if n.endswith("self_attn.k_norm.weight") and TEXT in n]
        for name in norms:
            layer = name.removesuffix("k_norm.weight")
            tensors.update({layer + leaf: torch.tensor([0.05]) for leaf in leaves})

    return change


def attention_in_fp8(tensors: Tensors) -> None:
    for name in [n for n in tensors if TEXT in n and "self_attn" in n and "norm" not in n]:
        del tensors[name]
    stored = tensors_of(FP8)
    tensors.update({n: stored[n] for n in stored if TEXT in n and "self_attn" in n})
    cached("k_scale", "v_scale")(tensors)


def claiming_both(config: Config) -> None:
    (group,) = config["quantization_config"]["config_groups"].values()
    (other,) = config_of(FP8)["quantization_config"]["config_groups"].values()
    said = {"format": "float-quantized", "targets": ["re:.*language_model.*self_attn.*"]}
    config["quantization_config"]["config_groups"] = {"group_0": other | said, "group_1": group}
    config["quantization_config"]["format"] = "mixed-precision"


def kv_scheme(config: Config) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    config["quantization_config"]["kv_cache_scheme"] = scheme


def fp8_head(tensors: Tensors) -> Tensors:
    """The token table as a head of its own, as compressed-tensors stores it."""
    table = tensors[f"{TEXT}.embed_tokens.weight"]
    scale = table.float().abs().amax(dim=1, keepdim=True) / 448
    state = {"weight": table, "weight_scale": scale.bfloat16()}
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    made: Tensors = compressor.compress(state, FP8_HEAD)
    tensors.update({f"lm_head.{leaf}": tensor for leaf, tensor in made.items()})
    return made


def without_its_scale(tensors: Tensors) -> None:
    fp8_head(tensors)
    del tensors["lm_head.weight_scale"]


def cast_to_floats(tensors: Tensors) -> None:
    """8-bit floats by their values, as another engine read them: the scale has no meaning then."""
    fp8_head(tensors)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()


def claiming_the_head(config: Config) -> None:
    group = FP8_HEAD.model_dump(mode="json") | {"targets": ["re:.*lm_head$"]}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": [],
    }


def format_at_the_top(config: Config) -> None:
    described = config["quantization_config"]
    assert described["format"] == "mxfp4-pack-quantized"
    for group in described["config_groups"].values():
        group["format"] = None


def format_in_the_groups(config: Config) -> None:
    del config["quantization_config"]["format"]


def no_format(config: Config) -> None:
    format_at_the_top(config)
    format_in_the_groups(config)


def older_key(config: Config) -> None:
    """Versions before 0.7 wrote another key, and the method goes without saying there."""
    config["compression_config"] = config.pop("quantization_config")
    del config["compression_config"]["quant_method"]


KNOWN = (
    Known(
        "vLLM #39045, #39256, #39406",
        "NVFP4 experts one by one, input_global_scale beside each",
        MOE_NVFP4,
    ),
    Known(
        "vLLM #39045",
        "the same, its single numbers without a dimension",
        MOE_NVFP4,
        reshaped((), "global_scale"),
    ),
    Known(
        "vLLM #40591, #40286, #40247, #40708",
        "leaves of experts behind an underscore, int4",
        MOE,
        underscored,
    ),
    Known(
        "vLLM #40591",
        "leaves of experts behind an underscore, NVFP4 with activations",
        MOE_NVFP4,
        underscored,
    ),
    Known(
        "vLLM #40591",
        "the same under the name of AWQ, as its repository has it",
        MOE,
        underscored,
        claiming_awq,
        noted=("says awq int4 g32, the tensors are int4 g32: loaded so",),
    ),
    Known(
        "vLLM #41206",
        "experts already under .moe.",
        MOE_NVFP4,
        rename(".experts.", ".moe.experts."),
    ),
    Known(
        "llm-compressor #2714, vLLM 0.21",
        "FP8 router, vision tower and projector: a recipe without an ignore list",
        FP8,
    ),
    Known("tpu-inference #3542", "int4 experts, which are not dense", MOE),
    Known(
        "tpu-inference #3542",
        "int8 experts, which are not dense",
        partial(written, "compressed-tensors W8A8", "26b"),
    ),
    Known(
        "FreeToken #492, #493",
        "FP8 attention, NVFP4 MLP and scales of the KV cache in one file",
        MIXED,
        cached("k_scale", "v_scale"),
        kv_scheme,
        noted=("kv_cache_scheme is not used", "8-bit float per tensor", "scales of a quantized KV"),
    ),
    Known(
        "FreeToken #492, #493",
        "the same of 26B-A4B: experts in NVFP4 too",
        MOE_NVFP4,
        attention_in_fp8,
        claiming_both,
        noted=("scales of a quantized KV",),
        swapped=(r"language_model.*self_attn", FP8),
    ),
    Known(
        "compressed-tensors 0.6",
        "scales of the KV cache as output_scale of k_proj and v_proj",
        fixture("31b-fp8-static"),
        cached("k_proj.output_scale"),
        noted=("scales of a quantized KV cache",),
    ),
    Known("vLLM #39407", "FP8 in blocks of 128", fixture("31b-fp8-block")),
    Known(
        "vLLM #43440, #44340",
        "Google's mobile recipe: 2, 4 and 8 bits, ends rounded, scales of the KV cache",
        MOBILE,
        cached("k_cache_scale", "v_cache_scale"),
        noted=("scales of a quantized KV cache",),
    ),
    Known(
        "vLLM #45535",
        "packed tables, of which that of tokens is the head",
        partial(written, "compressed-tensors tables", "e2b"),
    ),
    Known("vLLM #45535", "packed tables beside a head of floats", fixture("e2b-w4a16-embed")),
    Known("vLLM #37291", "a packed head", fixture("e2b-w4a16-head")),
    Known(
        "SGLang #35228",
        "an FP8 head by a pattern",
        DENSE,
        fp8_head,
        claiming_the_head,
        added=("lm_head",),
    ),
    Known(
        "SGLang #35228",
        "an FP8 head without its scale",
        DENSE,
        without_its_scale,
        claiming_the_head,
        refused=("lm_head", "weight_scale is missing"),
    ),
    Known(
        "SGLang #35228",
        "an FP8 head cast to bfloat16 by its values, the scale left over",
        DENSE,
        cast_to_floats,
        claiming_the_head,
        refused=("lm_head", "weight is BF16, expected F8_E4M3"),
    ),
    Known(
        "modular #6697, #6699, #6773",
        "global scales of the other convention",
        NVFP4[1],
        reciprocal(".weight_global_scale"),
        refused=("weight_global_scale", "reciprocal"),
    ),
    Known(
        "tpu-inference #2236",
        "the format at the top alone",
        fixture("26b-mxfp4"),
        config=format_at_the_top,
    ),
    Known(
        "tpu-inference #2236",
        "the format in the groups alone",
        fixture("26b-mxfp4"),
        config=format_in_the_groups,
    ),
    Known("tpu-inference #2236", "no format at all", fixture("26b-mxfp4"), config=no_format),
    Known(
        "compressed-tensors",
        "a sparsity_config over tensors that are not sparse",
        QUANTIZED[0],
        config=lambda config: config["quantization_config"].update(
            sparsity_config={"format": "sparse-24-bitmask"}
        ),
        noted=("sparsity_config says format",),
    ),
    Known("mlx-lm", "zero points, which it takes no file to have", fixture("e2b-w4a16-asym")),
    Known("mlx-lm", "8 bits, which it takes for 4", fixture("e2b-w8a16")),
    Known("compressed-tensors 0.6", "compression_config", QUANTIZED[0], config=older_key),
)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_known(tmp_path: Path, known: Known) -> None:
    known.check(tmp_path)


def test_a_quantized_head_is_what_upstream_decompresses(tmp_path: Path) -> None:
    """SGLang #35228"""
    made: Tensors = {}
    folder = altered(tmp_path, DENSE, lambda t: made.update(fp8_head(t)), claiming_the_head)
    model, report = load_model(folder, dtype=torch.float32)
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    expected = compressor.decompress(made, FP8_HEAD)["weight"].float()
    assert torch.equal(model.lm_head.weight.dense(torch.float32), expected)
    assert "fp8 channel, inputs fp8 per token" in {read.stored_as for read in report.plan.sites}


def test_a_packed_table_stays_packed() -> None:
    """mlx-node #73: 2.35 billion entries, of which a token needs some thousands."""
    model, report = load_model(MOBILE, dtype=torch.float32)
    table = model.model.language_model.embed_tokens_per_layer.weight
    held = sum(buffer.nbytes for buffer in table.buffers())
    (read,) = (r for r in report.plan.sites if r.site.name.endswith("embed_tokens_per_layer"))
    assert held <= read.nbytes < read.site.out_features * read.site.in_features


def test_hipfire_734_all_of_2816_columns_in_groups_of_256_count() -> None:
    """Eleven groups, of which a kernel for eight skipped three."""
    scheme, site = PackedInt(4, 256, True), Site("w", "linear", 40, 2816)
    stored = compressed(scheme, site, torch.bfloat16)
    expected = PackedQuantizationCompressor.decompress(stored, upstream(scheme))["weight"]
    weight = scheme.build(stored, site)
    check(weight, expected)
    x = torch.zeros(2, 2816)
    x[:, 2048:] = torch.randn(2, 768)
    torch.testing.assert_close(weight.linear(x), x @ expected.float().T, rtol=1e-4, atol=1e-4)
