"""Fixture checkpoints, and altered copies of them written by the safetensors library."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from stored import FIXTURES, Config, Tensors, config_of, tensors_of, write
from thin import fixture
from torch import Tensor

from cabochon.checkpoint.folder import TORCH_NAMES, Checkpoint
from cabochon.checkpoint.headers import TensorMeta
from cabochon.config import parse_config
from cabochon.gemma4.model import Gemma4
from cabochon.load.execute import Progress, execute
from cabochon.load.plan import LoadPlan
from cabochon.load.planner import build_plan
from cabochon.load.report import Report, plan_checkpoint

DENSE = FIXTURES / "e2b-bf16"
QUANTIZED = tuple(
    fixture(name)
    for name in (
        "e2b-w4a16",
        "e2b-w4a16-asym",
        "e2b-w8a16",
        "e2b-w8a16-asym",
        "e2b-w4a16-head",
        "e2b-w4a16-embed",
        "12b-w4a16",
        "26b-w4a16",
        "31b-w4a16",
    )
)
NVFP4 = (fixture("e2b-nvfp4a16"), fixture("26b-nvfp4a16"))
W4A16 = QUANTIZED[0]
ASYMMETRIC = QUANTIZED[1]


def altered(
    folder: Path,
    source: Path,
    tensors: Callable[[Tensors], object] | None = None,
    config: Callable[[Config], object] | None = None,
) -> Path:
    """A copy of `source` in `folder` after `tensors` and `config` have been changed in place."""
    stored, described = tensors_of(source), config_of(source)
    if tensors is not None:
        tensors(stored)
    if config is not None:
        config(described)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return write(folder, stored, described)


def plan_of(folder: Path) -> LoadPlan:
    raw = config_of(folder)
    return build_plan(Checkpoint.open(folder), parse_config(raw), raw)


def load_model(
    folder: Path, *, dtype: torch.dtype, progress: Progress | None = None
) -> tuple[Gemma4, Report]:
    """The model in `folder`, and the report on how it is stored."""
    report = plan_checkpoint(folder)
    assert report.plan is not None
    return execute(report.plan, dtype=dtype, progress=progress).model, report


def meta_of(name: str, tensor: Tensor) -> TensorMeta:
    """What a header would say of `tensor`, in a file that is not there."""
    dtype = next(n for n, torchs in TORCH_NAMES.items() if getattr(torch, torchs) is tensor.dtype)
    return TensorMeta(name, dtype, tuple(tensor.shape), Path("none"), (0, tensor.nbytes))
