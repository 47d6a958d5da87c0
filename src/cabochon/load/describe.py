"""What a checkpoint says of itself: its configuration, from `config.json` or from its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cabochon.checkpoint.folder import Checkpoint
from cabochon.checkpoint.gguf_model import GgufModel, read_floats
from cabochon.checkpoint.headers import HEADER_ONLY
from cabochon.config import Described, Gemma4Config, parse_gguf, read_config
from cabochon.errors import ConfigError
from cabochon.files import read_json_object
from cabochon.load.names import canonical
from cabochon.quant.gguf import METHOD
from cabochon.quant.modelopt import BESIDE
from cabochon.quant.torchao import HEADER, header_of

_ROPE = "rope_freqs.weight"


def describe(checkpoint: Checkpoint) -> tuple[Gemma4Config, Mapping[str, Any]]:
    """The configuration of `checkpoint`, and the raw mapping it came from.

    What ModelOpt leaves beside it is in that mapping under the name of its file, and what torchao
    wrote into headers under a name of ours. Of a GGUF model it says no more than that it is one.

    Raises:
        ConfigError: there is none, or it describes no model.
        ForeignArchitecture: it describes a model that this engine does not run.
    """
    model = checkpoint.gguf
    if model is None:
        config, raw = read_config(checkpoint.folder)
        found = {
            BESIDE: read_json_object(checkpoint.folder / BESIDE) or None,
            HEADER: _canonical(header_of(checkpoint.metadata)),
        }
        return config, {**raw, **{key: said for key, said in found.items() if said is not None}}
    described = Described(
        metadata=model.metadata,
        projector=model.projector,
        shapes={name: meta.shape for name, meta in model.tensors.items()},
        rope_factors=_rope_factors(model),
        file=str(model.path),
    )
    return parse_gguf(described), {"quantization_config": {"quant_method": METHOD}}


def _canonical(header: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Headers name modules as they were in memory, tensors as upstream renames them to be saved."""
    return None if header is None else {canonical(name): text for name, text in header.items()}


def _rope_factors(model: GgufModel) -> tuple[float, ...] | None:
    meta = model.tensors.get(_ROPE)
    if meta is None:
        raise ConfigError(
            f"{model.path} has no tensor {_ROPE!r}, which says how the heads of full layers rotate"
        )
    if meta.file.suffix == HEADER_ONLY:
        return None
    factors = read_floats(meta)
    if not factors:
        raise ConfigError(f"{meta.file}: tensor {_ROPE!r} is {meta}, expected a short row of F32")
    return factors
