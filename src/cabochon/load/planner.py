"""Makes the load plan: every stored tensor is put in its place, every matrix gets its verdict.

What is left over, and what is lacking, are problems.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from cabochon.checkpoint.folder import Checkpoint
from cabochon.checkpoint.gguf_model import GgufModel
from cabochon.checkpoint.headers import TensorMeta
from cabochon.config import Gemma4Config, unknown_keys
from cabochon.load.agreement import contradictions
from cabochon.load.gguf_names import GgufNames
from cabochon.load.mlx_names import read as read_mlx
from cabochon.load.names import KV_DTYPES, KV_SCALES, Named, absences, canonical, drops, locate
from cabochon.load.oddities import oddities
from cabochon.load.optional import half_given, unlike_others
from cabochon.load.plan import Dropped, LoadPlan, Note, ParameterRead, Problem, SiteRead
from cabochon.load.transforms import Transform
from cabochon.load.tree import HEAD, Tree, needed
from cabochon.quant.activations import ACTIVATION_LEAVES
from cabochon.quant.claims import Claim, Rules
from cabochon.quant.configs import read_rules
from cabochon.quant.resolve import Refusal, resolve
from cabochon.quant.scheme import FLOATS, INTEGERS, Dense, Site


@dataclass(slots=True)
class _Placed:
    """Every stored tensor at its place."""

    stored: dict[str, TensorMeta] = field(default_factory=dict)  # by canonical name
    # by site, part and leaf; the part is None where the whole matrix is stored at once
    sites: dict[str, dict[int | None, dict[str, TensorMeta]]] = field(default_factory=dict)
    parameters: dict[str, TensorMeta] = field(default_factory=dict)
    transforms: dict[str, Transform] = field(default_factory=dict)  # by site or parameter
    dropped: list[Dropped] = field(default_factory=list)
    unused: list[Named] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def drop(self, meta: TensorMeta, where: str, reason: str) -> None:
        if reason == KV_SCALES and meta.dtype not in KV_DTYPES:  # its values are told of
            expected = " or ".join(sorted(KV_DTYPES))
            self.problems.append(
                Problem("DTYPE", meta.name, f"is {meta.dtype}, expected {expected}")
            )
        else:
            self.dropped.append(Dropped(meta, where, reason))


def build_plan(
    checkpoint: Checkpoint,
    config: Gemma4Config,
    raw: Mapping[str, Any],
    *,
    weights_only: bool = False,
) -> LoadPlan:
    """The plan for `checkpoint`, or what stands against one, from its headers and `config.json`.

    A stored `lm_head` is used as the head, whatever the configuration says of tying; without one,
    the token table is. `raw` is the parsed file that `config` came from.
    With `weights_only`, what a recipe does to activations is left out.

    Raises:
        ConfigError: the quantization configuration is malformed.
    """
    rules = read_rules(raw)
    if weights_only:
        rules = rules.without_activations()
    named = _named(checkpoint, config)
    has_head = any(tensor.name.startswith(HEAD + ".") for tensor in named)
    tree = needed(config, has_head=has_head)
    inside = _inside(tree) if checkpoint.gguf is None else None
    placed = _place(named, config, tree, inside)
    sites, notes, problems = _resolve_all(tree, placed, rules, weights_only=weights_only)
    parameters, parameter_problems = _match_parameters(tree, placed)
    modules = {name.rpartition(".")[0] for name in checkpoint.tensors}
    notes += _rule_notes(rules, tree, modules)
    problems += [Problem("SCHEME", "config.json", text) for text in rules.refusals]
    problems += [*placed.problems, *parameter_problems, *_unused(inside, placed.unused, config)]
    problems += [*_missing(tree, placed), *_headless(raw, has_head)]
    if problems:
        contradicted = contradictions(config, placed.stored)
        where = "config.json" if checkpoint.gguf is None else "metadata"
        problems = [*(Problem("CONFIG", where, str(c)) for c in contradicted), *problems]
    if checkpoint.gguf is None:
        found = oddities(raw, sites, placed.parameters.values())
        notes += [Note(oddity.where, oddity.detail) for oddity in found]
    else:
        notes += _gguf_notes(checkpoint.gguf)
        names = GgufNames(config)
        problems = [replace(problem, where=names.stored(problem.where)) for problem in problems]
    return LoadPlan(
        config=config,
        has_head=has_head,
        sites=tuple(sites),
        parameters=tuple(parameters),
        dropped=tuple(placed.dropped),
        notes=tuple(notes),
        problems=tuple(problems),
    )


def _gguf_notes(model: GgufModel) -> Iterator[Note]:
    for path in model.others:
        yield Note(str(path), "makes vectors of another width than this model takes: not used")
    for key in unknown_keys(model.metadata):
        yield Note(key, "this version does not know this key of the metadata: not used")


def _named(checkpoint: Checkpoint, config: Gemma4Config) -> list[Named]:
    """All that is stored, under the model's names."""
    read: Callable[[TensorMeta], Iterator[Named]]
    if checkpoint.gguf is None:
        shapes = {p.name: p.shape for p in needed(config, has_head=False).parameters}
        experts = config.text.experts.count if config.text.experts else 0
        read = partial(read_mlx, shapes=shapes, experts=experts)
    else:
        read = GgufNames(config).read
    return [tensor for meta in checkpoint.tensors.values() for tensor in read(meta)]


