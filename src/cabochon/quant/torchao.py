"""torchao: what the header of a safetensors file says of each tensor that torchao took apart.

Its tensors are those of other producers under names of its own (`load/names.py`); what a matrix is
and what is done to activations is JSON in the header, parameter by parameter. Layout:
`torchao.prototype.safetensors`, torchao 0.18.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from cabochon.checkpoint.headers import TensorMeta
from cabochon.errors import ConfigError
from cabochon.files import parse_json
from cabochon.quant.activations import Dynamic, Rounded
from cabochon.quant.byte_codes import ByteCodes
from cabochon.quant.claims import Claim, Rules, Targets
from cabochon.quant.scheme import Scheme, Site

HEADER = "header of torchao"  # where a parsed configuration carries it

_MARK = "tensor_names"
_NUMBERS: Mapping[str, Literal["int8", "fp8"]] = {
    "Int8Tensor": "int8",
    "IntxUnpackedToInt8Tensor": "int8",
    "Float8Tensor": "fp8",
}


class _UnsupportedError(Exception):
    """What this version does not compute; the text ends "... is not supported by this version"."""


def candidates(site: Site, stored: Mapping[str, TensorMeta]) -> Iterator[Scheme]:
    """None of its own: its bytes and scales are those of compressed-tensors."""
    return iter(())


def header_of(metadata: Mapping[str, str]) -> Mapping[str, str] | None:
    """`metadata`, the free text of headers, if torchao wrote it."""
    return metadata if _MARK in metadata else None


def rules(key: str, config: Mapping[str, Any]) -> Rules:
    """Those of a configuration alone, which says too little of what is stored."""
    reason = f"{key} is torchao's, but no header describes its tensors: this"
    return Rules(everything=Claim(key, unsupported=f"{reason} is not supported by this version"))


def rules_of(header: Mapping[str, str]) -> Rules:
    """A claim for each parameter that the header describes.

    Raises:
        ConfigError: a description that torchao would not read either.
    """
    names: dict[str, list[str]] = {}
    for name, text in header.items():
        if "." in name and (text := text.strip()) != '{"_type": "Tensor"}':
            names.setdefault(text, []).append(name.removesuffix(".weight"))
    groups = {}
    for number, (text, modules) in enumerate(names.items()):
        claim = _claim(modules[0], text)
        groups[f"header {number}"] = Targets.of(modules), claim
    return Rules(groups=groups)


def _claim(where: str, text: str) -> Claim:
    try:
        said = parse_json(text.encode())
        kind, data = said["_type"], said["_data"]
        zeros = "zero_point" in said["_tensor_data_names"]
        extra = set(said["_tensor_data_names"]) - {"qdata", "scale", "zero_point"}
        if extra or kind not in _NUMBERS:
            within = f" with {sorted(extra)}" if extra else ""
            raise _UnsupportedError(f"{kind}{within}")
        numbers, (*rows, columns) = _NUMBERS[kind], data["block_size"]
        if any(size != 1 for size in rows):  # there are two of stacked experts
            raise _UnsupportedError(f"{kind} in blocks of {data['block_size']}")
        scheme = ByteCodes(numbers, (1, columns), not zeros)
        whole = ByteCodes(numbers, (1, None), not zeros)
        activations, unrounded = _activations(kind, data)
    except _UnsupportedError as error:
        return Claim("the header", unsupported=_reason(error))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the header describes {where!r} in a way torchao does not: {error}"
        ) from None
    return Claim("the header", whole, (scheme,), activations, unrounded=unrounded)


def _activations(kind: str, data: Mapping[str, Any]) -> tuple[Rounded | None, str | None]:
    """What `data` says of activations, or why that is not done here."""
    try:
        return _rounding(kind, data), None
    except _UnsupportedError as error:
        return None, _reason(error)


def _reason(error: _UnsupportedError) -> str:
    return f"torchao's {error} is not supported by this version"


def _rounding(kind: str, data: Mapping[str, Any]) -> Rounded | None:
    """Nothing, or a rounding of each token."""
    if kind == "IntxUnpackedToInt8Tensor":
        said = data["activation_quantization"]
        if said is None:
            return None
        if said != "int8_asym_per_token":
            raise _UnsupportedError(f"{kind} with activations {said!r}")
        return Rounded(Dynamic("int8", symmetric=False, multiplied=True))
    said = data["act_quant_kwargs"]
    if said is None:
        return None
    options = said["_data"]
    if options["granularity"]["_type"] != "PerRow":
        raise _UnsupportedError(f"{kind} with activations {options['granularity']['_type']!r}")
    if kind == "Float8Tensor":
        return Rounded(Dynamic("fp8"))
    if options.get("reduce_range"):
        raise _UnsupportedError(f"{kind} with activations of a reduced range")
    symmetric = options["mapping_type"]["_data"] == "SYMMETRIC"
    return Rounded(Dynamic("int8", symmetric=symmetric, multiplied=True))
