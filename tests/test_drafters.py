"""Drafters guess what transformers' own guess, beside any target, and change no answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import drafters
import family
import gguf
import numpy as np
import pytest
import torch
from checkpoints import altered
from conftest import FIXTURES, MEMBERS, noise
from ct import decompressed_into, rounding
from ct_formats import FORMATS, integers, preset
from ct_writer import encode
from gguf_models import decoded
from reference import inputs, relative_error
from thin import fixture
from torch import Tensor
from transformers import AutoConfig

from cabochon import LLM, SamplingParams
from cabochon.assembly import DRAFT_TOKENS
from cabochon.config import beside, parse_config
from cabochon.engine.cache import CachePlan, PagedCache
from cabochon.engine.drafts import Drafts
from cabochon.engine.request import Prompt
from cabochon.engine.runner import new_sequence
from cabochon.engine.scheduler import Scheduled, TokenSequence
from cabochon.errors import CabochonError, LoadError
from cabochon.gemma4.drafter import Drafter
from cabochon.load.obtain import inspect_model
from cabochon.load.report import inspect_checkpoint

References = Callable[[str], Any]
COUNT = 6  # guesses
ROTATIONS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.25,
    },
}
BLOCKS = FORMATS["FP8 block, cut short"][0]
SCHEMES = {
    "FP8 block": BLOCKS,
    "NVFP4A16": preset("NVFP4A16"),
    "W4A16": integers(4, 16),
    "W8A8": preset("W8A8"),
}


@pytest.fixture(scope="module", params=MEMBERS)
def member(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def together(member: str) -> Iterator[LLM]:
    """A tiny target and its drafter, both in float32."""
    folder = FIXTURES / f"{member}-bf16"
    with LLM(folder, drafter=drafters.drafter(member), dtype="float32") as llm:
        yield llm


def drafts_of(llm: LLM) -> Drafts:
    drafts = llm.engine.scheduler.guesser.drafts
    assert isinstance(drafts, Drafts)
    return drafts


def computed(llm: LLM, prompt: Prompt, drawn: int) -> tuple[TokenSequence, PagedCache]:
    """A sequence after a prompt, in a cache of its own; `drawn` is its next token."""
    length = len(prompt.tokens)
    plan = CachePlan.single(llm.config.text, length + 16, 512)
    cache = PagedCache(plan, llm.runner.kv_dtype, llm.runner.device)
    sequence = new_sequence(llm.runner.model, prompt, cache)
    while sequence.computed < length:
        chunk = sequence.chunk(24)
        assert cache.reserve(chunk)
        step = [Scheduled(sequence, chunk)]
        llm.runner.encode(step[0])
        hidden = llm.runner.run(cache, step, every=True)
    sequence.guesses.state = hidden[-1]
    sequence.tokens.append(drawn)
    return sequence, cache


class Recorded:
    """What a drafter of ours gives at each guess: states for the next one, and tokens."""

    def __init__(self, drafter: Drafter) -> None:
        self.states: list[Tensor] = []
        self._hook = drafter.post_projection.register_forward_hook(
            lambda _module, _given, made: self.states.append(made.clone())
        )

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@torch.inference_mode()
def theirs(
    target: Any, drafter: Any, prompt: Prompt, drawn: int, count: int
) -> tuple[list[int], list[Tensor]]:
    """What transformers' drafter makes of what its target keeps: tokens, and states."""
    length, window = len(prompt.tokens), target.config.get_text_config().sliding_window
    made = target(
        **inputs(target, prompt),
        output_hidden_states=True,
        return_shared_kv_states=True,
        use_cache=False,
    )
    first = {"sliding_attention": max(0, length - window + 1), "full_attention": 0}
    kept = {
        kind: tuple(x[:, :, first[kind] :] for x in kv)
        for kind, kv in made.shared_kv_states.items()
    }
    state, token = made.hidden_states[-1][:, -1:], torch.tensor([[drawn]])
    tokens, states = [], []
    for _ in range(count):
        embedded = target.get_input_embeddings()(token)
        out = drafter(
            inputs_embeds=torch.cat([embedded, state], dim=-1),
            position_ids=torch.tensor([[length]]),
            shared_kv_states=kept,
        )
        state, token = out.last_hidden_state, out.logits.argmax(dim=-1)
        tokens.append(int(token))
        states.append(state[0])
    return tokens, states


@pytest.fixture(scope="module")
def upstream(member: str, references: References) -> tuple[Any, Any]:
    """transformers' target and drafter."""
    drafters.mend()
    target = drafters.storing(references(member))
    return target, drafters.reference(drafters.drafter(member), member)


