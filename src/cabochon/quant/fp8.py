"""FP8 "fine-grained" (`quant_method: "fp8"`): 8-bit floats with a scale for each block or for all.

`weight_scale_inv` is what codes are multiplied with, whatever its name says: the inverse of what
the matrix was multiplied with. Layout and rounding are those of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cabochon.checkpoint.headers import TensorMeta
from cabochon.errors import ConfigError
from cabochon.quant.activations import Dynamic, Rounded, Static
from cabochon.quant.byte_codes import ByteCodes, Cell
from cabochon.quant.claims import Claim, Rules, Targets
from cabochon.quant.fields import unconverted
from cabochon.quant.scheme import Scheme, Site

_SCALE = "weight_scale_inv"
_BLOCK = (128, 128)  # if the configuration is silent, and what other files are tried with
_BLOCKS = (_BLOCK, (64, 64), (32, 32), (1, 128))


def candidates(site: Site, stored: Mapping[str, TensorMeta]) -> Iterator[Scheme]:
    """Schemes that leaves and the grid of scales leave open."""
    scales = stored.get(_SCALE)
    if scales is None:
        return
    if scales.shape in ((), (1,), (1, 1)):
        yield _scheme((None, None))
    for rows, columns in _BLOCKS:
        if scales.shape == (site.extent(f"out/{rows}"), site.extent(f"in/{columns}")):
            yield _scheme((rows, columns))
            return


def rules(key: str, config: Mapping[str, Any]) -> Rules:
    """One scheme for all linear layers but those that are not to be converted.

    Raises:
        ConfigError: `weight_block_size` is no pair of sizes.
    """
    skipped, name = config.get("modules_to_not_convert"), f"{key}.modules_to_not_convert"
    if skipped is None:
        skipped, name = config.get("ignored_layers"), f"{key}.ignored_layers"
    ignore = unconverted(["lm_head"] if skipped is None else skipped, name)
    cell = _cell(key, config.get("weight_block_size", list(_BLOCK)))
    scheme = config.get("activation_scheme", "dynamic")
    rule = f"fp8 with activation_scheme {scheme!r}"
    if scheme not in ("dynamic", "static") or config.get("scale_fmt", "float") != "float":
        reason = (
            f"{rule} and scale_fmt {config.get('scale_fmt')!r} is not supported by this version"
        )
        claim = Claim(rule, unsupported=reason)
    else:
        claim = Claim(rule, scheme=_scheme(cell), activations=_activations(scheme, cell))
    return Rules(groups={rule: (Targets.of(["Linear"]), claim)}, ignore=ignore)


def _scheme(cell: Cell) -> ByteCodes:
    return ByteCodes("fp8", cell, scale=_SCALE)


def _activations(scheme: str, cell: Cell) -> Rounded:
    static = scheme == "static"
    return Rounded(Static("fp8", "activation_scale") if static else Dynamic("fp8", cell[1]))


def _cell(key: str, block: Any) -> Cell:
    if block is None:
        return None, None
    if (
        not isinstance(block, list)
        or [type(size) for size in block] != [int, int]
        or min(block) < 1
    ):
        raise ConfigError(f"config.json: {key}.weight_block_size is {block!r}, expected two sizes")
    return block[0], block[1]
