"""A decoder of another convention would be seen, whatever the scheme.

Elsewhere each scheme's `dense` is held to its producer's, bit for bit. Had ours another convention,
it would make of the right tensors what it now makes of tensors in that other convention: so here
those must be another matrix. Scales are turned into their reciprocals, codes change places in their
bytes (those of a whole byte change their sign), and zero points are one higher, as GPTQ's two
versions are apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import test_bitsandbytes
import test_ct_formats
import torch
from checkpoints import Tensors, plan_of
from corruption import files, folders
from ct_formats import FORMATS
from formats import first_of_each
from torch import Tensor
from written import WAYS, written

from cabochon.checkpoint.folder import read_tensor
from cabochon.load.plan import SiteRead
from cabochon.load.report import plan_checkpoint
from cabochon.nn.gguf_blocks import magnitudes
from cabochon.quant.bitsandbytes import LlmInt8
from cabochon.quant.scheme import Scheme, Site, Slot

Stored = tuple[Scheme, Site, Tensors]
ZEROS = ("qzeros", "weight_zero_point")


def reciprocal(scales: Tensor) -> Tensor:
    if scales.dtype is torch.uint8:  # powers of two
        return 254 - scales
    turned = 1 / scales.float()
    return turned.clamp(-448, 448).to(scales.dtype) if scales.itemsize == 1 else turned.to(scales)


def moved(codes: Tensor, bits: int) -> Tensor:
    """Codes in the other order within their bytes; of whole bytes, the other sign."""
    octets = codes.contiguous().view(torch.uint8)
    if bits == 8:
        return (octets ^ 128).view(codes.dtype)
    halves = octets << 4 | octets >> 4
    if bits == 2:
        halves = (halves & 0x33) << 2 | (halves & 0xCC) >> 2
    return halves.view(codes.dtype)


def higher(zeros: Tensor) -> Tensor:
    """By one in the lowest field of each byte."""
    return (zeros.contiguous().view(torch.uint8) ^ 1).view(zeros.dtype)


def other_conventions(scheme: Scheme, stored: Tensors) -> Iterator[tuple[str, Tensors]]:
    """The same tensors as somebody else would have meant them, and what is different."""
    for slot in (slot for slot in scheme.slots if slot.leaf in stored):
        change = _change(scheme, slot)
        if change is not None:
            what, how = change
            yield f"{slot.leaf}: {what}", {**stored, slot.leaf: how(stored[slot.leaf])}


def _change(scheme: Scheme, slot: Slot) -> tuple[str, Callable[[Tensor], Tensor]] | None:
    if slot.holds in ("scales", "float8 scales", "divisor", "factor") and slot.leaf != "biases":
        return "reciprocal", reciprocal
    if slot.leaf == "biases":
        return "negated", torch.neg
    if slot.leaf in ZEROS:
        return "one higher", higher
    if slot.holds == "codes" and slot.leaf not in ("g_idx", "weight.absmax"):
        return "moved", lambda codes: moved(codes, scheme.bits)
    return None


def unseen(found: Iterator[tuple[str, Stored]]) -> tuple[set[str], list[str]]:
    """The schemes that were looked at, and what would go unseen in them."""
    schemes, missed = set(), []
    for name, (scheme, site, stored) in found:
        right = scheme.build(stored, site).dense(torch.float32)
        changes = list(other_conventions(scheme, stored))
        assert changes, name
        for what, tensors in changes:
            wrong = scheme.build(tensors, site).dense(torch.float32)
            if torch.allclose(wrong, right, rtol=1e-3, atol=0):
                missed.append(f"{name}: {what}")
        schemes.add(name)
    return schemes, missed


def read(found: SiteRead) -> Stored:
    stored = {leaf: read_tensor(meta) for leaf, meta in found.stored.items()}
    for slot in found.scheme.slots:
        if slot.holds == "float8 scales":
            stored[slot.leaf] = stored[slot.leaf].view(torch.float8_e4m3fn)
    return found.scheme, found.site, stored


def of(*checkpoints: Path) -> Iterator[tuple[str, Stored]]:
    """Each scheme of `checkpoints` once; blocks of ggml are looked at by themselves."""
    seen: set[str] = set()
    for path in checkpoints:
        for found in first_of_each(plan_of(path).sites):
            name = found.scheme.name
            if name not in seen and not name.startswith("gguf"):
                seen.add(name)
                yield name, read(found)


def test_in_every_fixture() -> None:
    schemes, missed = unseen(of(*folders()))
    assert len(schemes) > 38
    assert missed == []


def test_in_googles_own_format() -> None:
    schemes, missed = unseen(of(written("gemma", "e2b")))
    assert len(schemes) == 4
    assert missed == []


@pytest.mark.parametrize("way", [way for way in WAYS if way.startswith(("torchao", "fp8"))])
def test_in_what_transformers_writes(way: str) -> None:
    assert unseen(of(written(way, "31b")))[1] == []


def test_in_bitsandbytes() -> None:
    def made() -> Iterator[tuple[str, Stored]]:
        torch.manual_seed(0)
        weight = torch.randn(16, 128).bfloat16() / 16
        for kind in ("nf4", "fp4"):
            for double in (False, True):
                options = {"quant_type": kind, "compress_statistics": double}
                stored = test_bitsandbytes.quantized(weight, **options)
                scheme, site = test_bitsandbytes.found(stored, 16, 128)
                yield f"{scheme.name} {double}", (scheme, site, stored)
        codes, rows, _ = bnb.int8_vectorwise_quant(weight.half())
        row = torch.tensor(0, dtype=torch.uint8)
        stored = {"weight": codes, "SCB": rows, "weight_format": row}
        yield "int8", (LlmInt8(), Site("w", "linear", 16, 128), stored)

    schemes, missed = unseen(made())
    assert len(schemes) == 5
    assert missed == []


def test_in_every_format_of_compressed_tensors() -> None:
    def made() -> Iterator[tuple[str, Stored]]:
        for name, (claimed, scheme, _) in FORMATS.items():
            stored, site = test_ct_formats.gate(claimed)
            yield name, (scheme, site, stored)

    schemes, missed = unseen(made())
    assert schemes == FORMATS.keys()
    assert missed == []


def test_in_every_type_of_gguf() -> None:
    """Within blocks codes and scales take turns: every byte that is no scale has both halves
    exchanged, and scales are found by which bytes move them."""
    kinds: set[str] = set()
    for path in files():
        plan = plan_checkpoint(path).plan
        assert plan is not None
        for found in first_of_each(plan.sites):
            scheme, site, stored = read(found)
            if found.scheme.name in kinds or found.transform is not None:
                continue
            kinds.add(found.scheme.name)
            blocks = stored["weight"].view(-1, _bytes_of(found))
            scales, codes = _parts_of(blocks, found)
            assert scales, found.scheme.name
            assert codes, found.scheme.name
            right = scheme.build(stored, site).dense(torch.float32)
            for at in (*scales[:1], *codes[:1]):
                wrong = blocks.clone()
                wrong[:, at] = wrong[:, at] << 4 | wrong[:, at] >> 4
                made = scheme.build({**stored, "weight": wrong.view_as(stored["weight"])}, site)
                assert not torch.equal(made.dense(torch.float32), right), (found.scheme.name, at)
    assert len(kinds) == 14


def _bytes_of(found: SiteRead) -> int:
    from cabochon.checkpoint.gguf import BLOCKS

    return BLOCKS[found.stored["weight"].dtype][1]


def _parts_of(blocks: Tensor, found: SiteRead) -> tuple[list[int], list[int]]:
    """Which bytes of a block are of scales, and which are not."""
    kind = found.stored["weight"].dtype
    usual = magnitudes(blocks[:1], kind)
    scales, codes = [], []
    for at in range(blocks.shape[1]):
        other = blocks[:1].clone()
        other[:, at] ^= 0x11
        moves = not torch.equal(magnitudes(other, kind).nan_to_num(), usual.nan_to_num())
        (scales if moves else codes).append(at)
    return scales, codes
