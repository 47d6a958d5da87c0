"""GGUF models that are not whole or not what they say end in a refusal that names the place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import load_model
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf_models import FOLDER, MODELS, Fields, Tensors, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import float32

from cabochon.errors import CabochonError, LoadError, UnreadableError
from cabochon.load.plan import LoadPlan
from cabochon.load.report import Report, inspect_checkpoint
from cabochon.prompts import Prompts

E2B, MOE, DENSE = MODELS["e2b q4_1"][0], MODELS["26b q4_0"][0], MODELS["31b fused"][0]
PROJECTOR = FOLDER / "e2b" / "mmproj-bf16.gguf"
U32, F32, STRING = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING


def names(path: Path) -> list[str]:
    return [tensor.name for tensor in GGUFReader(path).tensors]


def beside(folder: Path, *, model: Path = E2B, projector: Path = PROJECTOR) -> Path:
    """A folder with copies of a model and a projector."""
    folder.mkdir(exist_ok=True)
    shutil.copy(model, folder / "model.gguf")
    shutil.copy(projector, folder / "mmproj.gguf")
    return folder


def verdict(path: Path) -> Report | str:
    """The report on what can be judged, or the words of the refusal to judge it."""
    try:
        return inspect_checkpoint(path)
    except CabochonError as error:
        return str(error)


def refused(path: Path) -> str:
    found = verdict(path)
    if isinstance(found, Report):
        assert not found.loads
        return found.text()
    return found


@pytest.mark.parametrize("source", [E2B, MOE, DENSE], ids=["e2b", "26b", "31b"])
def test_no_tensor_may_be_missing(tmp_path: Path, source: Path) -> None:
    for index, name in enumerate(names(source)):
        if ".blk" not in f".{name}" or name.startswith(("blk.0.", "blk.2.")):
            path = rewrite(source, tmp_path / f"{index}.gguf", tensors=lambda t, n=name: t.pop(n))
            words = refused(path)
            # What is fused is missed by the names of its parts.
            expected = name.replace("attn_qkv", "attn_q").removesuffix(".weight")
            assert expected in words, words
            path.unlink()


@pytest.mark.parametrize("member", ["e2b", "12b", "26b"])
def test_no_tensor_of_a_projector_may_be_missing(tmp_path: Path, member: str) -> None:
    """As 437 of 439 were, and pictures were hallucinated (kekzl/imp #489)."""
    kind = "f16" if member == "12b" else "bf16"
    source = FOLDER / member / f"mmproj-{kind}.gguf"
    model = {"e2b": E2B, "26b": MOE, "12b": None}[member]
    if model is None:
        shutil.copytree(FOLDER / "12b", tmp_path / "model")
        folder = tmp_path / "model"
        (folder / source.name).unlink()
    else:
        folder = beside(tmp_path / "model", model=model)
    target = folder / "mmproj.gguf"
    chosen = [n for n in names(source) if ".blk.1." not in n]
    for name in chosen[:: max(1, len(chosen) // 30)]:
        rewrite(source, target, tensors=lambda t, n=name: t.pop(n))
        # Either of two says that there are both.
        expected = "v.std" if name.startswith("v.std") else name.removesuffix(".weight")
        assert expected in refused(folder)


Change = Callable[[Tensors], object]


def renamed(old: str, new: str) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return change


def doubled(old: str, new: str) -> Change:
    return lambda tensors: tensors.update({new: tensors[old]})


def turned(name: str) -> Change:
    def change(tensors: Tensors) -> None:
        data, kind = tensors[name]
        tensors[name] = (np.ascontiguousarray(data.T), kind)

    return change


def scalar(name: str) -> Change:
    return lambda tensors: tensors.update({name: (np.float32(1), GGMLQuantizationType.F32)})


def integers(name: str) -> Change:
    def change(tensors: Tensors) -> None:
        data, _ = tensors[name]
        tensors[name] = (data.astype(np.int32), GGMLQuantizationType.I32)

    return change


def unread(name: str) -> Change:
    """Another type of blocks, of which this version knows no more than how long they are."""

    def change(tensors: Tensors) -> None:
        data, _ = tensors[name]
        blocks = np.zeros((len(data), 66), np.uint8)
        tensors[name] = (blocks, GGMLQuantizationType.IQ2_XXS)

    return change


CHANGES: dict[str, tuple[Path, Change, str]] = {
    "an unknown name": (E2B, renamed("blk.1.attn_q.weight", "blk.1.attn_qq.weight"), "attn_qq"),
    "an unknown layer": (E2B, doubled("blk.1.ffn_up.weight", "blk.77.ffn_up.weight"), "blk.77"),
    "a layer with a nought": (E2B, renamed("blk.1.ffn_up.weight", "blk.01.ffn_up.weight"), "01"),
    "a scale of nothing": (E2B, doubled("blk.1.attn_norm.weight", "blk.1.attn_q.scale"), "scale"),
    "a table that is a number": (E2B, scalar("token_embd.weight"), "token_embd"),
    "inputs that are a number": (E2B, scalar("per_layer_token_embd.weight"), "per_layer_token"),
    "a matrix turned": (E2B, turned("per_layer_model_proj.weight"), "per_layer_model_proj"),
    "integers": (E2B, integers("blk.1.attn_norm.weight"), "blk.1.attn_norm.weight"),
    "a type that is not read": (
        MODELS["26b every type"][0],
        unread("blk.0.attn_q.weight"),
        "IQ2_XXS",
    ),
    "values in a full layer": (
        MOE,
        doubled("blk.2.attn_k.weight", "blk.2.attn_v.weight"),
        "blk.5.attn_v",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_tensors_are_refused_by_name(tmp_path: Path, case: str) -> None:
    source, change, words = CHANGES[case]
    assert words in refused(rewrite(source, tmp_path / "model.gguf", tensors=change))


Describe = Callable[[Fields], object]


def said(key: str, value: Any, kind: GGUFValueType = U32) -> Describe:
    return lambda fields: fields.update({key: (kind, None, value)})


def unsaid(key: str) -> Describe:
    return lambda fields: fields.pop(key)


def listed(key: str, *values: Any) -> Describe:
    array = GGUFValueType.ARRAY
    return lambda fields: fields.update({key: (array, fields[key][1], list(values))})


METADATA: dict[str, tuple[Describe, str]] = {
    "no drafter": (said("general.architecture", "gemma4-assistant", STRING), "block_count"),
    "another family": (said("general.architecture", "llama", STRING), "no Gemma 4"),
    "an earlier one": (said("general.architecture", "gemma3n", STRING), "earlier generation"),
    "an adapter": (said("general.type", "adapter", STRING), "general.type"),
    "no layers": (unsaid("gemma4.block_count"), "gemma4.block_count"),
    "a layer less": (said("gemma4.block_count", 5), "for each of 5 layers"),
    "tokens that are a number": (said("tokenizer.ggml.tokens", 5), "tokenizer.ggml.tokens"),
    "a billion layers": (said("gemma4.block_count", 10**9), "expected at most 4096"),
    "heads": (said("gemma4.attention.head_count", 3), "attention"),
    "width": (said("gemma4.embedding_length", 96), "hidden_size is 96, but output_norm.weight"),
    "head size": (said("gemma4.attention.key_length", 64), "value_length"),
    "no window": (unsaid("gemma4.attention.sliding_window"), "sliding_window"),
    "no pattern": (unsaid("gemma4.attention.sliding_window_pattern"), "sliding_window_pattern"),
    "shared": (said("gemma4.attention.shared_kv_layers", 2), "blk.3.attn_k"),
    "all shared": (said("gemma4.attention.shared_kv_layers", 6), "shared_kv_layers"),
    "scaled rotation": (said("gemma4.rope.scaling.type", "yarn", STRING), "rope.scaling.type"),
    "fewer rotating": (said("gemma4.rope.dimension_count", 16), "rope.dimension_count"),
    "scaled attention": (said("gemma4.attention.scale", 0.25, F32), "attention.scale"),
    "padding": (said("tokenizer.ggml.padding_token_id", 9999), "padding_token_id"),
    "widths of layers": (listed("gemma4.feed_forward_length", 96, 96, 96, 192, 192, 0), "feed"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_says_something_else_is_refused(tmp_path: Path, case: str) -> None:
    change, words = METADATA[case]
    assert words in refused(rewrite(E2B, tmp_path / "model.gguf", fields=change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (said("clip.vision.projector_type", "gemma3", STRING), "its projector is"),
        (said("clip.audio.projector_type", "gemma4ua", STRING), "its projector is"),
        (said("clip.audio.num_mel_bins", 80), "num_mel_bins"),
        (said("clip.audio.projection_dim", 128), "projection_dim"),
        (said("clip.vision.block_count", 3), "vision num_hidden_layers"),
        (said("clip.vision.projector.scale_factor", 0), "scale_factor"),
        (said("general.architecture", "gemma4", STRING), "named like a projector"),
        (listed("clip.vision.image_mean", 0.5, 0.5, 0.5), "image_mean"),
        (said("clip.has_audio_encoder", False, GGUFValueType.BOOL), "a.pre_encode.out.bias"),
    ],
)
def test_projectors_that_do_not_fit_are_refused(
    tmp_path: Path, change: Describe, words: str
) -> None:
    folder = beside(tmp_path / "model")
    rewrite(PROJECTOR, folder / "mmproj.gguf", fields=change)
    assert words in refused(folder)


def test_the_projector_of_another_model_is_left_alone(tmp_path: Path) -> None:
    """Of a folder of many models; what it would make has another width than this one takes."""
    folder = beside(tmp_path / "model", model=MODELS["e2b every type"][0])
    report = inspect_checkpoint(folder)
    assert report.loads
    assert report.architecture == "Gemma4ForCausalLM"
    assert [note.where for note in report.notes] == [(str(folder / "mmproj.gguf"),)]


def test_keys_that_are_not_known_are_noted(tmp_path: Path) -> None:
    path = rewrite(E2B, tmp_path / "model.gguf", fields=said("gemma4.attention.novelty", 3))
    report = inspect_checkpoint(path)
    assert report.loads
    assert [note.where for note in report.notes] == [("gemma4.attention.novelty",)]
    for path, _ in MODELS.values():
        assert not inspect_checkpoint(path).notes


def test_of_several_projectors_the_most_exact_is_taken(tmp_path: Path) -> None:
    folder = beside(tmp_path / "model")
    kind = "general.file_type"
    rewrite(PROJECTOR, folder / "mmproj-f16.gguf", fields=said(kind, 1))
    report = inspect_checkpoint(folder)
    assert {m.file.name for m in report.checkpoint.tensors.values()} == {
        "model.gguf",
        "mmproj.gguf",
    }
    shutil.copy(PROJECTOR, folder / "mmproj-again.gguf")
    assert "several projectors: mmproj-again.gguf, mmproj-f16.gguf, mmproj.gguf" in refused(folder)


def test_a_projector_alone_is_no_model() -> None:
    assert "is a projector" in refused(PROJECTOR)


def test_parts_belong_together(tmp_path: Path) -> None:
    folder = tmp_path / "12b"
    shutil.copytree(FOLDER / "12b", folder)
    first, second, third = sorted(folder.glob("12b-*"))
    saved = second.read_bytes()
    second.unlink()
    assert f"{second} is not there, one of 3 parts" in refused(first)
    shutil.copy(third, second)
    assert "part 2 of 3" in refused(first)
    second.write_bytes(saved)
    rewrite(first, tmp_path / "again.gguf", fields=lambda f: said("split.tensors.count", 99)(f))
    shutil.copy(tmp_path / "again.gguf", first)
    assert "say" in refused(first)


def test_rotations_that_are_not_computed_are_refused(tmp_path: Path) -> None:
    def scaled(tensors: Tensors) -> None:
        data, kind = tensors["rope_freqs.weight"]
        tensors["rope_freqs.weight"] = (data * np.float32(1.5), kind)

    path = rewrite(E2B, tmp_path / "model.gguf", tensors=scaled)
    assert "rope_freqs.weight" in refused(path)


def poisoned(name: str, value: float, at: slice = slice(0, 2)) -> Change:
    def change(tensors: Tensors) -> None:
        data, kind = tensors[name]
        if data.dtype == np.uint8:
            data[0, at] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
        else:
            data.flat[0] = value
        tensors[name] = (data, kind)

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "blk.1.attn_norm.weight"])
def test_numbers_that_are_none_are_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    path = rewrite(E2B, tmp_path / "model.gguf", tensors=poisoned(name, value))
    with pytest.raises(LoadError, match=name):
        load_model(path, dtype=float32)


TOKENS = "tokenizer.ggml.tokens"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (said("tokenizer.ggml.model", "llama", STRING), "tokenizer.ggml.model"),
        (unsaid("tokenizer.ggml.merges"), "tokenizer.ggml.merges"),
        (unsaid("tokenizer.ggml.token_type"), "tokenizer.ggml.token_type"),
        (listed("tokenizer.ggml.merges", "nothing"), "'nothing'"),
        (listed("tokenizer.ggml.merges", "no-such token"), "make no tokenizer"),
        (said("tokenizer.ggml.bos_token_id", 4000), "bos_token_id"),
        (unsaid("tokenizer.ggml.bos_token_id"), "bos_token"),
        (said("tokenizer.chat_template", "{% if %}", STRING), "template"),
    ],
)
def test_tokenizers_that_are_not_gemmas_are_refused(
    tmp_path: Path, change: Describe, words: str
) -> None:
    report = inspect_checkpoint(rewrite(E2B, tmp_path / "model.gguf", fields=change))
    model = report.checkpoint.gguf
    assert model is not None
    assert isinstance(report.plan, LoadPlan)
    with pytest.raises(UnreadableError, match=words):
        Prompts(model.path, report.plan.config, model.metadata)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_change_of_bytes_in_front_of_the_weights(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Read as something that is whole, or refused; never anything else."""
    content = bytearray(MODELS["26b nvfp4"][0].read_bytes())
    end = content.index(b"output_norm.weight") + 60
    start = data.draw(st.sampled_from((0, content.index(b"rope_freqs.weight"))))
    at = data.draw(st.integers(start, end))
    content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
    path = tmp_path_factory.mktemp("any") / "model.gguf"
    path.write_bytes(content)
    verdict(path)
