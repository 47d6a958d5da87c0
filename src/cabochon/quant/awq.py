"""AWQ as AutoAWQ's `gemm` layout has it: codes packed along the output, eight to a word, shuffled.

Other layouts that call themselves AWQ pack along the input or in tiles, and are refused by name.
Files with AWQ in their title that are compressed-tensors inside say so in their configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cabochon.checkpoint.headers import TensorMeta
from cabochon.quant import groups
from cabochon.quant.claims import Claim, Rules, Targets
from cabochon.quant.fields import containing, integer, strings
from cabochon.quant.scheme import FLOATS, Scheme, Site, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.nn.weight import Weight


@dataclass(frozen=True, slots=True)
class Awq:
    """4-bit integers with a scale and a zero point for each group of the input."""

    group: int | None  # None: one scale a row

    @property
    def name(self) -> str:
        grouping = "channel" if self.group is None else f"g{self.group}"
        return f"awq int4 {grouping}"

    @property
    def bits(self) -> int:
        return 4

    @property
    def slots(self) -> tuple[Slot, ...]:
        words = frozenset({"I32"})
        count = "1" if self.group is None else f"in/{self.group}"
        return (
            Slot("qweight", words, ("in", "out/8"), "codes"),
            Slot("qzeros", words, (count, "out/8"), "codes"),
            Slot("scales", FLOATS, (count, "out"), "scales"),
        )

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        from cabochon.nn.awq import weight

        return weight(
            stored["qweight"],
            stored["qzeros"],
            stored["scales"],
            out_features=site.out_features,
            group=self.group or site.in_features,
        )


def candidates(site: Site, stored: Mapping[str, TensorMeta]) -> Iterator[Scheme]:
    if "qweight" in stored and stored["qweight"].shape[:1] == (site.in_features,):
        count = groups.count(stored.get("scales"), 0)
        for group in groups.sizes(site.in_features, count):
            yield Awq(group)


def rules(key: str, config: Mapping[str, Any]) -> Rules:
    """One layout for all linear layers but those that have an entry of a list in their names."""
    rule = f"quant_method {config.get('quant_method')!r}"
    ignored = config.get("modules_to_not_convert") or []
    where = f"{key}.modules_to_not_convert"
    claim = _claim(rule, key, config)
    return Rules(
        groups={rule: (Targets.of(["Linear"]), claim)},
        ignore=containing(strings(ignored, where), where),
    )


def _claim(rule: str, key: str, config: Mapping[str, Any]) -> Claim:
    layout = config.get("version") or config.get("checkpoint_format") or "gemm"
    bits = config.get("bits", config.get("w_bit"))
    if str(layout).lower() != "gemm":
        reason = f"AWQ's layout {layout!r} is not supported by this version; 'gemm' is"
        return Claim(rule, unsupported=reason)
    if bits != 4:
        return Claim(rule, unsupported=f"AWQ of {bits!r} bits is not supported; 4 are")
    return Claim(rule, scheme=scheme_of(config, key), selective=False)


def scheme_of(config: Mapping[str, Any], key: str) -> Awq:
    group = integer(config, "group_size" if "group_size" in config else "q_group_size", key)
    return Awq(group if group is not None and group > 0 else None)
