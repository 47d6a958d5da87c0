"""What `quantization_config` claims of each matrix. Claims explain and break ties, no more.

Rules are compressed-tensors': a target or an ignore entry is an exact module name, `re:` and a
regular expression anchored at the start, or a class name. Exact beats regex beats class, and ignore
wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cabochon.errors import ConfigError
from cabochon.quant.scheme import PackedInt, Site

# Quantizers unfold experts into linear layers.
_CLASSES = {"linear": "Linear", "embedding": "Embedding", "experts": "Linear"}


@dataclass(frozen=True, slots=True)
class Claim:
    """What the configuration says of one site."""

    rule: str  # text to show: "config group group_0"
    scheme: PackedInt | None = None  # None: dense, or `unsupported`
    unsupported: str | None = None  # why this version has no scheme for what is claimed

    @property
    def dense(self) -> bool:
        return self.scheme is None and self.unsupported is None


@dataclass(frozen=True, slots=True)
class Rules:
    """A parsed quantization configuration."""

    groups: Mapping[str, tuple[tuple[str, ...], Claim]] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    everything: Claim | None = None  # one claim for all sites, when there are no groups to read
    notes: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()  # what is computed would differ, whatever the tensors look like

    def claim(self, site: Site, spellings: Sequence[str]) -> Claim:
        """The claim of `site`, whose module the file may spell in other ways too."""
        if self.everything is not None:
            return self.everything
        for rule in self.ignore:
            if _specificity(rule, site, spellings) is not None:
                return Claim(f"ignore entry {rule!r}")
        ranked = [
            (rank, claim)
            for targets, claim in self.groups.values()
            for target in targets
            if (rank := _specificity(target, site, spellings)) is not None
        ]
        if not ranked:
            return Claim("no rule")
        return min(ranked, key=lambda pair: pair[0])[1]

    def unmatched(self, modules: Iterable[str]) -> tuple[str, ...]:
        """Targets and ignore entries that match none of `modules`; class names always match."""
        names = list(modules)
        known = set(names) | set(_CLASSES.values())
        rules = [*self.ignore, *(t for targets, _ in self.groups.values() for t in targets)]
        return tuple(
            rule
            for rule in rules
            if rule not in known
            and not (_is_regex(rule) and any(_pattern(rule).match(name) for name in names))
        )


def _is_regex(rule: str) -> bool:
    return rule.startswith("re:")


def _pattern(rule: str) -> re.Pattern[str]:
    return re.compile(rule.removeprefix("re:"))  # `re` keeps compiled patterns


def _specificity(rule: str, site: Site, spellings: Sequence[str]) -> int | None:
    """0 for an exact match, 1 for a regex, 2 for a class; None if `rule` does not match."""
    if _is_regex(rule):
        return 1 if any(_pattern(rule).match(name) for name in spellings) else None
    if rule in spellings:
        return 0
    return 2 if rule == _CLASSES[site.kind] else None


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
    if method != "compressed-tensors":
        reason = f"quant_method {method!r} is not supported by this version"
        return Rules(everything=Claim(key, unsupported=reason))
    described = _mapping(config.get("config_groups") or {}, f"{key}.config_groups")
    groups = {
        name: _group(name, _mapping(group, f"{key}.config_groups.{name}"), config)
        for name, group in described.items()
    }
    notes = []
    if config.get("kv_cache_scheme") is not None:
        notes.append("kv_cache_scheme is not used: keys and values are kept in the compute dtype")
    refusals = []
    if config.get("transform_config"):
        refusals.append(f"{key}.transform_config is not supported by this version")
    ignore = _strings(config.get("ignore") or [], f"{key}.ignore")
    return Rules(groups=groups, ignore=ignore, notes=tuple(notes), refusals=tuple(refusals))


def _group(
    name: str, group: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[tuple[str, ...], Claim]:
    where = f"config_groups.{name}"
    targets = _strings(group.get("targets") or [], f"{where}.targets")
    weights = group.get("weights")
    rule = f"config group {name!r}"
    if weights is None:
        return targets, Claim(rule)
    weights = _mapping(weights, f"{where}.weights")
    reason = _unsupported(group, weights, config)
    if reason is not None:
        return targets, Claim(rule, unsupported=reason)
    grouped = weights.get("strategy") == "group"
    scheme = PackedInt(
        bits=weights["num_bits"],
        group=weights.get("group_size") if grouped else None,
        symmetric=weights.get("symmetric") is not False,
    )
    return targets, Claim(rule, scheme=scheme)


def _unsupported(
    group: Mapping[str, Any], weights: Mapping[str, Any], config: Mapping[str, Any]
) -> str | None:
    """Why this version cannot run what a config group claims; None if it can."""
    form = group.get("format") or config.get("format")
    if form != "pack-quantized":
        return f"compressed-tensors format {form!r} is not supported by this version"
    if weights.get("type", "int") != "int" or weights.get("num_bits") not in (4, 8):
        kind = f"{weights.get('num_bits')}-bit {weights.get('type')}"
        return f"{kind} weights are not supported by this version"
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy not in ("group", "channel"):
        return f"weight strategy {strategy!r} is not supported by this version"
    if strategy == "group" and (type(size) is not int or size < 1):
        return f"group_size is {size!r}, expected a positive integer"
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            return f"{key} are not supported by this version: only weights may be quantized"
    return None


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {name} is {value!r}, expected an object")
    return value


def _strings(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"config.json: {name} is {value!r}, expected a list of names")
    for entry in value:
        if _is_regex(entry):
            try:
                _pattern(entry)
            except re.error as error:
                raise ConfigError(f"config.json: {name}: {entry!r} is no regex: {error}") from None
    return tuple(value)
