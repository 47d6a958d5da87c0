"""What whoever makes an `LLM` may wish, checked before anything is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cabochon.errors import CabochonError
from cabochon.kernels.library import Activations

Dtype = Literal["auto", "float32", "bfloat16"]
KvDtype = Literal["auto", "float16", "float32", "int8"]

_CHOICES = {
    "dtype": get_args(Dtype),
    "activations": ("auto", *get_args(Activations)),
    "kv_dtype": get_args(KvDtype),
}
_LEAST = {
    "threads": 1,
    "kv_cache_bytes": 1,
    "max_batch": 1,
    "prefill_chunk": 1,
    "max_context": 1,
    "draft_tokens": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """See `LLM`.

    Raises:
        CabochonError: one that is not among the choices, or too small.
    """

    dtype: Dtype
    activations: Activations | Literal["auto"]
    kv_dtype: KvDtype
    threads: int | None
    kv_cache_bytes: int | None
    max_batch: int
    prefill_chunk: int
    max_context: int | None
    picture_tokens: int | None
    draft_tokens: int | None
    debug_nan: bool

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            choice = getattr(self, name)
            if choice not in choices:
                expected = ", ".join(choices)
                raise CabochonError(f"{name} is {choice!r}, expected one of {expected}")
        for name, least in _LEAST.items():
            size = getattr(self, name)
            if size is not None and size < least:
                raise CabochonError(f"{name} is {size}, expected at least {least}")
