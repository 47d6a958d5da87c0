"""The sampler keeps what transformers' logits processors keep, and draws from just that."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cabochon.engine.request import SamplingParams
from cabochon.engine.sampler import Choices, Sampling, candidates, sample

VOCAB = 4096


def some_logits(seed: int, scale: float = 4.0, size: int = VOCAB) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def theirs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [vocab] after transformers' processors, in the order its `generate` has.

    In float64: at a low temperature, float32 leaves no six digits of a probability.
    """
    chain = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    no_tokens = torch.zeros(1, 0, dtype=torch.int64)
    return chain(no_tokens, logits[None].double())[0].softmax(dim=-1)


def ours(logits: Tensor, params: SamplingParams) -> Tensor:
    kept = candidates(logits.numpy(), params)
    probabilities = torch.zeros(len(logits), dtype=torch.float64)
    probabilities[kept.ids] = torch.from_numpy(kept.weights / kept.weights.sum())
    return probabilities


def drawn(logits: Tensor, row: Sampling) -> int:
    return sample(Choices(logits.numpy()), row)


def penalized(logits: Tensor, row: Sampling) -> Tensor:
    return torch.from_numpy(row.penalize(logits.numpy()))


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 64, VOCAB - 1, VOCAB, 10 * VOCAB])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.95, 0.9999, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_distribution_equals_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = some_logits(seed=top_k)
    expected, found = theirs(logits, params), ours(logits, params)
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    assert int((found > 0).sum()) >= 1


def test_ties_with_the_kth_token_stay_as_in_transformers() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0])
    params = SamplingParams(top_k=3)
    assert torch.equal(ours(logits, params) > 0, theirs(logits, params) > 0)
    assert candidates(logits.numpy(), params).ids.tolist() == [1, 2, 3, 4, 5]


def test_tokens_that_cannot_be_stay_out() -> None:
    logits = some_logits(0)
    logits[::2] = -math.inf
    for params in (SamplingParams(), SamplingParams(top_p=0.999), SamplingParams(top_k=3000)):
        row = Sampling(params, [], VOCAB)
        assert all(token % 2 for _ in range(50) for token in [drawn(logits, row)])


def test_a_flat_distribution_needs_nearly_all_for_its_nucleus() -> None:
    params = SamplingParams(top_p=0.99)
    kept = candidates(torch.zeros(VOCAB).numpy(), params)
    assert len(kept.ids) == math.ceil(0.99 * VOCAB)
    assert len(set(kept.ids.tolist())) == len(kept.ids)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    prompt, answer = [5, 7, 7, 100], [9, 5]
    logits = some_logits(1)
    row = Sampling(SamplingParams(repetition_penalty=penalty), prompt, VOCAB)
    for token in answer:
        row.observe(token)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + answer]), logits[None].clone()
    )
    assert torch.equal(penalized(logits, row), expected[0])


def test_presence_and_frequency_penalties_follow_their_definition() -> None:
    """mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence, over the answer alone."""
    logits = some_logits(2)
    params = SamplingParams(presence_penalty=0.6, frequency_penalty=-0.25)
    row = Sampling(params, [1, 2, 3], VOCAB)
    for token in (4, 4, 4, 9):
        row.observe(token)
    expected = logits.clone()
    expected[4] += 3 * 0.25 - 0.6
    expected[9] += 0.25 - 0.6
    assert torch.allclose(penalized(logits, row), expected, rtol=0, atol=1e-6)


def test_logits_are_not_changed() -> None:
    logits = some_logits(3)
    before = logits.clone()
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=1.0, top_k=5, top_p=0.5)
    drawn(logits, Sampling(params, [1], VOCAB))
    assert torch.equal(logits, before)


def test_greedy_takes_the_likeliest_after_penalties() -> None:
    logits = some_logits(5)
    first, second = logits.topk(2).indices.tolist()
    greedy = SamplingParams(temperature=0.0, top_k=3, top_p=0.1)
    row = Sampling(greedy, [], VOCAB)
    tired = Sampling(SamplingParams(temperature=0.0, presence_penalty=2.0), [], VOCAB)
    logits[first] = logits[second] + 1.0
    tired.observe(first)
    assert [drawn(logits, row), drawn(logits, tired)] == [first, second]


def draws(row: Sampling, company: list[Sampling], steps: int = 40) -> list[int]:
    """What `row` draws, step by step, in a batch with others."""
    tokens = []
    for step in range(steps):
        token = drawn(some_logits(step), row)
        for other in company:
            drawn(some_logits(step + 99), other)
        row.observe(token)
        tokens.append(token)
    return tokens


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=11),
        SamplingParams(seed=-11, top_k=50, top_p=0.9, frequency_penalty=0.5),
        SamplingParams(seed=2**63 - 1, top_p=0.9, min_p=0.01),
    ],
)
def test_a_seed_draws_the_same_whatever_it_is_batched_with(params: SamplingParams) -> None:
    company = [Sampling(SamplingParams(temperature=t), [1, 2], VOCAB) for t in (0.0, 0.5, 2.0)]
    alone = draws(Sampling(params, [3], VOCAB), [])
    assert alone == draws(Sampling(params, [3], VOCAB), company)


def test_seeds_differ_and_no_seed_differs_every_time() -> None:
    seeds = [None, None, 1, -1, 0, 2]
    answers = [tuple(draws(Sampling(SamplingParams(seed=s), [], VOCAB), [])) for s in seeds]
    assert len(set(answers)) == len(seeds)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=7),
        SamplingParams(seed=7, top_k=10),
        SamplingParams(seed=7, top_p=0.9, temperature=1.5),
        SamplingParams(seed=7, min_p=0.1),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    """Pearson's chi-square stays below its 99.9 % quantile (normal approximation)."""
    logits = some_logits(8, scale=1.5, size=32)
    expected = theirs(logits, params)
    row = Sampling(params, [], 32)
    total = 20_000
    counts = torch.bincount(torch.tensor([drawn(logits, row) for _ in range(total)]), minlength=32)
    kept = expected > 0
    assert int(counts[~kept].sum()) == 0
    statistic = float((((counts - total * expected) ** 2) / (total * expected))[kept].sum())
    degrees = int(kept.sum()) - 1
    assert statistic < degrees + 3.1 * math.sqrt(2 * degrees) + 6


def test_penalties_cost_nothing_when_they_are_off() -> None:
    logits = some_logits(9).numpy()
    assert Sampling(SamplingParams(), [1, 2], VOCAB).penalize(logits) is logits
