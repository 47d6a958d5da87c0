"""AutoRound: GPTQ's, AWQ's or compressed-tensors' tensors under a configuration of its own.

`packing_format` says which; with GPTQ's layout, it also says whether zero points are stored less by
one. Layers that differ stand in `extra_config`, by name, by a part of a name, or by an expression.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cabochon.quant import awq, gptq
from cabochon.quant.claims import Claim, Rules, Targets
from cabochon.quant.ct_arguments import UnsupportedError, form_of, scheme_of
from cabochon.quant.fields import integer, mapping, targets
from cabochon.quant.scheme import Scheme

METHODS = frozenset({"auto-round", "intel/auto-round"})

_GPTQ: Mapping[str, gptq.Version] = {
    "auto_round:auto_gptq": "v1",
    "auto_round:gptq": "v1",
    "auto_round": "v2",
    "auto_round:gptqmodel": "v2",
}
_AWQ = frozenset({"auto_round:auto_awq", "auto_round:awq"})
_LLM_COMPRESSOR = "auto_round:llm_compressor"
_KINDS = {"int": "int", "mx_fp": "float", "nv_fp": "float", "fp": "float"}


def rules(key: str, config: Mapping[str, Any]) -> Rules:
    """What blocks say, and what `extra_config` says of some of their layers, or of others.

    The first expression that is found in a name counts, and a whole name before it.
    """
    where = f"{key}.extra_config"
    groups: dict[str, tuple[Targets, Claim]] = {}
    for name, override in mapping(config.get("extra_config") or {}, where).items():
        merged = {**config, **mapping(override, f"{where}[{name!r}]")}
        wanted = name if _is_whole(name) else f"re:.*?(?:{name})"
        groups[name] = targets([wanted], where), _claim(f"extra_config {name!r}", key, merged)
    claim = _claim(f"quant_method {config.get('quant_method')!r}", key, config)
    groups[""] = Targets.of(["Linear"]), claim
    return Rules(groups=groups)


def _is_whole(name: str) -> bool:
    """Whether `name` is that of one layer, of which there may be tens of thousands."""
    parts = name.split(".")
    plain = all(part.isidentifier() or part.isdecimal() for part in parts)
    return name == "lm_head" or ("layers" in parts and plain)


def _claim(rule: str, key: str, config: Mapping[str, Any]) -> Claim:
    bits = integer(config, "bits", key)
    if bits is not None and bits >= 16:
        return Claim(rule)
    unrounded, rounded = None, integer(config, "act_bits", key)
    if rounded is not None and rounded < 16:
        kind = f"{rounded}-bit activations ({config.get('act_data_type')})"
        unrounded = f"AutoRound's {kind} are not supported by this version"
    form = str(config.get("packing_format") or "auto_round:auto_gptq")
    try:
        scheme = _scheme(form, key, config)
    except UnsupportedError as error:
        return Claim(rule, unsupported=str(error))
    # Of a width that is no multiple of the group, some versions store the rest of the last group.
    variants = (replace(scheme, padded=True),) if isinstance(scheme, gptq.Gptq) else ()
    return Claim(rule, scheme, variants, unrounded=unrounded, selective=False)


def _scheme(form: str, key: str, config: Mapping[str, Any]) -> Scheme:
    kind = config.get("data_type") or "int"
    if form == _LLM_COMPRESSOR:
        return _compressed(kind, config)
    if kind == "int" and form in _GPTQ:
        return gptq.scheme_of(config, key, _GPTQ[form])
    if kind == "int" and form in _AWQ:
        return awq.scheme_of(config, key)
    text = f"AutoRound's packing_format {form!r} of {kind!r} is not supported by this version"
    raise UnsupportedError(text)


def _compressed(kind: str, config: Mapping[str, Any]) -> Scheme:
    """What compressed-tensors calls the same."""
    if kind not in _KINDS:
        raise UnsupportedError(f"AutoRound's data_type {kind!r} is not supported by this version")
    size = config.get("group_size")
    weights = {
        "num_bits": config.get("bits"),
        "type": _KINDS[kind],
        "group_size": size,
        "strategy": "group" if isinstance(size, int) and size > 0 else "channel",
        "symmetric": config.get("sym") is not False,
    }
    if kind == "mx_fp":
        weights["scale_dtype"] = "torch.uint8"
    return scheme_of(form_of({"weights": weights}, {}), weights, padded=False)
