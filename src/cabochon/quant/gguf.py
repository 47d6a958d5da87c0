"""Matrices of a GGUF file, whose types say how they are stored; nothing else claims anything.

NVFP4 has one more number for the whole matrix, or for each expert, which multiplies: `scale`.
llama.cpp's converter leaves out those that are 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cabochon.checkpoint.headers import TensorMeta
from cabochon.quant.claims import Claim, Rules
from cabochon.quant.scheme import Scheme, Site, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.nn.weight import Weight

METHOD = "gguf"

# Bits of an entry's code, by ggml's type.
_BITS = {
    "Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8,
    "Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6,
    "IQ4_NL": 4, "IQ4_XS": 4, "MXFP4": 4, "NVFP4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufBlocks:
    """Blocks of ggml, along the input."""

    type: str
    scaled: bool = False  # whether a factor of the whole matrix is stored

    @property
    def name(self) -> str:
        return f"gguf {self.type.lower()}"

    @property
    def bits(self) -> int:
        return _BITS[self.type]

    @property
    def slots(self) -> tuple[Slot, ...]:
        blocks = Slot("weight", frozenset({self.type}), ("out", "in"), "blocks")
        return (
            (blocks, Slot("scale", frozenset({"F32"}), (), "factor")) if self.scaled else (blocks,)
        )

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        from cabochon.nn.gguf_blocks import BlockWeight

        blocks = stored["weight"].view(site.out_features, -1)
        factor = stored["scale"].reshape(()) if self.scaled else None
        return BlockWeight(blocks, self.type, factor, in_features=site.in_features)


def rules(key: str, config: Mapping[str, Any]) -> Rules:
    """A GGUF file has no configuration of its quantization; its tensors' types are all there is."""
    del key, config
    return Rules(everything=Claim("the types of a GGUF file", deferred=True))


def candidates(site: Site, stored: Mapping[str, TensorMeta]) -> Iterable[Scheme]:
    del site
    weight = stored.get("weight")
    if weight is not None and weight.dtype in _BITS:
        yield GgufBlocks(weight.dtype, scaled=weight.dtype == "NVFP4" and "scale" in stored)
