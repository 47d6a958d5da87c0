"""Reads quantization configurations, each in its producer's own schema, into `Rules`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cabochon.errors import ConfigError
from cabochon.quant.claims import Claim, Rules, Targets
from cabochon.quant.nvfp4 import Nvfp4
from cabochon.quant.scheme import PackedInt, Scheme

MAX_PATTERNS = 1000  # of a list; each is tried on each matrix

_KV_NOTE = "kv_cache_scheme is not used: keys and values are kept in the compute dtype"


def read_rules(raw: Mapping[str, Any]) -> Rules:
    """The rules in a parsed `config.json`.

    Raises:
        ConfigError: a quantization configuration that is not built as its own format demands.
    """
    text = raw.get("text_config")
    places = [raw, text] if isinstance(text, Mapping) else [raw]
    for place in places:
        for key in ("quantization_config", "compression_config"):  # the second is older
            config = place.get(key)
            if config is not None:
                return _rules(key, _mapping(config, key))
    return Rules(everything=Claim("no quantization_config"))


def _rules(key: str, config: Mapping[str, Any]) -> Rules:
    method = config.get("quant_method")
    if method is None and key == "compression_config":
        method = "compressed-tensors"
    if method is None:
        note = f"{key} has no quant_method: taken to claim nothing"
        return Rules(everything=Claim(note), notes=(note,))
    if method == "compressed-tensors":
        return _compressed_tensors(key, config)
    if method == "modelopt":
        return _modelopt(key, config)
    reason = f"quant_method {method!r} is not supported by this version"
    return Rules(everything=Claim(key, unsupported=reason))


def _compressed_tensors(key: str, config: Mapping[str, Any]) -> Rules:
    described = _mapping(config.get("config_groups") or {}, f"{key}.config_groups")
    groups = {
        name: _group(name, _mapping(group, f"{key}.config_groups.{name}"), config)
        for name, group in described.items()
    }
    notes = [] if config.get("kv_cache_scheme") is None else [_KV_NOTE]
    refusals = []
    if config.get("transform_config"):
        refusals.append(f"{key}.transform_config is not supported by this version")
    ignore = _targets(config.get("ignore") or [], f"{key}.ignore")
    return Rules(groups=groups, ignore=ignore, notes=tuple(notes), refusals=tuple(refusals))


def _group(name: str, group: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Targets, Claim]:
    where = f"config_groups.{name}"
    targets = _targets(group.get("targets") or [], f"{where}.targets")
    weights = group.get("weights")
    rule = f"config group {name!r}"
    if weights is None:
        return targets, Claim(rule)
    weights = _mapping(weights, f"{where}.weights")
    reason = _unsupported(group, weights, config)
    if reason is not None:
        return targets, Claim(rule, unsupported=reason)
    return targets, Claim(rule, scheme=_scheme(weights))


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


def _modelopt(key: str, config: Mapping[str, Any]) -> Rules:
    """ModelOpt's schema: one algorithm for all linear layers but those that shell patterns name."""
    ignored = config.get("ignore") or config.get("exclude_modules") or []
    names = _strings(ignored, f"{key}.ignore")
    rules = [f"glob:{name}" if set(name) & set("*?[") else name for name in names]
    ignore = _targets(rules, f"{key}.ignore")
    algorithm = config.get("quant_algo")
    rule = f"quant_algo {algorithm!r}"
    if algorithm == "W4A16_NVFP4":
        claim = Claim(rule, scheme=Nvfp4("modelopt"))
    else:
        reason = f"ModelOpt's quant_algo {algorithm!r} is not supported by this version"
        if algorithm in ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD"):
            reason += ": it quantizes activations too or changes them"
        claim = Claim(rule, unsupported=reason)
    notes = [] if config.get("kv_cache_scheme") is None else [_KV_NOTE]
    return Rules(groups={rule: (Targets.of(["Linear"]), claim)}, ignore=ignore, notes=tuple(notes))


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {name} is {value!r}, expected an object")
    return value


def _strings(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"config.json: {name} is {value!r}, expected a list of names")
    return tuple(value)


def _targets(value: Any, name: str) -> Targets:
    targets = Targets.of(_strings(value, name))
    if len(targets.patterns) > MAX_PATTERNS:
        count = len(targets.patterns)
        raise ConfigError(f"config.json: {name} has {count} patterns, more than {MAX_PATTERNS}")
    return targets
