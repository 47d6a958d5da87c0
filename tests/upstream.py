"""transformers' float32 model of weights that a producer's own code has decoded.

transformers is no oracle for quantized files themselves: it leaves experts uninitialised, and
rounds activations in kernels of its own. So every matrix is decoded by the library that wrote it,
and what comes out is loaded strictly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from checkpoints import Tensors, config_of, write
from conftest import noise
from reference import greedy, logits, relative_error
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cabochon import LLM, SamplingParams

EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def stacked(dense: Tensors) -> Tensors:
    """Experts stored one by one in the three dimensions in which transformers holds them."""
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name in list(dense):
        match = EXPERT.fullmatch(name)
        if match is not None:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = dense.pop(name)
    for module, parts in experts.items():
        numbers = sorted({number for number, _ in parts})
        fused = [torch.cat((parts[n, "gate"], parts[n, "up"])) for n in numbers]
        dense[f"{module}.gate_up_proj"] = torch.stack(fused)
        dense[f"{module}.down_proj"] = torch.stack([parts[n, "down"] for n in numbers])
    return dense


class Experts:
    """Experts as producers unfold them: each a layer for `gate`, for `up` and for `down`."""

    def __init__(
        self,
        act: Callable[[Tensor], Tensor],
        layers: Mapping[tuple[int, str], Callable[[Tensor], Tensor]],
    ) -> None:
        self.act = act
        self.layers = layers

    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            gate, up = (self.layers[expert, kind](x[token]) for kind in ("gate", "up"))
            made = self.layers[expert, "down"](self.act(gate) * up)
            out.index_add_(0, token, made * shares[token, place, None])
        return out


def reference(folder: Path, dense: Tensors, scratch: Path) -> Any:
    """The model of `folder` with the weights `dense`; every one of them must find its place."""
    from transformers import AutoModelForImageTextToText

    config = config_of(folder)
    config.pop("quantization_config", None)
    write(scratch, {name: t.float() for name, t in stacked(dense).items()}, config)
    model, info = AutoModelForImageTextToText.from_pretrained(
        scratch, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def same_answers(folder: Path, model: Any, *, weights_only: bool = False, count: int = 16) -> None:
    """The checkpoint in `folder` gives the logits of `model`, and the same tokens after them."""
    with LLM(folder, dtype="float32", weights_only=weights_only) as llm:
        image = llm.config.tokens.image
        tokens = [2, 4, *range(300, 350), image, *range(320, 360), 5]
        prompt = llm.prompts.raw(tokens, [noise(100, 60)])
        ours = llm.logits(list(prompt.tokens), [noise(100, 60)])
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        answer = list(llm.generate(prompt, params)[0].tokens)
    theirs = logits(model, prompt)
    assert cosine_similarity(ours, theirs, dim=-1).min() > 0.9999
    assert relative_error(ours, theirs) < 1e-3
    assert answer == greedy(model, prompt, count)
