"""bitsandbytes: NF4 and FP4, plain and doubly quantized, and LLM.int8.

A 4-bit matrix is flattened, two entries a byte, in blocks with a scale each (`absmax`). What the
tensors do not say lies as JSON in one more, named after the kind of codes. Its layout is that of
`QuantState.as_dict`, bitsandbytes 0.50.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from cabochon.checkpoint.headers import BITS, TensorMeta
from cabochon.errors import LoadError
from cabochon.files import parse_json
from cabochon.quant.claims import Claim, Rules, Targets
from cabochon.quant.fields import unconverted
from cabochon.quant.scheme import FLOATS, Scheme, Site, Slot

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cabochon.nn.codebook import NestedScales, PlainScales
    from cabochon.nn.weight import Weight

Codes = Literal["nf4", "fp4"]

BLOCK = 64  # entries that share a scale, if nobody asked for another number
_BLOCKS = (BLOCK, 32, 128, 256, 512, 1024, 2048, 4096)
_STATE = "weight.quant_state.bitsandbytes__"
_STORAGE = {"uint8": "U8", "int8": "I8", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_PER_CODE = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it
_TOLERANCE = 1e-5  # between tables of the same codes, as releases print and round them


_UNROUNDED = (
    "LLM.int8 also rounds activations, but for columns with an outlier anywhere in a batch; here"
    " they are not rounded, so that requests do not change each other's answers"
)


@dataclass(frozen=True, slots=True)
class Bnb4:
    """4-bit codes for a table of 16, with a scale a block, which may be quantized in its turn."""

    codes: Codes
    double: bool = False  # scales are quantized too
    block: int = BLOCK
    storage: str = "U8"  # bytes of codes may be stored under the name of any dtype

    @property
    def name(self) -> str:
        return f"{self.codes} g{self.block}" + (" double" if self.double else "")

    @property
    def bits(self) -> int:
        return 4

    @property
    def slots(self) -> tuple[Slot, ...]:
        entries = BITS[self.storage] // 4
        words = (f"out*in/{entries}", "1")
        blocks = (f"out*in/{self.block}",)
        plain, floats = not self.double, frozenset({"F32"})
        slots = (
            Slot("weight", frozenset({self.storage}), words, "codes"),
            Slot("weight.quant_map", floats, ("16",), "table"),
            Slot(f"{_STATE}{self.codes}", frozenset({"U8"}), None, "header"),
        )
        if plain:
            return (*slots, Slot("weight.absmax", FLOATS, blocks, "scales"))
        return (
            *slots,
            Slot("weight.absmax", frozenset({"U8"}), blocks, "codes"),
            Slot("weight.nested_absmax", floats, (f"out*in/{self.block * 256}",), "scales"),
            Slot("weight.nested_quant_map", floats, ("256",), "table"),
        )

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        """
        Raises:
            LoadError: the JSON or a table contradicts the tensors beside it.
        """
        import torch

        from cabochon.nn.codebook import CodebookWeight

        state = _State.read(stored[_STATE + self.codes], self, site)
        self._check_tables(stored, site)
        codes = stored["weight"].view(torch.uint8).view(site.out_features, -1)
        scales = self._scales(stored, state)
        table = stored["weight.quant_map"]
        return CodebookWeight(codes, table, scales, block=state.block, rounding=state.dtype)

    def _scales(self, stored: Mapping[str, Tensor], state: _State) -> PlainScales | NestedScales:
        from cabochon.nn.codebook import NestedScales, PlainScales

        absmax = stored["weight.absmax"]
        if not self.double:
            return PlainScales(absmax.float())
        table, outer = stored["weight.nested_quant_map"], stored["weight.nested_absmax"]
        return NestedScales(absmax, table, outer, state.offset)

    def _check_tables(self, stored: Mapping[str, Tensor], site: Site) -> None:
        """bitsandbytes decodes with tables of its own, so another one in a file is damage."""
        expected = stored["weight.quant_map"].new_tensor(TABLES[self.codes])
        apart = (stored["weight.quant_map"] - expected).abs().max()
        if not apart <= _TOLERANCE:
            raise LoadError(f"{site.name}.weight.quant_map is not the table of {self.codes}")
        nested = stored.get("weight.nested_quant_map")
        if nested is not None and not (nested.abs().max() <= 1 and (nested.diff() > 0).all()):
            raise LoadError(f"{site.name}.weight.nested_quant_map does not rise from -1 to 1")


# What codes stand for: https://arxiv.org/abs/2305.14314, and bitsandbytes' 4-bit floats.
TABLES: Mapping[Codes, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4,
        -0.0, -1 / 192, -2 / 3, -1.0, -1 / 3, -1 / 2, -1 / 6, -1 / 4,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _State:
    """What the JSON beside a matrix says."""

    block: int
    dtype: torch.dtype
    offset: float

    @classmethod
    def read(cls, stored: Tensor, scheme: Bnb4, site: Site) -> _State:
        """
        Raises:
            LoadError: it is not what bitsandbytes writes, or says something else than the tensors.
        """
        import torch

        def fail(detail: str) -> LoadError:
            return LoadError(f"{site.name}: {_STATE}{scheme.codes} {detail}")

        try:
            said = parse_json(bytes(stored.tolist()))
        except ValueError as error:
            raise fail(f"is not JSON: {error}") from None
        if not isinstance(said, dict):
            raise fail(f"is {said!r}, expected an object")
        shape = [site.out_features, site.in_features]
        if said.get("quant_type") != scheme.codes or said.get("shape") != shape:
            found = f"{said.get('quant_type')!r} and {said.get('shape')}"
            raise fail(f"says {found}, the tensors are {scheme.codes!r} and {shape}")
        block, entries = said.get("blocksize"), math.prod(shape)
        wanted = -(-entries // scheme.block)  # blocks that there are scales of
        if type(block) is not int or block < 1 or -(-entries // block) != wanted:
            raise fail(f"has blocksize {block!r}, the tensors are in blocks of {scheme.block}")
        name = said.get("dtype")
        if name not in ("bfloat16", "float16", "float32"):
            raise fail(f"has dtype {name!r}, expected bfloat16, float16 or float32")
        offset, size = said.get("nested_offset", 0.0), said.get("nested_blocksize")
        if scheme.double and (
            type(offset) is not float or not math.isfinite(offset) or size != 256
        ):
            raise fail(
                f"has nested_offset {offset!r} in blocks of {said.get('nested_blocksize')!r}"
            )
        return cls(block, getattr(torch, name), offset)


@dataclass(frozen=True, slots=True)
class LlmInt8:
    """8-bit integers with the largest magnitude of each row, which stands for 127.

    bitsandbytes also rounds activations, all but the columns that have an outlier anywhere in the
    batch. What a request is answered would depend on the requests beside it, so that is left out.
    """

    marked: bool = True  # the order of entries is stored: 0, by rows; old files leave it out

    @property
    def name(self) -> str:
        return "llm.int8"

    @property
    def bits(self) -> int:
        return 8

    @property
    def slots(self) -> tuple[Slot, ...]:
        slots = (
            Slot("weight", frozenset({"I8"}), ("out", "in"), "codes"),
            Slot("SCB", frozenset({"F32"}), ("out",), "scales"),
        )
        mark = Slot("weight_format", frozenset({"U8"}), (), "header")
        return (*slots, mark) if self.marked else slots

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        """
        Raises:
            LoadError: entries are in an order that only certain GPUs use.
        """
        from cabochon.nn.byte_codes import ByteWeight

        if self.marked and int(stored["weight_format"]) != 0:
            number = int(stored["weight_format"])
            raise LoadError(f"{site.name}: weight_format is {number}, expected 0, rows in order")
        scales = stored["SCB"][:, None]
        cell = (1, site.in_features)
        return ByteWeight(stored["weight"], scales, cell=cell, factor=_PER_CODE)


def candidates(site: Site, stored: Mapping[str, TensorMeta]) -> Iterator[Scheme]:
    """Schemes that leaves, dtypes and the number of blocks leave open."""
    if "SCB" in stored:
        yield LlmInt8("weight_format" in stored)
    if "weight.absmax" not in stored:
        return
    weight, blocks = stored.get("weight"), stored["weight.absmax"].shape
    storage = weight.dtype if weight is not None and weight.dtype in _STORAGE.values() else "U8"
    for codes in get_args(Codes):
        if f"{_STATE}{codes}" in stored:
            break
    fitting = (size for size in _BLOCKS if blocks == (site.extent(f"out*in/{size}"),))
    yield Bnb4(codes, "weight.nested_absmax" in stored, next(fitting, BLOCK), storage)


def rules(key: str, config: Mapping[str, Any]) -> Rules:
    """One scheme for all linear layers but those that are skipped."""
    skipped = config.get("llm_int8_skip_modules")
    ignore = unconverted(
        ["lm_head"] if skipped is None else skipped, f"{key}.llm_int8_skip_modules"
    )
    claim = _claim(key, config)
    notes = (_UNROUNDED,) if isinstance(claim.scheme, LlmInt8) else ()
    groups = {claim.rule: (Targets.of(["Linear"]), claim)}
    return Rules(groups=groups, ignore=ignore, notes=notes)


def _claim(key: str, config: Mapping[str, Any]) -> Claim:
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        codes = config.get("bnb_4bit_quant_type", "fp4")
        storage = config.get("bnb_4bit_quant_storage", "uint8")
        if codes not in TABLES or storage not in _STORAGE:
            reason = f"4-bit codes {codes!r} stored as {storage!r} are not known to this version"
            return Claim(key, unsupported=reason)
        double = bool(config.get("bnb_4bit_use_double_quant"))
        scheme = Bnb4(codes, double=double, storage=_STORAGE[storage])
        return Claim("bitsandbytes load_in_4bit", scheme=scheme)
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        return Claim("bitsandbytes load_in_8bit", scheme=LlmInt8())
    return Claim(key, unsupported="neither load_in_4bit nor load_in_8bit is set")
