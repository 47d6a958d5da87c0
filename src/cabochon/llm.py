"""`LLM`: a checkpoint, loaded and ready, as command line, server and Python callers share it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cabochon.checkpoint.source import Source
from cabochon.config import Gemma4Config, beside
from cabochon.engine.cache import CachePlan, PagedCache
from cabochon.engine.defaults import GenerationDefaults
from cabochon.engine.engine import Engine
from cabochon.engine.grammar import Grammars
from cabochon.engine.request import Completion, Prompt, SamplingParams
from cabochon.engine.runner import Runner, new_sequence
from cabochon.engine.scheduler import Scheduled
from cabochon.engine.stream import Stream
from cabochon.errors import CabochonError, LoadError, RequestError, ResourceError
from cabochon.gemma4.drafter import Drafter
from cabochon.gemma4.model import Gemma4
from cabochon.gemma4.sounds import Wave
from cabochon.kernels.choose import Kernels
from cabochon.kernels.layers import fuse
from cabochon.kernels.library import library
from cabochon.kernels.look import looking
from cabochon.kernels.packed import ACTIVATIONS, Activations
from cabochon.kernels.pages import enlarge
from cabochon.load.execute import Loaded, Progress, execute
from cabochon.load.forecast import machine_memory
from cabochon.load.obtain import obtain
from cabochon.load.plan import LoadPlan
from cabochon.load.report import Report, plan_checkpoint
from cabochon.prompts import Message, Prompts

AnyPrompt = str | Sequence[int] | Prompt
Dtype = Literal["auto", "float32", "bfloat16"]

logger = logging.getLogger(__name__)

DRAFT_TOKENS = 15  # with one that is certain fewer than attention computes in another order

_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
_KV_DTYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
_CHOICES = {
    "dtype": tuple(_DTYPES),
    "activations": ("auto", *ACTIVATIONS),
    "kv_dtype": ("auto", *_KV_DTYPES),
}


class _Numbers(NamedTuple):
    """What is computed in, what keys and values are kept in, what inputs are rounded to."""

    compute: torch.dtype
    kept: torch.dtype
    activations: Activations

    @classmethod
    def of(
        cls, dtype: Dtype, kv_dtype: str, activations: Activations | Literal["auto"]
    ) -> _Numbers:
        """Exact where a `dtype` is named, fast where it is not; what is named for itself counts."""
        compute = _DTYPES[dtype]
        kept = _KV_DTYPES.get(kv_dtype, torch.float16 if dtype == "auto" else compute)
        if activations == "auto":
            activations = "int8" if dtype == "auto" else "float32"
        return cls(compute, kept, activations)


class _Text(NamedTuple):
    """What needs a checkpoint's files, but no weights."""

    prompts: Prompts
    generation: GenerationDefaults
    longest_step: int  # tokens of one sequence computed at once
    cache: CachePlan


