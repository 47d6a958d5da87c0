"""What is changed in copies of checkpoints: their tensors, or their configuration, in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from checkpoints import Config, Tensors, tensors_of

TEXT = "model.language_model"

OfTensors = Callable[[Tensors], object]
OfConfig = Callable[[Config], object]


def named(tensors: Tensors, *parts: str) -> list[str]:
    """The names in which any of `parts` is; each must be in some."""
    for part in parts:
        assert any(part in name for name in tensors), part
    return [name for name in tensors if any(part in name for part in parts)]


def rename(old: str, new: str) -> OfTensors:
    def change(tensors: Tensors) -> None:
        for name in named(tensors, old):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def without(*parts: str) -> OfTensors:
    return lambda tensors: [tensors.pop(name) for name in named(tensors, *parts)]


def reciprocal(part: str) -> OfTensors:
    return lambda tensors: tensors.update({n: 1 / tensors[n] for n in named(tensors, part)})


def reshaped(shape: tuple[int, ...], *parts: str) -> OfTensors:
    """Single numbers as lists of one, or the other way round."""
    return lambda tensors: tensors.update(
        {name: tensors[name].reshape(shape) for name in named(tensors, *parts)}
    )


def dense_experts(source: Path) -> OfTensors:
    """Experts of `source`, stacked floats: quantizers visit linear layers, and they are none."""

    def change(tensors: Tensors) -> None:
        without(".experts.")(tensors)
        tensors.update({n: t for n, t in tensors_of(source).items() if ".experts." in n})

    return change


def with_shared_keys(root: str) -> OfTensors:
    """Keys and values in layers 3 to 5, which use those of an earlier one.

    Google's first release has them, and quantizers keep what was there.
    """

    def change(tensors: Tensors) -> None:
        for layer, source in ((3, 1), (4, 1), (5, 2)):
            old, new = (f"{root}.layers.{n}.self_attn." for n in (source, layer))
            leaves = (f"{old}{leaf}." for leaf in ("k_proj", "v_proj", "k_norm"))
            for name in named(tensors, *leaves):
                tensors[name.replace(old, new)] = tensors[name].clone()

    return change


def physical_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors[f"{TEXT}.embed_tokens.weight"].clone()


def quantization(**values: object) -> OfConfig:
    """MLX says the same twice."""

    def change(config: Config) -> None:
        for key in ("quantization_config", "quantization"):
            if key in config:
                config[key] = {**config[key], **values}

    return change


def unclaimed(config: Config) -> None:
    del config["quantization_config"]
