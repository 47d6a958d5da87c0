"""Whatever is wrong with a checkpoint, it is refused, or said; nothing loads wrong in silence.

A damaged copy of a fixture ends in one of three ways: an error for users that names the place; a
model that is the sound one to the bit, since what was changed means nothing; or, where the change
is one that a file may have, a report that says something it does not say of the sound file.

`CABOCHON_CASES=10000` tries so many instead of a fixed sample, and every way at every fixture.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from corruption import GGUF_WOUNDS, WOUNDS, Copy, Gguf, Unfit, as_bytes, files, floats, folders
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from thin import fixture
from written import everything

from cabochon.errors import CabochonError
from cabochon.load.certify import certify
from cabochon.load.execute import execute, tensors_of
from cabochon.load.report import plan_checkpoint

CASES = int(os.environ.get("CABOCHON_CASES", "0"))
SECONDS = 30  # a load of a fixture takes less than one
ROOM = 1 << 30  # bytes beyond the file's own size


def load(path: Path) -> tuple[str, set[str]]:
    """What is in memory, as a hash, and everything that a user is told beyond tables.

    The hash is of every tensor of the model by name, and of what is done to activations.
    """
    report = plan_checkpoint(path)
    assert report.plan is not None
    loaded = execute(report.plan, dtype=torch.float32)
    found = hashlib.sha256("".join(site.stored_as for site in report.plan.sites).encode())
    for name, tensor in tensors_of(loaded.model):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    findings = (*report.notes, *report.dropped, *loaded.certificate.notes)
    return found.hexdigest(), {f"{w}: {f.detail}" for f in findings for w in f.where}


@cache
def original(path: Path) -> tuple[str, set[str]]:
    return load(path)


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """Neither a hang nor memory far beyond what the file takes."""

    def stop(*_: object) -> None:
        pytest.fail(f"still not done after {SECONDS} s")

    before = _peak(reset=True)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
    assert _peak() - before < size + ROOM


def _peak(*, reset: bool = False) -> int:
    """Bytes of memory this process has had at most, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


often = settings(
    max_examples=CASES or 300,
    deadline=None,
    derandomize=not CASES,
    suppress_health_check=list(HealthCheck),
)


@often
@given(
    st.sampled_from(sorted(WOUNDS)),
    st.sampled_from(folders()),
    st.integers(0, 2**32 - 1),
)
def test_a_damaged_folder_never_loads_in_silence(wound: str, source: Path, seed: int) -> None:
    try:
        damage_folder(wound, source, seed)
    except Unfit:
        reject()


