"""The demo in bfloat16, and from that in five quantizations, each made by its real producer.

    pip install torch==2.13.0 llmcompressor==0.14.0.1 bitsandbytes==0.50.2 accelerate pillow
    python demo/variants.py OUT
    pip install torch==2.13.0 transformers==5.23.0 llama-cpp-python gguf sentencepiece protobuf
    python demo/variants.py OUT --llama-cpp TREE

Two environments, for their pins conflict. TREE is a source tree of llama.cpp, for its converter;
the source archive of llama-cpp-python has one under `vendor/llama.cpp`.

All five quantize the language model's matrices and leave the vision tower and its projector alone;
llama.cpp's default quantizes the embeddings too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[1] / "src/cabochon/demo"
Q4_0 = 2  # ggml's number of the file type
NAMED = ("--model-name", "Cabochon demo")


def decompress(target: Path) -> None:
    """What compressed-tensors makes of the packaged checkpoint.

    The matrices that were rounded to int4 are not kept. Training computed with the rounded ones, so
    this is the model that was trained, up to the rounding of code x scale to bfloat16.
    """
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from quantize import W4A16
    from safetensors.torch import load_file, save_file

    tensors = load_file(DEMO / "model.safetensors")
    packed = [name.removesuffix("_packed") for name in tensors if name.endswith("_packed")]
    for name in packed:
        leaves = ("weight_packed", "weight_scale", "weight_shape")
        place = name.removesuffix("weight")
        stored = {leaf: tensors.pop(place + leaf) for leaf in leaves}
        tensors[name] = PackedQuantizationCompressor.decompress(stored, W4A16)["weight"]
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((DEMO / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _side_files(target)


def compress(source: Path, target: Path, **recipe: Any) -> None:
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from quantize import IGNORED
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16)
    oneshot(model=model, recipe=QuantizationModifier(ignore=IGNORED, **recipe))
    _save(model, target)


def bitsandbytes(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.embed_vision"],
    )
    model = AutoModelForImageTextToText.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    _save(model, target)


def _save(model: Any, target: Path) -> None:
    model.save_pretrained(target)
    _side_files(target)


def _side_files(target: Path) -> None:
    from quantize import SIDE_FILES

    for name in SIDE_FILES:
        shutil.copy(DEMO / name, target)


def llama_cpp(tree: Path, source: Path, target: Path) -> None:
    """A model and its projector in one folder, which the projector is found in."""
    import llama_cpp

    def convert(file: Path, *flags: str) -> None:
        script = str(tree / "convert_hf_to_gguf.py")
        command = [sys.executable, script, str(source), "--outfile", str(file), *NAMED, *flags]
        subprocess.run(command, check=True)

    target.mkdir(exist_ok=True)
    plain = target.parent / "plain.gguf"
    convert(plain, "--outtype", "bf16")
    convert(target / "mmproj.gguf", "--mmproj", "--outtype", "bf16")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = Q4_0
    names = (str(plain).encode(), str(target / "demo-q4_0.gguf").encode())
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(parameters)) == 0
    plain.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--llama-cpp", type=Path, metavar="TREE")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if arguments.llama_cpp is not None:
        llama_cpp(arguments.llama_cpp, out / "bf16", out / "q4_0")
        return
    from quantize import W4A16

    decompress(out / "bf16")
    compress(out / "bf16", out / "w4a16", config_groups={"group_0": W4A16})
    compress(out / "bf16", out / "fp8", scheme="FP8_DYNAMIC", targets=["Linear"])
    compress(out / "bf16", out / "nvfp4", scheme="NVFP4A16", targets=["Linear"])
    bitsandbytes(out / "bf16", out / "nf4")


if __name__ == "__main__":
    main()
