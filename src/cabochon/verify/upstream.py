"""transformers' own model of a checkpoint, whose weights are ours, decoded when they are needed.

It is built without a weight. A module is given its own just before it is called, and loses them
when it returns: no more than one module's are ever decoded, so what fits as a file also runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cabochon.config import PatchConfig
from cabochon.engine.request import Prompt
from cabochon.errors import UnreadableError
from cabochon.gemma4.model import Gemma4
from cabochon.gemma4.pictures import Picture
from cabochon.gemma4.sounds import Sound
from cabochon.load.execute import tensors_of
from cabochon.load.names import canonical
from cabochon.nn.linear import Embedding, Linear
from cabochon.verify.halting import Call

HEAD, TOKENS = "lm_head", "model.language_model.embed_tokens"


def blank(folder: Path) -> Any:
    """transformers' float32 model of the configuration in `folder`, without a weight.

    Raises:
        UnreadableError: transformers is not installed, or there is no configuration for it.
    """
    try:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForImageTextToText
    except ImportError as error:
        raise UnreadableError(
            f"--reference transformers needs {error.name}, which is not installed;"
            " pip install 'cabochon[verify]' adds it"
        ) from None
    if not (folder / "config.json").is_file():
        raise UnreadableError(
            f"--reference transformers needs a config.json in {folder}, for transformers to read;"
            " put there the one of the model that was converted"
        )
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights():  # buffers that are computed are not empty
        built = AutoModelForImageTextToText.from_config(  # type: ignore[no-untyped-call]
            config,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    return built.eval()


def fill(blank: Any, model: Gemma4) -> None:
    """Let `blank` compute with the weights of `model`.

    Raises:
        UnreadableError: it needs one that `model` has not.
    """
    weights = Weights(model)
    for name, module in blank.named_modules():
        own = {leaf: weights.name_of(f"{name}.{leaf}") for leaf in _stored(module)}
        if own:
            module.register_forward_pre_hook(_Fill(weights, own))
            module.register_forward_hook(_empty)


def _stored(module: nn.Module) -> list[str]:
    """The names of what a module itself keeps in a checkpoint."""
    buffers = set(module._buffers) - module._non_persistent_buffers_set
    return [*(name for name, value in module._parameters.items() if value is not None), *buffers]


class Weights:
    """The tensors of our model under the names that transformers' modules have for theirs."""

    def __init__(self, model: Gemma4) -> None:
        self._plain = dict(tensors_of(model))
        self._matrices = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, Linear | Embedding)
        }

    def name_of(self, upstream: str) -> str:
        """Our name for a tensor of transformers' model.

        Raises:
            UnreadableError: there is none.
        """
        name = canonical(upstream).removesuffix(".weight")
        if name == HEAD and name not in self._matrices:
            name = TOKENS
        if name not in self._matrices:
            name = canonical(upstream)
        if name not in self._matrices and name not in self._plain:
            raise UnreadableError(
                f"transformers' model has {upstream}, for which this checkpoint has nothing: its"
                " config.json describes another model, or this version of transformers is not one"
                " that is known"
            )
        return name

    def read(self, name: str) -> Tensor:
        matrix = self._matrices.get(name)
        return self._plain[name] if matrix is None else matrix.weight.dense(torch.float32)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        return self._matrices[name].weight.rows(ids, torch.float32)


class _Fill:
    """Before a module is called: gives it its own tensors, of a table only the rows asked for."""

    def __init__(self, weights: Weights, own: Mapping[str, str]) -> None:
        self._weights = weights
        self._own = own

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if isinstance(module, nn.Embedding):
            asked, places = inputs[0].unique(return_inverse=True)
            _put(module, "weight", self._weights.rows(self._own["weight"], asked))
            return (places, *inputs[1:])
        for leaf, name in self._own.items():
            _put(module, leaf, self._weights.read(name))
        return None


def _put(module: nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in module._buffers:
        module._buffers[leaf] = value
        return
    shape = value.shape
    if not isinstance(module, nn.Embedding):
        wanted = module._parameters[leaf]
        assert wanted is not None
        shape = wanted.shape  # experts are stacked in three dimensions
    module._parameters[leaf] = nn.Parameter(value.view(shape), requires_grad=False)


def _empty(module: nn.Module, _inputs: object, _output: object) -> None:
    """A table keeps its few rows: transformers looks at them again, from outside."""
    if isinstance(module, nn.Embedding):
        return
    for leaf, value in module._parameters.items():
        if value is not None:
            module._parameters[leaf] = nn.Parameter(value.to("meta"), requires_grad=False)


def as_ours(call: Call, model: Gemma4) -> Call:
    """A call of transformers' as our model has it: names, no batch, and the order of arguments."""
    inputs = tuple(_plain(value) for value in call.inputs)
    output = call.output
    if call.name.endswith(".experts"):
        inputs = (inputs[0], inputs[2], inputs[1])  # numbers before shares
    if call.name.endswith(".router"):
        output = output[1:]  # probabilities come first
    else:
        while not isinstance(output, Tensor) and output is not None:
            output = next(iter(output.values() if hasattr(output, "values") else output), None)
        output = _plain(output)
    return replace(call, name=name_in_ours(call.name, model), inputs=inputs, output=output)


def name_in_ours(name: str, model: Gemma4) -> str:
    """Our name for a module of transformers' model."""
    if name == "model.embed_vision" and isinstance(model.config.vision, PatchConfig):
        return "model.vision_embedder"  # the projector is a part of it there
    return canonical(name)


def _plain(value: Any) -> Any:
    """Without the dimension of a batch, which is of one."""
    if isinstance(value, Tensor) and value.ndim > 2 and len(value) == 1:
        return value[0]
    return value


def inputs_of(model: Any, prompt: Prompt, padding: int = 0) -> dict[str, Any]:
    """What transformers' `model` takes for `prompt`, as upstream's processor would make it.

    Media of different sizes are filled up to the largest of a kind and `padding` more, and masked.
    """
    ids = torch.tensor([prompt.tokens])
    config = model.config
    kinds = (ids == config.image_token_id).long() + 3 * (ids == config.audio_token_id).long()
    made: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
    }
    pictures = [item for _, item in prompt.media if isinstance(item, Picture)]
    if pictures:
        length = max(len(picture.patches) for picture in pictures) + padding
        made["pixel_values"] = _stack([p.patches for p in pictures], length, 0.0)
        made["image_position_ids"] = _stack([p.positions for p in pictures], length, -1)
    sounds = [item.features for _, item in prompt.media if isinstance(item, Sound)]
    if sounds:
        length = max(map(len, sounds)) + padding
        made["input_features"] = _stack(sounds, length, 0.0)
        lengths = torch.tensor([[len(frames)] for frames in sounds])
        made["input_features_mask"] = torch.arange(length) < lengths
    return made


def _stack(parts: list[np.ndarray[Any, Any]], length: int, value: float) -> Tensor:
    def padded() -> Iterator[Tensor]:
        for rows in parts:
            padding = [(0, length - len(rows)), (0, 0)]
            yield torch.from_numpy(np.pad(rows, padding, constant_values=value))

    return torch.stack(list(padded()))
