"""The real Gemma 4s as headers: layouts written out by hand, in files of full length and no bytes.

Sizes are those of upstream's conversion script and configuration classes. Nothing here comes from
the package that is tested.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Tensor = tuple[str, tuple[int, ...]]  # dtype and shape
Layout = dict[str, Tensor]

MEMBERS = ("E2B", "E4B", "12B", "26B-A4B", "31B")
TOWERS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio", "vision_embedder")
BYTES = {"BF16": 2, "F32": 4, "I32": 4, "I64": 8, "U8": 1, "F8_E4M3": 1}
VOCABULARY = 262_144

# fmt: off
TEXT: Mapping[str, Mapping[str, Any]] = {
    "E2B": {"hidden": 1536, "layers": 35, "every": 5, "heads": 8, "kv": 1, "full_kv": 1,
            "mlp": 6144, "shared": 20, "ple": 256, "window": 512, "positions": 131_072},
    "E4B": {"hidden": 2560, "layers": 42, "every": 6, "heads": 8, "kv": 2, "full_kv": 2,
            "mlp": 10240, "shared": 18, "ple": 256, "window": 512, "positions": 131_072},
    "12B": {"hidden": 3840, "layers": 48, "every": 6, "heads": 16, "kv": 8, "full_kv": 1,
            "mlp": 15360, "shared": 0, "ple": 0, "window": 1024, "positions": 262_144},
    "26B-A4B": {"hidden": 2816, "layers": 30, "every": 6, "heads": 16, "kv": 8, "full_kv": 2,
                "mlp": 2112, "shared": 0, "ple": 0, "window": 1024, "positions": 262_144},
    "31B": {"hidden": 5376, "layers": 60, "every": 6, "heads": 32, "kv": 16, "full_kv": 4,
            "mlp": 21504, "shared": 0, "ple": 0, "window": 1024, "positions": 262_144},
}
# fmt: on

# Hidden size, width of MLPs and heads of each one's drafter.
DRAFTERS = {
    "E2B": (256, 2048, 4),
    "E4B": (256, 2048, 4),
    "12B": (1024, 8192, 16),
    "26B-A4B": (1024, 8192, 16),
    "31B": (1024, 8192, 32),
}


def is_full(member: str, layer: int) -> bool:
    return (layer + 1) % int(TEXT[member]["every"]) == 0


def keys_are_values(member: str) -> bool:
    return member in ("12B", "26B-A4B", "31B")


def layout(member: str) -> Layout:
    """Every tensor of the bfloat16 release, without redundant ones."""
    made = dict(_text(member))
    if member == "12B":
        made |= dict(_unified(TEXT[member]["hidden"]))
    else:
        made |= dict(_vision(small=member in ("E2B", "E4B"), hidden=TEXT[member]["hidden"]))
    if member in ("E2B", "E4B"):
        made |= dict(_audio(TEXT[member]["hidden"]))
    return {name: ("BF16", shape) for name, shape in made.items()}


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _text(member: str) -> Shapes:
    size, root = TEXT[member], "model.language_model"
    hidden, count, ple = size["hidden"], size["layers"], size["ple"]
    yield f"{root}.embed_tokens.weight", (VOCABULARY, hidden)
    yield f"{root}.norm.weight", (hidden,)
    if ple:
        yield f"{root}.embed_tokens_per_layer.weight", (VOCABULARY, count * ple)
        yield f"{root}.per_layer_model_projection.weight", (count * ple, hidden)
        yield f"{root}.per_layer_projection_norm.weight", (ple,)
    for index in range(count):
        layer = f"{root}.layers.{index}"
        yield f"{layer}.layer_scalar", (1,)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{layer}.{norm}_layernorm.weight", (hidden,)
        yield from _attention(member, index, f"{layer}.self_attn")
        width = size["mlp"]
        if member == "E2B" and index >= 15:
            width = 12288
        yield f"{layer}.mlp.gate_proj.weight", (width, hidden)
        yield f"{layer}.mlp.up_proj.weight", (width, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, width)
        if ple:
            yield f"{layer}.per_layer_input_gate.weight", (ple, hidden)
            yield f"{layer}.per_layer_projection.weight", (hidden, ple)
            yield f"{layer}.post_per_layer_input_norm.weight", (hidden,)
        if member == "26B-A4B":
            yield from _experts(layer)


def _attention(member: str, index: int, name: str) -> Shapes:
    size, full = TEXT[member], is_full(member, index)
    hidden, head = size["hidden"], 512 if full else 256
    keys = size["full_kv" if full else "kv"] * head
    yield f"{name}.q_proj.weight", (size["heads"] * head, hidden)
    yield f"{name}.q_norm.weight", (head,)
    yield f"{name}.o_proj.weight", (hidden, size["heads"] * head)
    if index < size["layers"] - size["shared"]:
        yield f"{name}.k_proj.weight", (keys, hidden)
        yield f"{name}.k_norm.weight", (head,)
        if not (full and keys_are_values(member)):
            yield f"{name}.v_proj.weight", (keys, hidden)


def _experts(layer: str) -> Shapes:
    yield f"{layer}.router.proj.weight", (128, 2816)
    yield f"{layer}.router.scale", (2816,)
    yield f"{layer}.router.per_expert_scale", (128,)
    yield f"{layer}.experts.gate_up_proj", (128, 1408, 2816)
    yield f"{layer}.experts.down_proj", (128, 2816, 704)
    yield f"{layer}.post_feedforward_layernorm_1.weight", (2816,)
    yield f"{layer}.pre_feedforward_layernorm_2.weight", (2816,)
    yield f"{layer}.post_feedforward_layernorm_2.weight", (2816,)


def _clipped(name: str, rows: int, columns: int, clipped: bool) -> Shapes:
    yield f"{name}.linear.weight", (rows, columns)
    if clipped:
        for bound in ("input_min", "input_max", "output_min", "output_max"):
            yield f"{name}.{bound}", ()


def _vision(*, small: bool, hidden: int) -> Shapes:
    width, count, mlp, head = (768, 16, 3072, 64) if small else (1152, 27, 4304, 72)
    root = "model.vision_tower"
    yield f"{root}.patch_embedder.input_proj.weight", (width, 768)
    yield f"{root}.patch_embedder.position_embedding_table", (2, 10240, width)
    for index in range(count):
        layer = f"{root}.encoder.layers.{index}"
        for projection in "qkvo":
            yield from _clipped(f"{layer}.self_attn.{projection}_proj", width, width, small)
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        yield from _clipped(f"{layer}.mlp.gate_proj", mlp, width, small)
        yield from _clipped(f"{layer}.mlp.up_proj", mlp, width, small)
        yield from _clipped(f"{layer}.mlp.down_proj", width, mlp, small)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{layer}.{norm}_layernorm.weight", (width,)
    if not small:
        yield f"{root}.std_bias", (width,)
        yield f"{root}.std_scale", (width,)
    yield "model.embed_vision.embedding_projection.weight", (hidden, width)


def _unified(hidden: int) -> Shapes:
    root = "model.vision_embedder"
    for norm, width in (("patch_ln1", 6912), ("patch_ln2", hidden), ("pos_norm", hidden)):
        yield f"{root}.{norm}.weight", (width,)
        yield f"{root}.{norm}.bias", (width,)
    yield f"{root}.patch_dense.weight", (hidden, 6912)
    yield f"{root}.patch_dense.bias", (hidden,)
    yield f"{root}.pos_embedding", (1120, 2, hidden)
    yield "model.embed_vision.embedding_projection.weight", (hidden, hidden)
    yield "model.embed_audio.embedding_projection.weight", (hidden, 640)


def _audio(hidden: int) -> Shapes:
    root = "model.audio_tower"
    subsample = f"{root}.subsample_conv_projection"
    yield f"{subsample}.layer0.conv.weight", (128, 1, 3, 3)
    yield f"{subsample}.layer0.norm.weight", (128,)
    yield f"{subsample}.layer1.conv.weight", (32, 128, 3, 3)
    yield f"{subsample}.layer1.norm.weight", (32,)
    yield f"{subsample}.input_proj_linear.weight", (1024, 1024)
    for index in range(12):
        layer = f"{root}.layers.{index}"
        for part in ("feed_forward1", "feed_forward2"):
            yield from _clipped(f"{layer}.{part}.ffw_layer_1", 4096, 1024, True)
            yield from _clipped(f"{layer}.{part}.ffw_layer_2", 1024, 4096, True)
            yield f"{layer}.{part}.pre_layer_norm.weight", (1024,)
            yield f"{layer}.{part}.post_layer_norm.weight", (1024,)
        for projection in ("q_proj", "k_proj", "v_proj", "post"):
            yield from _clipped(f"{layer}.self_attn.{projection}", 1024, 1024, True)
        yield f"{layer}.self_attn.relative_k_proj.weight", (1024, 1024)
        yield f"{layer}.self_attn.per_dim_scale", (128,)
        yield from _clipped(f"{layer}.lconv1d.linear_start", 2048, 1024, True)
        yield from _clipped(f"{layer}.lconv1d.linear_end", 1024, 1024, True)
        yield f"{layer}.lconv1d.depthwise_conv1d.weight", (1024, 1, 5)
        for norm in ("lconv1d.conv_norm", "lconv1d.pre_layer_norm", "norm_pre_attn"):
            yield f"{layer}.{norm}.weight", (1024,)
        yield f"{layer}.norm_post_attn.weight", (1024,)
        yield f"{layer}.norm_out.weight", (1024,)
    yield f"{root}.output_proj.weight", (1536, 1024)
    yield f"{root}.output_proj.bias", (1536,)
    yield "model.embed_audio.embedding_projection.weight", (hidden, 1536)


def config(member: str, *, per_layer: bool = False) -> dict[str, Any]:
    """`config.json` as released, or as newer transformers writes it (`per_layer`)."""
    size, unified = TEXT[member], member == "12B"
    kinds = [
        "full_attention" if is_full(member, i) else "sliding_attention"
        for i in range(size["layers"])
    ]
    shared_values = keys_are_values(member)
    text = {
        "hidden_size": size["hidden"],
        "num_hidden_layers": size["layers"],
        "layer_types": kinds,
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv"],
        "head_dim": 256,
        "attention_k_eq_v": shared_values,
        "num_kv_shared_layers": size["shared"],
        "intermediate_size": size["mlp"],
        "use_double_wide_mlp": member == "E2B",
        "hidden_size_per_layer_input": size["ple"],
        "vocab_size_per_layer_input": VOCABULARY,
        "vocab_size": VOCABULARY,
        "sliding_window": size["window"],
        "max_position_embeddings": size["positions"],
        "use_bidirectional_attention": "vision" if shared_values else None,
        "final_logit_softcapping": 30.0,
        "enable_moe_block": member == "26B-A4B",
    }
    if member == "26B-A4B":
        text |= {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
    if per_layer:
        full = {"head_dim": 512}
        if size["full_kv"] != size["kv"]:
            full["num_key_value_heads"] = size["full_kv"]
        text["per_layer_config"] = {
            f"{i:02}": full for i, kind in enumerate(kinds) if kind == "full_attention"
        }
    else:
        text["global_head_dim"] = 512
        text["num_global_key_value_heads"] = size["full_kv"] if shared_values else None
    name = "Gemma4Unified" if unified else "Gemma4"
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": "gemma4_unified" if unified else "gemma4",
        "text_config": text,
        "vision_config": _vision_config(member),
        "audio_config": _audio_config(member),
        "tie_word_embeddings": True,
    }


def _vision_config(member: str) -> dict[str, Any]:
    if member == "12B":  # without num_soft_tokens, as in vLLM #44494
        return {"mm_embed_dim": 3840, "mm_posemb_size": 1120, "output_proj_dims": 3840}
    small = member in ("E2B", "E4B")
    return {
        "hidden_size": 768 if small else 1152,
        "num_hidden_layers": 16 if small else 27,
        "num_attention_heads": 12 if small else 16,
        "num_key_value_heads": 12 if small else 16,
        "head_dim": 64 if small else 72,
        "intermediate_size": 3072 if small else 4304,
        "use_clipped_linears": small,
        "standardize": not small,
    }


def _audio_config(member: str) -> dict[str, Any] | None:
    if member == "12B":
        return {"audio_embed_dim": 640}
    return {"hidden_size": 1024, "num_hidden_layers": 12} if member in ("E2B", "E4B") else None


Quantizer = Callable[[str, int, int], Layout]  # module, rows, columns


def w4a16(module: str, rows: int, columns: int) -> Layout:
    """compressed-tensors `pack-quantized`, symmetric, groups of 32: Google's W4A16."""
    return {
        f"{module}.weight_packed": ("I32", (rows, -(-columns // 8))),
        f"{module}.weight_scale": ("BF16", (rows, -(-columns // 32))),
        f"{module}.weight_shape": ("I64", (2,)),
    }


def nvfp4(module: str, rows: int, columns: int) -> Layout:
    """compressed-tensors `nvfp4-pack-quantized`, weights only."""
    return {
        f"{module}.weight_packed": ("U8", (rows, columns // 2)),
        f"{module}.weight_scale": ("F8_E4M3", (rows, columns // 16)),
        f"{module}.weight_global_scale": ("F32", (1,)),
    }


def nvfp4_calibrated(module: str, rows: int, columns: int) -> Layout:
    """The same with a scale of activations."""
    return nvfp4(module, rows, columns) | {f"{module}.input_global_scale": ("F32", (1,))}


def modelopt_nvfp4(module: str, rows: int, columns: int) -> Layout:
    return {
        f"{module}.weight": ("U8", (rows, columns // 2)),
        f"{module}.weight_scale": ("F8_E4M3", (rows, columns // 16)),
        f"{module}.weight_scale_2": ("F32", ()),
    }


def quantized(dense: Layout, quantizer: Quantizer, *, router: bool = False) -> Layout:
    """`dense` with the text model's linear layers quantized, and experts one by one."""
    made: Layout = {}
    for name, (dtype, shape) in dense.items():
        module = name.removesuffix(".weight")
        if ".experts." in name:
            for expert, projection, rows in _unfolded(name, shape):
                path = f"{name.rpartition('.')[0]}.{expert}.{projection}"
                made |= quantizer(path, rows, shape[2])
        elif _is_linear(name, shape) and (router or ".router." not in name):
            made |= quantizer(module, *shape)
        else:
            made[name] = (dtype, shape)
    return made


def _unfolded(name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, str, int]]:
    for expert in range(shape[0]):
        if name.endswith("gate_up_proj"):
            yield expert, "gate_proj", shape[1] // 2
            yield expert, "up_proj", shape[1] // 2
        else:
            yield expert, "down_proj", shape[1]


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    excluded = ("embed_tokens", *TOWERS)
    return len(shape) == 2 and not any(part in name for part in excluded)


def claim(form: str, weights: Mapping[str, Any], activations: Any = None) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    ignore = [
        "lm_head",
        "re:.*embed_.*",
        "re:.*_tower.*",
        "re:.*vision_embedder.*",
        "re:.*router.*",
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
LOCAL = FP4 | {"dynamic": "local"}


def nbytes(tensors: Layout) -> int:
    return sum(BYTES[dtype] * math.prod(shape) for dtype, shape in tensors.values())


def drafter_config(member: str) -> dict[str, Any]:
    """`config.json` of a model's drafter."""
    hidden, width, heads = DRAFTERS[member]
    kind = "gemma4_unified" if member == "12B" else "gemma4"
    text = config(member)["text_config"] | {
        "model_type": f"{kind}_text",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"],
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    }
    prefix = "Gemma4Unified" if member == "12B" else "Gemma4"
    return {
        "architectures": [f"{prefix}AssistantForCausalLM"],
        "model_type": f"{kind}_assistant",
        "backbone_hidden_size": TEXT[member]["hidden"],
        "use_ordered_embeddings": member in ("E2B", "E4B"),
        "text_config": text,
    }


def write_headers(folder: Path, tensors: Layout, described: Mapping[str, Any]) -> Path:
    """A checkpoint that takes no room: a header, and a file as long as it says."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    (folder / "config.json").write_text(json.dumps(described))
    return folder
