"""Rounding of activations, as recipes claim it and files store its scales."""

from __future__ import annotations

# What calibration leaves behind. A recipe that rounds no activations has no use for it.
ACTIVATION_LEAVES = frozenset(
    {
        "input_scale",
        "input_zero_point",
        "input_global_scale",
        "output_scale",
        "output_zero_point",
        "input_activation_scale",
        "output_activation_scale",
    }
)
