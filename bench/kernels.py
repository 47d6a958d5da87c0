"""What the kernels reach of the machine's limits, format by format.

    python bench/kernels.py [--formats int4,nf4] [--columns 1,2,4,8,32,128,512] [--rounds 5]

Matrices of 6144 by 1536, E2B's gate and up, as many as no cache holds, each multiplied in turn.
For one column the share of read bandwidth is what counts, for many that of the integer peak; both
limits are measured in the same round as the products, and medians of the rounds are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from cabochon.bench import machine
from cabochon.kernels.arena import settled
from cabochon.kernels.choose import Kernels
from cabochon.kernels.floats import FloatsWeight
from cabochon.kernels.library import address, library
from cabochon.kernels.packed import ACTIVATIONS, PackedWeight
from cabochon.nn.bits import pack
from cabochon.nn.byte_codes import ByteWeight
from cabochon.nn.codebook import CodebookWeight, PlainScales
from cabochon.nn.float4 import Float4Weight
from cabochon.nn.gguf_blocks import KINDS, BlockWeight
from cabochon.nn.minifloat import E4M3
from cabochon.nn.packed_int import PackedIntWeight
from cabochon.nn.weight import DenseWeight, Weight

ROWS, COLUMNS = 6144, 1536
TOTAL = 160 << 20  # bytes of all copies together


def octets(*shape: int, least: int = 0, most: int = 256) -> torch.Tensor:
    return torch.randint(least, most, shape, dtype=torch.uint8)


def integers(bits: int, group: int, *, symmetric: bool = True) -> Weight:
    groups = COLUMNS // group
    return PackedIntWeight(
        pack(octets(ROWS, COLUMNS, most=2**bits), bits),
        torch.rand(ROWS, groups).to(torch.bfloat16),
        None if symmetric else octets(ROWS, groups, most=2**bits),
        in_features=COLUMNS,
        bits=bits,
        group=group,
    )


def blocks(kind: str) -> Weight:
    """Random blocks: their scales may be any float16, which changes no time."""
    width = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
    data = octets(ROWS, COLUMNS // KINDS[kind].layout.entries * width[kind], most=60)
    return BlockWeight(data, kind, in_features=COLUMNS)


def nf4() -> Weight:
    scales = PlainScales(torch.rand(ROWS * COLUMNS // 64))
    codes = octets(ROWS, COLUMNS // 2)
    levels = torch.linspace(-1, 1, 16) ** 3
    return CodebookWeight(codes, levels, scales, block=64, rounding=torch.bfloat16)


def four_bit_floats(block: int) -> Weight:
    scales = octets(ROWS, COLUMNS // block, most=127)
    codes = octets(ROWS, COLUMNS // 2)
    return Float4Weight(codes, scales, E4M3 * 0.001, in_features=COLUMNS, block=block)


def fp8(rows: int, columns: int) -> Weight:
    scales = torch.rand(-(-ROWS // rows), -(-COLUMNS // columns))
    return ByteWeight(octets(ROWS, COLUMNS, most=127), scales, E4M3, cell=(rows, columns))


def int8() -> Weight:
    return ByteWeight(
        octets(ROWS, COLUMNS).view(torch.int8), torch.rand(ROWS, 1), cell=(1, COLUMNS)
    )


FORMATS: dict[str, Callable[[], Weight]] = {
    "int4 by 32": lambda: integers(4, 32),
    "int4 by 128": lambda: integers(4, 128),
    "int4 by 32, asymmetric": lambda: integers(4, 32, symmetric=False),
    "int4 by row": lambda: integers(4, COLUMNS),
    "int2 by 32": lambda: integers(2, 32),
    "int3 by 128": lambda: integers(3, 128),
    "int8 by row": int8,
    "int8 by 32": lambda: integers(8, 32),
    "nf4 by 64": nf4,
    "nvfp4": lambda: four_bit_floats(16),
    "mxfp4": lambda: four_bit_floats(32),
    "fp8 by row": lambda: fp8(1, COLUMNS),
    "fp8 by 128 x 128": lambda: fp8(128, 128),
    **{kind: lambda kind=kind: blocks(kind) for kind in ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")},
    "bfloat16": lambda: DenseWeight(torch.randn(ROWS, COLUMNS).to(torch.bfloat16)),
}


def stored_bytes(weight: Weight) -> int:
    assert isinstance(weight, PackedWeight | FloatsWeight), "no kernel was chosen"
    if isinstance(weight, PackedWeight):
        return weight.nbytes
    return sum(buffer.nbytes for buffer in weight.buffers())


def multiply(weight: Weight, x: torch.Tensor, y: torch.Tensor) -> None:
    """y = x @ W.T, as a step calls it: without Python between one and the next."""
    kernels = library()
    assert kernels is not None
    shapes = (address(x), COLUMNS, len(x), 0, ROWS, address(y), ROWS, torch.get_num_threads())
    if isinstance(weight, PackedWeight):
        kernels.times(weight.matrix, *shapes)
    else:
        assert isinstance(weight, FloatsWeight)
        kernels.times_rows(weight.matrix, None, *shapes)


def rates(weights: list[Weight], columns: int) -> tuple[float, float]:
    """Bytes of weights, and additions and multiplications, a second."""
    x, y = torch.randn(columns, COLUMNS), torch.empty(columns, ROWS)
    used = weights if columns <= 16 else weights[:3]  # beyond, the cache makes no difference
    start = time.perf_counter()
    for weight in used:
        multiply(weight, x, y)
    seconds = time.perf_counter() - start
    read = sum(map(stored_bytes, used))
    return read / seconds, 2.0 * columns * ROWS * COLUMNS * len(used) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--formats", default=";".join(FORMATS), help="names, with ; between")
    parser.add_argument("--columns", default="1,2,4,8,16,32,128,512")
    parser.add_argument("--activations", default="int8", choices=ACTIVATIONS)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.columns.split(",")]
    print(f"{library().isa if library() else 'no kernels'}, {torch.get_num_threads()} threads")
    print(f"{'':24} bits  GB/s of one column, share" + "".join(f"{c:>8}" for c in counts) + " GOPS")
    for name in arguments.formats.split(";"):
        kernels = Kernels(library(), arguments.activations)
        first = kernels.for_weight(FORMATS[name]())
        made = [first]
        while len(made) * stored_bytes(first) < TOTAL:
            made.append(kernels.for_weight(FORMATS[name]()))
        kernels.enlarge()
        settled()
        shares, speeds = [], []
        seen: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(arguments.rounds):
            limit = machine()
            speed, _ = rates(made, 1)
            speeds.append(speed)
            shares.append(speed / limit.read)
            for count in counts:
                seen[count].append(rates(made, count)[1])
        bits = 8 * stored_bytes(first) / ROWS / COLUMNS
        print(
            f"{name:24} {bits:4.1f}  {statistics.median(speeds) / 1e9:10.1f}"
            f"  {statistics.median(shares):12.0%}"
            + "".join(f"{statistics.median(seen[count]) / 1e9:8.0f}" for count in counts),
            flush=True,
        )


if __name__ == "__main__":
    main()
