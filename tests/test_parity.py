"""Our models compute what transformers computes, submodule by submodule and token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import FIXTURES, MEMBERS, hiss, noise
from PIL import Image
from reference import greedy, inputs, logits, relative_error
from torch import Tensor, nn

from cabochon import LLM, SamplingParams
from cabochon.config import PatchConfig
from cabochon.config.types import PictureSight
from cabochon.engine.request import Prompt
from cabochon.gemma4.model import Gemma4
from cabochon.gemma4.sounds import Wave
from cabochon.nn.attention import KeyValues, visible
from cabochon.nn.experts import Experts
from cabochon.nn.norm import RMSNorm
from cabochon.nn.weight import DenseWeight

TOLERANCE = 1e-4
MEDIA = ("model.vision", "model.audio", "model.embed_vision", "model.embed_audio")
TEXT = [2, 4, *(280 + 37 * i % 100 for i in range(120)), 5]
HEARING = ("e2b", "12b")

Family = Callable[[str], LLM]
References = Callable[[str], Any]


class Media(NamedTuple):
    images: tuple[Image.Image, ...] = ()
    sounds: tuple[Wave, ...] = ()


CASES = {
    "text": Media(),
    "picture": Media((noise(100, 60),)),
    "two pictures": Media((noise(100, 60), noise(40, 200, seed=1))),
    "sound": Media((), (hiss(9_000),)),
    "mixed": Media((noise(60, 60), noise(50, 90)), (hiss(5_000), hiss(12_345, seed=1))),
}
RUNS = [
    pytest.param(member, media, id=f"{member}-{name}")
    for member in MEMBERS
    for name, media in CASES.items()
    if member in HEARING or not media.sounds
]


def prompt_of(llm: LLM, media: Media) -> Prompt:
    """Text with the media spread over its middle."""
    ids = llm.config.tokens
    places = [ids.image] * len(media.images) + [ids.audio] * len(media.sounds)
    tokens = TEXT[:40] + [t for place in places for t in (place, 310)] + TEXT[40:]
    return llm.prompts.raw(tokens, media.images, media.sounds)


def our_logits(llm: LLM, media: Media) -> Tensor:
    return llm.logits(list(prompt_of(llm, media).tokens), media.images, media.sounds)


@contextmanager
def traced(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The output of every module that is called inside, by name, in execution order."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            while not isinstance(output, Tensor):  # upstream returns tuples and output classes
                output = output[0]
            # A copy: upstream goes on in place with some of its outputs.
            outputs.setdefault(name, output.detach().float().clone())

        return hook

    hooks = [m.register_forward_hook(record(n)) for n, m in model.named_modules() if n]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of modules that both ran, in the reference's order, whose outputs differ."""
    differing = []
    for name, other in theirs.items():
        mine = ours.get(name)
        # A router gives us its choice, and upstream its probabilities first.
        if mine is None or name.endswith(".router"):
            continue
        while other.ndim > mine.ndim:
            other = other.flatten(0, 1) if other.shape[0] > 1 else other[0]
        if name.startswith(MEDIA):  # upstream pads media and masks the padding; we have none
            other = other[tuple(slice(size) for size in mine.shape)]
        if mine.shape != other.shape:
            differing.append(f"{name}: {tuple(mine.shape)} for {tuple(other.shape)}")
        elif not (error := relative_error(mine, other)) < TOLERANCE:
            differing.append(f"{name}: {error:.1e}")
    return differing


def traces(llm: LLM, model: Any, media: Media) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    prompt = prompt_of(llm, media)
    with traced(llm.runner.model) as ours:
        our_logits(llm, media)
    with traced(model) as theirs, torch.inference_mode():
        model(**inputs(model, prompt))
    if isinstance(llm.config.vision, PatchConfig):
        return ours, {on_disk(name): output for name, output in theirs.items()}
    return ours, theirs


def on_disk(name: str) -> str:
    """A module of the encoder-free model by the name that its tensors have in checkpoints."""
    whole, projector = "model.embed_vision", "model.embed_vision.multimodal_embedder"
    if name.startswith(projector):
        return whole + name.removeprefix(projector)
    return name.replace(whole, "model.vision_embedder")


