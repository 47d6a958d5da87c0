"""Sight and hearing, from the metadata of a projector (mmproj) and the shapes of its tensors.

What neither says is the same in every Gemma 4, and stands here as a number.
"""

from __future__ import annotations

from collections.abc import Mapping

from cabochon.config.section import Section
from cabochon.config.types import AudioConfig, FrameConfig, PatchConfig, VisionConfig

Shapes = Mapping[str, tuple[int, ...]]  # of all tensors, `[out, in]`


def axis_of(shapes: Shapes, tensor: str, axis: int, default: int) -> int:
    """A size by the shape of a tensor; a default where it is missing, which the plan will say."""
    shape = shapes.get(tensor, ())
    return shape[axis] if -len(shape) <= axis < len(shape) else default


def vision_of(section: Section, shapes: Shapes) -> VisionConfig:
    """A tower."""
    hidden, heads = section.needed("embedding_length"), section.needed("attention.head_count")
    head_dim = axis_of(shapes, "v.blk.0.attn_q_norm.weight", 0, hidden // heads)
    if head_dim % 4:
        raise section.wrong("attention.head_count", heads, f"with heads of {head_dim} channels")
    _unscaled(section)
    return VisionConfig(
        hidden_size=hidden,
        intermediate_size=section.needed("feed_forward_length"),
        num_layers=section.count("block_count"),
        num_heads=heads,
        head_dim=head_dim,
        eps=section.number("attention.layer_norm_epsilon", 1e-6),
        rope_theta=100.0,
        patch_size=section.size("patch_size", 16),
        pooling=section.size("projector.scale_factor", 3),
        position_table_size=axis_of(shapes, "v.position_embd.weight", 1, 10 * 1024),
        clipped=_clipped(shapes, "v."),
        standardize="v.std_bias" in shapes,
    )


def _unscaled(section: Section) -> None:
    """Pictures go in as numbers from 0 to 1; what a processor of another model would do is not."""
    section.only("image_mean", (0.0, 0.0, 0.0))
    section.only("image_std", (1.0, 1.0, 1.0))


def _clipped(shapes: Shapes, prefix: str) -> bool:
    return any(name.startswith(prefix) and name.endswith(".input_min") for name in shapes)


def patches_of(section: Section, shapes: Shapes) -> PatchConfig:
    """Vision without a tower."""
    _unscaled(section)
    return PatchConfig(
        patch_size=section.size("patch_size", 16),
        pooling=section.size("projector.scale_factor", 3),
        hidden_size=section.needed("embedding_length"),
        position_table_size=axis_of(shapes, "v.position_embd.weight", 1, 1120),
        eps=section.number("attention.layer_norm_epsilon", 1e-6),
    )


def audio_of(section: Section, shapes: Shapes) -> AudioConfig:
    """A conformer."""
    hidden, heads = section.needed("embedding_length"), section.needed("attention.head_count")
    if hidden % heads:
        raise section.wrong("attention.head_count", heads, f"but embedding_length is {hidden}")
    section.only("feed_forward_length", 4 * hidden)
    section.only("num_mel_bins", 128)
    return AudioConfig(
        hidden_size=hidden,
        num_layers=section.count("block_count"),
        num_heads=heads,
        conv_channels=(
            axis_of(shapes, "a.conv1d.0.weight", 0, 128),
            axis_of(shapes, "a.conv1d.1.weight", 0, 32),
        ),
        conv_kernel=axis_of(shapes, "a.blk.0.conv_dw.weight", -1, 5),
        residual_weight=0.5,
        chunk=12,
        left=13,
        right=0,
        logit_cap=50.0,
        eps=1e-6,  # the converter once wrote a wrong one; llama.cpp does not read it either
        gradient_clipping=1e10,
        output_size=axis_of(shapes, "a.pre_encode.out.weight", 0, 1536),
        clipped=_clipped(shapes, "a."),
    )


def frames_of(section: Section, shapes: Shapes) -> FrameConfig:
    """Sound without a tower."""
    del shapes  # metadata says it all
    return FrameConfig(samples=section.needed("embedding_length"), eps=1e-6)
