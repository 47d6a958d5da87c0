"""The compiled kernels: a library without Python in it, called through ctypes.

It is built when the package is installed. Where there was no compiler it is missing, and everything
runs as `nn` computes it. It is here before torch is: it reads weights while torch is imported.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import (
    POINTER,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint8,
    c_uint32,
    c_void_p,
)
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cabochon.errors import CabochonError

if TYPE_CHECKING:
    from torch import Tensor

Activations = Literal["int8", "int16", "float32"]  # what their inputs are rounded to

VARIABLE = "CABOCHON_ISA"
INSTRUCTION_SETS = ("avx512vnni", "avxvnni", "avx2", "neon", "scalar")  # the fastest first

_FILE = Path(__file__).with_name("libcabochon.so")


class Matrix(ctypes.Structure):
    """`struct Matrix` of csrc/api.h."""

    _fields_ = (
        ("data", c_void_p),
        ("levels", c_void_p),
        ("stride", c_int64),
        ("shared_at", c_int64),
        ("minima_at", c_int64),
        ("shared_minima_at", c_int64),
        ("codes_at", c_int64),
        ("rows", c_int32),
        ("columns", c_int32),
        ("units", c_int32),
        ("codes", c_int32),
        ("scales", c_int32),
        ("minima", c_int32),
        ("groups", c_int32),
        ("halves", c_int32),
        ("per_shared", c_int32),
        ("digits", c_int32),
        ("round", c_int32),
        ("zero", c_float),
        ("gain", c_float),
        ("unit", c_float),
        ("table", c_uint8 * 32),
        ("values", c_float * 16),
    )


class Plane(ctypes.Structure):
    """`struct Plane` of csrc/api.h."""

    _fields_ = tuple((name, c_int32) for name in ("at", "bits", "run", "to"))


class Layout(ctypes.Structure):
    """`struct Layout` of csrc/api.h."""

    _fields_ = (
        *((name, c_int32) for name in ("entries", "bytes", "flip", "high_first", "planes")),
        ("plane", Plane * 2),
    )


class Grouped(ctypes.Structure):
    """`struct Grouped` of csrc/api.h."""

    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("at", "row", "group")),
        *((name, c_int32) for name in ("per_row", "size")),
    )


class Stored(ctypes.Structure):
    """`struct Stored` of csrc/api.h."""

    _fields_ = (
        ("rows", c_void_p),
        *((name, c_int64) for name in ("ld", "bytes")),
        ("layout", Layout),
        ("grouped", Grouped * 4),
        ("which", c_void_p),
    )


class Numbers(ctypes.Structure):
    """`struct Numbers` of csrc/api.h."""

    _fields_ = tuple((name, c_int32) for name in ("form", "bytes", "first", "second"))


class Found(ctypes.Structure):
    """`struct Found` of csrc/api.h."""

    _fields_ = (
        *((name, c_int64) for name in ("bad", "count", "zeros")),
        ("top", c_uint32),
        ("largest", c_float),
        ("octets", c_int64 * 256),
        ("error", c_int32),
    )


class Stretch(ctypes.Structure):
    """`struct Stretch` of csrc/api.h."""

    _fields_ = (
        ("file", c_int32),
        *((name, c_int64) for name in ("at", "size", "every")),
        ("numbers", Numbers),
        *((name, c_void_p) for name in ("sums", "sample")),
        ("found", POINTER(Found)),
    )


class Rows(ctypes.Structure):
    """`struct Rows` of csrc/api.h."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("rows", c_int32),
        ("columns", c_int32),
        ("type", c_int32),
        ("scale_rows", c_int32),
        ("scale_columns", c_int32),
    )


class Linear(ctypes.Structure):
    """`struct Linear` of csrc/api.h."""

    _fields_ = (("packed", POINTER(Matrix)), ("rows", POINTER(Rows)))


class Sketch(ctypes.Structure):
    """`struct Sketch` of csrc/api.h."""

    _fields_ = (
        ("near", Matrix),
        *((name, c_void_p) for name in ("dither", "margins")),
        ("whole", Linear),
        ("stored", POINTER(Stored)),
    )


class Search(ctypes.Structure):
    """`struct Search` of csrc/api.h."""

    _fields_ = (
        ("products", c_void_p),
        ("sketch", POINTER(Sketch)),
        *((name, c_void_p) for name in ("x", "never", "allowed", "ids", "found")),
        *((name, c_int32) for name in ("n", "count", "nevers", "room", "threads")),
        ("widest", c_float * 2),
        *((name, c_float) for name in ("cap", "rounding")),
    )


_LINEARS = ("q", "k", "v", "o", "gate", "up", "down", "own_gate", "own_up")
_NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "after_own")


class Experts(ctypes.Structure):
    """`struct Experts` of csrc/api.h."""

    _fields_ = (
        ("router", Linear),
        ("gate_up", POINTER(Linear)),
        ("down", POINTER(Linear)),
        *((name, c_void_p) for name in ("router_scale", "per_expert")),
        *((name, c_void_p) for name in ("before", "after", "after_mlp")),
        ("gate_up_rows", c_int32),
        ("down_rows", c_int32),
        ("count", c_int32),
        ("chosen", c_int32),
        ("intermediate", c_int32),
        ("root", c_float),
    )


class Layer(ctypes.Structure):
    """`struct Layer` of csrc/api.h."""

    _fields_ = (
        *((name, Linear) for name in _LINEARS),
        *((name, c_void_p) for name in (*_NORMS, "q_norm", "k_norm")),
        ("experts", POINTER(Experts)),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate", c_int32),
        ("own", c_int32),
        ("shares_kv", c_int32),
        ("values_are_keys", c_int32),
        ("eps", c_float),
        ("scalar", c_float),
    )


