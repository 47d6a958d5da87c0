"""NVIDIA ModelOpt: what its configuration claims, and what its tensors can be.

The configuration comes in two shapes, as `quantization_config` in config.json and as a file of its
own, `hf_quant_config.json`. Modules are named by shell patterns, or by a parent of what is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cabochon.checkpoint.headers import TensorMeta
from cabochon.errors import ConfigError
from cabochon.quant.activations import Dynamic, Largest, Rounded
from cabochon.quant.byte_codes import ByteCodes
from cabochon.quant.claims import Claim, Rules, Targets
from cabochon.quant.fields import KV_NOTE, mapping, strings, targets
from cabochon.quant.modelopt_schemes import Corrected, RowPairs, Smoothed
from cabochon.quant.nvfp4 import BLOCK, Nvfp4
from cabochon.quant.scheme import Scheme, Site

BESIDE = "hf_quant_config.json"
METHODS = frozenset({"modelopt", "modelopt_fp4"})

_GROUPS = (128, 32, 64, 256)  # of integers; the first is ModelOpt's own choice
_RANKS = (32, 8, 16, 64, 128)  # of corrections; likewise

_NVFP4 = Nvfp4("modelopt")
_FP8 = ByteCodes("fp8", (None, None))
_FP8_ROWS = ByteCodes("fp8", (1, None), listed=True)

_STATIC_FP8 = Rounded(Largest("input_scale"))
_TOKEN_FP8 = Rounded(Largest(None))
# The scale of all blocks is what compressed-tensors' own is the reciprocal of.
_BLOCKS_FP4 = Rounded(Dynamic("fp4", BLOCK, scales="e4m3", whole="input_scale", reciprocal=True))


def _smoothed(schemes: tuple[Scheme, ...]) -> tuple[Scheme, ...]:
    """Where a norm comes before a matrix, its smoothing has become part of the norm."""
    return (*schemes, *(Smoothed(scheme) for scheme in schemes))


def _row_pairs(group: int | None, *, rounded: bool) -> tuple[Scheme, ...]:
    groups = _GROUPS if group is None else (group,)
    return _smoothed(tuple(RowPairs(size, rounded) for size in groups))


def _corrected() -> tuple[Scheme, ...]:
    return _smoothed(tuple(Corrected(_NVFP4, rank) for rank in _RANKS))


# The layouts of an algorithm, of which the file has one, and what it does to activations.
_ALGORITHMS: Mapping[str, Callable[[int | None], tuple[tuple[Scheme, ...], Rounded | None]]] = {
    "FP8": lambda _: ((_FP8,), _STATIC_FP8),
    "FP8_PER_CHANNEL_PER_TOKEN": lambda _: ((_FP8_ROWS,), _TOKEN_FP8),
    "NVFP4": lambda _: ((_NVFP4,), _BLOCKS_FP4),
    "NVFP4_AWQ": lambda _: (_smoothed((_NVFP4,)), _BLOCKS_FP4),
    "NVFP4_SVD": lambda _: (_corrected(), _BLOCKS_FP4),
    "W4A16_NVFP4": lambda _: ((_NVFP4,), None),
    "W4A16_AWQ": lambda group: (_row_pairs(group, rounded=False), None),
    "W4A8_AWQ": lambda group: (_row_pairs(group, rounded=True), _STATIC_FP8),
}


def candidates(site: Site, stored: Mapping[str, TensorMeta]) -> Iterator[Scheme]:
    """Schemes that leaves, dtypes and widths leave open."""
    weight, scale = stored.get("weight"), stored.get("weight_scale")
    if weight is None or scale is None:
        return
    scheme = _stored_in(site, stored, weight.dtype, scale)
    if scheme is None:
        return
    if "svdquant_lora_a" in stored:
        scheme = Corrected(scheme, (*stored["svdquant_lora_a"].shape, 1)[0])
    yield Smoothed(scheme) if "pre_quant_scale" in stored else scheme


def _stored_in(
    site: Site, stored: Mapping[str, TensorMeta], codes: str, scale: TensorMeta
) -> Scheme | None:
    if codes == "F8_E4M3":
        return _FP8_ROWS if scale.shape == (site.out_features,) else _FP8
    if codes != "U8":
        return None
    if scale.dtype == "F8_E4M3":
        return _NVFP4
    count = scale.shape[-1] if scale.shape else 1
    if count == 0 or site.in_features % count:
        return None
    return RowPairs(site.in_features // count, "weight_scale_2" in stored)


def rules(key: str, config: Mapping[str, Any]) -> Rules:
    """One algorithm for all linear layers but those that are ignored, or one for each of them.

    Raises:
        ConfigError: a field is not built as ModelOpt builds it.
    """
    said = details(key, config)
    ignored = said.get("ignore") or said.get("exclude_modules") or []
    names = strings(ignored, f"{key}.ignore")
    globs = [f"glob:{name}" if set(name) & set("*?[") else name for name in names]
    algorithm = said.get("quant_algo")
    if algorithm == "MIXED_PRECISION":
        groups = _mixed(key, said)
    else:
        claim = _claim(algorithm, said.get("group_size"))
        groups = {claim.rule: (Targets.of(["Linear"]), claim)}
    cache = said.get("kv_cache_scheme") or said.get("kv_cache_quant_algo")
    notes = (KV_NOTE,) if cache is not None else ()
    return Rules(groups=groups, ignore=targets(globs, f"{key}.ignore"), notes=notes)


def details(key: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of either shape that says what was done."""
    inner = config.get("quantization")
    return config if inner is None else mapping(inner, f"{key}.quantization")


