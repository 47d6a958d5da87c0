"""`LLM`: a checkpoint, loaded and ready, as command line, server and Python callers share it.

What computes, and torch, are imported when a checkpoint is planned and compiled code reads its
bytes: to read them takes as long.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

from cabochon.checkpoint.source import Source
from cabochon.config import Gemma4Config
from cabochon.engine.defaults import GenerationDefaults
from cabochon.engine.grammar import Grammars
from cabochon.engine.request import Completion, Prompt, SamplingParams
from cabochon.errors import CabochonError, ResourceError
from cabochon.garbage import uncollected
from cabochon.gemma4.sounds import Wave
from cabochon.kernels.backlog import Backlog
from cabochon.kernels.library import Activations, library, threads_without_torch
from cabochon.load.forecast import machine_memory
from cabochon.load.obtain import obtain
from cabochon.load.plan import LoadPlan
from cabochon.load.report import Report, plan_checkpoint
from cabochon.load.survey import Survey
from cabochon.prompts import Message, Prompts

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.engine.cache import CachePlan
    from cabochon.engine.stream import Stream
    from cabochon.load.execute import Progress

AnyPrompt = str | Sequence[int] | Prompt
Dtype = Literal["auto", "float32", "bfloat16"]
KvDtype = Literal["auto", "float16", "float32", "int8"]

logger = logging.getLogger(__name__)

_CHOICES = {
    "dtype": get_args(Dtype),
    "activations": ("auto", *get_args(Activations)),
    "kv_dtype": get_args(KvDtype),
}


class _Text(NamedTuple):
    """What needs a checkpoint's files, but no weights."""

    prompts: Prompts
    generation: GenerationDefaults
    longest_step: int  # tokens of one sequence computed at once
    cache: CachePlan


class _Aside:
    """Text, made in a thread beside what compiled code does: Python works on one thing at a time."""

    def __init__(self, pool: ThreadPoolExecutor, make: Callable[[], _Text]) -> None:
        self._pool = pool
        self._make = make
        self._made: Future[_Text] | None = None

    def begin(self) -> None:
        self._made = self._made or self._pool.submit(self._make)

    def check(self) -> None:
        """Raise its error, if it has ended in one."""
        if self._made is not None and self._made.done():
            self._made.result()

    def result(self) -> _Text:
        self.begin()
        assert self._made is not None
        return self._made.result()


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
        draft_tokens: Tokens guessed from what a text repeats and checked in one step, among all
            requests; 0 for none. None is 15 where answers are the same to the bit, else 0.
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
        kv_dtype: KvDtype = "auto",
        threads: int | None = None,
        kv_cache_bytes: int | None = None,
        max_batch: int = 16,
        prefill_chunk: int = 512,
        max_context: int | None = None,
        picture_tokens: int | None = None,
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
        with uncollected(), ExitStack() as stack:
            source = model if isinstance(model, Source) else obtain(model, weights_only=weights_only)
            self.name = source.name
            self.report = plan_checkpoint(
                source.path, weights_only=weights_only, source=source.shown
            )
            plan = self.report.plan
            assert plan is not None
            self.config: Gemma4Config = plan.config
            memory = _memory_for(plan, source.path)
            backlog = survey = None
            if (compiled := library()) is not None:
                backlog = stack.enter_context(Backlog(compiled, threads or threads_without_torch()))
                survey = Survey(plan, backlog)
            from cabochon import ready  # torch, while the survey goes on

            if threads is not None:
                ready.compute_in(threads)
            numbers = ready.Numbers.of(dtype, kv_dtype, activations)
            fit = partial(
                ready.CachePlan.fit,
                self.config.text,
                numbers.kept,
                kv_cache_bytes or memory // 8,
                max_batch,
                max_context=max_context,
            )
            self.kernels = ready.Kernels(compiled, numbers.activations, backlog)
            text = _Aside(
                stack.enter_context(ThreadPoolExecutor(1)),
                partial(_read_text, self.report, picture_tokens, prefill_chunk, fit),
            )
            if backlog is None:
                text.begin()
            else:
                backlog.when_waiting = text.begin
            gemma, self.certificate = ready.load(
                plan,
                numbers.compute,
                self.kernels,
                survey=survey,
                backlog=backlog,
                progress=_or_error_of(text, progress),
            )
            self.prompts, generation, self._longest_step, pages = text.result()
        self.prefill_chunk = prefill_chunk
        self.defaults = generation.sampling
        vocab, tokenizer = self.config.text.vocab_size, self.prompts.tokenizer
        self.grammars = Grammars(tokenizer, vocab, generation.ends)
        self.max_context = pages.max_context
        self.capacity = pages.describe(numbers.kept, asked=max_batch)
        logger.info("%s", self.capacity)
        self.runner = ready.runner(gemma, numbers)
        if debug_nan:
            self.runner.watch()
        self.engine = ready.Engine(
            self.runner,
            pages,
            tokenizer,
            ends=generation.ends,
            suppressed=generation.suppressed,
            prefill_chunk=prefill_chunk,
            draft_tokens=ready.draft_tokens(gemma) if draft_tokens is None else draft_tokens,
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
        from cabochon.engine.stream import Stream

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
        from cabochon.engine.whole import every_logits

        if isinstance(prompt, Prompt):
            assert not any((images, sounds, videos))
            full = prompt
        else:
            full = self.prompts.raw(prompt, images, sounds, videos)
        return every_logits(
            self.runner, full, prefill_chunk=self.prefill_chunk, longest_step=self._longest_step
        )

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


def _memory_for(plan: LoadPlan, path: Path) -> int:
    """Bytes of this machine's memory, which hold the weights at the least.

    Raises:
        ResourceError: they do not.
    """
    memory = machine_memory()
    if plan.nbytes > memory:
        raise ResourceError(
            f"the weights of {path} take {plan.nbytes / 1e9:.2f} GB of memory, and there are"
            f" {memory / 1e9:.2f} GB in all"
        )
    return memory


def _or_error_of(text: _Aside, progress: Progress | None) -> Progress:
    """`progress`; but an error of `text` ends the load, so that it costs no minute to find out."""

    def told(done: int, total: int) -> None:
        text.check()
        if progress is not None:
            progress(done, total)

    return told


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
