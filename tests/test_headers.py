"""Headers and indexes: what safetensors' own library accepts is read alike, the rest is named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DENSE, W4A16, altered, config_of, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from cabochon.checkpoint.folder import Checkpoint, read_tensor
from cabochon.checkpoint.headers import read_header
from cabochon.errors import UnreadableError
from cabochon.load.report import inspect_checkpoint

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64, torch.uint8)


def test_every_tensor_is_read_as_the_library_reads_it() -> None:
    for folder in (DENSE, W4A16):
        checkpoint = Checkpoint.open(folder)
        expected = tensors_of(folder)
        assert set(checkpoint.tensors) == set(expected)
        for name, tensor in expected.items():
            found = checkpoint.read(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor), name


def test_rows_are_read_by_range() -> None:
    name = "model.language_model.embed_tokens.weight"
    rows = read_tensor(Checkpoint.open(DENSE).tensors[name].rows(17, 40))
    assert torch.equal(rows, tensors_of(DENSE)[name][17:40])


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=5,
    )
)
def test_headers_of_the_library_are_read(tmp_path_factory: Any, entries: dict[str, Any]) -> None:
    tensors = {name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in entries.items()}
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    metas = {meta.name: meta for meta in read_header(path).tensors}
    assert {name: list(meta.shape) for name, meta in metas.items()} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }


def raw(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype: str = "F32", shape: object = (1,), start: int = 0, end: int = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def header(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


BROKEN = {
    "empty file": (b"", "cut off"),
    "no header": (b"\x08\0\0\0\0\0\0\0", "cut off"),
    "header longer than the file": (struct.pack("<Q", 1 << 40) + b"{}", "cut off"),
    "not JSON": (raw(b"{nonsense}"), "not valid"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid"),
    "nested without end": (raw(b'{"a":' * 100_000), "nested too deep"),
    "not an object": (raw(b"[1]"), "not an object"),
    "no dtype": (raw(header(a={"shape": [1], "data_offsets": [0, 4]}), b"1234"), "'a'"),
    "unknown dtype": (raw(header(a=entry("F31")), b"1234"), "unknown dtype 'F31'"),
    "negative size": (raw(header(a=entry(shape=[-1])), b"1234"), r"shape \[-1\]"),
    "fractional size": (raw(header(a=entry(shape=[1.0])), b"1234"), r"shape \[1.0\]"),
    "span too short": (raw(header(a=entry(end=3)), b"123"), "needs 4 bytes"),
    "span backwards": (raw(header(a=entry(start=4, end=0)), b"1234"), "not a start and an end"),
    "overlap": (
        raw(header(a=entry(), b=entry(start=2, end=6)), b"123456"),
        "'b' at byte .* overlaps tensor 'a'",
    ),
    "gap": (raw(header(a=entry(), b=entry(start=6, end=10)), b"1" * 10), "'b' .* leaves a gap"),
    "too few bytes": (raw(header(a=entry()), b"12"), "cut off: tensor 'a' ends at byte"),
    "too many bytes": (raw(header(a=entry()), b"12345"), "1 bytes after its last tensor"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused_as_the_library_refuses_them(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises((SafetensorError, OSError)), safe_open(path, "pt"):
        pass
    with pytest.raises(UnreadableError, match=message) as error:
        Checkpoint.open(tmp_path)
    assert str(path) in str(error.value)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_wherever_the_library_refuses_it(
    tmp_path_factory: Any, at: int, value: int
) -> None:
    """Ours may be stricter, never laxer, and never fails in another way."""
    content = bytearray(save({"first": torch.ones(2, 3), "second": torch.ones(4).bfloat16()}))
    content[at % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(content)
    try:
        with safe_open(path, "pt") as library:
            accepted = set(library.keys())
    except (SafetensorError, OSError):
        accepted = None
    try:
        found = {meta.name for meta in read_header(path).tensors}
    except UnreadableError:
        return
    assert found == accepted


def test_a_name_given_twice_is_found(tmp_path: Path) -> None:
    one = b'"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    (tmp_path / "model.safetensors").write_bytes(raw(b"{" + one + b"," + one + b"}", b"1"))
    with pytest.raises(UnreadableError, match="'w' appears twice"):
        Checkpoint.open(tmp_path)


def test_a_name_of_any_length_is_not_carried_around(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw(header(**{"w" * 1001: entry()}), b"1234"))
    with pytest.raises(UnreadableError, match="name has 1001 characters"):
        Checkpoint.open(tmp_path)


def test_a_header_of_more_than_100_megabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_009)  # sparse: nothing is written
    with pytest.raises(UnreadableError, match="more than the 100000000 allowed"):
        Checkpoint.open(tmp_path)


def sharded(folder: Path, source: Path = DENSE) -> dict[str, Any]:
    """`source` in two shards; returns the index, which is also written."""
    tensors = tensors_of(source)
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    folder.mkdir(exist_ok=True)
    for shard, members in halves.items():
        (folder / shard).write_bytes(save({name: tensors[name] for name in members}))
    index = {"weight_map": {name: shard for shard, members in halves.items() for name in members}}
    rewrite(folder, index)
    (folder / "config.json").write_text(json.dumps(config_of(source)))
    return index


def rewrite(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_found_by_the_index_alone(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not even a header")
    checkpoint = Checkpoint.open(tmp_path)
    expected = tensors_of(DENSE)
    assert set(checkpoint.tensors) == set(expected)
    assert all(torch.equal(checkpoint.read(name), expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("leaf", "files"),
    [
        ("self_attn.q_norm.weight", "a.safetensors"),  # a parameter
        ("mlp.up_proj.weight_packed", "a.safetensors and b.safetensors"),  # a matrix
    ],
)
def test_the_shard_of_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, leaf: str, files: str
) -> None:
    """It may be that of another checkpoint, and is the one to fetch again."""
    sharded(tmp_path, W4A16)
    name = f"model.language_model.layers.1.{leaf}"
    for shard in (tmp_path / "a.safetensors", tmp_path / "b.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = tensors[name][:-1]
            shard.write_bytes(save(tensors))
    text = inspect_checkpoint(tmp_path).text()
    assert name.rpartition(".")[0] in text
    assert f"; in {files}\n" in text
    whole = altered(tmp_path / "x", W4A16, tensors=lambda t: t.update({name: t[name][:-1]}))
    assert "; in " not in inspect_checkpoint(whole).text()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UnreadableError, match=r"b\.safetensors, which is not there"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", "..\\b.safetensors", "b.bin", ".", 7],
)
def test_shards_lie_in_the_folder(tmp_path: Path, shard: object) -> None:
    index = sharded(tmp_path)
    index["weight_map"]["lm_head.weight"] = shard
    rewrite(tmp_path, index)
    with pytest.raises(UnreadableError, match=r"'lm_head\.weight'.*not the plain name"):
        Checkpoint.open(tmp_path)


def _forget(index: dict[str, Any], name: str) -> None:
    del index["weight_map"][name]


def _move(index: dict[str, Any], name: str) -> None:
    index["weight_map"][name] = "b.safetensors"


def _invent(index: dict[str, Any], name: str) -> None:
    index["weight_map"]["lm_head.weight"] = "a.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_forget, r"a\.safetensors holds tensor {}, but .* does not list it"),
        (_move, r"a\.safetensors holds tensor {}, but .* puts it into b\.safetensors"),
        (_invent, r"1 tensors where they are not, first 'lm_head\.weight' into a\.safetensors"),
    ],
)
def test_index_and_shards_must_agree(
    tmp_path: Path, change: Callable[[dict[str, Any], str], None], message: str
) -> None:
    index = sharded(tmp_path)
    name = min(index["weight_map"])
    change(index, name)
    rewrite(tmp_path, index)
    with pytest.raises(UnreadableError, match=message.format(repr(name))):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    tensors = tensors_of(DENSE)
    name = min(index["weight_map"])
    names = [name, *(n for n, shard in index["weight_map"].items() if shard == "b.safetensors")]
    (tmp_path / "b.safetensors").write_bytes(save({n: tensors[n] for n in names}))
    with pytest.raises(
        UnreadableError, match=r"b\.safetensors holds tensor .* into a\.safetensors"
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "index", [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}']
)
def test_a_malformed_index_is_named(tmp_path: Path, index: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(UnreadableError, match=r"model\.safetensors\.index\.json"):
        Checkpoint.open(tmp_path)


def test_index_and_single_file_side_by_side_are_ambiguous(tmp_path: Path) -> None:
    sharded(tmp_path)
    altered(tmp_path, DENSE)
    with pytest.raises(UnreadableError, match="not clear"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no weights to read"),
        (["pytorch_model.bin"], "never read"),
        (["model.pt"], "never read"),
        (["mmproj-F16.gguf"], "only projectors"),
        (["consolidated.safetensors"], "neither"),
    ],
)
def test_folders_without_safetensors(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UnreadableError, match=message) as error:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_what_is_no_folder_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="there is no folder"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(UnreadableError, match="there is no file"):
        Checkpoint.open(tmp_path / "model.gguf")
    with pytest.raises(UnreadableError, match="is a file"):
        Checkpoint.open(DENSE / "config.json")


def test_a_file_that_shrinks_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(altered(tmp_path, DENSE))
    last = max(checkpoint.tensors.values(), key=lambda meta: meta.span)
    with last.file.open("r+b") as file:
        file.truncate(last.span[0] + 1)
    with pytest.raises(UnreadableError, match=f"ends at byte {last.span[0] + 1}") as error:
        checkpoint.read(last.name)
    assert last.name in str(error.value)


def header_alone(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def saved(folder: Path, source: Path) -> Path:
    """What is left of `source` without its weights."""
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            (folder / f"{file.name}.header").write_bytes(header_alone(file))
        else:
            shutil.copy(file, folder)
    return folder


def test_a_saved_header_stands_for_its_file(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", DENSE)
    whole = Checkpoint.open(DENSE)
    for path in (folder, folder / "model.safetensors.header"):
        found = Checkpoint.open(path)
        assert found.saved_headers
        assert found.folder == folder
        assert found.metadata == whole.metadata == {"format": "pt"}
        assert [(m.name, m.shape, m.span) for m in found.tensors.values()] == [
            (m.name, m.shape, m.span) for m in whole.tensors.values()
        ]
    assert not whole.saved_headers


def test_a_saved_header_ends_where_the_tensors_begin(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", DENSE)
    file = folder / "model.safetensors.header"
    size = (DENSE / "model.safetensors").stat().st_size
    assert Checkpoint.open(folder, {"model.safetensors": size}).tensors
    for wrong, message in ((size - 1, "is cut off"), (size + 1, "1 bytes after its last tensor")):
        with pytest.raises(UnreadableError, match=message):
            Checkpoint.open(folder, {"model.safetensors": wrong})
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0")
    with pytest.raises(UnreadableError, match="a saved header ends there"):
        Checkpoint.open(folder)
    file.write_bytes(whole[:-1])
    with pytest.raises(UnreadableError, match="is cut off"):
        Checkpoint.open(folder)


def test_one_file_is_a_checkpoint_with_the_config_beside_it(tmp_path: Path) -> None:
    folder = altered(tmp_path, DENSE)
    file = (folder / "model.safetensors").rename(folder / "other.safetensors")
    found = Checkpoint.open(file)
    assert found.folder == folder
    assert found.tensors.keys() == Checkpoint.open(DENSE).tensors.keys()


@pytest.mark.parametrize("text", ["1", "[]", '{"a": 1}'])
def test_metadata_is_a_table_of_texts(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw(b'{"__metadata__": %b}' % text.encode(), b""))
    with pytest.raises(UnreadableError, match="__metadata__"):
        Checkpoint.open(tmp_path)