class Text(ctypes.Structure):
    """`struct Text` of csrc/api.h."""

    _fields_ = (
        ("layers", POINTER(POINTER(Layer))),
        *((name, c_void_p) for name in ("turns", "frequencies", "pairs")),
        ("projection", Linear),
        *((name, c_void_p) for name in ("own_norm", "norm")),
        *((name, c_int32) for name in ("count", "writing", "rotations", "own")),
        *((name, c_float) for name in ("own_scale", "eps")),
    )


class Cache(ctypes.Structure):
    """`struct Cache` of csrc/api.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        ("kind", c_int32),
        ("group", c_int32),
    )


class Access(ctypes.Structure):
    """`struct Access` of csrc/api.h."""

    _fields_ = tuple((name, c_void_p) for name in ("slots", "pages", "page_at", "low", "high"))


class Turn(ctypes.Structure):
    """`struct Rotation` of csrc/api.h."""

    _fields_ = (("cos", c_void_p), ("sin", c_void_p))


class Step(ctypes.Structure):
    """`struct Step` of csrc/api.h."""

    _fields_ = (
        ("accesses", POINTER(Access)),
        *((name, c_void_p) for name in ("x", "found", "positions", "wanted", "y")),
        *((name, c_int32) for name in ("groups", "n", "rows", "threads")),
    )


class Pass(ctypes.Structure):
    """`struct Pass` of csrc/api.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "inputs")),
        ("inputs_ld", c_int64),
        *((name, c_int32) for name in ("n", "threads")),
    )


_SIGNATURES = {
    "choose": (c_int, [c_char_p]),
    "times": (
        None,
        [POINTER(Matrix), c_void_p, c_int64, c_int, c_int, c_int, c_void_p, c_int64, c_int],
    ),
    "times_rows": (
        None,
        [POINTER(Rows), c_void_p, c_void_p, c_int64, c_int, c_int, c_int, c_void_p, c_int64, c_int],
    ),
    "backlog": (c_void_p, [c_int]),
    "wait": (c_int, [c_void_p, c_int64, c_int]),
    "end": (None, [c_void_p]),
    "look": (c_int64, [c_void_p, POINTER(Stretch)]),
    "pack": (c_int64, [c_void_p, POINTER(Matrix), POINTER(Stored)]),
    "sketch": (c_int64, [c_void_p, POINTER(Sketch)]),
    "copy": (c_int64, [c_void_p, c_void_p, c_void_p, c_int64]),
    "near": (None, [POINTER(Sketch), c_void_p, c_int64, c_int, c_void_p, c_int64, c_int]),
    "search": (c_int64, [POINTER(Search)]),
    "dense": (None, [POINTER(Matrix), c_void_p, c_int64, c_int, c_void_p, c_int]),
    "picked": (None, [POINTER(Matrix), POINTER(Stored), c_void_p, c_int, c_void_p, c_int]),
    "text": (None, [POINTER(Text), POINTER(Cache), POINTER(Step)]),
    "layer": (
        None,
        [POINTER(Layer), POINTER(Cache), POINTER(Access), POINTER(Turn), POINTER(Pass)],
    ),
    "peak": (c_double, [c_int64, c_int]),
    "read": (None, [c_void_p, c_int64, c_int]),
    "advise": (None, [c_void_p, c_int64]),
    "enlarge": (None, [c_void_p, c_int64, c_int]),
}


class Library:
    """The functions of the library, and the instruction set that they use."""

    def __init__(self, file: Path) -> None:
        self._dll = ctypes.CDLL(str(file))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._dll, f"cabochon_{name}")
            function.restype = result
            function.argtypes = arguments
        self.times = self._dll.cabochon_times
        self.times_rows = self._dll.cabochon_times_rows
        self.backlog = self._dll.cabochon_backlog
        self.wait = self._dll.cabochon_wait
        self.end = self._dll.cabochon_end
        self.look = self._dll.cabochon_look
        self.pack = self._dll.cabochon_pack
        self.sketch = self._dll.cabochon_sketch
        self.copy = self._dll.cabochon_copy
        self.near = self._dll.cabochon_near
        self.search = self._dll.cabochon_search
        self.dense = self._dll.cabochon_dense
        self.picked = self._dll.cabochon_picked
        self.text = self._dll.cabochon_text
        self.layer = self._dll.cabochon_layer
        self.peak = self._dll.cabochon_peak
        self.read = self._dll.cabochon_read
        self.advise = self._dll.cabochon_advise
        self.enlarge = self._dll.cabochon_enlarge
        self.isa = ""

    def available(self) -> tuple[str, ...]:
        """The instruction sets that this machine has; the last that was tried is in use."""
        before = self.isa
        found = tuple(name for name in INSTRUCTION_SETS if self._dll.cabochon_choose(name.encode()))
        if before:
            self.choose(before)
        return found

    def choose(self, isa: str) -> None:
        """Compute with `isa` from now on.

        Raises:
            CabochonError: this machine does not have it.
        """
        if not self._dll.cabochon_choose(isa.encode()):
            have = ", ".join(self.available())
            raise CabochonError(f"{VARIABLE} is {isa!r}, but this machine has {have}")
        self.isa = isa


@cache
def library() -> Library | None:
    """The library, or None where it was not built."""
    if not _FILE.is_file():
        return None
    found = Library(_FILE)
    found.choose(os.environ.get(VARIABLE) or found.available()[0])
    return found


def address(tensor: Tensor | None) -> int | None:
    """Where the kernels find a tensor, which must be contiguous and stay alive."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def threads() -> int:
    import torch

    return torch.get_num_threads()


def threads_without_torch() -> int:
    """As many as torch would take."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and asked != "0" else os.cpu_count() or 1
