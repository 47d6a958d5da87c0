"""Clean checkpoints of common formats verify against their bfloat16, and lose by their bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from conftest import MEMBERS
from ct_writer import LAYERS, encode
from wide import FOLDER, original

from cabochon.verify.verification import Verification, verify

# The bits of an entry, from which on what comes out is closer.
BITS = {"int8": 8, "fp8": 8, "w4a16": 4, "nf4": 4, "nvfp4": 4, "q4_k": 4}
PRESETS = {"int8": "W8A8", "fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4A16"}
GROUPS = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(member: str) -> Path:
        if member not in made:
            made[member] = original(member, tmp_path_factory.mktemp(member))
        return made[member]

    return of


def quantized(source: Path, member: str, kind: str, room: Path) -> Path:
    """By its producer's own software."""
    if kind == "q4_k":
        return FOLDER / member / f"{member}-q4_k_m.gguf"
    if kind == "nf4":
        return nf4(source, room)
    if kind == "w4a16":
        scheme = QuantizationScheme(targets=["Linear"], weights=GROUPS)
    else:
        scheme = preset_name_to_scheme(PRESETS[kind], ["Linear"])
    return encode(room, source, {LAYERS: scheme})


def nf4(source: Path, room: Path) -> Path:
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    model = AutoModelForImageTextToText.from_pretrained(
        source,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map="cpu",
    )
    model.save_pretrained(room)
    for path in source.iterdir():
        if not (room / path.name).exists():
            (room / path.name).write_bytes(path.read_bytes())
    return room


def divergence(found: Verification) -> float:
    ends = next(stage for stage in found.stages if stage.name == "modules").finding.data["ends"]
    return float(next(end for end in ends if end["prompt"] == "text")["KL divergence"])


@pytest.mark.parametrize("member", MEMBERS)
def test_clean_ones_verify_and_lose_by_their_bits(
    originals: Callable[[str], Path], tmp_path: Path, member: str
) -> None:
    source, lost = originals(member), dict[str, float]()
    for kind in BITS:
        path = quantized(source, member, kind, tmp_path / kind)
        found = verify(path, source, to_the_end=True)
        assert found.passed, (kind, [stage.finding.faults for stage in found.stages])
        lost[kind] = divergence(found)
    least = min(lost[kind] for kind, bits in BITS.items() if bits == 4)
    assert max(lost[kind] for kind, bits in BITS.items() if bits == 8) < least
