"""What thinned checkpoints must be: their producers' matrices, and transformers' answers.

Digests say whether each matrix is, bit for bit, what its producer's own reader makes of it. With
matrices that are right, transformers runs in float32 on the source's other tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import thin
import torch
from checkpoints import Tensors, config_of, tensors_of, write
from conftest import noise
from reference import logits, relative_error
from torch.nn.functional import cosine_similarity

from cabochon import LLM
from cabochon.load.execute import execute
from cabochon.load.execute import tensors_of as parameters_of
from cabochon.load.plan import LoadPlan
from cabochon.load.report import plan_checkpoint
from cabochon.nn.weight import Stack, Weight

BEGUN_ANEW = ("model.vision_tower.std_bias", "model.vision_tower.std_scale")


def check_matrices(name: str, folder: Path) -> dict[str, Weight]:
    """Every matrix that the producer quantized is its own; every other tensor is the source's."""
    report = plan_checkpoint(folder)
    assert report.plan is not None
    model = execute(report.plan, dtype=torch.float32).model
    expected, found = thin.decoded(name), weights(report.plan, model)
    assert not expected.keys() - found.keys()
    for matrix, (dtype, text) in expected.items():
        assert thin.digest(found[matrix].dense(dtype)) == text, matrix
        wide = found[matrix].dense(dtype).float()
        assert torch.equal(found[matrix].dense(torch.float32), wide), matrix
    source = unquantized(folder, thin.source_of(thin.THIN / name))
    for parameter, tensor in parameters_of(model):
        if parameter in source:
            assert torch.equal(tensor, source[parameter].float()), parameter
    return {matrix: found[matrix] for matrix in expected}


def unquantized(folder: Path, source: Path) -> Tensors:
    """The source's tensors. AutoRound (0.16.1) loses two in some recipes for experts."""
    stored = tensors_of(folder)
    lost = {name: stored[name] for name in BEGUN_ANEW if name in stored}
    return tensors_of(source) | lost


def weights(plan: LoadPlan, model: torch.nn.Module) -> dict[str, Weight]:
    """The weight of each matrix, by the stored name of it or of its part."""
    found: dict[str, Weight] = {}
    for read in plan.sites:
        leaf, meta = next(iter(read.stored.items()))
        weight = model.get_submodule(read.site.name).weight
        assert isinstance(weight, Weight)
        if read.part is not None:
            assert isinstance(weight, Stack)
            weight = weight.parts[read.part]
        module = meta.name.removesuffix(f".{leaf}")
        if ".switch_glu." in module and read.part is not None:  # MLX stacks experts by projection
            module += f".{read.part if module.endswith('down_proj') else read.part // 2}"
        found[f"{module}.weight"] = weight
    return found


def check_answers(folder: Path, source: Path, room: Path) -> None:
    """Logits of text and a picture are those of transformers on the same matrices."""
    with LLM(folder, dtype="float32") as llm:
        image = llm.config.tokens.image
        tokens = [2, 4, *range(300, 350), image, *range(320, 360), 5]
        prompt = llm.prompts.raw(tokens, [noise(100, 60)])
        ours = llm.logits(list(prompt.tokens), [noise(100, 60)])
    theirs = logits(reference(folder, source, room), prompt)
    assert cosine_similarity(ours, theirs, dim=-1).min() > 0.9999
    assert relative_error(ours, theirs) < 1e-4


def reference(folder: Path, source: Path, room: Path) -> Any:
    """transformers' model of `source` with the matrices of `folder`."""
    from transformers import AutoModelForImageTextToText

    report = plan_checkpoint(folder)
    assert report.plan is not None
    model = execute(report.plan, dtype=torch.float32).model
    tensors = {name: tensor.float() for name, tensor in unquantized(folder, source).items()}
    tensors |= matrices(report.plan, model, tensors)
    write(room, tensors, config_of(source))
    made, info = AutoModelForImageTextToText.from_pretrained(
        room, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return made.eval()


def matrices(plan: LoadPlan, model: torch.nn.Module, source: Tensors) -> Tensors:
    found: Tensors = {}
    for site in {read.site.name: read.site for read in plan.sites}.values():
        dense = model.get_submodule(site.name).weight.dense(torch.float32)
        name = site.name if site.kind == "experts" else f"{site.name}.weight"
        found[name] = dense.view(source[name].shape)
    return found
