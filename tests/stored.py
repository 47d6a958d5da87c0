"""Where fixtures lie, and their files as the safetensors library reads and writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"

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
