"""Checkpoints of other producers, kept without what they left as it was.

`fixtures/thin/e2b-gptq4` holds what GPTQModel made of `fixtures/e2b-bf16`: its configuration, the
tensors that it wrote anew, and `decoded.json`, digests of what its own reader makes of each matrix.
What it copied is put back from the source, so that tests see the file as it was.

    python tests/thin.py FOLDER...

thins what producers wrote to `FOLDER` (named `member-anything`, with `decoded.json` in it, unless
their reader is here to decode it again) and checks that nothing is lost.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from stored import FIXTURES, Tensors, config_of, tensors_of, write
from torch import Tensor

THIN = FIXTURES / "thin"
# What stays as it is: what the producer leaves beside its tensors, and what it makes of them.
BESIDE = ("hf_quant_config.json", "decoded.json", "expected.safetensors")


def source_of(folder: Path) -> Path:
    return FIXTURES / f"{folder.name.partition('-')[0]}-bf16"


def mlx(name: str) -> str:
    """How mlx-vlm names what transformers calls `name`."""
    inner = name.removeprefix("model.")
    return inner.replace("language_model.", "language_model.model.", 1)


def saved_again(name: str) -> str:
    """How transformers itself saves the encoder-free embedder, since it has loaded it."""
    projection = "model.embed_vision.multimodal_embedder.embedding_projection"
    name = name.replace("model.embed_vision.embedding_projection", projection)
    return name.replace("model.vision_embedder.", "model.embed_vision.")


def spelling(folder: Path) -> Callable[[str], str]:
    if "-mlx" in folder.name:
        return mlx
    return saved_again if folder.name.startswith("12b-gptq") else str


def spelled(folder: Path) -> Tensors:
    """The source's tensors as the producer of `folder` names them, dense experts taken apart."""
    spell, found = spelling(folder), Tensors()
    for name, tensor in tensors_of(source_of(folder)).items():
        module, inside, leaf = spell(name).rpartition(".experts.")
        kinds = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        parts = zip(kinds, tensor.chunk(len(kinds), dim=1), strict=True) if inside else ()
        if inside and spell is mlx:
            made = {f"{module}.experts.switch_glu.{kind}.weight": part for kind, part in parts}
        elif inside and re.search("-modelopt-|-round-", folder.name):
            made = {f"{module}.experts.{number}.{kind}.weight": one
                    for kind, part in parts for number, one in enumerate(part)}  # fmt: skip
        else:
            made = {spell(name): tensor}
        found |= made
    return found


def restored(folder: Path, kept: Tensors) -> Tensors:
    """`kept` and, of the source, what belongs to no module that has anything in `kept`."""
    modules = {name.rpartition(".")[0] for name in kept}
    unfolded = {name.partition(".experts.")[0] for name in kept if ".experts." in name}
    found = dict(kept)
    for name, tensor in spelled(folder).items():
        layer, _, leaf = name.partition(".experts.")
        one_by_one = leaf in ("gate_up_proj", "down_proj") and layer in unfolded
        if name.rpartition(".")[0] not in modules and not one_by_one:
            found[name] = tensor
    return found


def whole(name: str, folder: Path) -> Path:
    """The checkpoint `name`, with tokenizer and all, as its producer wrote it."""
    thin = THIN / name
    shutil.copytree(source_of(thin), folder, dirs_exist_ok=True)
    for beside in (thin / name for name in BESIDE if (thin / name).exists()):
        shutil.copy(beside, folder)
    return write(folder, restored(thin, tensors_of(thin)), config_of(thin))


@cache
def fixture(name: str) -> Path:
    """The checkpoint `name`, to be read: where it lies, or, of a thin one, a copy made whole."""
    return whole(name, _room() / name) if (THIN / name).exists() else FIXTURES / name


@cache
def _room() -> Path:
    room = Path(tempfile.mkdtemp(prefix="cabochon-"))
    atexit.register(shutil.rmtree, room, ignore_errors=True)
    return room


def decoded(name: str) -> dict[str, tuple[torch.dtype, str]]:
    """The dtype and the digest of what the producer makes of each matrix, by its stored name."""
    digests = json.loads((THIN / name / "decoded.json").read_text())
    return {matrix: (getattr(torch, dtype), text) for matrix, (dtype, text) in digests.items()}


def digest(tensor: Tensor) -> str:
    octets = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(octets).hexdigest()[:16]


def same(tensor: Tensor, other: Tensor) -> bool:
    """Bit for bit, in 8-bit floats too, which torch does not compare."""
    described = tensor.dtype == other.dtype and tensor.shape == other.shape
    return described and digest(tensor.reshape(-1)) == digest(other.reshape(-1))


def thin(folder: Path) -> None:
    made = tensors_of(folder)
    copied = {n for n, t in spelled(folder).items() if n in made and same(made[n], t)}
    kept = {name: tensor for name, tensor in made.items() if name not in copied}
    again = restored(folder, kept)
    kept |= {name: made[name] for name in copied if name not in again}
    again = restored(folder, kept)
    assert again.keys() == made.keys(), again.keys() ^ made.keys()
    assert all(same(again[name], tensor) for name, tensor in made.items())
    out = THIN / folder.name
    out.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in kept.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config_of(folder), indent=1) + "\n")
    for name in BESIDE:
        if (folder / name).exists():
            shutil.copy(folder / name, out)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        thin(Path(given))
