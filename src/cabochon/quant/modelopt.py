"""NVIDIA ModelOpt: what its configuration claims, and what its tensors can be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cabochon.checkpoint.headers import TensorMeta
from cabochon.quant.claims import Claim, Rules, Targets
from cabochon.quant.fields import KV_NOTE, strings, targets
from cabochon.quant.nvfp4 import Nvfp4
from cabochon.quant.scheme import Scheme, Site


def candidates(site: Site, stored: Mapping[str, TensorMeta]) -> Iterator[Scheme]:
    if "weight_scale_2" in stored:
        yield Nvfp4("modelopt")


def rules(key: str, config: Mapping[str, Any]) -> Rules:
    """One algorithm for all linear layers but those that shell patterns name."""
    ignored = config.get("ignore") or config.get("exclude_modules") or []
    names = strings(ignored, f"{key}.ignore")
    globs = [f"glob:{name}" if set(name) & set("*?[") else name for name in names]
    ignore = targets(globs, f"{key}.ignore")
    algorithm = config.get("quant_algo")
    rule = f"quant_algo {algorithm!r}"
    if algorithm == "W4A16_NVFP4":
        claim = Claim(rule, scheme=Nvfp4("modelopt"))
    else:
        reason = f"ModelOpt's quant_algo {algorithm!r} is not supported by this version"
        if algorithm in ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD"):
            reason += ": it quantizes activations too or changes them"
        claim = Claim(rule, unsupported=reason)
    notes = [] if config.get("kv_cache_scheme") is None else [KV_NOTE]
    return Rules(groups={rule: (Targets.of(["Linear"]), claim)}, ignore=ignore, notes=tuple(notes))
