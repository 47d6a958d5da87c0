"""The load plan on headers alone: names and wrappers, drops, claims against files, notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    ASYMMETRIC,
    DENSE,
    QUANTIZED,
    W4A16,
    altered,
    config_of,
    load_model,
    plan_of,
    tensors_of,
    write,
)
from thin import fixture
from transformers import AutoConfig, Gemma4ForCausalLM, Gemma4ForConditionalGeneration

from cabochon.checkpoint.folder import Checkpoint
from cabochon.checkpoint.headers import TensorMeta
from cabochon.config import parse_config, read_config
from cabochon.gemma4.model import Gemma4
from cabochon.load.execute import tensors_of as parts_of
from cabochon.load.plan import LoadPlan
from cabochon.load.planner import build_plan
from cabochon.load.tree import needed
from cabochon.nn.linear import Embedding, Linear

Rename = Callable[[str], str]


def plan(
    source: Path,
    rename: Rename = lambda name: name,
    config: Callable[[dict[str, Any]], object] | None = None,
    tensors: Callable[[dict[str, TensorMeta]], object] | None = None,
) -> LoadPlan:
    """The plan for `source` with names, configuration or headers changed; nothing is written."""
    raw = config_of(source)
    if config is not None:
        config(raw)
    metas = {
        rename(name): replace(meta, name=rename(name))
        for name, meta in Checkpoint.open(source).tensors.items()
    }
    if tensors is not None:
        tensors(metas)
    return build_plan(Checkpoint(source, metas), parse_config(raw), raw)


def schemes(found: LoadPlan) -> Mapping[str, str]:
    return {read.site.name: read.scheme.name for read in found.sites}


@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("ple", [0, 32])
@pytest.mark.parametrize("seeing", [False, True])
def test_the_tree_is_the_model(has_head: bool, clipped: bool, ple: int, seeing: bool) -> None:
    raw = config_of(DENSE)
    raw["text_config"]["hidden_size_per_layer_input"] = ple
    raw["vision_config"]["use_clipped_linears"] = clipped
    if not seeing:
        raw["vision_config"] = None
    config = parse_config(raw)
    with torch.device("meta"):
        model = Gemma4(config, has_head=has_head)
    tree = needed(config, has_head=has_head)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, Linear | Embedding)}
    assert sorted(site.name for site in tree.sites) == sorted(modules)
    for site in tree.sites:
        module = modules[site.name]
        if isinstance(module, Embedding):
            sizes = ("embedding", module.num_embeddings, module.embedding_dim)
        else:
            sizes = ("linear", module.out_features, module.in_features)
        assert (site.kind, site.out_features, site.in_features) == sizes, site.name
    parts = {name: tuple(tensor.shape) for name, tensor in parts_of(model)}
    assert {p.name: p.shape for p in tree.parameters} == parts


def test_the_tree_is_upstreams_state() -> None:
    """Names and shapes are those of transformers' own model, the tied head left out."""
    with torch.device("meta"):
        reference = Gemma4ForConditionalGeneration(AutoConfig.from_pretrained(DENSE))
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in reference.state_dict().items()
        if name != "lm_head.weight"
    }
    tree = needed(read_config(DENSE)[0], has_head=False)
    found = {f"{s.name}.weight": (s.out_features, s.in_features) for s in tree.sites}
    assert found | {p.name: p.shape for p in tree.parameters} == expected


@pytest.mark.parametrize("folder", [DENSE, *QUANTIZED], ids=lambda folder: folder.name)
def test_every_stored_tensor_is_read_once_or_dropped(folder: Path) -> None:
    found = plan_of(folder)
    assert not found.problems
    assert not found.notes
    read = [meta.name for site in found.sites for meta in site.stored.values()]
    read += [parameter.tensor.name for parameter in found.parameters]
    dropped = [drop.tensor.name for drop in found.dropped]
    assert sorted(read + dropped) == sorted(Checkpoint.open(folder).tensors)
    assert not dropped
    assert found.has_head == any(name.startswith("lm_head.") for name in read)