V1, V2 = {"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}
NOT_SYMMETRIC, BESIDE_ZERO = (
    "although config.json says sym: true",
    "one step beside zero on average",
)


@pytest.mark.parametrize(
    ("name", "said", "words"),
    [
        ("e2b-gptq4", V2, NOT_SYMMETRIC),
        ("e2b-gptq4", {**V2, "sym": False}, "one beside the middle"),
        ("e2b-gptq8", {**V2, "sym": False}, "one beside the middle"),
        ("e2b-gptq4-v2", {**V1, "sym": True}, NOT_SYMMETRIC),
        ("e2b-gptq4-v2", V1, BESIDE_ZERO),
        ("e2b-gptq2-v2", V1, BESIDE_ZERO),
        (
            "e2b-round2-asym",
            {"packing_format": "auto_round:auto_gptq"},
            BESIDE_ZERO,
        ),
    ],
)
def test_zero_points_read_by_the_other_version_are_noted(
    tmp_path: Path, name: str, said: dict[str, object], words: str
) -> None:
    """GPTQ's first version stores a zero point less one: 7 for 8, which the second takes for 7."""
    copy = Copy(fixture(name), tmp_path / name)
    copy.config(lambda config: config["quantization_config"].update(said))
    judge(copy.folder, fixture(name), ())
    assert any(words in word for word in load(copy.folder)[1])
    assert not any(words in word for word in original(fixture(name))[1])


def test_fine_steps_beside_zero_are_noted(tmp_path: Path) -> None:
    """In asymmetric codes of 8 bits a step is a fiftieth of what entries are apart."""
    copy, chance = Copy(fixture("e2b-gptq8"), tmp_path / "e2b-gptq8"), np.random.default_rng(1)
    tensors = copy.read()
    stored = {tensor.name: tensor for tensor in tensors}
    for tensor in (tensor for tensor in tensors if tensor.name.endswith(".qzeros")):
        zeros = chance.integers(118, 139, len(tensor.data))  # one of each row
        codes = stored[tensor.name.replace("qzeros", "qweight")]
        words = np.frombuffer(codes.data, np.uint8).reshape(-1, len(zeros), 4)
        moved = np.clip(words + (zeros - 128)[None, :, None], 0, 255)
        tensor.data, codes.data = zeros.astype(np.uint8).tobytes(), moved.astype(np.uint8).tobytes()
    copy.write(tensors)
    copy.config(lambda config: config["quantization_config"].update(V2, sym=False))
    assert not any(BESIDE_ZERO in word for word in load(copy.folder)[1])
    copy.config(lambda config: config["quantization_config"].update(V1))
    assert any(BESIDE_ZERO in word for word in load(copy.folder)[1])


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("31b-awq", "model.vision_tower.patch_embedder.position_embedding_table"),
        ("12b-round-awq", "model.language_model.norm.weight"),
        ("e2b-awq", "model.embed_vision.embedding_projection.weight"),
        ("e2b-mobile", "model.language_model.embed_tokens_per_layer.weight_scale"),
    ],
)
def test_one_tensor_told_as_the_other_half_is_noted(tmp_path: Path, name: str, tensor: str) -> None:
    """AWQ files say float16 of themselves, and keep in bfloat16 what is not quantized."""
    copy = Copy(fixture(name), tmp_path / name)
    tensors = copy.read()
    (stored,) = [stored for stored in tensors if stored.name == tensor]
    stored.dtype = "F16"
    copy.write(tensors)
    judge(copy.folder, fixture(name), ())
    assert any(tensor in word and "F16" in word for word in load(copy.folder)[1])


@pytest.mark.parametrize("damage", ["zeroed", "retyped"])
def test_biases_of_a_matrix_without_peers_are_held_against_it(damage: str, tmp_path: Path) -> None:
    """Its scales know their dtype, and entries that all have one sign are none of a matrix."""
    source = {folder.name: folder for folder in folders()}["31b-mlx-few"]
    copy = Copy(source, tmp_path / source.name)
    tensors = copy.read()
    biases = next(t for t in tensors if t.name.endswith("layers.0.self_attn.k_proj.biases"))
    if damage == "zeroed":
        biases.data = bytes(len(biases.data))
    else:
        biases.dtype = {"BF16": "F16", "F16": "BF16"}[biases.dtype]
    copy.write(tensors)
    said = load(copy.folder)[1] - original(source)[1]
    assert any("k_proj" in word and "biases" in word for word in said), said


def test_biases_that_half_of_the_experts_parts_lost_are_noted(tmp_path: Path) -> None:
    copy = Copy(fixture("26b-mlx4"), tmp_path / "26b-mlx4")
    tensors = copy.read()
    (gates, *_) = [t for t in tensors if t.name.endswith("switch_glu.gate_proj.biases")]
    gates.data = bytes(len(gates.data))
    copy.write(tensors)
    judge(copy.folder, fixture("26b-mlx4"), ())


@pytest.mark.parametrize("leaf", ["weight_scale", "weight_scale_2"])
def test_scales_of_the_only_one_of_its_name_that_is_quantized(tmp_path: Path, leaf: str) -> None:
    """Both multiply what the other divides: entries stay as large as they were."""
    name = "12b-modelopt-w4a8-awq"
    copy = Copy(fixture(name), tmp_path / name)
    tensors = copy.read()
    (scale,) = [t for t in tensors if t.name.endswith(f"layers.1.self_attn.v_proj.{leaf}")]
    scale.data = as_bytes(scale, floats(scale) * 1000)
    copy.write(tensors)
    judge(copy.folder, fixture(name), ())


