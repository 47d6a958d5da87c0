"""The load plan: one consumer for each stored tensor, one producer for each thing the model needs.

The plan is a value, made from headers and configuration alone (`load/planner.py`). A plan with
problems is a refusal; it is never executed, and still describes what it could, for the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cabochon.checkpoint.headers import TensorMeta
from cabochon.config import Gemma4Config
from cabochon.load.names import KV_SCALES
from cabochon.load.transforms import Transform
from cabochon.load.tree import Parameter
from cabochon.quant.scheme import Activations, Scheme, Site, Slot

Kind = Literal["FOREIGN", "CONFIG", "UNUSED", "MISSING", "TWICE", "SHAPE", "DTYPE", "SCHEME"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a checkpoint is refused: `where`, a stored or needed name, stands for `count` of them."""

    kind: Kind
    where: str
    detail: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth saying about `where` that does not keep the checkpoint from loading."""

    where: str
    detail: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A stored tensor that is not read, and the outermost module of which nothing is needed."""

    tensor: TensorMeta
    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class SiteRead:
    """A matrix or one part of it, the scheme it is stored in, and its tensors by leaf."""

    site: Site  # with the dimensions of the part
    scheme: Scheme
    stored: Mapping[str, TensorMeta]
    part: int | None = None
    activations: Activations | None = None
    transform: Transform | None = None  # of the matrix, before it is one

    @property
    def stored_as(self) -> str:
        """How the matrix is stored and what is done to activations, as reports print it."""
        name = self.scheme.name
        return name if self.activations is None else f"{name}, inputs {self.activations.name}"

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All that its tensors may be in."""
        return (*self.scheme.slots, *(self.activations.slots if self.activations else ()))

    @property
    def nbytes(self) -> int:
        return sum(meta.nbytes for meta in self.stored.values())


@dataclass(frozen=True, slots=True)
class ParameterRead:
    parameter: Parameter
    tensor: TensorMeta
    transform: Transform | None = None


@dataclass(frozen=True, slots=True)
class LoadPlan:
    config: Gemma4Config
    has_head: bool
    sites: tuple[SiteRead, ...]
    parameters: tuple[ParameterRead, ...]
    dropped: tuple[Dropped, ...]
    notes: tuple[Note, ...]
    problems: tuple[Problem, ...]

    @property
    def kv_scales(self) -> tuple[TensorMeta, ...]:
        """Dropped tensors whose values are told of all the same."""
        return tuple(drop.tensor for drop in self.dropped if drop.reason == KV_SCALES)

    @property
    def nbytes(self) -> int:
        """Bytes that executing the plan makes weights of."""
        matrices = sum(read.nbytes for read in self.sites)
        return matrices + sum(read.tensor.nbytes for read in self.parameters)
