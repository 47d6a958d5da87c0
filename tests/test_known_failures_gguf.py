"""What broke other engines with GGUF, and what its converter changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES
from gguf_models import MODELS, rewrite
from known import Known, load, refusal
from torch import equal, float32

PROJECTOR = "mmproj-bf16.gguf"


@dataclass(frozen=True)
class KnownGguf(Known):
    """A model in GGUF, of which `tensors` and `config` change what `changed` holds."""

    changed: str = ""  # a file of the folder; by itself the source
    original: Path | None = None  # the safetensors whose towers it has

    def make(self, folder: Path) -> Path:
        made = folder / "model"
        shutil.copytree(self.source.parent, made)
        if self.tensors is not None or self.config is not None:
            name = self.changed or self.source.name
            changes: Any = (self.tensors, self.config)
            rewrite(self.source.with_name(name), made / name, *changes)
        return made / self.source.name

    def check(self, folder: Path) -> None:
        path = self.make(folder)
        if self.refused:
            text = refusal(path)
            for part in self.refused:
                assert part in text
            return
        report, found = load(path)
        assert found
        schemes = " ".join(row.scheme for row in report.groups)
        for part in self.noted:
            assert part in schemes
        if self.original is not None:
            for name, weight in load(self.original)[1].items():
                if "language_model" not in name:
                    assert equal(found[name].dense(float32), weight.dense(float32)), name


def without(name: str) -> Callable[[Any], object]:
    return lambda tensors: tensors.pop(name)


E2B = MODELS["e2b q4_1"][0]
KNOWN = (
    KnownGguf(
        "kekzl/imp #489",
        "a projector that lacks a tensor: pictures were hallucinated",
        E2B,
        tensors=without("mm.input_projection.weight"),
        changed=PROJECTOR,
        refused=("MISSING", "mm.input_projection"),
    ),
    KnownGguf(
        "llama.cpp conversion/gemma.py",
        "patch columns, the sound's scales and convolutions as the converter changes them",
        E2B,
        original=FIXTURES / "e2b-bf16",
    ),
    KnownGguf(
        "llama.cpp conversion/gemma.py",
        "NVFP4 experts, whose scales are multiplied with the router's per-expert scale",
        MODELS["26b nvfp4"][0],
        noted=("gguf nvfp4",),
    ),
    KnownGguf(
        "llama.cpp #22780",
        "queries, keys and values in one attn_qkv",
        MODELS["31b fused"][0],
        noted=("gguf q5_0",),
    ),
    KnownGguf(
        "llama.cpp #22243",
        "the table of per-layer inputs in Q5_K, and tensors of thirteen other types",
        MODELS["e2b every type"][0],
        noted=("gguf q5_k", "gguf iq4_xs"),
    ),
    KnownGguf(
        "guoqingbao/xinfer #303",
        "rows that are no multiple of 256, for which K-quants fall back to blocks of 32",
        MODELS["26b every type"][0],
        noted=("gguf q4_k", "gguf q5_0", "gguf q8_0"),
    ),
    KnownGguf(
        "vLLM #39583",
        "any GGUF, which vLLM does not load any more; here in parts, with sight and hearing",
        MODELS["12b split"][0],
        noted=("gguf q8_0",),
    ),
    KnownGguf(
        "llama.cpp conversion/gemma.py",
        "a drafter, without its clusters of tokens",
        FIXTURES / "gguf" / "assistant" / "e2b-assistant-q8_0.gguf",
        noted=("gguf q8_0",),
    ),
)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_known(tmp_path: Path, known: KnownGguf) -> None:
    known.check(tmp_path)


def test_a_wrong_original_would_be_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        replace(KNOWN[1], original=FIXTURES / "26b-bf16").check(tmp_path)
