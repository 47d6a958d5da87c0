"""What a quantization configuration claims of each matrix. Claims explain and break ties, no more.

A target or an ignore entry is an exact module name, `re:` and a regular expression anchored at the
start, `glob:` and a shell pattern, or a class name. Exact beats pattern beats class; ignore wins.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from cabochon.quant.scheme import Scheme, Site

# Quantizers unfold experts into linear layers.
_CLASSES = {"linear": "Linear", "embedding": "Embedding", "experts": "Linear"}


@dataclass(frozen=True, slots=True)
class Claim:
    """What the configuration says of one site."""

    rule: str  # text to show: "config group group_0"
    scheme: Scheme | None = None  # None: dense, or `unsupported`
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
            and not ((compiled := pattern(rule)) and any(compiled.match(n) for n in names))
        )


@lru_cache(maxsize=4096)
def pattern(rule: str) -> re.Pattern[str] | None:
    """What `rule` matches, if it is not a plain name. `re.error` if it is malformed."""
    kind, colon, text = rule.partition(":")
    if not colon or kind not in ("re", "glob"):
        return None
    return re.compile(text if kind == "re" else fnmatch.translate(text))


def _specificity(rule: str, site: Site, spellings: Sequence[str]) -> int | None:
    """0 for an exact match, 1 for a pattern, 2 for a class; None if `rule` does not match."""
    compiled = pattern(rule)
    if compiled is not None:
        return 1 if any(compiled.match(name) for name in spellings) else None
    if rule in spellings:
        return 0
    return 2 if rule == _CLASSES[site.kind] else None
