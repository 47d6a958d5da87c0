"""Experts as transformers computes them, and only those that were chosen."""

from __future__ import annotations

import pytest
import torch
from checkpoints import load_model
from conftest import FIXTURES
from torch import Tensor, nn
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

from cabochon.nn.experts import Experts
from cabochon.nn.packed_int import PackedIntWeight
from cabochon.nn.weight import DenseWeight, Stack, Weight

HIDDEN, WIDTH, COUNT = 32, 24, 6


def upstream(gate_up: Tensor, down: Tensor) -> Gemma4TextExperts:
    config = Gemma4TextConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=COUNT, top_k_experts=2
    )
    config._experts_implementation = "eager"
    experts = Gemma4TextExperts(config)
    experts.gate_up_proj = nn.Parameter(gate_up)
    experts.down_proj = nn.Parameter(down)
    return experts


def as_stored(matrix: Tensor, parts: int) -> Weight:
    """One tall matrix, or a stack of parts as checkpoints with an expert a tensor have them."""
    tall = matrix.flatten(0, 1)
    return DenseWeight(tall) if parts == 1 else Stack([DenseWeight(p) for p in tall.chunk(parts)])


@pytest.mark.parametrize("parts", [(1, 1), (2 * COUNT, COUNT), (COUNT, COUNT)])
@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_experts_are_upstreams(parts: tuple[int, int], tokens: int) -> None:
    torch.manual_seed(tokens)
    gate_up, down = torch.randn(COUNT, 2 * WIDTH, HIDDEN), torch.randn(COUNT, HIDDEN, WIDTH)
    experts = Experts(HIDDEN, WIDTH, COUNT)
    experts.gate_up_proj.weight = as_stored(gate_up, parts[0])
    experts.down_proj.weight = as_stored(down, parts[1])
    x, shares = torch.randn(tokens, HIDDEN), torch.rand(tokens, 2)
    numbers = torch.stack([torch.randperm(COUNT)[:2] for _ in range(tokens)])
    with torch.inference_mode():
        expected = upstream(gate_up, down)(x, numbers, shares)
        torch.testing.assert_close(experts(x, shares, numbers), expected, rtol=1e-4, atol=1e-4)


def test_experts_that_were_not_chosen_are_not_read() -> None:
    """What is not read may be anything: poison in the others' scales does not show."""
    model, _ = load_model(FIXTURES / "26b-w4a16", dtype=torch.float32)
    experts = model.get_submodule("model.language_model.layers.0.experts")
    assert isinstance(experts, Experts)
    torch.manual_seed(0)
    x, shares = torch.randn(3, 64), torch.rand(3, 2)
    numbers = torch.tensor([[1, 5], [5, 1], [1, 5]])
    before = experts(x, shares, numbers)
    for projection, halves in ((experts.gate_up_proj, 2), (experts.down_proj, 1)):
        assert isinstance(projection.weight, Stack)
        for index, part in enumerate(projection.weight.parts):
            assert isinstance(part, PackedIntWeight)
            if index // halves not in (1, 5):
                part.scales.fill_(torch.nan)
    assert torch.equal(experts(x, shares, numbers), before)
    assert experts(x, shares, torch.tensor([[1, 5], [0, 1], [1, 5]])).isnan().any()
