"""The threads that kernels share: whoever asks, and however many at once, products are the same."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from cabochon.kernels.choose import Kernels
from cabochon.kernels.library import Library
from cabochon.nn.bits import pack
from cabochon.nn.packed_int import PackedIntWeight
from cabochon.nn.weight import Weight

ROWS, COLUMNS = 4096, 512  # so many blocks that every thread takes some


def matrix(kernels: Library) -> Weight:
    codes = torch.randint(0, 16, (ROWS, COLUMNS), dtype=torch.uint8)
    scales = torch.rand(ROWS, COLUMNS // 32).to(torch.bfloat16)
    stored = PackedIntWeight(pack(codes, 4), scales, None, in_features=COLUMNS, bits=4, group=32)
    return Kernels(kernels, "float32").for_weight(stored)


def close(made: Tensor, wanted: Tensor) -> bool:
    return bool((made.double() - wanted).abs().max() < 1e-4 * wanted.abs().max())


def test_many_callers_at_once(kernels: Library) -> None:
    """One of them has the threads; the others do everything themselves."""
    weight = matrix(kernels)
    dense = weight.dense(torch.float32).double()
    inputs = torch.randn(64, 2, COLUMNS)

    def product(x: Tensor) -> bool:
        torch.set_num_threads(2)
        return close(weight.linear(x), x.double() @ dense.T)

    with ThreadPoolExecutor(6) as callers:
        assert all(callers.map(product, inputs))


def test_a_forked_process_has_threads_of_its_own(kernels: Library) -> None:
    weight, x = matrix(kernels), torch.randn(2, COLUMNS)
    expected = weight.linear(x)
    child = os.fork()
    if child == 0:  # nothing of pytest may run here, whatever happens
        same = False
        try:
            same = torch.equal(weight.linear(x), expected)
        finally:
            os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
