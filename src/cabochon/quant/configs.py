"""Finds the quantization configuration of a checkpoint and hands it to its producer's reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cabochon.quant import mlx, modelopt, torchao
from cabochon.quant.claims import Claim, Rules
from cabochon.quant.families import FAMILIES
from cabochon.quant.fields import mapping


def read_rules(raw: Mapping[str, Any]) -> Rules:
    """The rules in a parsed `config.json`, and in what lies beside it under the name of its file.

    Raises:
        ConfigError: a quantization configuration that is not built as its own format demands.
    """
    if torchao.HEADER in raw:
        return torchao.rules_of(raw[torchao.HEADER])
    beside = raw.get(modelopt.BESIDE)
    beside = None if beside is None else modelopt.details(modelopt.BESIDE, beside)
    text = raw.get("text_config")
    places = [raw, text] if isinstance(text, Mapping) else [raw]
    if isinstance(raw.get("quantization"), Mapping) and not _method(raw):
        return mlx.rules("quantization", raw["quantization"])
    for place in places:
        for key in ("quantization_config", "compression_config"):  # the second is older
            config = place.get(key)
            if config is not None:
                return _with_beside(key, mapping(config, key), beside)
    if beside is not None:
        return modelopt.rules(modelopt.BESIDE, beside)
    return Rules(everything=Claim("no quantization_config"))


def _method(raw: Mapping[str, Any]) -> Any:
    """What quantized a checkpoint, by its own word; MLX says its piece twice and its name never."""
    config = raw.get("quantization_config")
    return config.get("quant_method") if isinstance(config, Mapping) else config


def _with_beside(key: str, config: Mapping[str, Any], beside: Mapping[str, Any] | None) -> Rules:
    """ModelOpt writes what it did twice; config.json counts, and may say less."""
    if beside is None:
        return _rules(key, config)
    method = config.get("quant_method")
    if method not in modelopt.METHODS:
        note = f"{modelopt.BESIDE} is ModelOpt's, but {key} says quant_method {method!r}: followed"
        rules = _rules(key, config)
        return replace(rules, notes=(*rules.notes, note))
    said, notes = modelopt.completed(key, config, beside)
    rules = _rules(key, {**said, "quant_method": method})
    return replace(rules, notes=(*rules.notes, *notes))


def _rules(key: str, config: Mapping[str, Any]) -> Rules:
    method = config.get("quant_method")
    if method is None and key == "compression_config":
        method = "compressed-tensors"
    if method is None:
        note = f"{key} has no quant_method: taken to claim nothing"
        return Rules(everything=Claim(note), notes=(note,))
    for family in FAMILIES:
        if isinstance(method, str) and method in family.methods:
            return family.rules(key, config)
    reason = f"quant_method {method!r} is not supported by this version"
    return Rules(everything=Claim(key, unsupported=reason))