WORDS = [2, *np.random.default_rng(3).integers(280, 384, 70).tolist()]


@pytest.mark.parametrize("kind", ["short", "behind the window", "with a picture"])
def test_guesses_are_upstreams(together: LLM, upstream: tuple[Any, Any], kind: str) -> None:
    """Each one, and the states between them."""
    tokens = WORDS[:9] if kind == "short" else WORDS
    prompt = Prompt(tuple(tokens))
    if kind == "with a picture":
        image = together.config.tokens.image
        prompt = together.prompts.raw([*WORDS[:20], image, *WORDS[20:]], (noise(90, 60),))
    sequence, cache = computed(together, prompt, drawn=300)
    drafter = drafts_of(together).drafter
    with Recorded(drafter) as recorded:
        ours = Drafts(drafter, together.runner, cache)([sequence], COUNT)[0]
    tokens, states = theirs(*upstream, prompt, 300, COUNT)
    assert ours == tokens
    for mine, its in zip(recorded.states, states, strict=True):
        assert relative_error(mine, its) < 1e-5


def test_kernels_guess_what_upstream_guesses(member: str, upstream: tuple[Any, Any]) -> None:
    """Nearly always: they round otherwise, and a guess may hang by a last bit."""
    rng, right = np.random.default_rng(6), 0
    prompts = [Prompt((2, *rng.integers(280, 384, 5 + 3 * i).tolist())) for i in range(20)]
    with LLM(FIXTURES / f"{member}-bf16", drafter=drafters.drafter(member)) as llm:
        for prompt in prompts:
            sequence, cache = computed(llm, prompt, drawn=300)
            ours = Drafts(drafts_of(llm).drafter, llm.runner, cache)([sequence], 3)[0]
            right += ours == theirs(*upstream, prompt, 300, 3)[0]
    assert right >= 18


def test_sequences_are_guessed_for_together(together: LLM) -> None:
    """Those of all lengths at once are those of each alone."""
    drafts, params = drafts_of(together), SamplingParams(temperature=0.0, max_tokens=40)
    asked: list[tuple[list[TokenSequence], list[list[int]]]] = []

    def watched(sequences: Sequence[TokenSequence], count: int) -> list[list[int]]:
        made = drafts(sequences, count)
        alone = [drafts([sequence], count)[0] for sequence in sequences]
        asked.append((list(sequences), made))
        assert made == alone
        return made

    guesser = together.engine.scheduler.guesser
    guesser.drafts = watched
    try:
        together.generate([WORDS[:n] for n in (3, 12, 20, 47)], params)
    finally:
        guesser.drafts = drafts
    assert max(len(sequences) for sequences, _ in asked) > 1


def test_the_state_is_where_the_latest_token_was_drawn(
    together: LLM, upstream: tuple[Any, Any]
) -> None:
    """Behind right guesses, wrong ones, and several of both: upstream guesses the same from it."""
    drafts = drafts_of(together)
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    answer = list(together.generate(WORDS[:30], params)[0].tokens)
    rng, seen = np.random.default_rng(4), []

    def partly_right(sequences: Sequence[TokenSequence], count: int) -> list[list[int]]:
        (sequence,) = sequences
        done = len(sequence.tokens) - 30
        seen.append((list(sequence.tokens), drafts(sequences, 3)[0]))
        made = answer[done : done + count]
        wrong = int(rng.integers(0, count + 1))
        return [[*made[:wrong], *(1 + token for token in made[wrong:])]]

    guesser = together.engine.scheduler.guesser
    guesser.drafts = partly_right
    try:
        assert list(together.generate(WORDS[:30], params)[0].tokens) == answer
    finally:
        guesser.drafts = drafts
    assert together.engine.stats.guessed_right > 0
    assert len(seen) > 3
    for tokens, guessed in seen:
        *known, latest = tokens
        assert theirs(*upstream, Prompt(tuple(known)), latest, 3)[0] == guessed