WRAPPERS: Mapping[str, Mapping[str, str]] = {
    "engines and MLX": {
        "model.language_model": "language_model.model",
        "model.vision_tower": "vision_tower",
        "model.audio_tower": "audio_tower",
        "model.embed_vision": "embed_vision",
        "model.embed_audio": "embed_audio",
        "lm_head": "language_model.lm_head",
    },
    "some importers": {
        "model.language_model": "model.language_model.model",
        "lm_head": "model.language_model.lm_head",
    },
    "text under model": {"model.language_model": "model"},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("source", [W4A16, fixture("e2b-w4a16-head")], ids=["tied", "head"])
def test_wrappers_are_spellings_of_the_same_places(source: Path, wrapper: str) -> None:
    rows = WRAPPERS[wrapper]

    def rename(name: str) -> str:
        for spelling in sorted(rows, key=len, reverse=True):
            if name.startswith(spelling + "."):
                return rows[spelling] + name[len(spelling) :]
        return name

    found = plan(source, rename)
    assert not found.problems
    assert schemes(found) == schemes(plan(source))


def test_a_text_only_export_by_upstream_loads(tmp_path: Path) -> None:
    """Gemma4ForCausalLM of transformers, saved by it, has the text model's weights."""
    model = Gemma4ForCausalLM(AutoConfig.from_pretrained(DENSE).text_config)
    model.save_pretrained(tmp_path)
    loaded, report = load_model(tmp_path, dtype=torch.float32)
    assert report.plan.config.architecture == "Gemma4ForCausalLM"
    assert loaded.config.vision is None
    state = model.state_dict()
    matrix = loaded.get_submodule("model.language_model.layers.3.mlp.up_proj").weight
    assert torch.equal(
        matrix.dense(torch.float32), state["model.layers.3.mlp.up_proj.weight"].float()
    )


def test_a_prefix_is_a_whole_component() -> None:
    def rename(name: str) -> str:
        return name.replace("model.language_model.norm", "model.language_models.norm")

    found = plan(DENSE, rename)
    assert {(p.kind, p.where) for p in found.problems} == {
        ("UNUSED", "model.language_models.norm.weight"),
        ("MISSING", "model.language_model.norm.weight"),
    }


def test_one_tensor_in_two_spellings_is_refused() -> None:
    name, other = "model.language_model.norm.weight", "model.norm.weight"
    found = plan(DENSE, tensors=lambda t: t.update({other: replace(t[name], name=other)}))
    assert [(p.kind, p.where) for p in found.problems] == [("TWICE", other)]
    assert name in found.problems[0].detail


def test_keys_and_values_of_sharing_layers_are_dropped() -> None:
    """Google's first release still has them; upstream's model has no place for them either."""

    def duplicate(tensors: dict[str, TensorMeta]) -> None:
        for name, meta in list(tensors.items()):
            if ".layers.2.self_attn." in name and name.split(".")[-2] in (
                "k_proj",
                "v_proj",
                "k_norm",
            ):
                copy = name.replace(".layers.2.", ".layers.5.")
                tensors[copy] = replace(meta, name=copy)

    found = plan(W4A16, tensors=duplicate)
    assert not found.problems
    shared = [d for d in found.dropped if "language_model" in d.tensor.name]
    assert {d.where.rpartition(".")[2] for d in shared} == {"k_proj", "v_proj", "k_norm"}
    assert {d.reason for d in shared} == {"these layers use the keys and values of an earlier one"}


def test_layers_with_their_own_keys_need_them() -> None:
    name = "model.language_model.layers.2.self_attn.k_proj"
    found = plan(DENSE, tensors=lambda t: t.pop(f"{name}.weight"))
    assert [(p.kind, p.where) for p in found.problems] == [("MISSING", name)]


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.0.self_attn.k_scale",
        "model.language_model.layers.2.self_attn.v_cache_scale",
        "model.embed_vision.embedding.weight",
        "model.embed_vision.soft_embedding_norm.weight",
    ],
)
def test_known_superfluous_tensors_are_dropped(name: str) -> None:
    meta = TensorMeta(name, "F32", (1,), Path("x"), (0, 4))
    found = plan(DENSE, tensors=lambda t: t.update({name: meta}))
    assert not found.problems
    assert name in {drop.tensor.name for drop in found.dropped}


def test_clip_bounds_follow_the_configuration() -> None:
    def unclipped(raw: dict[str, Any]) -> None:
        raw["vision_config"]["use_clipped_linears"] = False

    found = plan(DENSE, config=unclipped)
    assert not found.problems
    bounds = [drop for drop in found.dropped if drop.reason == "use_clipped_linears is false"]
    assert len(bounds) == 2 * 7 * 4  # layers, projections, bounds
    name = "model.vision_tower.encoder.layers.1.mlp.up_proj.output_max"
    assert [p.where for p in plan(DENSE, tensors=lambda t: t.pop(name)).problems] == [name]