@pytest.mark.parametrize(
    ("name", "module"),
    [
        # In the other layers that have an output, values are not projected.
        ("12b-modelopt-w4a16-awq", "layers.1.self_attn.o_proj"),
        # The only queries beside which there are no keys, whose norm would take it over.
        ("e2b-modelopt-w4a8-awq", "layers.5.self_attn.q_proj"),
        ("e2b-modelopt-w4a8-awq", "per_layer_model_projection"),
    ],
)
def test_a_smoothing_that_is_lost_where_nothing_else_is_the_same_is_noted(
    tmp_path: Path, name: str, module: str
) -> None:
    copy = Copy(fixture(name), tmp_path / name)
    lost = f"model.language_model.{module}.pre_quant_scale"
    copy.write([tensor for tensor in copy.read() if tensor.name != lost])
    judge(copy.folder, fixture(name), ())
    assert any("no norm takes over" in word for word in load(copy.folder)[1])


@settings(often, max_examples=CASES // 2 or 60)
@given(
    st.sampled_from(sorted(GGUF_WOUNDS)),
    st.sampled_from(files()),
    st.integers(0, 2**32 - 1),
)
def test_a_damaged_gguf_file_never_loads_in_silence(wound: str, source: Path, seed: int) -> None:
    damage_file(wound, source, seed)


every = pytest.mark.skipif(not CASES, reason="minutes: with CABOCHON_CASES")


@every
@pytest.mark.parametrize("wound", WOUNDS)
def test_every_folder_damaged_in_each_way(wound: str) -> None:
    for seed, source in enumerate(folders()):
        with suppress(Unfit):
            damage_folder(wound, source, seed)


@every
@pytest.mark.parametrize("wound", GGUF_WOUNDS)
def test_every_gguf_file_damaged_in_each_way(wound: str) -> None:
    for seed, source in enumerate(files()):
        damage_file(wound, source, seed)


# AutoRound (0.16.1) has lost what pictures are standardized with.
DAMAGED = {"26b-round-awq", "26b-round-few", "26b-round-few-asym"}


def test_what_is_sound_does_not_look_damaged() -> None:
    for source in (*folders(), *files(), *everything()):
        plan = plan_checkpoint(source).plan
        assert plan is not None
        certificate = certify(plan)
        assert bool(certificate.untrained) == (source.name in DAMAGED)
        assert len(certificate.notes) == (source.name in DAMAGED), source.name


def damage_folder(wound: str, source: Path, seed: int) -> None:
    print(f"{wound} of {source.name} by {seed}")
    with TemporaryDirectory() as room:
        copy = Copy(source, Path(room) / source.name)
        words = WOUNDS[wound](copy, random.Random(seed))
        judge(copy.folder, source, words)


def damage_file(wound: str, source: Path, seed: int) -> None:
    """A byte of metadata may say another thing that a file may say: a word, a name, a token."""
    print(f"{wound} of {source.name} by {seed}")
    with TemporaryDirectory() as room:
        copy = Gguf(source, Path(room) / "damaged")
        GGUF_WOUNDS[wound](copy, random.Random(seed))
        with bounded(size_of(source)):
            found = attempt(copy.file)
    if isinstance(found, str):
        assert source.name in found or "damaged" in found
    elif wound != "byte_of_header":
        assert found[0] == original(source)[0], "loaded in silence"


def judge(damaged: Path, source: Path, words: tuple[str, ...]) -> None:
    sound_hash, sound_words = original(source)
    with bounded(size_of(source)):
        found = attempt(damaged)
    if isinstance(found, str):
        assert any(word in found for word in words), f"none of {words} in: {found}"
    else:
        assert found[0] == sound_hash or found[1] - sound_words, "loaded in silence"


def size_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else path.parent.iterdir()
    return sum(file.stat().st_size for file in files if file.is_file())


def attempt(path: Path) -> tuple[str, set[str]] | str:
    """What `load` says, or the words of the refusal."""
    try:
        return load(path)
    except CabochonError as error:
        return str(error)
