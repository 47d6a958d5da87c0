"""Where a stored tensor belongs: spellings of module paths, places, and tensors left out.

Name tables map module paths only; what follows a site's name, the leaf, belongs to its scheme.
Whole path components are matched, never substrings.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cabochon.checkpoint.headers import TensorMeta
from cabochon.config import AudioConfig, Gemma4Config, VisionConfig
from cabochon.load.transforms import Transform
from cabochon.load.tree import CLIP_BOUNDS
from cabochon.quant.scheme import FLOATS, Site

# Prefixes met in files, and the canonical ones; the first that matches counts.
_WRAPPERS = (
    ("model.language_model.model", "model.language_model"),  # some importers
    ("model.language_model.lm_head", "lm_head"),
    ("model.language_model", "model.language_model"),  # multimodal, as upstream saves it
    ("language_model.model", "model.language_model"),  # MLX, and engines' own
    ("language_model.lm_head", "lm_head"),
    ("model.vision_tower", "model.vision_tower"),
    ("model.audio_tower", "model.audio_tower"),
    ("model.vision_embedder", "model.vision_embedder"),
    ("model.embed_vision", "model.embed_vision"),
    ("model.embed_audio", "model.embed_audio"),
    ("vision_tower", "model.vision_tower"),
    ("vision_embedder", "model.vision_embedder"),
    ("audio_tower", "model.audio_tower"),
    ("embed_vision", "model.embed_vision"),
    ("embed_audio", "model.embed_audio"),
    ("model", "model.language_model"),  # text-only export
    ("lm_head", "lm_head"),
)


# Other spellings of the same place, once the wrapper is canonical. All that match are applied.
_RENAMES = (
    # transformers saves the encoder-free embedder so from some 5.1x on
    (
        re.compile(
            r"model\.embed_vision\.(patch_ln1|patch_dense|patch_ln2|pos_embedding|pos_norm)\b"
        ),
        r"model.vision_embedder.\1",
    ),
    (re.compile(r"model\.embed_vision\.multimodal_embedder\b"), "model.embed_vision"),
    (re.compile(r"(model\.language_model\.layers\.\d+)\.moe\.experts\b"), r"\1.experts"),
    # leaves of experts with an underscore: `experts.7.down_proj_packed`, `experts.down_proj_scale`
    (
        re.compile(
            r"(\.experts\.(?:\d+\.)?(?:gate|up|gate_up|down)_proj)"
            r"_(packed|scale_inv|scale|shape|zero_point|global_scale|g_idx)$"
        ),
        r"\1.weight_\2",
    ),
    (
        re.compile(
            r"(\.experts\.(?:\d+\.)?(?:gate|up|gate_up|down)_proj)"
            r"_(activation_scale|(?:input|output)_(?:scale|zero_point|global_scale))$"
        ),
        r"\1.\2",
    ),
    # torchao's names of the parts into which it takes a parameter apart
    (re.compile(r"\._weight_qdata$"), ".weight"),
    (re.compile(r"\._weight_(scale|zero_point)$"), r".weight_\1"),
    (re.compile(r"\.experts\._(gate_up|down)_proj_qdata$"), r".experts.\1_proj"),
    (
        re.compile(r"\.experts\._(gate_up|down)_proj_(scale|zero_point)$"),
        r".experts.\1_proj.weight_\2",
    ),
    # ModelOpt's names of the low-rank corrections of SVDQuant
    (re.compile(r"\.(?:weight_quantizer\.)?_?svdquant_lora_([ab])$"), r".svdquant_lora_\1"),
)

KV_SCALES = "scales of a quantized KV cache; keys and values are kept in the compute dtype"
KV_DTYPES = FLOATS | {"I8", "F8_E4M3"}  # zero points are of the cache's own dtype

# ModelOpt writes them into the projections.
_OF_THE_CACHE = frozenset({"k_scale", "v_scale", "k_bias", "v_bias"})

# One expert's matrix: layer, expert, projection, leaf.
_EXPERT = re.compile(r"(.+\.layers\.\d+)\.experts\.(\d+)\.(gate|up|down)_proj\.(.+)")


class Named(NamedTuple):
    """A stored tensor, or some rows of one, under the model's own name for it."""

    name: str
    meta: TensorMeta  # in the shape that it has after the transform
    transform: Transform | None = None


