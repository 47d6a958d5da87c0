"""What a load proves: slots, statistics held against the library's own decoding, hashes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    DENSE,
    FIXTURES,
    NVFP4,
    QUANTIZED,
    W4A16,
    Tensors,
    altered,
    load_model,
    plan_of,
    tensors_of,
)

from cabochon.checkpoint.folder import Checkpoint
from cabochon.checkpoint.headers import TensorMeta
from cabochon.errors import LoadError
from cabochon.load.certificate import Certificate
from cabochon.load.certify import certify
from cabochon.load.execute import execute
from cabochon.load.fingerprint import plan_hash
from cabochon.load.look import look_at, scales_of
from cabochon.load.measure import Measure
from cabochon.load.report import inspect_checkpoint
from cabochon.nn.linear import Embedding, Linear

GATE = "model.language_model.layers.1.mlp.gate_proj"
FILES = (DENSE, *QUANTIZED, *NVFP4)


def certified(folder: Path, *, thorough: bool = False) -> Certificate:
    return execute(plan_of(folder), dtype=torch.float32, thorough=thorough).certificate


@pytest.mark.parametrize("folder", FILES, ids=lambda folder: folder.name)
def test_statistics_are_those_of_the_decoded_weights(folder: Path) -> None:
    model, _ = load_model(folder, dtype=torch.float32)
    certificate = certified(folder, thorough=True)
    assert certificate.planned == certificate.filled
    assert certificate.notes == ()
    found = {site.name: site for site in certificate.sites}
    sites = {n: m for n, m in model.named_modules() if isinstance(m, Linear | Embedding)}
    assert found.keys() == sites.keys()
    for name, module in sites.items():
        weight = module.weight
        assert weight is not None
        dense = weight.dense(torch.float32)
        assert found[name].seen == found[name].entries == dense.numel()
        assert found[name].largest == pytest.approx(float(dense.abs().max()), rel=1e-6)
        assert found[name].zeros == int((dense == 0).sum())
        assert not found[name].dead_groups


@pytest.mark.parametrize("folder", FILES, ids=lambda folder: folder.name)
def test_a_sample_is_of_what_there_is(folder: Path) -> None:
    thorough = {site.name: site for site in certified(folder, thorough=True).sites}
    for site in certified(folder).sites:
        assert 0 < site.seen <= site.entries
        assert site.largest <= thorough[site.name].largest
        assert site.scales == thorough[site.name].scales


def test_scales_are_counted() -> None:
    stored = tensors_of(W4A16)
    (site,) = [site for site in certified(W4A16).sites if site.name == GATE]
    scales = stored[f"{GATE}.weight_scale"].float()
    assert site.scales == scales.numel()
    assert site.largest_scale == float(scales.abs().max())
    assert site.median_scale == float(scales.abs().flatten().median())


@pytest.mark.parametrize("file", sorted((FIXTURES / "gguf").rglob("*.gguf")), ids=lambda f: f.name)
def test_scales_in_blocks_are_those_of_the_library(file: Path) -> None:
    """Entries of a group are at most so many scales: what gguf-py decodes holds it to that."""
    from gguf import GGUFReader, dequantize

    kinds = {"Q4_0": (32, 8), "Q8_0": (32, 127), "Q5_0": (32, 16), "MXFP4": (32, 12)}
    for tensor in GGUFReader(file).tensors:
        kind = tensor.tensor_type.name
        if kind in kinds:
            group, most = kinds[kind]
            entries = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).flatten()
            largest = entries.abs().view(-1, group).amax(1)
            stored = torch.from_numpy(tensor.data.copy()).view(torch.uint8)
            meta = TensorMeta(tensor.name, kind, (len(entries),), file, (0, stored.numel()))
            found = scales_of(stored, look_at([stored.flatten()], meta, kind))
            assert found.count == len(largest)
            assert found.dead <= int((largest == 0).sum())
            assert float(largest.max()) <= found.largest * most
            assert float(largest.max()) >= found.largest * most / 4


def at(leaf: str, change: Callable[[torch.Tensor], object]) -> Callable[[Tensors], object]:
    return lambda tensors: change(tensors[f"{GATE}.{leaf}"])


ODD = {
    "dead groups": (W4A16, at("weight_scale", lambda t: t[3].zero_()), "scales are zero"),
    "one scale": (W4A16, at("weight_scale", lambda t: t[3, 1].mul_(1000)), "times the median"),
    "all scales": (W4A16, at("weight_scale", lambda t: t.mul_(1000)), "same matrix elsewhere"),
    "a global scale": (
        NVFP4[0],
        at("weight_global_scale", lambda t: t.div_(1000)),
        "its weight_global_scale is",
    ),
    "a dense matrix": (DENSE, at("weight", lambda t: t.mul_(1000)), "what others have"),
    "nothing but zeros": (DENSE, at("weight", torch.Tensor.zero_), "every entry"),
}


@pytest.mark.parametrize(("source", "change", "words"), ODD.values(), ids=ODD)
def test_what_is_legal_and_looks_like_damage_is_noted(
    tmp_path: Path, source: Path, change: Callable[[Tensors], object], words: str
) -> None:
    certificate = certified(altered(tmp_path, source, tensors=change))
    assert {note.where for note in certificate.notes} == {(GATE,)}
    assert any(words in note.detail for note in certificate.notes)
    assert GATE in certificate.text()
    assert certificate.fingerprint != certified(source).fingerprint


@pytest.mark.parametrize(("name", "value"), [("std_bias", 0.0), ("std_scale", 1.0)])
def test_a_standardization_as_before_training_is_noted(
    tmp_path: Path, name: str, value: float
) -> None:
    """transformers begins with these, and each is lost by itself."""
    name = f"model.vision_tower.{name}"
    lost = altered(tmp_path / "a", FIXTURES / "31b-w4a16", lambda t: t[name].fill_(value))
    (note,) = certified(lost).notes
    assert note.where == (name,)
    assert "pictures are not standardized" in note.detail
    one = altered(tmp_path / "b", lost, lambda t: t[name][3:4].fill_(0.5))
    assert certified(one).notes == certified(FIXTURES / "31b-w4a16").notes == ()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("source", "name"),
    [
        (W4A16, f"{GATE}.weight_scale"),
        (DENSE, f"{GATE}.weight"),
        (DENSE, "model.language_model.norm.weight"),
    ],
)
def test_a_value_that_is_no_number_refuses_the_load(
    tmp_path: Path, source: Path, name: str, value: float
) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[name].view(-1)[-1] = value

    folder = altered(tmp_path, source, tensors=spoil)
    with pytest.raises(LoadError, match=name.replace(".", r"\.")):
        certified(folder)


def test_replicas_have_one_fingerprint(tmp_path: Path) -> None:
    first = certified(W4A16)
    again = certified(Path(shutil.copytree(W4A16, tmp_path / "elsewhere")))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint.startswith(plan_hash(plan_of(W4A16))[:16])


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("folder", [DENSE, W4A16, FIXTURES / "26b-w4a16"], ids=lambda f: f.name)
def test_any_bit_of_the_weights_counts(tmp_path: Path, folder: Path, where: float) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    file = changed / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    # The lowest bit of a float, or of a code.
    content[start + int(where * (len(content) - start - 2)) // 2 * 2] ^= 1
    file.write_bytes(content)
    try:
        damaged = certified(changed)
    except LoadError:  # it hit the shape that is stored beside packed integers
        return
    whole = certified(folder)
    assert damaged.plan_hash == whole.plan_hash
    assert damaged.weights_hash != whole.weights_hash


@pytest.mark.parametrize("row", [0, -1])
def test_all_rows_of_a_matrix_that_is_read_in_parts_count(tmp_path: Path, row: int) -> None:
    """llama.cpp's converter puts queries, keys and values of some files into one tensor."""
    file = Path(shutil.copy(FIXTURES / "gguf" / "31b" / "31b-q5_0.gguf", tmp_path / "31b.gguf"))
    stored = Checkpoint.open(file).tensors["blk.0.attn_qkv.weight"]
    content = bytearray(file.read_bytes())
    size = stored.nbytes // stored.shape[0]
    first = stored.span[0] if row == 0 else stored.span[1] - size
    content[first + 21] ^= 1  # codes, behind the scale
    plan = inspect_checkpoint(file).plan
    assert plan is not None
    whole = execute(plan, dtype=torch.float32).certificate
    file.write_bytes(content)
    damaged = execute(plan, dtype=torch.float32).certificate
    assert damaged.weights_hash != whole.weights_hash