def test_a_prompt_whose_last_token_has_a_step_of_its_own(
    together: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is drawn yet that a drafter could go on from."""
    scheduler, prompt = together.engine.scheduler, [7, *WORDS[:16]]
    monkeypatch.setattr(scheduler, "prefill_chunk", 16)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    answer = together.generate([prompt], params)
    monkeypatch.setattr(scheduler.guesser, "most", 0)
    assert together.generate([prompt], params) == answer


@pytest.mark.parametrize("name", ["26b-bf16", "e2b-bf16"])
def test_few_are_drafted_where_each_token_has_experts_of_its_own(name: str) -> None:
    member = name.split("-")[0]
    asked = []
    for draft_tokens in (None, 8):
        with LLM(fixture(name), drafter=drafters.drafter(member), draft_tokens=draft_tokens) as llm:
            asked.append(llm.engine.scheduler.guesser.drafted)
    assert asked == [3 if member == "26b" else DRAFT_TOKENS, 8]


def test_no_request_fails_with_the_drafter(
    together: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    guesser, params = together.engine.scheduler.guesser, SamplingParams(max_tokens=20, seed=3)
    monkeypatch.setattr(guesser, "drafts", guesser.drafts)  # put back afterwards
    prompts = [WORDS[:n] for n in (5, 30)]
    answers = together.generate(prompts, params)

    def fail(hidden: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no memory")

    monkeypatch.setattr(drafts_of(together).drafter, "likeliest", fail)
    assert together.generate(prompts, params) == answers
    assert [record.message for record in caplog.records] == [
        "the drafter failed: from now on it is not asked"
    ]


@pytest.mark.parametrize("name", ["e2b-w4a16", "e2b-nvfp4a16"])
def test_no_answer_changes(name: str) -> None:
    """Where kernels round activations, to the bit, whatever a drafter guesses."""
    folder, params = fixture(name), SamplingParams(temperature=0.6, seed=5, max_tokens=60)
    prompts = [WORDS[:n] for n in (5, 30)]
    with LLM(folder, draft_tokens=0) as plain, LLM(folder, drafter=drafters.drafter("e2b")) as llm:
        assert llm.generate(prompts, params) == plain.generate(prompts, params)
        assert llm.engine.stats.guessed > 0


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_a_drafter_is_quantized_by_itself(
    tmp_path: Path, member: str, upstream: tuple[Any, Any], name: str
) -> None:
    """Its own configuration says how, whatever its target is stored in."""
    target, drafter = upstream
    groups = {r"re:model\.layers\..*": SCHEMES[name], "re:p.*_projection": SCHEMES[name]}
    folder = encode(tmp_path / "drafter", drafters.drafter(member), groups)
    decoded = rounding(decompressed_into(drafter, folder), folder)
    sites = inspect_model(folder).plan.sites
    assert sum(read.scheme.name != "bf16" for read in sites) == 4 * 5 + 2
    with LLM(FIXTURES / f"{member}-bf16", drafter=folder, dtype="float32") as llm:
        sequence, cache = computed(llm, Prompt(tuple(WORDS)), drawn=300)
        ours = Drafts(drafts_of(llm).drafter, llm.runner, cache)([sequence], COUNT)[0]
    assert ours == theirs(target, decoded, Prompt(tuple(WORDS)), 300, COUNT)[0]


@pytest.mark.parametrize("name", ["e2b", "12b"])
def test_a_drafter_in_gguf(references: References, name: str) -> None:
    """llama.cpp's converter leaves out clusters, so that all tokens get logits."""
    path = FIXTURES / "gguf" / "assistant" / f"{name}-assistant-q8_0.gguf"
    drafter = drafters.reference(drafters.drafter(name), name)
    stored = decoded(path)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, 99)
    own = {"pre_projection": "nextn.pre_projection", "post_projection": "nextn.post_projection"}
    tensors = {**dict(drafter.named_parameters()), **dict(drafter.named_buffers())}
    tensors = {n: t for n, t in tensors.items() if ".rotary_emb." not in n}
    for full, tensor in tensors.items():
        if full.startswith(("masked_embedding", "model.embed_tokens.embed_scale")):
            continue
        module = full.removesuffix(".weight")
        theirs_name = own.get(module) or table.get_name(module)
        tensor.data.copy_(stored.pop(f"{theirs_name}.weight").reshape(tensor.shape))
    assert stored.keys() == {"rope_freqs.weight"}
    drafter.config.use_ordered_embeddings = False
    target, prompt = drafters.storing(references(name)), Prompt(tuple(WORDS))
    with LLM(FIXTURES / f"{name}-bf16", drafter=path, dtype="float32") as llm:
        sequence, cache = computed(llm, prompt, drawn=300)
        ours = Drafts(drafts_of(llm).drafter, llm.runner, cache)([sequence], COUNT)[0]
    assert ours == theirs(target, drafter, prompt, 300, COUNT)[0]


