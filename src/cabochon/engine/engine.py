"""The engine: one thread that steps, an inbox in front of it, and a sink behind each request."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count

import torch
from torch import Tensor

from cabochon.engine.cache import CachePlan, PagedCache
from cabochon.engine.drafts import Drafts
from cabochon.engine.guesses import Guesser
from cabochon.engine.guide import Guide
from cabochon.engine.prediction import Prediction, Whole
from cabochon.engine.reader import Reader
from cabochon.engine.request import Delta, Prompt, SamplingParams, TokenLogprob
from cabochon.engine.runner import Runner, new_sequence
from cabochon.engine.sampler import Sampling, logprob
from cabochon.engine.scheduler import Scheduled, Scheduler, TokenSequence
from cabochon.engine.stats import Stats
from cabochon.engine.work import Limits, Sink, Work
from cabochon.errors import (
    CabochonError,
    DeadlineError,
    FaultError,
    NumericalError,
    RequestError,
)
from cabochon.gemma4.drafter import Drafter
from cabochon.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Engine:
    """Runs requests together. Every method may be called from any thread.

    Sinks are called from the engine's own thread and must not block it.
    """

    def __init__(
        self,
        runner: Runner,
        plan: CachePlan,
        tokenizer: Tokenizer,
        *,
        ends: frozenset[int],
        suppressed: Sequence[int] = (),
        prefill_chunk: int,
        draft_tokens: int = 0,
        drafter: Drafter | None = None,
        drafted_tokens: int | None = None,
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.ends = ends
        # A tokenizer may know tokens that the model has no logits of.
        vocab = runner.model.config.text.vocab_size
        self.suppressed = [token for token in suppressed if token < vocab]
        self.max_context = plan.max_context
        self.cache = PagedCache(plan, runner.kv_dtype, runner.device)
        drafts = Drafts(drafter, runner, self.cache) if drafter else None
        guesser = Guesser(draft_tokens, drafts, drafted_tokens)
        self.scheduler = Scheduler(self.cache, prefill_chunk, guesser)
        self.limits = Limits()
        self.stats = Stats()
        self._waiting_tokens = 0  # of what the scheduler holds
        self._requests: dict[int, Work] = {}
        self._by_sequence: dict[TokenSequence, int] = {}
        self._ids = count()
        self._inbox: list[tuple[int, Work | None]] = []  # None: cancel
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="cabochon-engine", daemon=True)
        self._thread.start()
        # A thread that is inside torch when the interpreter goes away takes the process with it.
        atexit.register(self.close)

    def submit(
        self, prompt: Prompt, params: SamplingParams, on_delta: Sink, *, salt: bytes = b""
    ) -> int:
        """Enqueue a request and return its number. Its last delta says how it ended.

        What it has in common with an earlier request of the same `salt` is not computed again.

        Raises:
            RequestError: the prompt is empty, does not fit the context, or has pictures that this
                model cannot see.
            BusyError: too many tokens wait already.
        """
        request = self._request(prompt, params, on_delta)
        request.sequence.salt = salt
        number = next(self._ids)
        self._put(number, request)
        return number

    def cancel(self, number: int) -> None:
        """Forget a request. No delta follows, but for one that may be under way."""
        with self._wake:
            self._inbox.append((number, None))
            self._wake.notify()

    def close(self) -> None:
        """End the thread, from another one; requests that still run get an error."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        atexit.unregister(self.close)

    @property
    def alive(self) -> bool:
        """Whether requests are still worked on."""
        return self._thread.is_alive()

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        with self._wake:
            arriving = sum(request is not None for _, request in self._inbox)
            return arriving + len(self._requests)

    @property
    def running(self) -> int:
        """Requests that hold pages."""
        return len(self.scheduler.running)

    def _request(self, prompt: Prompt, params: SamplingParams, sink: Sink) -> Work:
        length = len(prompt.tokens)
        if length >= self.max_context:
            raise RequestError(
                f"the prompt has {length:,} tokens, but the context holds {self.max_context:,}"
                " with the answer: shorten it, or serve with a larger kv_cache_bytes",
                "messages",
            )
        sequence = new_sequence(self.runner.model, prompt, self.cache)
        sequence.scored = params.prompt_logprobs is not None
        vocab = self.runner.model.config.text.vocab_size
        most = self.max_context - length
        sequence.limit = length + min(params.max_tokens or most, most)
        work = Work(
            sequence=sequence,
            params=params,
            sink=sink,
            sampling=Sampling(params, prompt.tokens, vocab),
            reader=Reader(self.tokenizer, prompt, params.stops),
            guide=Guide(params.rules, self.ends, vocab) if params.rules else None,
            prompt_length=length,
        )
        sequence.guesses.forced = work.forced
        return work

    def _put(self, number: int, request: Work) -> None:
        with self._wake:
            if self._closed or not self._thread.is_alive():
                raise CabochonError("the engine is closed")
            arriving = sum(r.prompt_length for _, r in self._inbox if r is not None)
            waiting, rate = self._waiting_tokens + arriving, self.stats.tokens_per_second
            self.limits.check_room(request.prompt_length, waiting, rate)
            self._inbox.append((number, request))
            self._wake.notify()

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                self._serve()
        except BaseException:  # a panic in a library's Rust code is no Exception
            logger.critical("the engine has stopped", exc_info=True)
            self._abandon()

    def _abandon(self) -> None:
        """Tell everybody who waits that no answer will come; the server's health tells others."""
        with self._wake:
            self._closed = True
            arriving = [request for _, request in self._inbox if request is not None]
        for request in [*self._requests.values(), *arriving]:
            with suppress(Exception):
                request.sink(Delta(error=FaultError("the engine has stopped")))

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._inbox or self._requests or self._closed)
                inbox, self._inbox = self._inbox, []
                for number, request in inbox:
                    self._accept(number, request)
                self._count_waiting()
                if self._closed:
                    break
            self._end_overdue()
            self._step_safely()
        for number in list(self._requests):
            self._fail(
                number, CabochonError("the engine was closed before the answer was complete")
            )

    def _accept(self, number: int, request: Work | None) -> None:
        if request is not None:
            self._requests[number] = request
            self._by_sequence[request.sequence] = number
            self.scheduler.add(request.sequence)
        elif number in self._requests:
            self._end(number, "abort")

    def _count_waiting(self) -> None:
        self._waiting_tokens = sum(len(s.tokens) for s in self.scheduler.waiting)

    def _end_overdue(self) -> None:
        seconds = self.limits.seconds
        if seconds is None:
            return
        now = time.monotonic()
        for number in [
            n for n, r in self._requests.items() if now - r.timeline.submitted > seconds
        ]:
            self._fail(number, DeadlineError(f"the answer took longer than {seconds:g} seconds"))

    def _step_safely(self) -> None:
        """One step. If the engine itself fails, so do its requests; it goes on with the next."""
        try:
            self._step()
        except Exception as error:
            logger.exception("the engine failed")
            for number in list(self._requests):
                self._fail(number, _internal(error))

    def _step(self) -> None:
        begun = time.monotonic()
        step = self.scheduler.schedule()
        self._count_waiting()
        step = self._encode(step)
        for scheduled in step:
            request = self._requests[self._by_sequence[scheduled.sequence]]
            self.stats.start(request.timeline, begun)
        for part, hidden in self._compute(step):
            sizes = [s.chunk.stop - s.chunk.start for s in part]
            decoding = [s.chunk.start >= self._prompt_length(s) for s in part]
            prefill = sum(n for n, past in zip(sizes, decoding, strict=True) if not past)
            self.stats.step(prefill, sum(decoding), sum(sizes))
            self._read(part, hidden)
        self.stats.busy_seconds += time.monotonic() - begun

    def _prompt_length(self, scheduled: Scheduled) -> int:
        return self._requests[self._by_sequence[scheduled.sequence]].prompt_length

    def _compute(self, step: list[Scheduled]) -> Iterator[tuple[list[Scheduled], Tensor]]:
        """What the step's logits are made of; if it fails, each sequence is tried alone.

        So only the culprit ends.

        What a step has written before it failed is written once more: it has moved nobody on.
        """
        try:
            if step:
                yield step, self.runner.run(self.cache, step)
            return
        except Exception as error:
            if len(step) == 1:
                logger.exception("a step of one request failed")
                self._fail(self._by_sequence[step[0].sequence], _internal(error))
                return
            logger.exception("a step of %d requests failed; each is tried alone", len(step))
        for scheduled in step:
            yield from self._compute([scheduled])

    def _encode(self, step: Sequence[Scheduled]) -> list[Scheduled]:
        """Encode the media that chunks reach; a sequence with one that cannot be fails alone."""
        ready = []
        for scheduled in step:
            try:
                self.runner.encode(scheduled)
                ready.append(scheduled)
            except Exception as error:
                logger.exception("a picture or sound could not be encoded")
                self._fail(self._by_sequence[scheduled.sequence], _internal(error))
        return ready

    def _read(self, part: Sequence[Scheduled], hidden: Tensor) -> None:
        """Score prompts by their rows, and draw the next tokens of what is complete."""
        works = [self._requests[self._by_sequence[s.sequence]] for s in part]
        few = [w.few for w, s in zip(works, part, strict=True) for _ in range(s.rows)]
        try:
            predictions = self.runner.predict(hidden, few)
        except Exception as error:
            self._read_alone(part, hidden, error)
            return
        last = 0
        for work, scheduled in zip(works, part, strict=True):
            first, last = last, last + scheduled.rows
            if scheduled.sequence.scored:
                self._score(work, scheduled, predictions[first:last])
            if scheduled.complete:
                drawing = slice(last - 1 - len(scheduled.sequence.guesses.tokens), last)
                self._draw(scheduled, predictions[drawing], hidden[drawing])

    def _read_alone(self, part: Sequence[Scheduled], hidden: Tensor, error: Exception) -> None:
        """What failed for all of them, for each: only the culprit ends."""
        if len(part) == 1:
            logger.exception("what one request says next could not be computed")
            self._fail(self._by_sequence[part[0].sequence], _internal(error))
            return
        logger.exception("what %d requests say next failed; each is tried alone", len(part))
        last = 0
        for scheduled in part:
            first, last = last, last + scheduled.rows
            self._read([scheduled], hidden[first:last])

    def _score(self, request: Work, scheduled: Scheduled, rows: Sequence[Prediction]) -> None:
        """Tell the probabilities of the prompt's tokens, each by the row before it."""
        tokens, asked = request.sequence.tokens, request.params.prompt_logprobs
        assert asked is not None
        for position, row in enumerate(rows, scheduled.chunk.start):
            assert isinstance(row, Whole)
            # A sequence that was put off computes some of its prompt again.
            if position == len(request.scores) and position + 1 < len(tokens):
                request.scores.append(logprob(row.logits, tokens[position + 1], asked))
        if scheduled.complete:
            request.sequence.scored = False

    def _draw(self, scheduled: Scheduled, rows: Sequence[Prediction], hidden: Tensor) -> None:
        """Draw the next token, and those behind it for as long as they are what was guessed.

        What goes wrong in a row ends its request alone.
        """
        sequence = scheduled.sequence
        number, guesses = self._by_sequence[sequence], sequence.guesses.tokens
        right = 0
        for row, guess in zip(rows, [*guesses, None], strict=True):
            token = self._draw_one(number, scheduled, row)
            if token != guess or number not in self._requests:
                break
            right += 1
            sequence.computed += 1
        self.stats.judged(len(guesses), right)
        sequence.guesses.judge(right)
        sequence.guesses.state = hidden[right]

    def _draw_one(self, number: int, scheduled: Scheduled, row: Prediction) -> int | None:
        """The token that a row gives a request; None if that fails."""
        try:
            if not row.finite:
                raise self._not_finite(scheduled)
            token, logprobs = self._requests[number].draw(row, self.suppressed)
        except CabochonError as error:
            self._fail(number, error)
        except Exception as error:
            logger.exception("a token could not be drawn")
            self._fail(number, _internal(error))
        else:
            self._advance(number, token, logprobs)
            return token
        return None

    def _not_finite(self, scheduled: Scheduled) -> NumericalError:
        """What to say of logits that are no numbers; nobody else begins with their pages."""
        self.cache.forget(scheduled.sequence.table)
        source = self.runner.not_finite()
        where = f"; the output of {source} is the first that is not" if source else ""
        return NumericalError(f"the model's logits are not finite for this prompt{where}")

    def _advance(self, number: int, token: int, logprobs: tuple[TokenLogprob, ...]) -> None:
        """Give `token` to a request: text to its sink, and its end if this was the last."""
        request = self._requests[number]
        request.sequence.tokens.append(token)
        request.sampling.observe(token)
        self.stats.token(request.timeline, time.monotonic())
        reads, reason = request.take(token, self.ends)
        if reason:
            self._end(number, reason)
        self._emit(request, request.delta(token, reads, reason, logprobs))

    def _fail(self, number: int, error: CabochonError) -> None:
        request = self._requests[number]
        self._end(number, "error")
        self._emit(request, Delta(error=error))

    def _end(self, number: int, reason: str) -> None:
        """Forget a request, and free its pages."""
        request = self._requests.pop(number)
        del self._by_sequence[request.sequence]
        self.scheduler.remove(request.sequence)
        self.stats.end(request.timeline, reason, request.prompt_length)

    def _emit(self, request: Work, delta: Delta) -> None:
        try:
            request.sink(delta)
        except Exception:  # a client's sink must not take the engine with it
            logger.exception("the sink of a request raised; the request is given up")
            if request.sequence in self._by_sequence:
                self._end(self._by_sequence[request.sequence], "abort")


def _internal(error: Exception) -> FaultError:
    return FaultError(f"the engine failed at this request: {type(error).__name__}: {error}")
