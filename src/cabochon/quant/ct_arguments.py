"""The arguments of a compressed-tensors config group, as schemes and as rounding of activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cabochon.quant.activations import Dynamic, Numbers, Rounded, Static
from cabochon.quant.byte_codes import ByteCodes, Cell
from cabochon.quant.microscaled import BLOCK as MX_BLOCK
from cabochon.quant.microscaled import Mxfp4
from cabochon.quant.nvfp4 import BLOCK as NV_BLOCK
from cabochon.quant.nvfp4 import Nvfp4
from cabochon.quant.packed_int import ALIGNED, PackedInt
from cabochon.quant.scheme import Scheme

Arguments = Mapping[str, Any]  # of weights, or of activations

_NUMBERS: dict[tuple[str, str], Numbers] = {
    ("int", "4"): "int4",
    ("int", "8"): "int8",
    ("float", "4"): "fp4",
    ("float", "8"): "fp8",
}


class UnsupportedError(Exception):
    """What keeps this version from doing what a config group asks for."""


def scheme_of(form: str, weights: Arguments, *, padded: bool) -> Scheme:
    """The scheme in which `form` stores what `weights` describes.

    Raises:
        UnsupportedError: there is none in this version.
    """
    if form == "nvfp4-pack-quantized":
        _expect(form, weights, num_bits=4, type="float", group_size=NV_BLOCK)
        return Nvfp4("compressed-tensors")
    if form == "mxfp4-pack-quantized":
        _expect(form, weights, num_bits=4, type="float", group_size=MX_BLOCK)
        return Mxfp4()
    if form == "mxfp8-quantized":
        _expect(form, weights, num_bits=8, type="float", group_size=MX_BLOCK)
        return ByteCodes("mxfp8", (1, MX_BLOCK))
    if form == "pack-quantized":
        return _packed(weights, padded=padded)
    if form in ("int-quantized", "float-quantized", "naive-quantized"):
        return _bytes(weights)
    raise UnsupportedError(f"compressed-tensors format {form!r} is not supported by this version")


def form_of(group: Arguments, config: Arguments) -> str:
    """The format of a config group: its own, the file's, or what its arguments are stored in."""
    form = group.get("format") or config.get("format")
    if isinstance(form, str) and form != "mixed-precision":
        return form
    weights = group["weights"]
    if kind_of(weights) == "int":
        return "int-quantized" if group.get("input_activations") else "pack-quantized"
    if weights.get("num_bits") == 4:
        micro = weights.get("group_size") == MX_BLOCK
        return "mxfp4-pack-quantized" if micro else "nvfp4-pack-quantized"
    return "mxfp8-quantized" if _is_microscaled(weights) else "float-quantized"


def rounding_of(group: Arguments) -> Rounded | None:
    """What a config group does to activations.

    Raises:
        UnsupportedError: nothing that this version does.
    """
    inputs, outputs = group.get("input_activations"), group.get("output_activations")
    if inputs is None and outputs is None:
        return None
    # Google's mobile files say by a scale of 0.0 that an end was not calibrated.
    may_lack = outputs is not None
    ends = [
        None if arguments is None else _end(name, arguments, may_lack=may_lack)
        for name, arguments in (("input", inputs), ("output", outputs))
    ]
    if isinstance(ends[1], Dynamic):
        raise UnsupportedError("output_activations with dynamic scales are not supported")
    return Rounded(ends[0], ends[1])


def kind_of(arguments: Arguments) -> str:
    return str(arguments.get("type") or "int").lower()


