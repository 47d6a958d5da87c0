"""GPTQ, as AutoGPTQ, GPTQModel and optimum write it: codes packed along the input, transposed.

Zero points are stored minus one in the first version of the format, and as they are in the second.
Nothing but the configuration tells the two apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cabochon.checkpoint.headers import TensorMeta
from cabochon.errors import ConfigError, LoadError
from cabochon.quant import groups
from cabochon.quant.claims import Claim, Rules, Targets
from cabochon.quant.fields import containing, integer, mapping, strings, targets
from cabochon.quant.scheme import FLOATS, Scheme, Site, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.nn.weight import Weight

Version = Literal["v1", "v2"]

WIDTHS = (2, 3, 4, 8)
_VERSIONS: Mapping[str, Version] = {"gptq": "v1", "gptq_v2": "v2"}


@dataclass(frozen=True, slots=True)
class Gptq:
    """Integers in int32 words, columns of a word being rows of the matrix."""

    bits: int
    group: int | None  # None: one scale a row
    version: Version  # of zero points
    ordered: bool = False  # `g_idx`, the group of each column, must be there
    padded: bool = False  # codes fill the last group, though columns do not
    # Claimed of all zero points: each is the middle code. They are stored and read all the same.
    symmetric: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        grouping = "channel" if self.group is None else f"g{self.group}"
        return f"gptq {self.version} int{self.bits} {grouping}"

    @property
    def slots(self) -> tuple[Slot, ...]:
        words = frozenset({"I32"})
        count = "1" if self.group is None else f"in/{self.group}"
        width = f"in^{self.group}" if self.padded and self.group else "in"
        return (
            Slot("qweight", words, (f"{width}*{self.bits}/32", "out"), "codes"),
            Slot("qzeros", words, (count, f"out*{self.bits}/32"), "codes"),
            Slot("scales", FLOATS, (count, "out"), "scales"),
            Slot("g_idx", words, ("in",), "codes", optional=not self.ordered),
        )

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        from cabochon.nn import gptq

        group = self.group or site.in_features
        zeros = gptq.zero_points(
            stored["qzeros"], self.bits, site.out_features, less_one=self.version == "v1"
        )
        order = None
        if "g_idx" in stored:
            order = gptq.order(stored["g_idx"], group)
            if order is None:
                detail = f"does not put {group} columns in each group"
                raise LoadError(f"g_idx of {site.name!r} {detail}")
        return gptq.weight(
            stored["qweight"],
            stored["scales"],
            zeros,
            order,
            in_features=site.in_features,
            bits=self.bits,
            group=group,
        )


def candidates(site: Site, stored: Mapping[str, TensorMeta]) -> Iterator[Scheme]:
    if "qweight" not in stored:
        return
    rows = stored["qweight"].shape[0] if stored["qweight"].shape else 0
    count = groups.count(stored.get("scales"), 0)
    for bits in WIDTHS:
        for group in groups.sizes(site.in_features, count):
            filled = site.extent(f"in^{group or 1}")
            for width in {site.in_features, filled}:
                if -(-width * bits // 32) == rows:
                    padded = width > site.in_features
                    yield Gptq(bits, group, "v1", "g_idx" in stored, padded)
                    yield Gptq(bits, group, "v2", "g_idx" in stored, padded)


def rules(key: str, config: Mapping[str, Any]) -> Rules:
    """One layout for all linear layers, but for what the expressions of `dynamic` match.

    Which layers are quantized is not said; those of a decoder block are, as a rule.
    """
    form = config.get("checkpoint_format") or config.get("format") or "gptq"
    where = f"{key}.dynamic"
    every: dict[str, tuple[Targets, Claim]] = {}
    for rule, override in mapping(config.get("dynamic") or {}, where).items():
        claim = Claim(f"dynamic rule {rule!r}")
        if not rule.startswith("-:"):
            merged = {**config, **mapping(override, f"{where}.{rule}")}
            claim = _claim(claim.rule, key, merged, form)
        pattern = rule.removeprefix("-:").removeprefix("+:")
        every[rule] = targets([f"re:{pattern}"], where), claim
    base = _claim(f"quant_method {config.get('quant_method')!r}", key, config, form)
    return Rules(groups={**every, "": (Targets.of(["Linear"]), base)}, ignore=_ignored(key, config))


def _ignored(key: str, config: Mapping[str, Any]) -> Targets:
    names = strings(config.get("modules_to_not_convert") or [], f"{key}.modules_to_not_convert")
    return containing(names, f"{key}.modules_to_not_convert")


def _claim(rule: str, key: str, config: Mapping[str, Any], form: str) -> Claim:
    if form not in _VERSIONS:
        return Claim(rule, unsupported=f"checkpoint_format {form!r} is not supported")
    if config.get("planar"):
        return Claim(rule, unsupported="the planar layout is not supported by this version")
    if config.get("pack_dtype", "int32") != "int32":
        reason = f"pack_dtype {config['pack_dtype']!r} is not supported; int32 is"
        return Claim(rule, unsupported=reason)
    scheme = scheme_of(config, key, _VERSIONS[form])
    return Claim(rule, scheme=scheme, selective=False)


def scheme_of(config: Mapping[str, Any], key: str, version: Version) -> Gptq:
    """The scheme that `bits`, `group_size`, `desc_act` and `sym` describe."""
    bits, group = integer(config, "bits", key), integer(config, "group_size", key)
    if bits not in WIDTHS:
        raise ConfigError(f"config.json: {key}.bits is {bits!r}, expected one of {WIDTHS}")
    if group is not None and group <= 0:
        group = None
    ordered, symmetric = (config.get(name) is True for name in ("desc_act", "sym"))
    return Gptq(bits, group, version, ordered=ordered, symmetric=symmetric)
