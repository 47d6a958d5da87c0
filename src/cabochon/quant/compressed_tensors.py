"""compressed-tensors: what its configuration claims, and what its tensors can be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cabochon.checkpoint.headers import TensorMeta
from cabochon.quant.claims import Claim, Rules, Targets
from cabochon.quant.fields import KV_NOTE, mapping, targets
from cabochon.quant.nvfp4 import Nvfp4
from cabochon.quant.packed_int import PackedInt
from cabochon.quant.scheme import Scheme, Site


def candidates(site: Site, stored: Mapping[str, TensorMeta]) -> Iterator[Scheme]:
    """Schemes that leaves, dtypes and widths leave open."""
    if "weight_global_scale" in stored:
        yield Nvfp4("compressed-tensors")
    elif "weight_packed" in stored:
        symmetric = "weight_zero_point" not in stored
        for bits in (4, 8):
            for group in _groups(site, stored.get("weight_scale")):
                yield PackedInt(bits, group, symmetric)


def _groups(site: Site, scale: TensorMeta | None) -> list[int | None]:
    """Group sizes that give as many groups as `scale` has: powers of two, and an even split."""
    count = scale.shape[-1] if scale is not None and scale.shape else 1
    if count <= 1:
        return [None]
    sizes = {2**n for n in range(3, 13) if -(-site.in_features // 2**n) == count}
    if site.in_features % count == 0:
        sizes.add(site.in_features // count)
    return sorted(sizes) or [None]


def rules(key: str, config: Mapping[str, Any]) -> Rules:
    """The rules of `config_groups`, whose targets and ignore entries name upstream's modules."""
    described = mapping(config.get("config_groups") or {}, f"{key}.config_groups")
    groups = {
        name: _group(name, mapping(group, f"{key}.config_groups.{name}"), config)
        for name, group in described.items()
    }
    notes = [] if config.get("kv_cache_scheme") is None else [KV_NOTE]
    refusals = []
    if config.get("transform_config"):
        refusals.append(f"{key}.transform_config is not supported by this version")
    ignore = targets(config.get("ignore") or [], f"{key}.ignore")
    return Rules(groups=groups, ignore=ignore, notes=tuple(notes), refusals=tuple(refusals))


def _group(name: str, group: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Targets, Claim]:
    where = f"config_groups.{name}"
    wanted = targets(group.get("targets") or [], f"{where}.targets")
    weights = group.get("weights")
    rule = f"config group {name!r}"
    if weights is None:
        return wanted, Claim(rule)
    weights = mapping(weights, f"{where}.weights")
    reason = _unsupported(group, weights, config)
    if reason is not None:
        return wanted, Claim(rule, unsupported=reason)
    return wanted, Claim(rule, scheme=_scheme(weights))


def _scheme(weights: Mapping[str, Any]) -> Scheme:
    """The scheme that `weights`, which this version supports, describes."""
    if weights.get("type", "int") == "float":
        return Nvfp4("compressed-tensors")
    return PackedInt(
        bits=weights["num_bits"],
        group=weights.get("group_size") if weights.get("strategy") == "group" else None,
        symmetric=weights.get("symmetric") is not False,
    )


def _unsupported(
    group: Mapping[str, Any], weights: Mapping[str, Any], config: Mapping[str, Any]
) -> str | None:
    """Why this version cannot run what a config group claims; None if it can."""
    form = group.get("format") or config.get("format")
    if form == "nvfp4-pack-quantized":
        reason = _unsupported_nvfp4(weights)
    elif form == "pack-quantized":
        reason = _unsupported_packed(weights)
    else:
        reason = f"compressed-tensors format {form!r} is not supported by this version"
    for key in ("input_activations", "output_activations"):
        if reason is None and group.get(key) is not None:
            reason = f"{key} are not supported by this version: only weights may be quantized"
    return reason


def _unsupported_packed(weights: Mapping[str, Any]) -> str | None:
    if weights.get("type", "int") != "int" or weights.get("num_bits") not in (4, 8):
        kind = f"{weights.get('num_bits')}-bit {weights.get('type')}"
        return f"{kind} weights are not supported by this version"
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy not in ("group", "channel"):
        return f"weight strategy {strategy!r} is not supported by this version"
    if strategy == "group" and (type(size) is not int or size < 1):
        return f"group_size is {size!r}, expected a positive integer"
    return None


def _unsupported_nvfp4(weights: Mapping[str, Any]) -> str | None:
    expected = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    for key, value in expected.items():
        if weights.get(key) != value:
            return f"nvfp4-pack-quantized has {key} {weights.get(key)!r}, expected {value!r}"
    if weights.get("symmetric") is False:
        return "asymmetric nvfp4-pack-quantized weights are not supported by this version"
    return None
