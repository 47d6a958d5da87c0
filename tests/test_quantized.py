"""Quantized checkpoints answer as upstream's decompression of them does, run by transformers.

transformers is no oracle for quantized files themselves (it leaves experts uninitialised), so each
file is decompressed by compressed-tensors first, and that dense copy is loaded strictly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import NVFP4, QUANTIZED, Tensors, config_of, tensors_of, write
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from conftest import FIXTURES, noise
from reference import greedy, logits, relative_error
from thin import THIN
from torch.nn.functional import cosine_similarity

from cabochon import LLM, SamplingParams

LEAVES = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
)
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def decompressed(folder: Path) -> Tensors:
    """Every matrix of the checkpoint dense, as compressed-tensors makes it."""
    stored = tensors_of(folder)
    dense = {n: t for n, t in stored.items() if not re.search(r"\.weight_\w+$", n)}
    for name in stored:
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            parts = {f: stored[f"{module}.{f}"] for f in LEAVES if f"{module}.{f}" in stored}
            scheme = scheme_of(folder, parts)
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            dense[f"{module}.weight"] = compressor.decompress(parts, scheme)["weight"]
    return stacked(dense)


def scheme_of(folder: Path, parts: Tensors) -> QuantizationScheme:
    """The config group whose width is that of the packed words."""
    groups = config_of(folder)["quantization_config"]["config_groups"].values()
    schemes = [QuantizationScheme.model_validate(group) for group in groups]
    if "weight_shape" not in parts:  # 4-bit floats, of which there is one kind
        return next(s for s in schemes if s.format == "nvfp4-pack-quantized")
    _, width = parts["weight_shape"].tolist()
    bits = 32 * parts["weight_packed"].shape[1] // width
    return next(s for s in schemes if s.weights is not None and s.weights.num_bits == bits)


def stacked(dense: Tensors) -> Tensors:
    """Experts stored one by one in the three dimensions in which transformers holds them."""
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name in list(dense):
        match = EXPERT.fullmatch(name)
        if match is not None:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = dense.pop(name)
    for module, parts in experts.items():
        numbers = sorted({number for number, _ in parts})
        fused = [torch.cat((parts[n, "gate"], parts[n, "up"])) for n in numbers]
        dense[f"{module}.gate_up_proj"] = torch.stack(fused)
        dense[f"{module}.down_proj"] = torch.stack([parts[n, "down"] for n in numbers])
    return dense


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        from transformers import AutoModelForImageTextToText

        config = config_of(folder)
        del config["quantization_config"]
        path = tmp_path_factory.mktemp(folder.name)
        write(path, {n: t.float() for n, t in decompressed(folder).items()}, config)
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info.values()), info
        return model.eval()

    return load


@pytest.mark.parametrize("folder", [*QUANTIZED, *NVFP4], ids=lambda folder: folder.name)
def test_answers_are_those_of_upstreams_decompression(
    folder: Path, oracle: Callable[[Path], Any]
) -> None:
    with LLM(folder, dtype="float32") as llm:
        image = llm.config.tokens.image
        tokens = [2, 4, *range(300, 350), image, *range(320, 360), 5]
        prompt = llm.prompts.raw(tokens, [noise(100, 60)])
        ours = llm.logits(list(prompt.tokens), [noise(100, 60)])
        params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
        answer = list(llm.generate(prompt, params)[0].tokens)
    reference = oracle(folder)
    theirs = logits(reference, prompt)
    assert cosine_similarity(ours, theirs, dim=-1).min() > 0.9999
    assert relative_error(ours, theirs) < 1e-4
    assert answer == greedy(reference, prompt, 32)


def test_the_fixtures_are_all_here() -> None:
    found = {folder.name for kept in (FIXTURES, THIN) for folder in kept.glob("???-[wn]*[48]a16*")}
    assert found == {folder.name for folder in (*QUANTIZED, *NVFP4)}


def test_the_fixtures_are_small() -> None:
    """Every clone has them; `thin.py` leaves out of a new one what another holds already."""
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) < 40_000_000