def _place(
    named: Iterable[Named], config: Gemma4Config, tree: Tree, inside: set[str] | None
) -> _Placed:
    sites = {site.name: site for site in tree.sites}
    parameters = {parameter.name for parameter in tree.parameters}
    rows = drops(config)
    for name in (*(f"{site}.weight" for site in sites), *parameters):
        assert not any(row.pattern.fullmatch(name) for row in rows), f"{name} is needed and dropped"
    placed = _Placed()
    for tensor in named:
        full, meta = tensor.name, tensor.meta
        if full in placed.stored:
            detail = f"the same tensor as {placed.stored[full].name}"
            placed.problems.append(Problem("TWICE", meta.name, detail))
            continue
        placed.stored[full] = meta
        place = locate(full, sites, parameters)
        if place is None:
            reason = next((row.reason for row in rows if row.pattern.fullmatch(full)), None)
            if reason is None:
                placed.unused.append(tensor)
            else:
                placed.drop(meta, _outermost(tensor, inside), reason)
            continue
        if tensor.transform is not None:
            placed.transforms[place.module] = tensor.transform
        if place.leaf:
            parts = placed.sites.setdefault(place.module, {})
            parts.setdefault(place.part, {})[place.leaf] = _flat(meta, sites[place.module])
        else:
            placed.parameters[place.module] = meta
    return placed


def _flat(meta: TensorMeta, site: Site) -> TensorMeta:
    """Stacked experts `[experts, rows, in]` as the one tall matrix that they are."""
    if site.kind == "experts" and len(meta.shape) == 3:
        experts, rows, width = meta.shape
        return replace(meta, shape=(experts * rows, width))
    return meta


def _resolve_all(
    tree: Tree, placed: _Placed, rules: Rules, *, weights_only: bool
) -> tuple[list[SiteRead], list[Note], list[Problem]]:
    reads: list[SiteRead] = []
    notes: list[Note] = []
    problems: list[Problem] = []
    claims: dict[str, Claim] = {}
    for whole in tree.sites:
        parts = placed.sites.get(whole.name, {})
        problems += _incomplete(whole, parts)
        for part, found in parts.items():
            site = whole if part is None else whole.part
            claim = claims[site.name] = rules.claim(site, _spellings(site, found))
            stored = found
            if weights_only or claim.scheme is not None or claim.deferred:
                stored = _without_idle(site, found, claim, placed)
            verdict = resolve(site, stored, claim)
            if isinstance(verdict, Refusal):
                where = site.name if part is None else next(iter(stored.values())).name
                problems.append(Problem(verdict.kind, where, verdict.detail))
                continue
            if verdict.note is not None:
                notes.append(Note(site.name, verdict.note))
            how = placed.transforms.get(site.name)
            if how is not None and not isinstance(verdict.scheme, Dense):
                detail = f"its columns are in another order, and {verdict.scheme.name} keeps it so"
                problems.append(Problem("SCHEME", stored["weight"].name, detail))
                continue
            reads.append(SiteRead(site, verdict.scheme, stored, part, verdict.activations, how))
    problems += [Problem("SCHEME", *found) for found in half_given(reads, claims)]
    notes += [Note(*found) for found in unlike_others(reads)]
    return reads, notes, problems


def _without_idle(
    site: Site, stored: dict[str, TensorMeta], claim: Claim, placed: _Placed
) -> dict[str, TensorMeta]:
    """`stored` without scales of activations where the recipe rounds none."""
    if site.kind == "embedding":  # its rows are looked up, not multiplied with anything
        claim = replace(claim, activations=None)
    used = {slot.leaf for slot in claim.activations.slots} if claim.activations else set()
    idle = stored.keys() & ACTIVATION_LEAVES - used
    for leaf in sorted(idle):
        meta = stored[leaf]
        cached = leaf.startswith("output_") and site.name.endswith((".k_proj", ".v_proj"))
        reason = KV_SCALES if cached else "a scale of activations, which are not quantized here"
        placed.drop(meta, meta.name, reason)
    return {leaf: meta for leaf, meta in stored.items() if leaf not in idle}


def _incomplete(site: Site, parts: Collection[int | None]) -> Iterator[Problem]:
    """A matrix is stored whole, or in all of its parts."""
    stored = [part for part in parts if part is not None]
    if stored and len(stored) < len(parts):
        yield Problem("TWICE", site.name, "stored whole and in parts")
    lacking = sorted(set(range(site.parts)) - set(stored)) if stored else []
    if lacking:
        detail = (
            f"{len(lacking)} of {site.parts} parts are not stored, first {_part(site, lacking[0])}"
        )
        yield Problem("MISSING", site.name, detail, len(lacking))


