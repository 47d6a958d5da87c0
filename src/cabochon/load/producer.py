"""Who made a checkpoint, and what says so: its tensors, its configuration, the files beside it.

Nothing is decided by this: `quant` goes by tensors and rules. It answers a reader's question, and
shows at a glance when a configuration and the tensors are not of the same producer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

NOBODY = "no quantization"

# The last component of a tensor's name that only one producer writes.
_LEAVES: Mapping[str, str] = {
    "weight_packed": "compressed-tensors",
    "weight_global_scale": "compressed-tensors",
    "weight_scale_2": "ModelOpt",
    "weight_scale_inv": "fine-grained FP8",
    "bitsandbytes__nf4": "bitsandbytes",
    "bitsandbytes__fp4": "bitsandbytes",
    "SCB": "bitsandbytes",
    "g_idx": "GPTQ",
    "embedding_quantized": "Google's gemma",
    "_weight_qdata": "torchao",
    "biases": "MLX",
}
# Leaves that several share: they count where nothing else speaks.
_SHARED: Mapping[str, str] = {
    "qweight": "GPTQ, AWQ or AutoRound",
    "weight_scale": "compressed-tensors, ModelOpt or gemma",
}
_METHODS: Mapping[str, str] = {
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "gemma": "Google's gemma",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "auto-round": "AutoRound",
    "auto_round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "modelopt": "ModelOpt",
    "modelopt_fp4": "ModelOpt",
    "fp8": "fine-grained FP8",
    "torchao": "torchao",
}
_FILES: Mapping[str, str] = {
    "recipe.yaml": "llm-compressor",
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "GPTQ or AWQ",
    "quant_config.json": "AWQ",
    "quantization_config.json": "AutoRound",
}
_KEYS = ("quantization_config", "compression_config", "quantization")
# Packings that GPTQ's and AWQ's tools share.
_GPTQ_LIKE = frozenset({"GPTQ", "AWQ", "AutoRound"})


@dataclass(frozen=True, slots=True)
class Producer:
    """A name for people, and each thing that points to it or away from it."""

    name: str
    evidence: tuple[str, ...]


def producer_of(
    raw: Mapping[str, Any],
    names: Collection[str],
    metadata: Mapping[str, Any],
    files: Collection[str],
) -> Producer:
    """From a parsed `config.json`, names of tensors, free text of headers and names of files."""
    stored = _by_tensors(names)
    claimed, evidence = _by_config(raw)
    evidence = [*_tensor_evidence(stored), *evidence, *_header_evidence(metadata)]
    beside = [name for name in _FILES if name in files]
    evidence += [f"{name} lies beside it, as {_FILES[name]} leaves it" for name in beside]
    found = next((_LEAVES[leaf] for leaf in stored if leaf in _LEAVES), None)
    name = found or claimed or next((_SHARED[leaf] for leaf in stored), None)
    if found == "GPTQ" and claimed in _GPTQ_LIKE:
        name = claimed
    elif found and claimed and found != claimed:
        evidence.append(f"config.json says {claimed}, the tensors are those of {found}")
    elif claimed and not stored and names:
        evidence.append("no tensor is stored as a quantizer names it")
    if name is None:
        return Producer(NOBODY, tuple(evidence))
    return Producer(_with_tool(name, raw, beside), tuple(evidence))


def producer_of_gguf(metadata: Mapping[str, Any]) -> Producer:
    """From the metadata of a GGUF model, which names its tools and people at times."""
    keys = ("general.quantized_by", "general.organization", "general.name", "general.file_type")
    said = [f"{key} is {metadata[key]!r}" for key in keys if key in metadata]
    if "quantize.imatrix.file" in metadata:
        said.append("quantize.imatrix.file: entries were weighed by how much they matter")
    return Producer("GGUF", ("the file is GGUF, llama.cpp's format", *said))


def _by_tensors(names: Collection[str]) -> dict[str, tuple[int, str]]:
    """Telling leaves, each with how many tensors have it and the first that does."""
    known = {**_LEAVES, **_SHARED}
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for name in names:
        leaf = name.rpartition(".")[2]
        if leaf in known:
            counts[leaf] += 1
            first.setdefault(leaf, name)
    return {leaf: (counts[leaf], first[leaf]) for leaf in known if leaf in counts}


def _tensor_evidence(stored: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    for leaf, (count, first) in stored.items():
        who = _LEAVES.get(leaf) or _SHARED[leaf]
        yield f"{count} tensors named *.{leaf}, as {who} names them; first {first}"


def _by_config(raw: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """The producer that the configuration names, and in which words."""
    text = raw.get("text_config")
    places = [raw, text] if isinstance(text, Mapping) else [raw]
    for key in _KEYS:
        config = next((p[key] for p in places if isinstance(p.get(key), Mapping)), None)
        if config is None:
            continue
        method = config.get("quant_method")
        if method is None and key == "quantization":
            return "MLX", [f"{key} in config.json, without quant_method, as MLX writes it"]
        if method is None and "bits" in config and "group_size" in config:
            return "MLX", [f"{key} in config.json has bits and group_size and no quant_method"]
        words = [f"{k} {config[k]!r}" for k in ("quant_method", "format", "quant_algo", "version")
                 if isinstance(config.get(k), str)]  # fmt: skip
        tools = _tools(config)
        said = ", ".join(words) or "no quant_method"
        evidence = [f"{key} in config.json: {said}", *(f"{key} names {tool}" for tool in tools)]
        return _METHODS.get(str(method), str(method) if method else None), evidence
    return None, []


def _tools(config: Mapping[str, Any]) -> Iterator[str]:
    """Programs that a quantization configuration names, with their versions."""
    made = config.get("producer")
    if isinstance(made, Mapping):
        yield " ".join(str(made[key]) for key in ("name", "version") if made.get(key))
    if config.get("autoround_version"):
        yield f"AutoRound {config['autoround_version']}"
    meta = config.get("meta")
    if isinstance(meta, Mapping) and meta.get("quantizer"):
        quantizer = meta["quantizer"]
        yield ", ".join(map(str, quantizer)) if isinstance(quantizer, list) else str(quantizer)


def _header_evidence(metadata: Mapping[str, Any]) -> Iterator[str]:
    """What the free text of a header says of its writer."""
    for key in ("general.quantized_by", "general.quantization_version", "general.file_type"):
        if key in metadata:
            yield f"{key} in the header: {metadata[key]}"
    form = metadata.get("format")
    if form == "mlx":
        yield "the headers say that MLX wrote the file"
    if any("torchao" in str(key) for key in metadata):
        yield "the headers carry torchao's description of its tensors"


def _with_tool(name: str, raw: Mapping[str, Any], beside: Collection[str]) -> str:
    """`name` with the tool behind the format, and its version, where they are known."""
    if name != "compressed-tensors":
        return name
    configs = [raw[key] for key in _KEYS if isinstance(raw.get(key), Mapping)]
    version = configs[0].get("version") if configs else None
    form = f"{name} {version}" if isinstance(version, str) and version else name
    return f"llm-compressor ({form})" if "recipe.yaml" in beside else form
