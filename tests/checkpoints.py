"""Fixture checkpoints, and altered copies of them written by the safetensors library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cabochon.checkpoint.folder import TORCH_NAMES, Checkpoint
from cabochon.checkpoint.headers import TensorMeta
from cabochon.config import parse_config
from cabochon.gemma4.model import Gemma4
from cabochon.load.execute import Progress, execute
from cabochon.load.plan import LoadPlan
from cabochon.load.planner import build_plan
from cabochon.load.report import Report, plan_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
DENSE = FIXTURES / "e2b-bf16"
QUANTIZED = tuple(
    FIXTURES / name
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
NVFP4 = (FIXTURES / "e2b-nvfp4a16", FIXTURES / "26b-nvfp4a16")
W4A16 = QUANTIZED[0]
ASYMMETRIC = QUANTIZED[1]

Tensors = dict[str, Tensor]
Config = dict[str, Any]


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def config_of(folder: Path) -> Config:
    config: Config = json.loads((folder / "config.json").read_text())
    return config


def write(folder: Path, tensors: Tensors, config: Config) -> Path:
    """A checkpoint of `tensors` and `config` alone."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


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
