"""The soft-cap, through which logits go."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1e-6  # of tanh in float32, generously


@dataclass(frozen=True, slots=True)
class SoftCap:
    """`tanh(x / cap) * cap`; None: `x` itself."""

    cap: float | None

    def __call__(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def floor(self, logit: float) -> float:
        """The least logit that may become equal to this one: the ends of the cap are flat."""
        if self.cap is None or not math.isfinite(logit):
            return logit
        share = math.tanh(logit / self.cap) - _ROUNDING
        return self.cap * math.atanh(share) if share > -1 else -math.inf
