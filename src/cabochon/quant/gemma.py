"""Google's own format, `quant_method: "gemma"`: packed bytes, and activations rounded all the same.

Every linear layer carries a scale for what goes in and one for what comes out; 0.0 says that none
was found. Tables have leaves of their own, and a scale for each row or for each block of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import regex

from cabochon.checkpoint.headers import TensorMeta
from cabochon.errors import ConfigError
from cabochon.quant.activations import Rounded, Static
from cabochon.quant.claims import Claim, Matches, Rules, Targets, compiled, found
from cabochon.quant.fields import integer, mapping, unconverted
from cabochon.quant.scheme import FLOATS, Scheme, Site, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.nn.weight import Weight

_WIDTHS = (2, 4, 8)
_ROUNDED = Rounded(
    inputs=Static("int8", "input_activation_scale", may_lack=True, asked=True),
    outputs=Static("int8", "output_activation_scale", may_lack=True, asked=True),
)


@dataclass(frozen=True, slots=True)
class Gemma:
    """Integers of 2 and 4 bits with an offset, low bits of a byte first; of 8 bits as they are."""

    bits: int
    group: int | None = None  # None: one scale a row
    table: bool = False

    @property
    def name(self) -> str:
        grouping = "channel" if self.group is None else f"g{self.group}"
        return f"gemma int{self.bits} {grouping}"

    @property
    def slots(self) -> tuple[Slot, ...]:
        codes, scales = "weight", "weight_scale"
        if self.table:
            codes, scales = "embedding_quantized", "embedding_scale"
        groups = "1" if self.group is None else f"in/{self.group}"
        dtype = frozenset({"I8" if self.bits == 8 else "U8"})
        return (
            Slot(codes, dtype, ("out", f"in*{self.bits}/8"), "codes"),
            Slot(scales, FLOATS, ("out", groups), "scales"),
        )

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        import torch

        from cabochon.nn.bits import words_of
        from cabochon.nn.packed_int import PackedIntWeight

        codes, scales = (stored[slot.leaf] for slot in self.slots)
        if self.bits == 8:
            codes = codes.view(torch.uint8) ^ 128
        return PackedIntWeight(
            words_of(codes),
            scales,
            None,
            in_features=site.in_features,
            bits=self.bits,
            group=self.group or site.in_features,
            asked=True,
        )


def candidates(site: Site, stored: Mapping[str, TensorMeta]) -> Iterator[Scheme]:
    table = "embedding_quantized" in stored
    codes = stored.get("embedding_quantized" if table else "weight")
    scales = stored.get("embedding_scale" if table else "weight_scale")
    if codes is None or codes.dtype not in ("U8", "I8"):
        return
    if not table and "input_activation_scale" not in stored:
        return
    groups = scales.shape[-1] if scales is not None and scales.shape else 1
    group = site.in_features // groups if groups > 1 and site.in_features % groups == 0 else None
    for bits in _WIDTHS:
        if codes.shape[-1:] == (-(-site.in_features * bits // 8),):
            yield Gemma(bits, group, table)


def rules(key: str, config: Mapping[str, Any]) -> Rules:
    """One width for all linear layers, and others where an expression is found in the name.

    All expressions are one alternation: the leftmost match counts, and of several there, the first.
    """
    where = f"{key}.module_quant_configs"
    overrides = mapping(config.get("module_quant_configs") or {}, where)
    whole = _alternation(overrides, where)
    groups: dict[str, tuple[Targets, Claim]] = {}
    for number, (rule, override) in enumerate(overrides.items()):
        name = f"{where}[{rule!r}]"
        bits = _width({**config, **mapping(override, name)}, name)
        patterns = ((rule, partial(_is, whole, f"_rule{number}")),)
        groups |= _both(f"module_quant_configs {rule!r}", bits, {}, patterns, config)
    bits = _width(config, key)
    every = {"Linear": None, "Embedding": None}
    groups |= _both(f"num_bits {bits}", bits, every, (), config)
    ignored = unconverted(config.get("modules_to_not_convert"), f"{key}.modules_to_not_convert")
    return Rules(groups=groups, ignore=ignored)


def _both(
    rule: str,
    bits: int,
    exact: Mapping[str, None],
    patterns: tuple[tuple[str, Matches], ...],
    config: Mapping[str, Any],
) -> dict[str, tuple[Targets, Claim]]:
    """What a rule says of linear layers, and what of tables: of these it does not name blocks."""
    linear = Claim(rule, scheme=Gemma(bits), activations=_ROUNDED)
    table = Claim(rule, deferred=bool(config.get("quantize_embeddings")))
    return {
        f"{rule} linear": (Targets(exact, patterns, kind="linear"), linear),
        f"{rule} table": (Targets(exact, patterns, kind="embedding"), table),
    }


def _width(config: Mapping[str, Any], name: str) -> int:
    bits = integer(config, "num_bits", name)
    if bits is None:
        bits = 4  # upstream's default
    if bits not in _WIDTHS:
        raise ConfigError(f"config.json: {name}.num_bits is {bits}, expected one of {_WIDTHS}")
    return bits


def _alternation(rules: Mapping[str, Any], where: str) -> regex.Pattern[str]:
    for rule in rules:
        compiled(rule, rule)  # so that a malformed one is named
    text = "|".join(f"(?P<_rule{number}>{rule})" for number, rule in enumerate(rules))
    return compiled(where, text)


def _is(whole: regex.Pattern[str], rule: str, name: str) -> bool:
    match = found(whole.search, "module_quant_configs", name)
    return match is not None and match.group(rule) is not None