def completed(
    key: str, config: Mapping[str, Any], beside: Mapping[str, Any]
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """`config` with what only the file beside it says, and notes on what they say differently."""
    said = details(key, config)
    ignored = said.get("ignore") or said.get("exclude_modules")
    notes = [
        f"{BESIDE} says {field} {beside[field]!r}, config.json {value!r}: config.json counts"[:300]
        for field, value in (*said.items(), ("exclude_modules", ignored))
        if field in beside and _differ(beside[field], value)
    ]
    return {**beside, **said, "ignore": ignored or beside.get("exclude_modules")}, tuple(notes)


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return sorted(map(str, one)) != sorted(map(str, other))
    return bool(one != other)


def _mixed(key: str, said: Mapping[str, Any]) -> dict[str, tuple[Targets, Claim]]:
    """A claim for each algorithm that `quantized_layers` names, with the layers it names."""
    layers = mapping(said.get("quantized_layers") or {}, f"{key}.quantized_layers")
    if not layers:
        claim = Claim(key, unsupported="quant_algo 'MIXED_PRECISION' without quantized_layers")
        return {key: (Targets.of(["Linear"]), claim)}
    names: dict[tuple[Any, Any], list[str]] = {}
    for name, layer in layers.items():
        layer = mapping(layer, f"{key}.quantized_layers[{name!r}]")
        algorithm, size = layer.get("quant_algo"), layer.get("group_size")
        if not isinstance(algorithm, str) or type(size) not in (int, type(None)):
            found = f"{algorithm!r} in groups of {size!r}"
            raise ConfigError(f"config.json: {key}.quantized_layers[{name!r}] is {found}")
        names.setdefault((algorithm, size), []).append(f"in:{_canonical(name)}")
    claims = {pair: _claim(*pair) for pair in names}
    return {
        f"{algorithm} {size}": (Targets.of(names[algorithm, size]), claim)
        for (algorithm, size), claim in claims.items()
    }


def _canonical(name: str) -> str:
    """As upstream's multimodal model has it, if `name` is an engine's or that of the text alone."""
    for wrapper in ("language_model.model.", "model."):
        rest = name.removeprefix(wrapper)
        if rest != name and rest.startswith("layers."):
            return f"model.language_model.{rest}"
    return name


def _claim(algorithm: Any, group: Any) -> Claim:
    rule = f"quant_algo {algorithm!r}"
    made = _ALGORITHMS.get(algorithm) if isinstance(algorithm, str) else None
    if made is None or type(group) not in (int, type(None)) or group == 0:
        within = "" if group is None else f" in groups of {group!r}"
        reason = f"ModelOpt's quant_algo {algorithm!r}{within} is not supported by this version"
        return Claim(rule, unsupported=reason)
    (scheme, *others), activations = made(group)
    return Claim(rule, scheme=scheme, variants=tuple(others), activations=activations)