def test_words_that_change_places_count() -> None:
    def hashed(words: torch.Tensor) -> str:
        measure = Measure()
        meta = TensorMeta("weight", "I64", tuple(words.shape), Path("none"), (0, words.nbytes))
        measure.tensor(words, meta)
        return measure.certificate(plan_of(W4A16), 0).weights_hash

    words = torch.arange(1 << 14, dtype=torch.int64)  # 128 KiB
    exchanged = words.clone()
    exchanged[[3, 700]] = words[[700, 3]]
    assert hashed(words) == hashed(words.clone())
    assert hashed(words) != hashed(exchanged)
    assert hashed(words) != hashed(words.view(2, -1).flip(0))


def test_the_certificate_is_json_and_text() -> None:
    certificate = certified(W4A16)
    found = certificate.as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["slots_planned"] == found["slots_filled"]
    assert certificate.fingerprint in certificate.text()


ATTENTION = "model.language_model.layers.{}.self_attn"


def with_cache_scales(*values: float) -> Callable[[Tensors], object]:
    """Both spellings that others give layers 0 to 2; `values` are those of their keys."""

    def change(tensors: Tensors) -> None:
        for layer, value in enumerate(values):
            tensors[f"{ATTENTION.format(layer)}.k_scale"] = torch.tensor([value])
            tensors[f"{ATTENTION.format(layer)}.v_proj.v_scale"] = torch.tensor(0.5).bfloat16()

    return change