class LLM:
    """A Gemma 4 checkpoint behind an engine.

    Args:
        model: A folder or file, an id on the hub, or what `obtain` made of it; None: the demo.
        dtype: What activations are computed in. "auto" is float32, the faster and exacter one on
            processors without bfloat16 arithmetic.
        activations: What the inputs of quantized matrices are rounded to, 32 at a time, "float32"
            for not at all. "auto" is "int8", the fastest; "float32" if `dtype` is named.
        kv_dtype: What keys and values are kept in. "auto" is "float16"; `dtype` if that is named.
            "int8" is half the memory and less exact.
        threads: Of torch; None leaves its own choice.
        kv_cache_bytes: For keys and values; None takes at most an eighth of the machine's memory.
        max_batch: Requests computed together.
        prefill_chunk: Prompt tokens computed in one step, among all requests.
        max_context: Tokens of prompt and answer; None takes what model and cache allow.
        picture_tokens: That a picture may take: one of `SOFT_TOKEN_BUDGETS`. None takes the
            checkpoint's own setting, and upstream's 280 where it has none, as a GGUF.
        drafter: A small model made to guess for this one, such as `org/name-assistant`.
        draft_tokens: Tokens guessed from what a text repeats, or by the drafter, and checked in one
            step, among all requests; 0 for none. None is 15 with a drafter, and where answers are
            the same to the bit; else 0.
        weights_only: Leave activations as they are where a recipe quantizes them.
        debug_nan: Name the module that first gave numbers that are none; slows every step.
        progress: Called while loading with bytes done and bytes in all.

    Raises:
        CabochonError: an option out of its range.
        UnreadableError, ConfigError: the folder is no readable Gemma 4 checkpoint.
        LoadError: the checkpoint would not load exactly right; the text is the plan's report.
        ResourceError: it would, but this machine has not the memory.
    """

    def __init__(
        self,
        model: str | Path | Source | None = None,
        *,
        dtype: Dtype = "auto",
        activations: Activations | Literal["auto"] = "auto",
        kv_dtype: Literal["auto", "float16", "float32", "int8"] = "auto",
        threads: int | None = None,
        kv_cache_bytes: int | None = None,
        max_batch: int = 16,
        prefill_chunk: int = 512,
        max_context: int | None = None,
        picture_tokens: int | None = None,
        drafter: str | Path | Source | None = None,
        draft_tokens: int | None = None,
        weights_only: bool = False,
        debug_nan: bool = False,
        progress: Progress | None = None,
    ) -> None:
        _check_options(
            {"dtype": dtype, "activations": activations, "kv_dtype": kv_dtype},
            {
                "threads": (threads, 1),
                "kv_cache_bytes": (kv_cache_bytes, 1),
                "max_batch": (max_batch, 1),
                "prefill_chunk": (prefill_chunk, 1),
                "max_context": (max_context, 1),
                "draft_tokens": (draft_tokens, 0),
            },
        )
        source = _source(model, weights_only)
        self.name = source.name
        if threads is not None:
            torch.set_num_threads(threads)
        numbers = _Numbers.of(dtype, kv_dtype, activations)
        self.report = plan_checkpoint(source.path, weights_only=weights_only, source=source.shown)
        self.report.require_model()
        plan = self.report.plan
        assert plan is not None
        self.config: Gemma4Config = plan.config
        drafting = None if drafter is None else _plan_drafter(drafter, plan, weights_only)
        memory = _memory_for([plan, *([drafting] if drafting else [])], source.path)
        self.prefill_chunk = prefill_chunk
        fit = partial(
            CachePlan.fit,
            self.config.text,
            numbers.kept,
            kv_cache_bytes or memory // 8,
            max_batch,
            max_context=max_context,
        )
        self.kernels = Kernels(library(), numbers.activations)
        with ThreadPoolExecutor(1) as aside:  # to make a tokenizer takes as long as to read weights
            text = aside.submit(_read_text, self.report, picture_tokens, prefill_chunk, fit)
            told = _or_error_of(text, progress)
            gemma, self.certificate = _load(plan, numbers.compute, self.kernels, told)
            assert isinstance(gemma, Gemma4)
        self.prompts, generation, self._longest_step, cache = text.result()
        self.defaults = generation.sampling
        vocab, tokenizer = self.config.text.vocab_size, self.prompts.tokenizer
        self.grammars = Grammars(tokenizer, vocab, generation.ends)
        self.max_context = cache.max_context
        self.capacity = cache.describe(numbers.kept, asked=max_batch)
        logger.info("%s", self.capacity)
        self.runner = Runner(gemma, numbers.compute, torch.device("cpu"), numbers.kept)
        if debug_nan:
            self.runner.watch()
        self.engine = Engine(
            self.runner,
            cache,
            tokenizer,
            ends=generation.ends,
            suppressed=generation.suppressed,
            prefill_chunk=prefill_chunk,
            draft_tokens=_draft_tokens(gemma, drafting) if draft_tokens is None else draft_tokens,
            drafter=_load_drafter(drafting, numbers, progress) if drafting else None,
        )

    @property
    def fingerprint(self) -> str:
        """Names the plan and the bytes of the weights; equal in replicas that run the same."""
        return self.certificate.fingerprint

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Deltas as they come. Closing the stream cancels the request.

        Raises:
            RequestError: the request is refused; the stream itself raises if it fails on the way.
        """
        return Stream(self.engine, prompt, params or self.defaults)

    def generate(
        self,
        prompts: AnyPrompt | Sequence[AnyPrompt],
        params: SamplingParams | None = None,
    ) -> list[Completion]:
        """Answers to one or several prompts, computed together, in order.

        Text that does not start with the beginning-of-sequence token gets it: Gemma repeats itself
        without. Token ids and `Prompt`s are taken as they are.
        """
        many = [self._generation_prompt(p) for p in _as_list(prompts)]
        with ExitStack() as stack:  # an error in one cancels those that still run
            streams = [stack.enter_context(self.stream(prompt, params)) for prompt in many]
            return [stream.collect() for stream in streams]

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **template: Any
    ) -> Completion:
        """The answer to a conversation; see `Prompts.chat` for the messages."""
        return self.generate(self.prompts.chat(messages, **template), params)[0]

    @torch.inference_mode()
    def logits(
        self,
        prompt: AnyPrompt,
        images: Sequence[Image.Image] = (),
        sounds: Sequence[Wave] = (),
        videos: Sequence[bytes] = (),
    ) -> Tensor:
        """Logits after the soft-cap at every position of `prompt`: `[tokens, vocab_size]`, float32.

        See `Prompts.raw` for what a prompt may hold; a `Prompt` has its media already. It goes
        through a cache of its own, in the chunks in which serving would compute it.
        """
        if isinstance(prompt, Prompt):
            assert not any((images, sounds, videos))
            full = prompt
        else:
            full = self.prompts.raw(prompt, images, sounds, videos)
        text, length = self.config.text, len(full.tokens)
        if length > text.max_positions:
            raise RequestError(
                f"the prompt has {length:,} tokens, the model knows {text.max_positions:,}",
                "prompt",
            )
        plan = CachePlan.single(text, length, self._longest_step)
        cache = PagedCache(plan, self.runner.kv_dtype, self.runner.device)
        sequence = new_sequence(self.runner.model, full, cache)
        logits = torch.empty(length, text.vocab_size)
        while sequence.computed < length:
            chunk = sequence.chunk(self.prefill_chunk)
            reserved = cache.reserve(chunk)
            assert reserved
            step = [Scheduled(sequence, chunk)]
            self.runner.encode(step[0])
            hidden = self.runner.run(cache, step, every=True)
            logits[chunk.start : chunk.stop] = self.runner.logits(hidden)
        return logits

    def close(self) -> None:
        """End the engine's thread and the template's process; requests that run get an error."""
        self.engine.close()
        self.prompts.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generation_prompt(self, prompt: AnyPrompt) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str) and not prompt.startswith("<bos>"):
            prompt = "<bos>" + prompt
        return self.prompts.raw(prompt)


def open_text(report: Report) -> tuple[Prompts, GenerationDefaults]:
    """What turns conversations into prompts for a checkpoint that loads, and its own defaults."""
    assert report.plan is not None
    folder, config = report.folder, report.plan.config
    gguf = report.checkpoint.gguf
    if gguf is None:
        prompts = Prompts(folder, config)
        return prompts, GenerationDefaults.open(folder, prompts.tokenizer)
    # One file says it all; others beside it are not looked at.
    prompts = Prompts(gguf.path, config, gguf.metadata)
    return prompts, GenerationDefaults.of_gguf(gguf.metadata, prompts.tokenizer)


def _read_text(
    report: Report,
    picture_tokens: int | None,
    prefill_chunk: int,
    fit: Callable[[int], CachePlan],
) -> _Text:
    prompts, generation = open_text(report)
    if picture_tokens is not None:
        prompts.limit_pictures(picture_tokens)
    # A picture that must stay whole may make a step longer than the chunk.
    step = max(prefill_chunk, prompts.longest_picture)
    return _Text(prompts, generation, step, fit(step))


def _source(model: str | Path | Source | None, weights_only: bool) -> Source:
    return model if isinstance(model, Source) else obtain(model, weights_only=weights_only)


def _plan_drafter(drafter: str | Path | Source, target: LoadPlan, weights_only: bool) -> LoadPlan:
    """How a drafter is loaded that guesses for `target`; read with it in mind, before any weight.

    Raises:
        UnreadableError, LoadError: it is no drafter that loads, or one of another model.
    """
    source = _source(drafter, weights_only)
    report = plan_checkpoint(source.path, weights_only=weights_only, source=source.shown)
    report.require_drafter()
    assert report.plan is not None
    try:
        return replace(report.plan, config=beside(report.plan.config, target.config))
    except LoadError as error:
        raise LoadError(f"{source.shown}: {error}") from None


def _load_drafter(plan: LoadPlan, numbers: _Numbers, progress: Progress | None) -> Drafter:
    kernels = Kernels(library(), numbers.activations)
    drafter, _ = _load(plan, numbers.compute, kernels, progress)
    assert isinstance(drafter, Drafter)
    return drafter


def _memory_for(plans: Sequence[LoadPlan], path: Path) -> int:
    """Bytes of this machine's memory, which hold the weights at the least.

    Raises:
        ResourceError: they do not.
    """
    memory = machine_memory()
    nbytes = sum(plan.nbytes for plan in plans)
    if nbytes > memory:
        raise ResourceError(
            f"the weights of {path} take {nbytes / 1e9:.2f} GB of memory, and there are"
            f" {memory / 1e9:.2f} GB in all"
        )
    return memory


def _draft_tokens(model: Gemma4, drafting: LoadPlan | None) -> int:
    """How many guesses are worth their price.

    Kernels that round activations compute every column by itself, so that a token's logits are the
    same to the bit with guesses beside it; PyTorch's sums depend on how many rows there are, so
    that there nothing is guessed unless somebody asks for it.
    """
    fast = model.model.language_model.together is not None
    return DRAFT_TOKENS if fast or drafting is not None else 0


def _or_error_of(other: Future[Any], progress: Progress | None) -> Progress:
    """`progress`; but an error of `other` ends the load, so that it costs no minute to find out."""

    def told(done: int, total: int) -> None:
        if other.done():
            other.result()
        if progress is not None:
            progress(done, total)

    return told


def _load(
    plan: LoadPlan, dtype: torch.dtype, kernels: Kernels, progress: Progress | None
) -> Loaded:
    """The model, its kernels chosen, said and joined."""
    try:
        loaded = execute(
            plan,
            dtype=dtype,
            progress=progress,
            look=looking(library()),
            prepare=kernels.for_weight,
        )
    except (MemoryError, RuntimeError) as error:  # torch has no class of its own for it
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise ResourceError(
                f"memory ran out while {plan.nbytes / 1e9:.2f} GB of weights were read;"
                " other processes, or a limit on this one, leave too little"
            ) from None
        raise
    level = logging.INFO if kernels.built else logging.WARNING
    logger.log(level, "%s", kernels.describe())
    logger.info("%s", fuse(loaded.model, library(), exact=kernels.activations == "float32"))
    enlarge(loaded.model, library())
    return loaded


def _check_options(choices: Mapping[str, str], sizes: Mapping[str, tuple[int | None, int]]) -> None:
    """Each of `choices` is one that there is, each of `sizes` at least so large if it is set."""
    for name, choice in choices.items():
        if choice not in _CHOICES[name]:
            expected = ", ".join(_CHOICES[name])
            raise CabochonError(f"{name} is {choice!r}, expected one of {expected}")
    for name, (size, least) in sizes.items():
        if size is not None and size < least:
            raise CabochonError(f"{name} is {size}, expected at least {least}")


def _as_list(prompts: AnyPrompt | Sequence[AnyPrompt]) -> list[AnyPrompt]:
    """Several prompts, also where one was given: text, a `Prompt`, or a row of token ids."""
    if isinstance(prompts, str | Prompt):
        return [prompts]
    many: list[Any] = list(prompts)
    row = bool(many) and not isinstance(many[0], str | Prompt) and np.ndim(many[0]) == 0
    return [many] if row else many
