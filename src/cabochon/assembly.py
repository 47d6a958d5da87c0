"""From a plan to an engine: text, weights, kernels, a cache. Importing it imports torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Literal, NamedTuple

import torch

from cabochon.engine.cache import CachePlan
from cabochon.engine.defaults import GenerationDefaults
from cabochon.engine.engine import Engine
from cabochon.engine.grammar import Grammars
from cabochon.engine.runner import Runner
from cabochon.errors import ResourceError
from cabochon.gemma4.drafter import Drafter
from cabochon.gemma4.model import Gemma4
from cabochon.kernels.choose import Kernels
from cabochon.kernels.layers import fuse
from cabochon.kernels.library import Activations, library
from cabochon.load.certificate import Certificate
from cabochon.load.execute import Loaded, Progress, execute
from cabochon.load.findings import Finding
from cabochon.load.look import look
from cabochon.load.plan import LoadPlan
from cabochon.load.report import Report
from cabochon.options import Options
from cabochon.prompts import Prompts
from cabochon.survey import Survey, surveyed

logger = logging.getLogger(__name__)

DRAFT_TOKENS = 15  # with one that is certain fewer than attention computes in another order
# Of a drafter, where each token computed has experts of its own to be read: the fourth guess of a
# trained one is right too seldom to be worth them.
DRAFTED_FOR_EXPERTS = 3

_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
_KV_DTYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.int8}


class _Numbers(NamedTuple):
    """What is computed in, what keys and values are kept in, what inputs are rounded to."""

    compute: torch.dtype
    kept: torch.dtype
    activations: Activations

    @classmethod
    def of(cls, dtype: str, kv_dtype: str, activations: Activations | Literal["auto"]) -> _Numbers:
        """Exact where a `dtype` is named, fast where it is not; what is named for itself counts."""
        compute = _DTYPES[dtype]
        kept = _KV_DTYPES.get(kv_dtype, torch.float16 if dtype == "auto" else compute)
        if activations == "auto":
            activations = "int8" if dtype == "auto" else "float32"
        return cls(compute, kept, activations)


class Text(NamedTuple):
    """What needs a checkpoint's files, but no weights."""

    prompts: Prompts
    generation: GenerationDefaults
    longest_step: int  # tokens of one sequence computed at once
    cache: CachePlan


class _Aside:
    """Text, made in a thread when there is nothing else for Python to do."""

    def __init__(self, pool: ThreadPoolExecutor, make: Callable[[], Text]) -> None:
        self._pool = pool
        self._make = make
        self._made: Future[Text] | None = None

    def begin(self) -> None:
        self._made = self._made or self._pool.submit(self._make)

    def result(self) -> Text:
        self.begin()
        assert self._made is not None
        return self._made.result()

    def or_error(self, progress: Progress | None) -> Progress:
        """`progress`; but an error here ends the load, so that it costs no minute to find out."""

        def told(done: int, total: int) -> None:
            if self._made is not None and self._made.done():
                self._made.result()
            if progress is not None:
                progress(done, total)

        return told


class Assembled(NamedTuple):
    """What an `LLM` is made of."""

    text: Text
    certificate: Certificate
    notes: tuple[Finding, ...]  # on the weights, of a drafter too
    kernels: Kernels
    grammars: Grammars
    capacity: str
    runner: Runner
    engine: Engine


def assemble(
    report: Report,
    drafting: LoadPlan | None,
    options: Options,
    memory: int,
    survey: Survey | None,
    progress: Progress | None,
) -> Assembled:
    """Load what `report` and `drafting` plan into a machine of so many bytes of memory."""
    plan = report.plan
    assert plan is not None
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    numbers = _Numbers.of(options.dtype, options.kv_dtype, options.activations)
    config, batch, longest = plan.config.text, options.max_batch, options.max_context
    budget = options.kv_cache_bytes or memory // 8
    fit = partial(CachePlan.fit, config, numbers.kept, budget, batch, max_context=longest)
    kernels = _kernels(numbers, survey)
    with ThreadPoolExecutor(1) as pool:
        aside = _Aside(pool, partial(_read_text, report, options, fit))
        if survey is None:
            aside.begin()
        else:
            survey.backlog.when_waiting = aside.begin
        told = aside.or_error(progress)
        gemma, certificate = _load(plan, numbers.compute, kernels, survey, told)
        assert isinstance(gemma, Gemma4)
        text = aside.result()
    capacity = text.cache.describe(numbers.kept, asked=batch)
    logger.info("%s", capacity)
    runner = Runner(gemma, numbers.compute, torch.device("cpu"), numbers.kept)
    if options.debug_nan:
        runner.watch()
    tokenizer, generation = text.prompts.tokenizer, text.generation
    guessed, drafted = _guesses(gemma, drafting, options.draft_tokens)
    drafter, more = _load_drafter(drafting, numbers, options, progress)
    notes = (*certificate.notes, *more)
    engine = Engine(
        runner,
        text.cache,
        tokenizer,
        ends=generation.ends,
        suppressed=generation.suppressed,
        prefill_chunk=options.prefill_chunk,
        draft_tokens=guessed,
        drafter=drafter,
        drafted_tokens=drafted,
    )
    grammars = Grammars(tokenizer, config.vocab_size, generation.ends)
    return Assembled(text, certificate, notes, kernels, grammars, capacity, runner, engine)


def _kernels(numbers: _Numbers, survey: Survey | None) -> Kernels:
    return Kernels(library(), numbers.activations, None if survey is None else survey.backlog)


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


def _read_text(report: Report, options: Options, fit: Callable[[int], CachePlan]) -> Text:
    prompts, generation = open_text(report)
    if options.picture_tokens is not None:
        prompts.limit_pictures(options.picture_tokens)
    # A picture that must stay whole may make a step longer than the chunk.
    step = max(options.prefill_chunk, prompts.longest_picture)
    return Text(prompts, generation, step, fit(step))


def _load(
    plan: LoadPlan,
    dtype: torch.dtype,
    kernels: Kernels,
    survey: Survey | None,
    progress: Progress | None,
) -> Loaded:
    """The model, its kernels chosen, filled, said and joined."""
    try:
        loaded = execute(
            plan,
            dtype=dtype,
            progress=progress,
            look=survey or look,
            prepare=kernels.for_weight,
        )
        if survey is not None:
            survey.backlog.finish()
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
    kernels.enlarge()
    return loaded


def _load_drafter(
    plan: LoadPlan | None, numbers: _Numbers, options: Options, progress: Progress | None
) -> tuple[Drafter | None, tuple[Finding, ...]]:
    """The drafter that is planned, if one is, and what is noted of its weights."""
    if plan is None:
        return None, ()
    with surveyed(plan, options.threads) as survey:
        kernels = _kernels(numbers, survey)
        drafter, certificate = _load(plan, numbers.compute, kernels, survey, progress)
    assert isinstance(drafter, Drafter)
    return drafter, tuple(certificate.notes)


def _guesses(model: Gemma4, drafting: LoadPlan | None, asked: int | None) -> tuple[int, int]:
    """How many guesses are worth their price, if nobody asks, and how many of a drafter.

    Kernels that round activations compute every column by itself, so that a token's logits are the
    same to the bit with guesses beside it; PyTorch's sums depend on how many rows there are, so
    that there nothing is guessed unless somebody asks for it.
    """
    if asked is not None:
        return asked, asked
    fast = model.model.language_model.together is not None
    guessed = DRAFT_TOKENS if fast or drafting is not None else 0
    return guessed, DRAFTED_FOR_EXPERTS if model.config.text.experts else guessed