@pytest.mark.parametrize(
    ("member", "media"),
    [
        pytest.param(member, media, id=f"{member}-{name}")
        for member in MEMBERS
        for name, media in (("text", Media()), ("media", CASES["picture"]))
    ]
    + [pytest.param(member, CASES["sound"], id=f"{member}-sound") for member in HEARING],
)
def test_every_submodule(family: Family, references: References, member: str, media: Media) -> None:
    ours, theirs = traces(family(member), references(member), media)
    # Only in ours: weights, which are modules here, and experts, which upstream holds as tensors.
    own = ("weight", "gate_up_proj", "down_proj")
    assert [n for n in ours if n not in theirs and not n.endswith(own)] == []
    assert len(set(ours) & set(theirs)) > (90 if member == "e2b" else 70)
    assert compare(ours, theirs) == []


@pytest.mark.parametrize(("member", "media"), RUNS)
def test_logits(family: Family, references: References, member: str, media: Media) -> None:
    llm = family(member)
    expected = logits(references(member), prompt_of(llm, media))
    assert relative_error(our_logits(llm, media), expected) < TOLERANCE


@pytest.mark.parametrize("chunk", [7, 16, 100])
@pytest.mark.parametrize("member", MEMBERS)
def test_logits_in_chunks(references: References, member: str, chunk: int) -> None:
    """The prompt exceeds the sliding window, and pictures lie across the edges of chunks."""
    media = CASES["mixed" if member in HEARING else "two pictures"]
    with LLM(FIXTURES / f"{member}-bf16", dtype="float32", prefill_chunk=chunk) as llm:
        prompt = prompt_of(llm, media)
        assert len(prompt.tokens) > 3 * max(layer.window or 0 for layer in llm.config.text.layers)
        ours = our_logits(llm, media)
    assert relative_error(ours, logits(references(member), prompt)) < TOLERANCE


@pytest.mark.parametrize(("member", "media"), RUNS)
def test_greedy_tokens(family: Family, references: References, member: str, media: Media) -> None:
    llm = family(member)
    prompt = prompt_of(llm, media)
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    expected = greedy(references(member), prompt, 64)
    assert list(llm.generate(prompt, params)[0].tokens) == expected


class Fault(NamedTuple):
    """A mistake that no loader can see, and the module where it must show first."""

    member: str
    inject: Callable[[Gemma4], None]
    first: str
    report: str  # of an engine that made it


FAULTS: dict[str, Fault] = {}
LAYER = "model.language_model.layers.0"
FULL = "model.language_model.layers.2"


def fault(member: str, first: str, report: str = "") -> Callable[[Callable[[Gemma4], None]], None]:
    def register(inject: Callable[[Gemma4], None]) -> None:
        name = f"{report} {inject.__name__}".strip()
        FAULTS[name] = Fault(member, inject, first, report)

    return register


@fault("e2b", LAYER)
def layer_scalar_dropped(model: Gemma4) -> None:
    model.get_submodule(LAYER).layer_scalar = torch.ones(1)


@fault("e2b", f"{LAYER}.mlp.gate_proj")
def gate_and_up_swapped(model: Gemma4) -> None:
    mlp: Any = model.get_submodule(f"{LAYER}.mlp")
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


@fault("e2b", f"{LAYER}.mlp.down_proj", "vLLM #41574")
def silu_for_gelu(model: Gemma4) -> None:
    mlp: Any = model.get_submodule(f"{LAYER}.mlp")
    silu = nn.functional.silu
    mlp.forward = lambda x: mlp.down_proj(silu(mlp.gate_proj(x)) * mlp.up_proj(x))


@fault("e2b", f"{LAYER}.self_attn.o_proj")
def attention_scaled(model: Gemma4) -> None:
    attention: Any = model.get_submodule(f"{LAYER}.self_attn")
    plain = attention.forward

    class Scaled:
        def __init__(self, kv: KeyValues) -> None:
            self.write = kv.write
            self.attend = lambda layer, q: kv.attend(layer, q * q.shape[-1] ** -0.5)

    attention.forward = lambda x, rotation, kv: plain(x, rotation, Scaled(kv))