@pytest.mark.parametrize("name", family.MEMBERS)
def test_plans_of_the_real_sizes_read_what_upstreams_drafters_have(
    tmp_path: Path, name: str
) -> None:
    described = family.drafter_config(name)
    (tmp_path / "config.json").write_text(json.dumps(described))
    drafters.mend()
    with torch.device("meta"):
        made = drafters.class_of(name.lower())(AutoConfig.from_pretrained(tmp_path))
    tensors = made.state_dict()
    del tensors["lm_head.weight"]  # the token table
    dtypes = {torch.int64: "I64", torch.float32: "BF16"}
    layout = {key: (dtypes[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}
    report = inspect_checkpoint(family.write_headers(tmp_path, layout, described))
    assert report.loads, report.text()
    assert report.nbytes == family.nbytes(layout)
    assert f"guesses for Gemma 4 {name}:" in report.text()


@pytest.mark.parametrize("name", family.MEMBERS)
def test_a_drafter_of_a_real_size_fits_its_target_alone(name: str) -> None:
    drafter = parse_config(family.drafter_config(name))
    targets = {other: parse_config(family.config(other)) for other in family.MEMBERS}
    layers = targets[name].text.layers
    read = [layers[layer.kv_source] for layer in beside(drafter, targets.pop(name)).text.layers]
    assert [layer.kind for layer in read] == ["sliding"] * 3 + ["full"]
    assert not any(layer.shares_kv for layer in read)
    for other in targets.values():
        with pytest.raises(LoadError, match="not of this model"):
            beside(drafter, other)


def refused(target: Path, drafter: Path) -> str:
    with pytest.raises(LoadError) as caught:
        LLM(target, drafter=drafter, dtype="float32")
    return str(caught.value)


def test_what_a_drafter_looks_like_is_told(tmp_path: Path) -> None:
    def empty(tensors: dict[str, Tensor]) -> None:
        tensors["post_projection.weight"].zero_()

    drafter = altered(tmp_path / "d", drafters.drafter("12b"), tensors=empty)
    with LLM(FIXTURES / "12b-bf16", drafter=drafter, dtype="float32") as llm:
        assert any("post_projection" in where for note in llm.notes for where in note.where)
        assert "post_projection" not in llm.report.text()
        assert "d: loads (Gemma4UnifiedAssistantForCausalLM)" in llm.told()


def test_a_drafter_that_may_not_guess_is_a_contradiction() -> None:
    with pytest.raises(CabochonError, match="draft_tokens is 0"):
        LLM(FIXTURES / "12b-bf16", drafter=drafters.drafter("12b"), draft_tokens=0)


def test_a_drafter_answers_nobody() -> None:
    with pytest.raises(LoadError, match=r"is a drafter.*--drafter"):
        LLM(drafters.drafter("e2b"))
    assert "is no drafter" in refused(FIXTURES / "e2b-bf16", FIXTURES / "e2b-bf16")


def changed(**values: object) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        text = config["text_config"]
        for key, value in values.items():
            (text if key in text else config)[key] = value

    return change


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sliding_window": 16}, "window of sliding layers is 16, and 32"),
        ({"per_layer_config": {}}, "SHAPE"),
        ({"num_key_value_heads": 2}, "key and value heads of sliding layers is 2, and 1"),
        ({"rope_parameters": ROTATIONS}, "base of full layers is 500000.0, and 1000000.0 of"),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers is 3"),
        ({"hidden_size_per_layer_input": 8}, "hidden_size_per_layer_input is 8"),
        ({"num_centroids": 7}, "num_centroids is 7"),
        ({"centroid_intermediate_top_k": 17}, "centroid_intermediate_top_k is 17"),
        ({"use_ordered_embeddings": False}, "masked_embedding"),
        ({"backbone_hidden_size": 96}, "pre_projection"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, values: dict[str, object], said: str) -> None:
    drafter = altered(tmp_path / "d", drafters.drafter("e2b"), config=changed(**values))
    with pytest.raises(CabochonError) as caught:
        LLM(FIXTURES / "e2b-bf16", drafter=drafter, dtype="float32")
    assert said in str(caught.value)


def test_a_drafter_of_another_model_is_refused() -> None:
    said = refused(FIXTURES / "12b-bf16", drafters.drafter("e2b"))
    assert "not of this model" in said
    assert "key and value heads" in said


def test_an_order_names_each_token_once(tmp_path: Path) -> None:
    def twice(tensors: dict[str, Tensor]) -> None:
        tensors["masked_embedding.token_ordering"][5] = 9

    said = refused(
        FIXTURES / "e2b-bf16", altered(tmp_path / "d", drafters.drafter("e2b"), tensors=twice)
    )
    assert "masked_embedding.token_ordering" in said
