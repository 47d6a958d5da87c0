"""compressed-tensors: what its configuration claims, and what its tensors can be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cabochon.checkpoint.headers import TensorMeta
from cabochon.quant.byte_codes import ByteCodes, Cell
from cabochon.quant.claims import Claim, Rules, Targets
from cabochon.quant.ct_arguments import (
    UnsupportedError,
    form_of,
    kind_of,
    rounding_of,
    scheme_of,
    strategy_of,
)
from cabochon.quant.fields import KV_NOTE, mapping, targets
from cabochon.quant.groups import count, sizes
from cabochon.quant.microscaled import BLOCK as MX_BLOCK
from cabochon.quant.microscaled import Mxfp4
from cabochon.quant.nvfp4 import Nvfp4
from cabochon.quant.packed_int import PackedInt
from cabochon.quant.scheme import Scheme, Site

DENSE_SINCE = (0, 18)  # before, each word held as many whole entries as went into it


def candidates(site: Site, stored: Mapping[str, TensorMeta]) -> Iterator[Scheme]:
    """Schemes that leaves, dtypes and widths leave open."""
    scale = stored.get("weight_scale")
    if "weight_packed" in stored:
        if "weight_global_scale" in stored:
            yield Nvfp4("compressed-tensors")
        elif stored["weight_packed"].dtype == "U8":
            yield Mxfp4()
        else:
            yield from _packed(site, stored)
    elif "weight" in stored and scale is not None and len(scale.shape) < 3:
        symmetric = "weight_zero_point" not in stored
        dtype = stored["weight"].dtype
        if dtype == "F8_E4M3" and scale.dtype == "U8":
            yield ByteCodes("mxfp8", (1, MX_BLOCK))
        elif dtype in ("I8", "F8_E4M3"):
            for cell in _cells(site, scale):  # floats have no zero points
                yield (
                    ByteCodes("int8", cell, symmetric) if dtype == "I8" else ByteCodes("fp8", cell)
                )


def _packed(site: Site, stored: Mapping[str, TensorMeta]) -> Iterator[Scheme]:
    """Not as old versions packed: their 7 bits are as wide as 8, and only a claim tells which."""
    symmetric, reordered = "weight_zero_point" not in stored, "weight_g_idx" in stored
    for bits in range(2, 9):
        for group in sizes(site.in_features, count(stored.get("weight_scale"), -1)):
            scheme = PackedInt(bits, group, symmetric, reordered=reordered)
            if site.extent(scheme.width) == stored["weight_packed"].shape[-1]:
                yield scheme


def _cells(site: Site, scale: TensorMeta) -> Iterator[Cell]:
    """What may share a scale, by how many of them there are."""
    if len(scale.shape) < 2:
        yield None, None
    elif scale.shape[0] == site.out_features:
        for group in sizes(site.in_features, count(scale, -1)):
            yield 1, group
    else:
        yield 128, 128


def rules(key: str, config: Mapping[str, Any]) -> Rules:
    """The rules of `config_groups`, whose targets and ignore entries name upstream's modules."""
    described = mapping(config.get("config_groups") or {}, f"{key}.config_groups")
    groups = {
        name: _group(name, mapping(group, f"{key}.config_groups.{name}"), config)
        for name, group in described.items()
    }
    refusals = []
    if config.get("transform_config"):
        refusals.append(f"{key}.transform_config is not supported by this version")
    ignore = targets(config.get("ignore") or [], f"{key}.ignore")
    notes = tuple(_notes(key, config))
    return Rules(groups=groups, ignore=ignore, notes=notes, refusals=tuple(refusals))


def _notes(key: str, config: Mapping[str, Any]) -> Iterator[str]:
    scheme = config.get("kv_cache_scheme")
    if scheme is not None:
        scheme = mapping(scheme, f"{key}.kv_cache_scheme")
        kind = f"{scheme.get('num_bits')}-bit {kind_of(scheme)} per {strategy_of(scheme)}"
        yield f"{KV_NOTE} (claimed: {kind})"
    sparse = config.get("sparsity_config")
    form = sparse.get("format") if isinstance(sparse, Mapping) else None
    if form not in (None, "dense"):
        yield f"sparsity_config says format {form!r}; what is stored is read as it is"
    for name, group in (config.get("config_groups") or {}).items():
        if _shares_at_run_time(group.get("input_activations") or {}):
            yield (
                f"config group {name!r} has one scale for all that is computed at once; here each"
                " token has its own, so that requests do not change each other's answers"
            )


def _shares_at_run_time(inputs: Any) -> bool:
    return (
        isinstance(inputs, Mapping)
        and inputs.get("dynamic") is True
        and strategy_of(inputs) == "tensor"
    )


def _group(name: str, group: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Targets, Claim]:
    where = f"config_groups.{name}"
    wanted = targets(group.get("targets") or [], f"{where}.targets")
    rule = f"config group {name!r}"
    if group.get("weights") is not None:
        mapping(group["weights"], f"{where}.weights")
    try:
        return wanted, _claim(rule, group, config)
    except UnsupportedError as error:
        return wanted, Claim(rule, unsupported=str(error))


def _claim(rule: str, group: Mapping[str, Any], config: Mapping[str, Any]) -> Claim:
    weights = group.get("weights")
    if weights is None:
        if rounding_of(group) is not None:
            raise UnsupportedError("activations of unquantized matrices are not rounded")
        return Claim(rule)
    form, padded = form_of(group, config), _pads(config)
    scheme = scheme_of(form, weights, padded=padded)
    other = scheme_of(form, weights, padded=not padded)
    variants = () if other == scheme else (other,)
    try:
        return Claim(rule, scheme, variants, rounding_of(group))
    except UnsupportedError as error:
        return Claim(rule, scheme, variants, unrounded=str(error))


def _pads(config: Mapping[str, Any]) -> bool:
    """Whether 3, 5, 6 and 7 bits are packed as older versions did."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("version") or ""))
    return version is not None and (int(version[1]), int(version[2])) < DENSE_SINCE