def test_scales_of_the_cache_are_read_told_and_not_used(tmp_path: Path) -> None:
    folder = altered(tmp_path, W4A16, tensors=with_cache_scales(0.25, 0.125, 0.75))
    certificate, plain = certified(folder), certified(W4A16)
    found = {scale.name: (scale.least, scale.largest) for scale in certificate.kv_scales}
    assert found == {
        **{f"{ATTENTION.format(i)}.k_scale": (v, v) for i, v in enumerate((0.25, 0.125, 0.75))},
        **{f"{ATTENTION.format(i)}.v_proj.v_scale": (0.5, 0.5) for i in range(3)},
    }
    assert "3 k_scale of a quantized KV cache, 0.125 to 0.75: not used" in certificate.text()
    assert certificate.weights_hash == plain.weights_hash
    assert plain.kv_scales == ()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_scale_of_the_cache_that_is_no_number_refuses_the_load(
    tmp_path: Path, value: float
) -> None:
    folder = altered(tmp_path, W4A16, tensors=with_cache_scales(0.25, value))
    with pytest.raises(LoadError, match=r"layers\.1\.self_attn\.k_scale"):
        certified(folder)
    with pytest.raises(LoadError, match=r"layers\.1\.self_attn\.k_scale"):
        certify(plan_of(folder))


def test_a_scale_of_the_cache_in_a_strange_dtype_is_refused(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{ATTENTION.format(1)}.k_scale"] = torch.ones(1, dtype=torch.int64)

    text = inspect_checkpoint(altered(tmp_path, W4A16, tensors=change)).text()
    assert "DTYPE" in text
    assert f"{ATTENTION.format(1)}.k_scale" in text


def test_clip_bounds_the_wrong_way_round_are_refused(tmp_path: Path) -> None:
    """Between them there is nothing, and every activation would be one number."""
    layer = "model.vision_tower.encoder.layers.1.mlp.up_proj"

    def change(tensors: Tensors) -> None:
        low, high = f"{layer}.input_min", f"{layer}.input_max"
        tensors[low], tensors[high] = tensors[high], tensors[low]

    folder = altered(tmp_path, DENSE, tensors=change)
    for load in (certified, lambda f: certify(plan_of(f))):
        with pytest.raises(LoadError, match=layer.replace(".", r"\.") + r"\.input_min is"):
            load(folder)
