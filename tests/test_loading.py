"""What a load does with files: bytes are repacked as they lie there, and tables stay there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoints import DENSE, W4A16, Config, Tensors, altered, plan_of, tensors_of
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from corruption import files, folders
from gguf import quants
from test_bitsandbytes import found, quantized
from test_bitsandbytes import upstream as by_bitsandbytes
from test_gguf_blocks import HALVES, KINDS
from test_schemes import compressed
from test_schemes import upstream as by_compressed_tensors
from torch import Tensor

from cabochon.checkpoint import mapped
from cabochon.checkpoint.folder import Checkpoint, read_tensor
from cabochon.checkpoint.gguf import BLOCKS
from cabochon.errors import LoadError, UnreadableError
from cabochon.kernels.choose import Kernels
from cabochon.kernels.library import library
from cabochon.kernels.packed import PackedWeight
from cabochon.load.execute import execute
from cabochon.load.plan import LoadPlan
from cabochon.load.report import plan_checkpoint
from cabochon.nn.gguf_blocks import BlockWeight
from cabochon.nn.weight import Weight
from cabochon.quant.packed_int import PackedInt
from cabochon.quant.scheme import Site

built = pytest.mark.skipif(library() is None, reason="no C++ compiler where it was installed")

# Of real models; 4304 is no multiple of 32, and 37 rows are none of a block of 32.
WIDTHS, ROWS = (704, 2112, 4304), 37


def repacked(weight: Weight) -> Tensor:
    """What the kernels make of the stored bytes."""
    kernel = Kernels(library(), "int8").for_weight(weight)
    assert isinstance(kernel, PackedWeight)
    return kernel.dense(torch.float32)


@built
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_of_compressed_tensors(width: int, bits: int, symmetric: bool) -> None:
    torch.manual_seed(width + bits)
    scheme = PackedInt(bits, 16, symmetric)
    site = Site("w", "linear", ROWS, width)
    stored = compressed(scheme, site, torch.bfloat16)
    theirs = PackedQuantizationCompressor.decompress(stored, by_compressed_tensors(scheme))
    assert torch.equal(repacked(scheme.build(stored, site)), theirs["weight"].float())


@built
@pytest.mark.parametrize("codes", ["nf4", "fp4"])
@pytest.mark.parametrize("width", [704, 2112])
def test_of_bitsandbytes(width: int, codes: str) -> None:
    weight = torch.randn(ROWS, width)
    stored = quantized(weight, blocksize=64, quant_type=codes, compress_statistics=False)
    scheme, site = found(stored, ROWS, width)
    assert torch.equal(repacked(scheme.build(stored, site)), by_bitsandbytes(stored))


@built
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [704, 2112, 2304, 5376])
def test_of_ggml(width: int, kind: str) -> None:
    entries, nbytes = BLOCKS[kind]
    if width % entries:
        width -= width % entries  # there is no such row
    rng = np.random.default_rng(width)
    blocks = rng.integers(0, 256, (ROWS * width // entries, nbytes), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        scales = rng.normal(0, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(100, 130, len(blocks))
    if kind == "NVFP4":
        blocks[:, :4] = rng.integers(0, 127, (len(blocks), 4))
    rows = blocks.reshape(ROWS, -1)
    theirs = quants.dequantize(rows, gguf.GGMLQuantizationType[kind]).astype(np.float32)
    weight = BlockWeight(torch.from_numpy(rows), kind, in_features=width)
    assert np.array_equal(repacked(weight).numpy(), theirs)


@pytest.mark.parametrize("path", [*folders(), *files()], ids=lambda path: path.name)
def test_mapped_tensors_are_those_that_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for meta in Checkpoint.open(path).tensors.values():
        expected = read_tensor(meta).reshape(-1).view(torch.uint8)
        for small in (0, mapped.SMALL):
            monkeypatch.setattr(mapped, "SMALL", small)
            tensor = mapped.map_tensor(meta)
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected)
        monkeypatch.setattr(mapped, "PIECE", 1)
        parts = [part.view(torch.uint8) for part in mapped.pieces(tensor, meta)]
        assert torch.equal(torch.cat(parts), expected)
        monkeypatch.undo()


@pytest.mark.parametrize("path", [DENSE, W4A16, files()[0]], ids=lambda path: path.name)
def test_pieces_are_certified_as_a_whole_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_checkpoint(path).plan
    assert plan is not None
    whole = execute(plan, dtype=torch.float32).certificate
    monkeypatch.setattr(mapped, "PIECE", 1)
    assert execute(plan, dtype=torch.float32).certificate == whole


def with_a_table(folder: Path, rows: int) -> Path:
    """The dense fixture with a table of per-layer embeddings that is larger than all else."""

    def grow(tensors: Tensors) -> None:
        name = "model.language_model.embed_tokens_per_layer.weight"
        width = tensors[name].shape[1]
        row = torch.linspace(-1, 1, width)
        numbers = torch.arange(rows)[:, None] % 97 / 97
        tensors[name] = (row * numbers + 0.5).bfloat16()

    def claim(config: Config) -> None:
        config["text_config"]["vocab_size_per_layer_input"] = rows

    return altered(folder, DENSE, grow, claim)


LOADS = """
import resource, sys
from pathlib import Path
import torch
from cabochon.kernels.choose import Kernels
from cabochon.kernels.library import library
from cabochon.load.execute import execute
from cabochon.load.report import plan_checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large = (plan_checkpoint(Path(path)).plan for path in sys.argv[1:])
kernels = Kernels(library(), "int8")
execute(small, dtype=torch.float32, prepare=kernels.for_weight)
before = peak()
model = execute(large, dtype=torch.float32, prepare=kernels.for_weight).model
print(large.nbytes - small.nbytes, peak() - before)
table = model.model.language_model.embed_tokens_per_layer
print(table(torch.tensor([7, 500_000]), torch.float32)[:, :3].tolist())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in another way there")
def test_a_table_stays_in_its_file(tmp_path: Path) -> None:
    folder = with_a_table(tmp_path, 520_000)
    ended = subprocess.run(
        [sys.executable, "-c", LOADS, DENSE, folder], capture_output=True, text=True, check=True
    )
    sizes, rows = ended.stdout.splitlines()
    added, grown = map(int, sizes.split())
    assert added > 190_000_000
    assert grown < 3 * mapped.PIECE, grown
    table = tensors_of(folder)["model.language_model.embed_tokens_per_layer.weight"]
    scale = plan_of(folder).config.text.ple_dim ** 0.5
    wanted = table[[7, 500_000], :3].float() * scale
    assert torch.allclose(torch.tensor(json.loads(rows)), wanted)


