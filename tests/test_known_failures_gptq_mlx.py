"""What broke other engines with GPTQ, AWQ, AutoRound, MLX and Google's own format."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from changes import TEXT, physical_head, quantization, rename, with_shared_keys, without
from checkpoints import Config, Tensors
from known import Known, load
from thin import fixture
from written import written

from cabochon.nn.packed_int import PackedIntWeight

GOOGLE = partial(written, "gemma", "e2b")
MLX = "language_model.model"


def claiming_of_experts(config: Config) -> None:
    """What has the width of the whole file is not written, and is found by what is."""
    widths = config["quantization_config"]["extra_config"]
    widths[".*gate_proj.*"] = {"bits": 2, "group_size": 32}


def top_level_alone(config: Config) -> None:
    config["quantization"] = {"group_size": 32, "bits": 4, "mode": "affine"}
    config["quantization_config"] = config["quantization"]


def plain_convolutions(tensors: Tensors) -> None:
    for name in [name for name in tensors if "conv" in name and tensors[name].ndim > 2]:
        tensors[name] = tensors[name].movedim(-1, 1)


def unpadded(tensors: Tensors) -> None:
    """Codes of the columns that there are, and no more."""
    for name in [name for name in tensors if name.endswith("per_layer_projection.qweight")]:
        assert tensors[name].shape[0] == 16
        tensors[name] = tensors[name][:8]


KNOWN = (
    # Experts
    Known(
        "GPTQModel gemma4.py",
        "dense three-dimensional experts beside int4 attention",
        partial(fixture, "26b-gptq4"),
    ),
    Known(
        "vLLM #43227",
        "AutoRound's experts one by one, the router too",
        partial(fixture, "26b-round4"),
    ),
    Known(
        "vLLM #43227",
        "a last group that is not full, filled up",
        partial(fixture, "e2b-round-mixed"),
    ),
    Known(
        "vLLM #43227",
        "a last group that is not full, cut",
        partial(fixture, "e2b-round-mixed"),
        tensors=unpadded,
    ),
    Known(
        "vLLM #43227",
        "a rule for the keys of a layer whose values they are, and none for values",
        partial(fixture, "31b-round4"),
        config=quantization(
            extra_config={f"{TEXT}.layers.2.self_attn.k_proj": {"bits": 4, "group_size": 32}}
        ),
    ),
    Known(
        "AutoRound 0.16.1",
        "an expression for other matrices that finds experts too, whose own width is not written",
        partial(fixture, "26b-round-few-asym"),
        config=claiming_of_experts,
        noted=("says gptq v2 int2 g32, the tensors are gptq v2 int3 channel: loaded so",),
    ),
    Known(
        "AutoRound 0.16.1",
        "std_bias and std_scale of the vision tower as before training",
        partial(fixture, "26b-round-few"),
        noted=("as it was before training",),
    ),
    Known(
        "mlx-lm gemma4",
        "a router of 8 bits among experts of 4, stacked",
        partial(fixture, "26b-mlx4"),
    ),
    Known(
        "z-lab/paroquant #53, #46",
        "MLX experts under switch_mlp instead of switch_glu",
        partial(fixture, "26b-mlx4"),
        tensors=rename(".switch_glu.", ".switch_mlp."),
        refused=("switch_mlp",),
    ),
    # Attention
    Known(
        "mlx-swift-lm #342",
        "MLX without keys of layers that share them",
        partial(fixture, "e2b-mlx4"),
    ),
    Known(
        "mlx-swift-lm #342",
        "MLX with keys of layers that share them",
        partial(fixture, "e2b-mlx4"),
        tensors=with_shared_keys(MLX),
        noted=("these layers use the keys and values of an earlier one",),
    ),
    Known(
        "vLLM #44340, LiteRT-LM #2497, flutter_gemma #385",
        "Google's mobile format, with scales of a quantized cache",
        GOOGLE,
        noted=("scales of a quantized KV cache",),
    ),
    # Embeddings, per-layer tables, heads
    Known(
        "vLLM #53170, #51665",
        "GPTQ with a head of its own, tied in config.json",
        partial(fixture, "31b-gptq4"),
        tensors=physical_head,
        added=("lm_head",),
    ),
    Known("Rapid-MLX #1114", "a per-layer table of 4 bits in MLX", partial(fixture, "e2b-mlx4")),
    Known(
        "mlx-lm #1112, mlx-vlm #935, maclocal-api #147, mlx-swift-lm #244, omlx #592",
        "a quantized per_layer_model_projection in MLX",
        partial(fixture, "e2b-mlx4"),
    ),
    Known(
        "jjang-ai/vmlx #191",
        "a per_layer_model_projection of mxfp4 among affine layers",
        partial(fixture, "e2b-mlx-mixed"),
    ),
    Known("jjang-ai/vmlx #191", "everything in mxfp4", partial(fixture, "e2b-mlx-mxfp4")),
    Known(
        "larql #49",
        "no per-layer tensors at all",
        partial(fixture, "e2b-mlx4"),
        tensors=without("per_layer"),
        refused=("MISSING", "embed_tokens_per_layer"),
    ),
    # Towers
    Known(
        "mlx-vlm gemma4",
        "convolutions that were not turned",
        partial(fixture, "e2b-mlx4"),
        tensors=plain_convolutions,
    ),
    # Metadata
    Known(
        "pmetal #26, lablup/mlxcel #690, ollama #16740",
        "MLX overrides of 8 bits over a base of 4",
        partial(fixture, "e2b-mlx-mixed"),
    ),
    Known(
        "pmetal #26, lablup/mlxcel #690, ollama #16740",
        "the same, and only the top level is left",
        partial(fixture, "e2b-mlx-mixed"),
        config=top_level_alone,
        noted=("says mlx int4 g32, the tensors are mlx int8 g32: loaded so",),
    ),
    Known(
        "mlx-lm utils.py",
        "GPTQ's layout under AWQ's name",
        partial(fixture, "e2b-gptq4"),
        config=quantization(quant_method="awq", version="gemm"),
        refused=("gptq v1 int4 g32 and gptq v2 int4 g32",),
    ),
    Known(
        "mlx-lm utils.py",
        "AWQ's layout under GPTQ's name",
        partial(fixture, "e2b-awq"),
        config=quantization(quant_method="gptq", checkpoint_format="gptq"),
        noted=("the tensors are awq int4 g32",),
    ),
    Known(
        "GPTQModel quantization/config.py",
        "GPTQ in the planar layout",
        partial(fixture, "e2b-gptq4-v2"),
        config=quantization(checkpoint_format="gptq_p"),
        refused=("gptq_p",),
    ),
)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_known(tmp_path: Path, known: Known) -> None:
    known.check(tmp_path)


def test_mlx_node_73_the_per_layer_table_stays_in_its_bits() -> None:
    """Decoded at once, E2B's would be 9 GB; rows are decoded when they are looked up."""
    report, found = load(GOOGLE())
    assert report.plan is not None
    table = found[f"{TEXT}.embed_tokens_per_layer"]
    assert isinstance(table, PackedIntWeight)
    held = sum(buffer.nbytes for buffer in table.buffers())
    (read,) = (r for r in report.plan.sites if r.site.name.endswith("embed_tokens_per_layer"))
    assert held == read.nbytes
    assert table.rows(torch.tensor([5]), torch.float32).shape == (1, read.site.in_features)
