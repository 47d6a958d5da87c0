"""A planned checkpoint made ready to compute. This imports torch; `llm` does not until it must."""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple

import torch

from cabochon.engine.cache import CachePlan
from cabochon.engine.engine import Engine
from cabochon.engine.runner import Runner
from cabochon.errors import ResourceError
from cabochon.gemma4.model import Gemma4
from cabochon.kernels.backlog import Backlog
from cabochon.kernels.choose import Kernels
from cabochon.kernels.layers import fuse
from cabochon.kernels.library import Activations, library
from cabochon.kernels.pages import enlarge
from cabochon.load.execute import Loaded, Progress, execute
from cabochon.load.look import look
from cabochon.load.plan import LoadPlan
from cabochon.load.survey import Survey

__all__ = ["CachePlan", "Engine", "Kernels", "Numbers", "draft_tokens", "load", "runner"]

logger = logging.getLogger(__name__)

DRAFT_TOKENS = 15  # with one that is certain fewer than attention computes in another order

_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
_KV_DTYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.int8}


class Numbers(NamedTuple):
    """What is computed in, what keys and values are kept in, what inputs are rounded to."""

    compute: torch.dtype
    kept: torch.dtype
    activations: Activations

    @classmethod
    def of(
        cls, dtype: str, kv_dtype: str, activations: Activations | Literal["auto"]
    ) -> Numbers:
        """Exact where a `dtype` is named, fast where it is not; what is named for itself counts."""
        compute = _DTYPES[dtype]
        kept = _KV_DTYPES.get(kv_dtype, torch.float16 if dtype == "auto" else compute)
        if activations == "auto":
            activations = "int8" if dtype == "auto" else "float32"
        return cls(compute, kept, activations)


def load(
    plan: LoadPlan,
    dtype: torch.dtype,
    kernels: Kernels,
    *,
    survey: Survey | None,
    backlog: Backlog | None,
    progress: Progress,
) -> Loaded:
    """The model, its kernels chosen, filled, said and joined."""
    try:
        loaded = execute(
            plan,
            dtype=dtype,
            progress=progress,
            look=survey or look,
            prepare=kernels.for_weight,
        )
        if backlog is not None:
            backlog.finish()
    except (MemoryError, RuntimeError) as error:  # torch has no class of its own for it
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise ResourceError(
                f"memory ran out while {plan.nbytes / 1e9:.2f} GB of weights were read;"
                " other processes, or a limit on this one, leave too little"
            ) from None
        raise
    level = logging.INFO if kernels.built else logging.WARNING
    logger.log(level, "%s", kernels.describe())
    logger.info("%s", fuse(loaded.model, library()))
    enlarge(loaded.model, library())
    return loaded


def draft_tokens(model: Gemma4) -> int:
    """How many guesses are worth their price.

    Kernels that round activations compute every column by itself, so that a token's logits are the
    same to the bit with guesses beside it; PyTorch's sums depend on how many rows there are.
    """
    return DRAFT_TOKENS if model.model.language_model.together is not None else 0


def runner(model: Gemma4, numbers: Numbers) -> Runner:
    return Runner(model, numbers.compute, torch.device("cpu"), numbers.kept)


def compute_in(threads: int) -> None:
    torch.set_num_threads(threads)