@fault("e2b", f"{FULL}.self_attn.o_proj")
def all_pairs_rotated(model: Gemma4) -> None:
    text: Any = model.get_submodule("model.language_model")
    whole = replace(text.config.rope["full"], fraction=1.0)
    text.config = replace(text.config, rope={**text.config.rope, "full": whole})


@fault("31b", f"{FULL}.self_attn.v_norm")
def values_after_the_key_norm(model: Gemma4) -> None:
    attention: Any = model.get_submodule(f"{FULL}.self_attn")
    norm, plain = attention.k_norm, attention.v_norm.forward
    attention.v_norm.forward = lambda x: plain(norm.forward(x))


@fault("26b", f"{LAYER}.experts", "vLLM #42250")
def per_expert_scale_skipped(model: Gemma4) -> None:
    router: Any = model.get_submodule(f"{LAYER}.router")
    router.per_expert_scale = nn.Parameter(torch.ones_like(router.per_expert_scale))


@fault("26b", f"{LAYER}.experts")
def halves_of_experts_swapped(model: Gemma4) -> None:
    experts = model.get_submodule(f"{LAYER}.experts")
    assert isinstance(experts, Experts)
    data = experts.gate_up_proj.weight.dense(torch.float32)
    halves = data.unflatten(0, (experts.count, 2, -1)).flip(1)
    experts.gate_up_proj.weight = DenseWeight(halves.flatten(0, 2))


@fault("e2b", "model.language_model.embed_tokens_per_layer", "transformers #45207")
def inputs_of_layers_not_scaled(model: Gemma4) -> None:
    """The table's rows are multiplied with the root of their width, 16 in the real ones."""
    model.get_submodule("model.language_model.embed_tokens_per_layer").scale = 1.0


@fault("e2b", "model.embed_vision.embedding_pre_projection_norm", "vLLM #40411")
def norm_behind_the_projection(model: Gemma4) -> None:
    embedder: Any = model.get_submodule("model.embed_vision")
    norm = embedder.embedding_pre_projection_norm
    assert isinstance(norm, RMSNorm)
    embedder.forward = lambda x: norm(embedder.embedding_projection(x))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found_where_it_is(references: References, fault: Fault) -> None:
    with LLM(FIXTURES / f"{fault.member}-bf16", dtype="float32") as llm:
        fault.inject(llm.runner.model)
        differing = compare(*traces(llm, references(fault.member), CASES["picture"]))
    assert differing[0].startswith(fault.first + ":")


@pytest.mark.parametrize(("sight", "first"), [("causal", LAYER), ("window", FULL)])
def test_vllm_40534_47217_pictures_are_seen_forwards_in_sliding_layers_alone(
    references: References, sight: PictureSight, first: str
) -> None:
    """One sight in all layers shows in the first whose own is another."""

    def other(*given: Any) -> Tensor:
        queries, keys, window, _, *spans = given
        return visible(queries, keys, window, sight, *spans)

    with LLM(FIXTURES / "31b-bf16", dtype="float32") as llm, pytest.MonkeyPatch.context() as patch:
        patch.setattr("cabochon.engine.cache.visible", other)
        differing = compare(*traces(llm, references("31b"), CASES["picture"]))
    assert differing[0].startswith(f"{first}.self_attn.o_proj:")


@pytest.mark.parametrize("member", ["e2b", "12b", "31b"])
def test_bfloat16_is_upstreams_bfloat16(member: str) -> None:
    """The same roundings in the same places, up to the order of sums.

    Not the mixture of experts: rounding there changes which experts are chosen, upstream as here.
    """
    from transformers import AutoModelForImageTextToText

    folder = FIXTURES / f"{member}-bf16"
    reference = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    with LLM(folder, dtype="bfloat16") as llm:
        prompt = prompt_of(llm, CASES["picture"])
        with traced(llm.runner.model) as outputs:
            ours = our_logits(llm, CASES["picture"])
        made = inputs(reference, prompt)
        made["pixel_values"] = made["pixel_values"].bfloat16()
        with torch.inference_mode():
            theirs = reference(**made).logits[0].float()
    assert outputs
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean() > 0.998
