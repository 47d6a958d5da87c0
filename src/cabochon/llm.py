"""`LLM`: a checkpoint, loaded and ready, as command line, server and Python callers share it.

What computes, and torch, are imported when a checkpoint is planned and compiled code reads its
bytes: to read them takes as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cabochon.checkpoint.source import Source
from cabochon.config import Gemma4Config, beside
from cabochon.errors import CabochonError, MismatchError, ResourceError
from cabochon.garbage import uncollected
from cabochon.kernels.library import Activations
from cabochon.linking import link_torch
from cabochon.load.forecast import machine_memory
from cabochon.load.obtain import obtain
from cabochon.load.plan import LoadPlan
from cabochon.load.report import Report, plan_checkpoint
from cabochon.options import Dtype, KvDtype, Options
from cabochon.survey import surveyed

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from cabochon.engine.request import Completion, Prompt, SamplingParams
    from cabochon.engine.stream import Stream
    from cabochon.gemma4.sounds import Wave
    from cabochon.load.execute import Progress
    from cabochon.prompts import AnyPrompt, Message


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
        kv_dtype: KvDtype = "auto",
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
        options = Options(
            dtype=dtype,
            activations=activations,
            kv_dtype=kv_dtype,
            threads=threads,
            kv_cache_bytes=kv_cache_bytes,
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
            max_context=max_context,
            picture_tokens=picture_tokens,
            draft_tokens=draft_tokens,
            debug_nan=debug_nan,
        )
        if drafter is not None and draft_tokens == 0:
            raise CabochonError("draft_tokens is 0, so that the drafter guesses nothing: name one")
        with uncollected():
            source = _source(model, weights_only)
            self.name = source.name
            link_torch()
            self.report = plan_checkpoint(
                source.path, weights_only=weights_only, source=source.shown
            )
            self.report.require_model()
            plan = self.report.plan
            assert plan is not None
            self.config: Gemma4Config = plan.config
            self.drafter = None if drafter is None else _drafter(drafter, plan, weights_only)
            drafting = self.drafter.plan if self.drafter else None
            memory = _memory_for([plan, *([drafting] if drafting else [])], source.path)
            with surveyed(plan, threads) as survey:
                from cabochon.assembly import assemble

                made = assemble(self.report, drafting, options, memory, survey, progress)
        self.prefill_chunk = prefill_chunk
        self.certificate = made.certificate
        self.notes = made.notes
        self.kernels = made.kernels
        self.prompts = made.text.prompts
        self.defaults = made.text.generation.sampling
        self.grammars = made.grammars
        self.max_context = made.text.cache.max_context
        self.capacity = made.capacity
        self.runner = made.runner
        self.engine = made.engine
        self._longest_step = made.text.longest_step

    def told(self) -> str:
        """What was loaded and how, for people."""
        drafter = [self.drafter.text()] if self.drafter else []
        return "\n\n".join((self.report.text(), self.certificate.text(), *drafter))

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
        many = self.prompts.complete(prompts)
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


def _source(model: str | Path | Source | None, weights_only: bool) -> Source:
    return model if isinstance(model, Source) else obtain(model, weights_only=weights_only)


def _drafter(drafter: str | Path | Source, target: LoadPlan, weights_only: bool) -> Report:
    """The report on a drafter, whose plan is for guessing for `target`; made before any weight.

    Raises:
        UnreadableError, LoadError: it is no drafter that loads, or one of another model.
    """
    source = _source(drafter, weights_only)
    report = plan_checkpoint(source.path, weights_only=weights_only, source=source.shown)
    report.require_drafter()
    assert report.plan is not None
    try:
        config = beside(report.plan.config, target.config)
        return replace(report, plan=replace(report.plan, config=config))
    except MismatchError as error:
        raise MismatchError(f"{source.shown}: {error}") from None


def _memory_for(plans: Sequence[LoadPlan], path: Path) -> int:
    """Bytes of this machine's memory, which hold the weights at the least.

    Raises:
        ResourceError: they do not.
    """
    memory = machine_memory()
    nbytes = sum(plan.nbytes for plan in plans)
    if nbytes > memory:
        both = " and its drafter" if len(plans) > 1 else ""
        raise ResourceError(
            f"the weights of {path}{both} take {nbytes / 1e9:.2f} GB of memory, and there are"
            f" {memory / 1e9:.2f} GB in all"
        )
    return memory