def _end(name: str, arguments: Arguments, *, may_lack: bool) -> Static | Dynamic:
    where = f"{name}_activations"
    if not isinstance(arguments, Mapping):
        raise UnsupportedError(f"{where} is {arguments!r}, expected an object")
    numbers = _NUMBERS.get((kind_of(arguments), str(arguments.get("num_bits"))))
    if numbers is None:
        text = f"{arguments.get('num_bits')}-bit {kind_of(arguments)}"
        raise UnsupportedError(f"{where} of {text} are not supported by this version")
    strategy, dynamic = strategy_of(arguments), arguments.get("dynamic")
    symmetric = arguments.get("symmetric") is not False
    if not symmetric and not numbers.startswith("int"):
        raise UnsupportedError(f"{where} of asymmetric floats are not supported by this version")
    if dynamic == "local" and strategy == "tensor_group":
        group = _group_size(arguments)
        return Dynamic(numbers, group, scales="e4m3", whole=f"{name}_global_scale")
    if dynamic is True and strategy in ("token", "tensor"):
        return Dynamic(numbers, symmetric=symmetric)
    if dynamic is True and strategy == "group":
        micro = numbers == "fp4" or _is_microscaled(arguments)
        return Dynamic(
            numbers,
            _group_size(arguments),
            symmetric=symmetric,
            scales="e8m0" if micro else "float",
        )
    if not dynamic and strategy == "tensor":
        zero = None if symmetric else f"{name}_zero_point"
        return Static(numbers, f"{name}_scale", zero, may_lack=may_lack)
    kind = "dynamic" if dynamic else "static"
    raise UnsupportedError(
        f"{kind} {where} with strategy {strategy!r} are not supported by this version"
    )


def _packed(weights: Arguments, *, padded: bool) -> PackedInt:
    bits, strategy = weights.get("num_bits"), strategy_of(weights)
    if kind_of(weights) != "int" or type(bits) is not int or not 2 <= bits <= 8:
        text = f"{bits}-bit {kind_of(weights)}"
        raise UnsupportedError(f"{text} weights are not supported in pack-quantized")
    if strategy not in ("group", "channel"):
        raise UnsupportedError(f"weight strategy {strategy!r} is not supported by this version")
    return PackedInt(
        bits,
        _group_size(weights) if strategy == "group" else None,
        symmetric=weights.get("symmetric") is not False,
        padded=padded and bits not in ALIGNED,
        reordered=weights.get("actorder") in ("group", "dynamic", True),
    )


def _bytes(weights: Arguments) -> ByteCodes:
    kind, bits = kind_of(weights), weights.get("num_bits")
    if (kind, bits) != ("float", 8) and not (kind == "int" and bits in range(2, 9)):
        raise UnsupportedError(f"{bits}-bit {kind} weights are not supported by this version")
    symmetric = weights.get("symmetric") is not False
    if kind == "float" and not symmetric:
        raise UnsupportedError("weights of asymmetric floats are not supported by this version")
    return ByteCodes("int8" if kind == "int" else "fp8", _cell(weights), symmetric)


def _cell(weights: Arguments) -> Cell:
    """Rows and columns that share a scale."""
    strategy = strategy_of(weights)
    if strategy == "tensor":
        return None, None
    if strategy == "channel":
        return 1, None
    if strategy == "group":
        return 1, _group_size(weights)
    if strategy == "block":
        block = weights.get("block_structure")
        if isinstance(block, str):  # "128x128", in older versions
            block = [int(size) if size.isdigit() else 0 for size in block.split("x")]
        if isinstance(block, list) and len(block) == 2 and all(_is_size(size) for size in block):
            return block[0], block[1]
        raise UnsupportedError(f"block_structure is {block!r}, expected two positive integers")
    raise UnsupportedError(f"weight strategy {strategy!r} is not supported by this version")


def strategy_of(arguments: Arguments) -> str:
    """What shares a scale; if it is not said, it follows from the size of groups."""
    strategy, size = arguments.get("strategy"), arguments.get("group_size")
    if strategy is not None:
        return str(strategy).lower()
    if size is None:
        return "tensor"
    return "channel" if size == -1 else "group"


def _group_size(arguments: Arguments) -> int:
    size: Any = arguments.get("group_size")
    if not _is_size(size):
        raise UnsupportedError(f"group_size is {size!r}, expected a positive integer")
    return int(size)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_microscaled(arguments: Arguments) -> bool:
    scales = str(arguments.get("scale_dtype") or "").removeprefix("torch.")
    return arguments.get("group_size") == MX_BLOCK and scales == "uint8"


def _expect(form: str, weights: Arguments, **expected: Any) -> None:
    for key, value in expected.items():
        found = kind_of(weights) if key == "type" else weights.get(key)
        if found != value:
            raise UnsupportedError(f"{form} has {key} {found!r}, expected {value!r}")
    if weights.get("symmetric") is False:
        raise UnsupportedError(f"asymmetric {form} weights are not supported by this version")