class Place(NamedTuple):
    """A stored tensor's destination: a site and its leaf, or a parameter with an empty leaf.

    `part` counts slices of rows, for sites that are stored in parts.
    """

    module: str
    leaf: str
    part: int | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """Tensors, by canonical name, that are known and have no use, and why."""

    pattern: re.Pattern[str]
    reason: str


def canonical(name: str) -> str:
    """`name` in the model's own spelling; a name without a known wrapper stays as it is."""
    for wrapper, prefix in _WRAPPERS:
        if name == wrapper or name.startswith(wrapper + "."):
            name = prefix + name[len(wrapper) :]
            break
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name, count=1)
    return name


def locate(name: str, sites: Mapping[str, Site], parameters: Container[str]) -> Place | None:
    """The place of the canonical `name`; None if the model has none."""
    if name in parameters:
        return Place(name, "")
    if name in sites:  # stacked experts have no leaf
        return Place(name, "weight")
    expert = _EXPERT.fullmatch(name)
    if expert is not None:
        layer, number, projection, leaf = expert.groups()
        return _locate_expert(f"{layer}.experts", int(number), projection, leaf, sites)
    module = name
    while "." in module:
        module = module.rpartition(".")[0]
        leaf = name[len(module) + 1 :]
        if module in sites:
            return None if leaf in _OF_THE_CACHE else Place(module, leaf)
    return None


def _locate_expert(
    experts: str, number: int, projection: str, leaf: str, sites: Mapping[str, Site]
) -> Place | None:
    """Gate and up take turns in the rows of one matrix; down has a matrix of its own."""
    fused = projection != "down"
    site = sites.get(f"{experts}.gate_up_proj" if fused else f"{experts}.down_proj")
    part = 2 * number + (projection == "up") if fused else number
    if site is None or part >= site.parts:
        return None
    return Place(site.name, leaf, part)


def drops(config: Gemma4Config) -> tuple[Drop, ...]:
    """What this configuration makes superfluous. None of it may name anything the model needs."""
    rows = [
        (
            r"model\.embed_vision\.(embedding|hard_embedding_norm|soft_embedding_norm)\..+",
            "a vestige that upstream's model does not read either",
        ),
        (
            r"model\.language_model\.layers\.\d+\.self_attn\.([kv]_proj\.)?"
            r"([qkv]_(cache_scale|scale|zero_point|global_scale)|[kv]_bias)",
            KV_SCALES,
        ),
        (r"rope_freqs\.weight", "which pairs of a head rotate, read with the configuration"),
    ]
    sharing = [str(layer.index) for layer in config.text.layers if layer.shares_kv]
    if sharing:
        layers = "|".join(sharing)
        rows.append(
            (
                rf"model\.language_model\.layers\.({layers})\.self_attn\.[kv]_(proj|norm)\..+",
                "these layers use the keys and values of an earlier one"
                if config.drafting is None
                else "a drafter uses the keys and values of its target",
            )
        )
    bounds = "|".join(CLIP_BOUNDS)
    for name, tower in (("vision", config.vision), ("audio", config.audio)):
        if isinstance(tower, VisionConfig | AudioConfig) and not tower.clipped:
            rows.append((rf"model\.{name}_tower\..+\.({bounds})", "use_clipped_linears is false"))
    return tuple(Drop(re.compile(pattern), reason) for pattern, reason in rows)


def absences(config: Gemma4Config) -> tuple[Drop, ...]:
    """Why a model of this configuration has no place for tensors that others of the family have."""
    text, layers = config.text, r"model\.language_model\.layers"
    rows = []
    full = "|".join(str(layer.index) for layer in text.layers if layer.k_eq_v)
    if full:
        reason = "attention_k_eq_v says that full layers take their values from k_proj"
        rows.append((rf"{layers}\.({full})\.self_attn\.v_proj\b.*", reason))
    if text.experts is None:
        pattern = rf"{layers}\.\d+\.(experts|router|\w+_layernorm_[12])\b.*"
        rows.append((pattern, "enable_moe_block is not set, so there are no experts"))
    if not text.ple_dim:
        pattern = r"model\.language_model\.(layers\.\d+\.)?\w*per_layer\w*\b.*"
        rows.append((pattern, "config.json says that layers have no inputs of their own"))
    for name, part in (("vision", config.vision), ("audio", config.audio)):
        if part is None:
            pattern = rf"model\.({name}_tower|{name}_embedder|embed_{name})\b.*"
            rows.append((pattern, f"{config.architecture} has no {name}_config here"))
    return tuple(Drop(re.compile(pattern), reason) for pattern, reason in rows)