def quantization(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda raw: change(raw["quantization_config"])


FOREIGN: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "other namespace": lambda q: q.update(ignore=["vision_tower.blocks.0.attn", "re:^visual\\..*"]),
    "towers without .linear": lambda q: q.update(
        ignore=[entry.removesuffix(".linear") for entry in q["ignore"]]
    ),
    "no ignore list": lambda q: q.pop("ignore"),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_rules_of_another_namespace_explain_and_never_overrule(change: Any) -> None:
    found = plan(W4A16, config=quantization(change))
    assert not found.problems
    assert schemes(found) == schemes(plan(W4A16))
    assert any("loaded dense" in note.detail for note in found.notes)


def test_rules_that_match_nothing_are_noted() -> None:
    change = quantization(lambda q: q["ignore"].extend(["visual.0.attn", "re:.*router.*"]))
    notes = {n.where: n.detail for n in plan(W4A16, config=change).notes}
    assert set(notes) == {"visual.0.attn", "re:.*router.*"}
    assert all("matches nothing" in detail for detail in notes.values())


def test_an_older_key_means_the_same() -> None:
    def rename(raw: dict[str, Any]) -> None:
        old = raw["compression_config"] = raw.pop("quantization_config")
        del old["quant_method"]

    found = plan(W4A16, config=rename)
    assert not found.problems
    assert not found.notes


def test_no_quant_method_claims_nothing() -> None:
    """Google's `-unquantized` releases keep a quantization_config without one."""
    found = plan(DENSE, config=lambda raw: raw.update(quantization_config={"bits": 4}))
    assert not found.problems
    assert [note.detail for note in found.notes] == [
        "quantization_config has no quant_method: taken to claim nothing"
    ]


def test_dense_weights_under_another_method_are_dense() -> None:
    stale = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    found = plan(DENSE, config=lambda raw: raw.update(quantization_config=stale))
    assert not found.problems
    assert set(schemes(found).values()) == {"bf16"}
    assert all("bitsandbytes" in note.detail for note in found.notes)


def test_a_silent_configuration_leaves_it_to_the_tensors() -> None:
    found = plan(W4A16, config=lambda raw: raw.pop("quantization_config"))
    assert not found.problems
    names = set(schemes(found).values())
    assert names == {"bf16", "int4 g32", "int4 channel"}  # in 32 columns, one group is the row
    assert any("the tensors are int4 g32" in note.detail for note in found.notes)


def test_a_wrong_group_size_or_width_gives_way_to_the_tensors() -> None:
    def wrong(config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["weights"].update(num_bits=8, group_size=16)

    found = plan(W4A16, config=quantization(wrong))
    assert not found.problems
    assert schemes(found)["model.language_model.layers.0.mlp.up_proj"] == "int4 g32"
    assert any("says int8 g16, the tensors are int4 g32" in n.detail for n in found.notes)


def odd_groups(tensors: dict[str, TensorMeta]) -> None:
    """96 columns in two groups: of 64, the last cut short, or of 48."""
    for name, meta in list(tensors.items()):
        if name.endswith("mlp.down_proj.weight_scale") and meta.shape[1] == 3:
            tensors[name] = replace(meta, shape=(meta.shape[0], 2))


def test_several_fitting_schemes_need_a_claim() -> None:
    silent = plan(W4A16, config=lambda raw: raw.pop("quantization_config"), tensors=odd_groups)
    details = {problem.detail for problem in silent.problems}
    assert details == {"its tensors fit int4 g48 and int4 g64, and config.json does not say which"}

    def claim(config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["weights"]["group_size"] = 64

    told = plan(W4A16, config=quantization(claim), tensors=odd_groups)
    assert not told.problems
    assert schemes(told)["model.language_model.layers.0.mlp.down_proj"] == "int4 g64"


def test_a_head_of_its_own_is_used_whatever_is_said_of_tying(tmp_path: Path) -> None:
    table = tensors_of(DENSE)["model.language_model.embed_tokens.weight"]
    folder = altered(tmp_path, DENSE, lambda t: t.update({"lm_head.weight": 2 * table}))
    model, report = load_model(folder, dtype=torch.float32)
    assert report.plan.has_head
    assert torch.equal(model.lm_head.weight.dense(torch.bfloat16), 2 * table)


def test_plain_parameters_are_exact_and_in_float32() -> None:
    model, report = load_model(ASYMMETRIC, dtype=torch.float32)
    stored = tensors_of(ASYMMETRIC)
    parts = dict(parts_of(model))
    for read in report.plan.parameters:
        found = parts[read.parameter.name]
        assert found.dtype is torch.float32
        assert torch.equal(found, stored[read.tensor.name].float()), read.parameter.name


def test_progress_ends_at_the_plans_bytes() -> None:
    seen: list[tuple[int, int]] = []
    _, report = load_model(W4A16, dtype=torch.float32, progress=lambda *p: seen.append(p))
    assert seen == sorted(seen)
    assert seen[-1] == (report.plan.nbytes, report.plan.nbytes)


def test_infinite_clip_bounds_are_bounds(tmp_path: Path) -> None:
    name = "model.vision_tower.encoder.layers.0.mlp.up_proj.input_max"
    tensors = tensors_of(DENSE)
    tensors[name] = torch.full_like(tensors[name], float("inf"))
    model, _ = load_model(write(tmp_path, tensors, config_of(DENSE)), dtype=torch.float32)
    assert dict(parts_of(model))[name] == float("inf")