def _part(site: Site, part: int) -> str:
    """What a checkpoint calls a part of stacked experts."""
    if site.name.endswith("gate_up_proj"):
        return f"{part // 2}.{('gate', 'up')[part % 2]}_proj"
    return f"{part}.down_proj"


def _spellings(site: Site, stored: Mapping[str, TensorMeta]) -> tuple[str, ...]:
    """The site's canonical name and the one in the file: rules may be written in either."""
    leaf, meta = next(iter(stored.items()))
    return tuple({site.name, meta.name.removesuffix("." + leaf)})


def _match_parameters(tree: Tree, placed: _Placed) -> tuple[list[ParameterRead], list[Problem]]:
    reads, problems = [], []
    for parameter in tree.parameters:
        meta = placed.parameters.get(parameter.name)
        if meta is None:
            continue
        dtypes = INTEGERS if parameter.order else FLOATS
        if meta.dtype not in dtypes:
            expected = " or ".join(sorted(dtypes))
            problems.append(Problem("DTYPE", meta.name, f"is {meta.dtype}, expected {expected}"))
        elif meta.shape != parameter.shape:
            detail = f"has shape {list(meta.shape)}, expected {list(parameter.shape)}"
            problems.append(Problem("SHAPE", meta.name, detail))
        else:
            reads.append(ParameterRead(parameter, meta, placed.transforms.get(parameter.name)))
    return reads, problems


def _missing(tree: Tree, placed: _Placed) -> Iterator[Problem]:
    """What nothing is stored for: whole modules by their own name, not by those of their parts."""
    wanted = [*(site.name for site in tree.sites), *(p.name for p in tree.parameters)]
    lacking = [n for n in wanted if n not in placed.sites and n not in placed.parameters]
    total = Counter(part for name in wanted for part in _ancestors(name))
    gone = Counter(part for name in lacking for part in _ancestors(name))
    tops: dict[str, list[str]] = {}
    for name in lacking:
        # A matrix may have a bias inside that is stored.
        top = next((part for part in _ancestors(name) if gone[part] == total[part]), name)
        tops.setdefault(top, []).append(name)
    for where, names in tops.items():
        if len(names) == 1:
            yield Problem("MISSING", names[0], "not stored; the model needs it")
        else:
            detail = f"not stored; the model needs all {len(names)} in it"
            yield Problem("MISSING", where, detail, len(names))


def _unused(
    inside: set[str] | None, unused: Iterable[Named], config: Gemma4Config
) -> Iterator[Problem]:
    """Stored tensors without a place: an unknown module once, by its own name."""
    rows = absences(config)
    tops: dict[str, list[Named]] = {}
    for tensor in unused:
        tops.setdefault(_outermost(tensor, inside), []).append(tensor)
    for where, tensors in tops.items():
        first = tensors[0]
        reason = next((f": {row.reason}" for row in rows if row.pattern.fullmatch(first.name)), "")
        detail = f"stored, but the model has no place for it{reason}"
        if len(tensors) == 1:
            yield Problem("UNUSED", first.meta.name, detail)
        else:
            many = f"{detail}; first {first.meta.name}"
            yield Problem("UNUSED", f"{where}.*", many, len(tensors))


def _inside(tree: Tree) -> set[str]:
    """All names that lead to something the model needs."""
    needs = [*(site.name for site in tree.sites), *(p.name for p in tree.parameters)]
    return {part for name in needs for part in _ancestors(name)}


def _outermost(tensor: Named, inside: set[str] | None) -> str:
    """The shortest leading part of a stored name under which the model needs nothing.

    Without `inside`, stored names do not lead where the model's do: the whole name.
    """
    if inside is None:
        return tensor.meta.name
    top = next((part for part in _ancestors(tensor.name) if part not in inside), tensor.name)
    return tensor.meta.name.removesuffix(tensor.name[len(top) :])


def _ancestors(name: str) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c` of `a.b.c`."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _headless(raw: Mapping[str, Any], has_head: bool) -> Iterator[Problem]:
    if raw.get("tie_word_embeddings") is False and not has_head:
        detail = "not stored, and config.json says that it is not the token table"
        yield Problem("MISSING", HEAD, f"{detail} (tie_word_embeddings is false)")


def _rule_notes(rules: Rules, tree: Tree, modules: set[str]) -> list[Note]:
    everything = modules | {site.name for site in tree.sites} | {HEAD}
    everything |= {canonical(module) for module in modules}
    notes = [Note("config.json", text) for text in rules.notes]
    detail = "this rule of quantization_config matches nothing; the file decides"
    return notes + [Note(rule, detail) for rule in rules.unmatched(everything)]
