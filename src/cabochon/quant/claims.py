"""What a quantization configuration claims of each matrix. Claims explain and break ties, no more.

A target or an ignore entry is an exact module name, `re:` and a regular expression anchored at the
start, `glob:` and a shell pattern, `skip:` and what transformers takes in its lists of modules not
to convert (a leading part of the path, as a regular expression, or the end of the name), `in:` and
the name of a module or of one around it, or a class name. Exact beats pattern beats class; ignore
wins.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import regex

from cabochon.errors import ConfigError
from cabochon.quant.scheme import Activations, Scheme, Site

RULE_SECONDS = 1.0  # for one name; rules that are meant as such take microseconds

_INSIDE = "in:"

# Quantizers unfold experts into linear layers.
_CLASSES = {"linear": "Linear", "embedding": "Embedding", "experts": "Linear"}


@dataclass(frozen=True, slots=True)
class Claim:
    """What the configuration says of one site."""

    rule: str  # text to show: "config group group_0"
    scheme: Scheme | None = None  # None: dense, or `unsupported`
    variants: tuple[Scheme, ...] = ()  # other layouts of the same, between which the file decides
    activations: Activations | None = None  # None: they are not rounded
    unsupported: str | None = None  # why this version has no scheme for what is claimed
    unrounded: str | None = None  # why it cannot round activations as is claimed
    deferred: bool = False  # to the tensors, whose own types say it all
    selective: bool = True  # says which matrices are quantized, not only how those are that are

    @property
    def dense(self) -> bool:
        return self.scheme is None and self.unsupported is None


Matches = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Targets:
    """A list of rules, in the order of the file."""

    exact: Mapping[str, None]
    patterns: tuple[tuple[str, Matches], ...]
    kind: str | None = None  # of matrices they are for; None: all
    # modules that are meant with all that is in them
    inside: Mapping[str, None] = field(default_factory=dict)

    @classmethod
    def of(cls, rules: Iterable[str]) -> Targets:
        """`ConfigError`, naming the rule, if one is malformed."""
        listed = dict.fromkeys(rules)
        inside = {rule[len(_INSIDE) :]: None for rule in listed if rule.startswith(_INSIDE)}
        compiled = [(rule, _matches(rule)) for rule in listed if not rule.startswith(_INSIDE)]
        patterns = tuple((rule, matches) for rule, matches in compiled if matches is not None)
        return cls(
            {rule: None for rule, matches in compiled if matches is None}, patterns, inside=inside
        )

    def first(self, site: Site, spellings: Sequence[str]) -> tuple[int, str] | None:
        """The most specific rule for `site`: 0 and a name, 1 and a pattern, or 2 and a class."""
        if self.kind not in (None, site.kind):
            return None
        for name in spellings:
            if name in self.exact:
                return 0, name
            if self.inside:
                around = next((part for part in _around(name) if part in self.inside), None)
                if around is not None:
                    return 0, around
        for rule, matches in self.patterns:
            if any(matches(name) for name in spellings):
                return 1, rule
        kind = _CLASSES[site.kind]
        return (2, kind) if kind in self.exact else None


@dataclass(frozen=True, slots=True)
class Rules:
    """A parsed quantization configuration."""

    groups: Mapping[str, tuple[Targets, Claim]] = field(default_factory=dict)
    ignore: Targets = field(default_factory=lambda: Targets.of(()))
    everything: Claim | None = None  # one claim for all sites, when there are no groups to read
    notes: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()  # what is computed would differ, whatever the tensors look like

    def claim(self, site: Site, spellings: Sequence[str]) -> Claim:
        """The claim of `site`, whose module the file may spell in other ways too."""
        if self.everything is not None:
            return self.everything
        ignored = self.ignore.first(site, spellings)
        if ignored is not None:
            return Claim(f"ignore entry {ignored[1]!r}")
        ranked = [
            (found[0], claim)
            for targets, claim in self.groups.values()
            if (found := targets.first(site, spellings)) is not None
        ]
        if not ranked:
            return Claim("no rule")
        return min(ranked, key=lambda pair: pair[0])[1]

    def without_activations(self) -> Rules:
        """The same for weights alone."""
        groups = {
            name: (targets, replace(claim, activations=None, unrounded=None))
            for name, (targets, claim) in self.groups.items()
        }
        everything = self.everything and replace(self.everything, activations=None)
        return replace(self, groups=groups, everything=everything)

    def unmatched(self, modules: Iterable[str]) -> tuple[str, ...]:
        """Targets and ignore entries that match none of `modules`; class names always match."""
        names = set(modules)
        known = names | set(_CLASSES.values())
        lists = [self.ignore, *(targets for targets, _ in self.groups.values())]
        waiting = {rule: matches for targets in lists for rule, matches in targets.patterns}
        for name in names:
            for rule in [rule for rule, matches in waiting.items() if matches(name)]:
                del waiting[rule]
        exact = (rule for targets in lists for rule in targets.exact if rule not in known)
        parents = {part for name in names for part in _around(name)}
        inside = (rule for targets in lists for rule in targets.inside if rule not in parents)
        return (*exact, *inside, *waiting)


def _around(name: str) -> Iterator[str]:
    """`a.b.c`, `a.b` and `a` of `a.b.c`."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _matches(rule: str) -> Matches | None:
    """What tells whether a name matches `rule`; None if it is a plain name."""
    kind, _, text = rule.partition(":")
    if kind == "glob":
        text = fnmatch.translate(text)
    elif kind == "skip":
        text = rf"(?:{text})(?:(?<=\.)|(?=\.|$))|.*{regex.escape(text)}$"
    elif kind != "re":
        return None
    return partial(_match, compiled(rule, text), rule)


def compiled(rule: str, text: str) -> regex.Pattern[str]:
    """`text`, the regular expression in `rule`."""
    try:
        return regex.compile(text)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"config.json: {rule[:200]!r} is no regular expression: {error}"
        ) from None


def _match(pattern: regex.Pattern[str], rule: str, name: str) -> bool:
    return found(pattern.match, rule, name) is not None


def found(
    find: Callable[..., regex.Match[str] | None], rule: str, name: str
) -> regex.Match[str] | None:
    """What a pattern's method `find` makes of `name`.

    Rules come from strangers, and one that backtracks without end must not hang a server.
    """
    try:
        return find(name, timeout=RULE_SECONDS)
    except TimeoutError:
        raise ConfigError(
            f"config.json: {rule[:200]!r} takes longer than {RULE_SECONDS:g} s to match {name!r}"
        ) from None
