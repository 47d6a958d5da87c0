"""What producers write while the tests run: each of their ways for each architecture, once.

`docs/formats.md` counts them beside the fixtures. Google's converter alone is not public:
`google.py` writes its format from the description, and transformers reads it.
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import google
import torch
import torchao.quantization as ao
from checkpoints import FIXTURES, Config, Tensors, altered
from conftest import MEMBERS
from ct_formats import ALONE, FORMATS, MIXED, OLDER
from ct_writer import LAYERS, encode

BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}
TORCHAO: dict[str, Callable[[], Any]] = {
    "int8": ao.Int8WeightOnlyConfig,
    "int8-dynamic": ao.Int8DynamicActivationInt8WeightConfig,
    "fp8": ao.Float8WeightOnlyConfig,
    "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
    "int8-int4": lambda: ao.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=ao.PerGroup(32)
    ),
}
OF_PARAMETERS = ("int8", "int8-dynamic", "fp8")  # torchao makes the others of linear layers alone
# The projector of sound has 48 columns here, which are no whole groups of torchao's.
UNTOUCHED = ["lm_head", "model.vision_embedder", "model.embed_audio"]
FP8_TEXT = re.compile(
    r"model\.language_model\.layers\.\d+\.(self_attn|mlp|experts)\..*proj(\.weight)?"
)
FP8_SKIPPED = [
    "lm_head", "model.vision_tower", "model.vision_embedder", "model.embed_vision",
    "model.audio_tower", "model.embed_audio", "router.proj", "per_layer_input_gate",
    "per_layer_projection", "per_layer_model_projection",
]  # fmt: skip
Block = tuple[int, int] | None  # None: one scale for a matrix


def saved(folder: Path, source: Path, recipe: Any) -> Path:
    """Quantized and saved by transformers."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=recipe, device_map="cpu"
    )
    model.save_pretrained(folder)
    for path in source.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def bitsandbytes(folder: Path, source: Path, kind: str) -> Path:
    from transformers import BitsAndBytesConfig

    return saved(folder, source, BitsAndBytesConfig(**BITSANDBYTES[kind]))


def torchao(folder: Path, source: Path, kind: str) -> Path:
    from transformers import TorchAoConfig

    recipe = TORCHAO[kind]()
    if kind in OF_PARAMETERS and "26b" in source.name:
        experts = r"re:.*\.experts\.(gate_up|down)_proj"
        recipe = ao.FqnToConfig({experts: recipe, "_default": recipe})
    return saved(folder, source, TorchAoConfig(recipe, modules_to_not_convert=UNTOUCHED))


def fp8(folder: Path, source: Path, block: Block, static: bool = False) -> Path:
    """Fine-grained FP8 as transformers' quantizer makes it."""
    if block is None and "26b" in source.name:
        # Of one scale for each expert transformers (5.23) writes [8, 1, 1] and reads [8, 2, 1].
        block = (32, 32)
    return altered(folder, source, fp8_tensors(block, static), fp8_config(block, static))


def fp8_tensors(block: Block, static: bool = False) -> Callable[[Tensors], None]:
    """Puts every matrix of the text model in FP8."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    size = None if block is None else list(block)
    said = SimpleNamespace(weight_block_size=size, scale_fmt="float")
    quantizer = Fp8Quantize(SimpleNamespace(quantization_config=said))

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if FP8_TEXT.fullmatch(n)]:
            made = quantizer.convert({name: tensors.pop(name)})
            tensors |= {n: t.reshape(()) if t.numel() == 1 else t for n, t in made.items()}
            module = name.removesuffix(".weight")
            if static and ".experts." in module:  # one for each, in one tensor
                tensors[f"{module}_activation_scale"] = torch.full((8,), 0.02)
            elif static:
                tensors[f"{module}.activation_scale"] = torch.tensor(0.02)

    return change


def fp8_config(block: Block, static: bool = False) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "static" if static else "dynamic",
            "weight_block_size": None if block is None else list(block),
            "modules_to_not_convert": FP8_SKIPPED,
        }

    return change


def gemma(folder: Path, source: Path) -> Path:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return google.checkpoint(folder, dense=source)


# Each writes, to a folder, the checkpoint in another.
WAYS: Mapping[str, Callable[[Path, Path], Path]] = {
    **{f"bitsandbytes {kind}": partial(bitsandbytes, kind=kind) for kind in BITSANDBYTES},
    **{f"torchao {kind}": partial(torchao, kind=kind) for kind in TORCHAO},
    "fp8 blocks": partial(fp8, block=(16, 32)),
    "fp8 tensor": partial(fp8, block=None),
    "gemma": gemma,
    **{
        f"compressed-tensors {name}": partial(encode, groups={LAYERS: FORMATS[name][0]})
        for name in ALONE
    },
    **{
        f"compressed-tensors {name}": partial(encode, groups=groups)
        for name, (groups, _) in MIXED.items()
    },
    **{
        f"compressed-tensors {name}": partial(encode, groups=groups, packing=packing)
        for name, (groups, packing) in OLDER.items()
    },
}


@cache
def written(way: str, member: str) -> Path:
    """The small checkpoint of `member` as `way` has it; not to be changed."""
    return WAYS[way](_room() / f"{member}-{way.replace(' ', '-')}", FIXTURES / f"{member}-bf16")


@cache
def _room() -> Path:
    room = Path(tempfile.mkdtemp(prefix="cabochon-"))
    atexit.register(shutil.rmtree, room, ignore_errors=True)
    return room


def everything() -> Iterator[Path]:
    return (written(way, member) for way in WAYS for member in MEMBERS)
