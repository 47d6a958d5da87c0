"""MLX: what `quantization` in config.json claims, and what the tensors of a layer can be.

Whatever has scales is quantized, embeddings and routers too. Layers that differ from the rest stand
in the configuration by their path in MLX' own tree, `false` for those that are not quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cabochon.checkpoint.headers import TensorMeta
from cabochon.errors import ConfigError
from cabochon.quant.claims import Claim, Rules, Targets
from cabochon.quant.fields import integer
from cabochon.quant.scheme import FLOATS, Holds, Scheme, Site, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.nn.weight import Weight

METHOD = "mlx"  # files themselves have no quant_method

Mode = Literal["mxfp4", "mxfp8", "nvfp4"]

_WORDS = frozenset({"U32"})
_WIDTHS = (1, 2, 3, 4, 5, 6, 8)
_MODES: Mapping[Mode, tuple[int, int]] = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
_AFFINE = (4, 64)  # bits and group size where none are given


@dataclass(frozen=True, slots=True)
class MlxAffine:
    """Unsigned integers with a scale and a bias for each group."""

    bits: int
    group: int

    @property
    def name(self) -> str:
        return f"mlx int{self.bits} g{self.group}"

    @property
    def slots(self) -> tuple[Slot, ...]:
        groups = ("out", f"in/{self.group}")
        return (
            Slot("weight", _WORDS, ("out", f"in*{self.bits}/32"), "codes"),
            Slot("scales", FLOATS, groups, "scales"),
            Slot("biases", FLOATS, groups, "scales"),
        )

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        import torch

        from cabochon.nn.affine import AffineWeight

        return AffineWeight(
            stored["weight"].view(torch.int32),
            stored["scales"],
            stored["biases"].to(stored["scales"].dtype),
            in_features=site.in_features,
            bits=self.bits,
            group=self.group,
        )


@dataclass(frozen=True, slots=True)
class MlxFloat:
    """Floats of 4 or 8 bits in blocks, whose scales are powers of two or, for nvfp4, E4M3."""

    mode: Mode

    @property
    def name(self) -> str:
        return f"mlx {self.mode}"

    @property
    def bits(self) -> int:
        return _MODES[self.mode][0]

    @property
    def slots(self) -> tuple[Slot, ...]:
        bits, block = _MODES[self.mode]
        scales: Holds = "float8 scales" if self.mode == "nvfp4" else "scales"
        return (
            Slot("weight", _WORDS, ("out", f"in*{bits}/32"), "codes"),
            Slot("scales", frozenset({"U8"}), ("out", f"in/{block}"), scales),
        )

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        import torch

        from cabochon.nn.byte_codes import ByteWeight
        from cabochon.nn.float4 import Float4Weight
        from cabochon.nn.minifloat import E4M3, E8M0

        bits, block = _MODES[self.mode]
        codes, scales = (stored[leaf].view(torch.uint8) for leaf in ("weight", "scales"))
        if bits == 8:
            return ByteWeight(
                codes, scales, E4M3, cell=(1, block), levels=E8M0, rounding=torch.bfloat16
            )
        levels = E4M3 if self.mode == "nvfp4" else E8M0
        return Float4Weight(codes, scales, levels, in_features=site.in_features, block=block)


def candidates(site: Site, stored: Mapping[str, TensorMeta]) -> Iterator[Scheme]:
    weight, scales = stored.get("weight"), stored.get("scales")
    if weight is None or scales is None or weight.dtype not in _WORDS:
        return
    width, count = (meta.shape[-1] if meta.shape else 0 for meta in (weight, scales))
    if scales.dtype == "U8":
        for mode, (bits, block) in _MODES.items():
            if site.in_features * bits == 32 * width and site.in_features == block * count:
                yield MlxFloat(mode)
    elif count and site.in_features % count == 0:
        for bits in _WIDTHS:
            if site.in_features * bits == 32 * width:
                yield MlxAffine(bits, site.in_features // count)


def rules(key: str, config: Mapping[str, Any]) -> Rules:
    """One scheme for whatever is quantized, and the paths that differ."""
    groups: dict[str, tuple[Targets, Claim]] = {}
    for path, override in config.items():
        if isinstance(override, Mapping):
            claim = _claim(f"{key}[{path!r}]", path, override)
            groups[path] = Targets.of([path]), claim
        elif override is False:
            groups[path] = Targets.of([path]), Claim(f"{key}[{path!r}] false")
    base = _claim(key, key, config)
    groups[""] = Targets.of(["Linear", "Embedding"]), base
    return Rules(groups=groups)


def _claim(rule: str, name: str, config: Mapping[str, Any]) -> Claim:
    mode = config.get("mode", "affine")
    if mode == "affine":
        bits, group = integer(config, "bits", name), integer(config, "group_size", name)
        if bits is None and "bits" not in config:
            bits = _AFFINE[0]
        if group is None and "group_size" not in config:
            group = _AFFINE[1]
        if bits not in _WIDTHS or group is None or group <= 0:
            raise ConfigError(
                f"config.json: {name} has bits {bits!r} and group_size {group!r}, expected one of"
                f" {_WIDTHS} and a number of columns"
            )
        return Claim(rule, scheme=MlxAffine(bits, group), selective=False)
    if mode in _MODES:
        return Claim(rule, scheme=MlxFloat(mode), selective=False)
    return Claim(rule, unsupported=f"MLX's mode {mode!r} is not supported by this version")
