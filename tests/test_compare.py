"""`cabochon compare`: its figures are numpy's on upstream's own decompression."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import DENSE, FIXTURES, W4A16, Tensors, altered, tensors_of
from command import cabochon
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from thin import fixture

from cabochon.verify.comparison import Comparison, compare_checkpoints
from cabochon.verify.weights import SiteSigns

LAYER = "model.language_model.layers.1"
GATE = f"{LAYER}.mlp.gate_proj"
UP = f"{LAYER}.mlp.up_proj"


def site(found: Comparison, name: str) -> SiteSigns:
    return next(site for site in found.sites if site.name == name)


def test_figures_are_numpys_on_upstreams_decompression() -> None:
    stored = tensors_of(W4A16)
    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
    tensors = {
        leaf: stored[f"{GATE}.{leaf}"] for leaf in ("weight_packed", "weight_scale", "weight_shape")
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    made = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"].double().numpy()
    original = tensors_of(DENSE)[f"{GATE}.weight"].double().numpy()
    gap = original - made
    found = site(compare_checkpoints(W4A16, DENSE), GATE)
    assert found.loss is not None
    expected = 10 * math.log10((original**2).sum() / (gap**2).sum())
    assert found.loss.distance.decibels == pytest.approx(expected, rel=1e-9)
    assert found.loss.distance.largest == pytest.approx(np.abs(gap).max())
    assert found.signs.largest == np.abs(made).max()
    assert found.signs.zeros == (made == 0).mean()
    assert found.signs.bits == 8 * sum(t.nbytes for t in tensors.values()) / made.size


def test_a_file_lost_nothing_against_itself() -> None:
    found = compare_checkpoints(DENSE, DENSE)
    assert not found.worst
    assert all(site.loss is not None for site in found.sites)
    assert found.as_dict()["sites"][0]["loss"]["decibels"] is None  # infinity is no JSON


@pytest.mark.parametrize("other", ["31b-bf16", "e2b-assistant"])
def test_models_of_other_sizes_are_refused(other: str) -> None:
    done = cabochon("compare", W4A16, FIXTURES / other)
    assert done.returncode == 2
    assert "only models of the same sizes can be compared" in done.stderr


@pytest.mark.parametrize("name", ["e2b-w4a16-embed", "26b-w4a16", "31b-bnb-nf4"])
def test_large_matrices_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path, original = fixture(name), FIXTURES / f"{name[:3]}-bf16"
    whole = compare_checkpoints(path, original).as_dict()
    monkeypatch.setattr("cabochon.load.in_file.LARGE", 0)
    monkeypatch.setattr("cabochon.load.in_file.PIECE_BYTES", 1 << 10)
    assert compare_checkpoints(path, original).as_dict() == whole


def scaled(tensors: Tensors) -> None:
    tensors[f"{GATE}.weight_scale"] *= 1.5


def swapped(tensors: Tensors) -> None:
    for leaf in ("weight_packed", "weight_scale"):
        gate, up = tensors[f"{GATE}.{leaf}"], tensors[f"{UP}.{leaf}"]
        tensors[f"{GATE}.{leaf}"], tensors[f"{UP}.{leaf}"] = up, gate


def nibbles(tensors: Tensors) -> None:
    octets = tensors[f"{GATE}.weight_packed"].view(torch.uint8)
    octets.copy_(octets >> 4 | octets << 4)


FAULTS: dict[str, tuple[Callable[[Tensors], object], set[str], float]] = {
    "scales half too large": (scaled, {GATE}, 7.0),
    "gate and up exchanged": (swapped, {GATE, UP}, 0.0),
    "nibbles exchanged": (nibbles, {GATE}, 0.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_ruined_matrix_is_the_worst(tmp_path: Path, fault: str) -> None:
    change, ruined, most = FAULTS[fault]
    found = compare_checkpoints(altered(tmp_path, W4A16, change), DENSE)
    worst = found.worst[: len(ruined)]
    assert {site.name for site in worst} == ruined
    assert all(site.loss and site.loss.distance.decibels < most for site in worst)
    following = found.worst[len(ruined)].loss
    assert following is not None
    assert following.distance.decibels > 19


def test_dead_groups_and_crowded_ends_are_remarked_without_an_original(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{GATE}.weight_scale"][0] = 0
        tensors[f"{UP}.weight_packed"].fill_(-1)  # every code at the upper end

    remarks = "\n".join(compare_checkpoints(altered(tmp_path, W4A16, change)).remarks)
    assert f"{GATE}: 2 groups hold nothing but zeros" in remarks
    assert f"{UP}: 100% of its codes are at the ends of their range" in remarks
    assert not compare_checkpoints(W4A16).remarks


def test_more_bits_lose_less() -> None:
    def least(name: str) -> float:
        worst = compare_checkpoints(fixture(name), DENSE).worst[0].loss
        assert worst is not None
        return worst.distance.decibels

    assert least("e2b-w8a16") > least("e2b-w4a16") + 20


def test_the_command_writes_a_page_and_json(tmp_path: Path) -> None:
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    files = ["--html", str(page), "--json", str(data)]
    done = cabochon("compare", W4A16, DENSE, *files)
    assert done.returncode == 0
    assert "the worst, by signal to noise" in done.stdout
    head = next(line for line in done.stdout.splitlines() if "stored as" in line)
    for column in ("MB", "bits", "dB least", "largest error", "outlying", "dead", "at the ends"):
        assert column in head
    found = json.loads(data.read_text())
    assert (found["schema"], len(found["sites"])) == (1, 92)
    text = page.read_text()
    assert "cabochon compare" in text
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    done = cabochon("compare", W4A16, "--html", tmp_path / "no" / "where.html")
    assert done.returncode == 2
    assert "cannot be written: No such file or directory" in done.stderr
