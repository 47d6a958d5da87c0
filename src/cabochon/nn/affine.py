"""`AffineWeight`: MLX's `affine` mode, unsigned integers with a scale and a bias for each group.

An entry is `code * scale + bias`, each step rounded in the scales' dtype, as `mlx.core.dequantize`
makes it. float32 asks for the same numbers, widened.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cabochon.nn.layout import Layout
from cabochon.nn.packed_int import codes_of
from cabochon.nn.weight import Coded, Weight


class AffineWeight(Weight):
    """A matrix of unsigned codes, `bits` each, packed along the input dimension.

    Args:
        words: int32 `[out, in * bits / 32]`; entry i starts at bit `i * bits` of its row.
        scales, biases: float `[out, in / group]`.
    """

    def __init__(
        self,
        words: Tensor,
        scales: Tensor,
        biases: Tensor,
        *,
        in_features: int,
        bits: int,
        group: int,
    ) -> None:
        assert 1 <= bits <= 8
        assert words.dtype is torch.int32
        assert in_features % group == 0
        assert words.shape[1] * 32 == in_features * bits
        assert scales.shape == biases.shape == (words.shape[0], in_features // group)
        assert scales.dtype is biases.dtype
        super().__init__(words.shape[0], in_features)
        self.bits = bits
        self.group = group
        self.register_buffer("words", words)
        self.register_buffer("scales", scales)
        self.register_buffer("biases", biases)

    words: Tensor
    scales: Tensor
    biases: Tensor

    def description(self) -> Coded | None:
        if self.bits in (1, 7):
            return None
        return Coded(
            octets=self.words.view(torch.uint8),
            layout=Layout.stream(self.bits),
            group=self.group,
            scales=self.scales,
            minima=-self.biases,
            rounded=self.scales.dtype,
            exact=self.scales.dtype is torch.float32,
        )

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self._expand(slice(start, stop), dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._expand(ids.flatten(), dtype).view(*ids.shape, self.in_features)

    def _expand(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        codes, origin = codes_of(self.words[rows], self.bits, self.in_features)
        if origin:
            codes -= origin
        values = codes.to(self.scales.dtype).view(len(codes), -1, self.group)
        values *= self.scales[rows][:, :, None]
        values += self.biases[rows][:, :, None]
        return values.to(dtype).view(-1, self.in_features)
