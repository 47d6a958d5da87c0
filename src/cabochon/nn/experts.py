"""A mixture of experts: the router, and experts stacked into two tall matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cabochon.nn.linear import Linear
from cabochon.nn.norm import RMSNorm


class Router(nn.Module):
    """Chooses experts for each token, and how much each of them counts."""

    scale: Tensor  # [hidden_size]
    per_expert_scale: Tensor  # [experts]

    def __init__(self, hidden_size: int, count: int, chosen: int, eps: float) -> None:
        super().__init__()
        self.chosen = chosen
        self.root = hidden_size**-0.5
        self.norm = RMSNorm(eps)
        self.proj = Linear(hidden_size, count)
        self.scale = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.per_expert_scale = nn.Parameter(torch.empty(count), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of `x [tokens, hidden_size]`, shares (float32) and experts, `[tokens, chosen]` each."""
        scores = self.proj(self.norm(x) * self.scale.to(x.dtype) * self.root)
        shares, numbers = scores.softmax(dim=-1, dtype=torch.float32).topk(self.chosen, dim=-1)
        shares = shares / shares.sum(dim=-1, keepdim=True)
        return shares * self.per_expert_scale[numbers], numbers


class Experts(nn.Module):
    """Expert `e` owns the `e`-th slice of rows of each matrix; gate rows come before up rows.

    Tokens are sorted by expert, so that each chosen expert's rows are read once, and no others.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.gate_up_proj = Linear(hidden_size, count * 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, count * hidden_size)

    def forward(self, x: Tensor, shares: Tensor, numbers: Tensor) -> Tensor:
        """The weighted sum of what its experts make of each row of `x [tokens, hidden_size]`."""
        order = numbers.flatten().argsort(stable=True)
        tokens = order // numbers.shape[1]
        shares = shares.flatten()[order]
        out = torch.zeros_like(x)
        start = 0
        for expert, stop in enumerate(
            numbers.flatten().bincount(minlength=self.count).cumsum(0).tolist()
        ):
            if stop > start:
                rows = tokens[start:stop]
                made = self._run(expert, x[rows]) * shares[start:stop, None]
                out.index_add_(0, rows, made.to(out.dtype))
            start = stop
        return out

    def _run(self, expert: int, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj.part(x, expert, self.count).chunk(2, dim=-1)
        return self.down_proj.part(F.gelu(gate, approximate="tanh") * up, expert, self.count)