def cut_since(folder: Path, cut: int) -> LoadPlan:
    """The plan of a checkpoint with a table, whose file has lost so many bytes since."""
    plan = plan_of(with_a_table(folder, 150_000))
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - cut)
    return plan


@pytest.mark.parametrize("cut", [1, 50_000_000])
def test_a_file_that_is_cut_after_it_was_planned(tmp_path: Path, cut: int) -> None:
    plan = cut_since(tmp_path, cut)
    with pytest.raises(UnreadableError, match="Download it again"):
        execute(plan, dtype=torch.float32)


COUNTING = """
import os, torch
from cabochon.kernels.choose import Kernels
from cabochon.kernels.library import library
from cabochon.load.measure import Measure
from cabochon.nn.gguf_blocks import BlockWeight
from cabochon.nn.weight import DenseWeight

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
kernels = Kernels(library(), "int8")
octets = torch.empty(8192, 864, dtype=torch.uint8).random_(0, 56)
before = threads()
weight = BlockWeight(octets, "Q4_0", in_features=1536)
Measure()._entries(weight)
kernels.for_weight(weight)
kernels.for_weight(DenseWeight(torch.empty(1024, 4096, dtype=torch.bfloat16)))
after = threads()
octets + octets  # by the threads of torch
print(after - before, threads() - after)
"""


@built
@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted as Linux tells them")
def test_a_load_leaves_the_threads_of_torch_asleep() -> None:
    """They would look out for work for milliseconds, on processors that others compute with."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTING], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "1"]


def test_a_number_in_a_table_that_is_none(tmp_path: Path) -> None:
    """It is found in whichever piece of a table it lies, with how many there are."""
    folder = with_a_table(tmp_path, 260_000)
    name = "model.language_model.embed_tokens_per_layer.weight"

    def damage(tensors: Tensors) -> None:
        tensors[name][[3, 259_999], 5] = torch.nan

    plan = plan_of(altered(tmp_path / "damaged", folder, damage))
    with pytest.raises(LoadError, match=f"{name}.* has 2 of 49920000 values"):
        execute(plan, dtype=torch.float32)
