"""The engine: one thread that steps, an inbox in front of it, and a sink behind each request."""

from __future__ import annotations

import atexit
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from cabochon.engine.cache import CachePlan, PagedCache
from cabochon.engine.request import Delta, FinishReason, Prompt, SamplingParams
from cabochon.engine.runner import Runner, new_sequence
from cabochon.engine.sampler import Sampling, sample
from cabochon.engine.scheduler import Scheduled, Scheduler, TokenSequence
from cabochon.errors import CabochonError, RequestError
from cabochon.text.detokenizer import Detokenizer, StopStrings
from cabochon.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Sink = Callable[[Delta], None]


@dataclass(slots=True, eq=False)
class _Request:
    """What the engine knows of a request beside its tokens."""

    sequence: TokenSequence
    params: SamplingParams
    sink: Sink
    sampling: Sampling
    text: Detokenizer
    stops: StopStrings
    limit: int  # length of prompt and answer at which it ends

    def finish_reason(self, token: int, ends: frozenset[int]) -> FinishReason | None:
        if token in self.params.stop_token_ids or (token in ends and not self.params.ignore_eos):
            return "stop"
        return "length" if len(self.sequence.tokens) >= self.limit else None

    def read(self, token: int) -> tuple[str, bool]:
        """Text that `token` made certain, and whether a stop string ended it."""
        return self.stops.push(self.text.push(token))

    def rest(self) -> str:
        """What was held back, at the end of an answer."""
        text, stopped = self.stops.push(self.text.flush())
        return text if stopped else text + self.stops.flush()


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
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.ends = ends
        self.suppressed = list(suppressed)
        self.max_context = plan.max_context
        self.cache = PagedCache(plan, runner.dtype, runner.device)
        self.scheduler = Scheduler(self.cache, prefill_chunk)
        self._requests: dict[int, _Request] = {}
        self._by_sequence: dict[TokenSequence, int] = {}
        self._ids = count()
        self._inbox: list[tuple[int, _Request | None]] = []  # None: cancel
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="cabochon-engine", daemon=True)
        self._thread.start()
        # A thread that is inside torch when the interpreter goes away takes the process with it.
        atexit.register(self.close)

    def submit(self, prompt: Prompt, params: SamplingParams, on_delta: Sink) -> int:
        """Enqueue a request and return its number. Its last delta says how it ended.

        Raises:
            RequestError: the prompt is empty, does not fit the context, or has pictures that this
                model cannot see.
        """
        request = self._request(prompt, params, on_delta)
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

    def _request(self, prompt: Prompt, params: SamplingParams, sink: Sink) -> _Request:
        sequence = new_sequence(self.runner.model, prompt, self.cache)
        length = len(prompt.tokens)
        if length >= self.max_context:
            raise RequestError(
                f"the prompt has {length:,} tokens, but the context holds {self.max_context:,}"
                " with the answer: shorten it, or serve with a larger kv_cache_bytes",
                "messages",
            )
        vocab = self.runner.model.config.text.vocab_size
        most = self.max_context - length
        return _Request(
            sequence=sequence,
            params=params,
            sink=sink,
            sampling=Sampling(params, prompt.tokens, vocab),
            text=Detokenizer(self.tokenizer),
            stops=StopStrings(params.stops),
            limit=length + min(params.max_tokens or most, most),
        )

    def _put(self, number: int, request: _Request) -> None:
        with self._wake:
            if self._closed or not self._thread.is_alive():
                raise CabochonError("the engine is closed")
            self._inbox.append((number, request))
            self._wake.notify()

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._inbox or self._requests or self._closed)
                inbox, self._inbox = self._inbox, []
                for number, request in inbox:
                    self._accept(number, request)
                if self._closed:
                    break
            self._step_safely()
        for number in list(self._requests):
            self._fail(
                number, CabochonError("the engine was closed before the answer was complete")
            )

    def _accept(self, number: int, request: _Request | None) -> None:
        if request is not None:
            self._requests[number] = request
            self._by_sequence[request.sequence] = number
            self.scheduler.add(request.sequence)
        elif number in self._requests:
            self._forget(number)

    def _step_safely(self) -> None:
        """One step. If the engine itself fails, so do its requests; it goes on with the next."""
        try:
            self._step()
        except Exception as error:
            logger.exception("the engine failed")
            for number in list(self._requests):
                self._fail(number, _internal(error))

    def _step(self) -> None:
        step = self._encode(self.scheduler.schedule())
        if not step:
            return
        try:
            logits = self.runner.run(self.cache, step)
        except Exception as error:  # whatever it is, the engine goes on with the other requests
            logger.exception("a step failed")
            for scheduled in step:
                self._fail(self._by_sequence[scheduled.sequence], _internal(error))
            return
        self._sample([s for s in step if s.complete], logits)

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

    def _sample(self, complete: Sequence[Scheduled], logits: Tensor) -> None:
        """Draw the next token of each sequence; what goes wrong in a row ends its request alone."""
        finite = logits.sum(dim=-1).isfinite().tolist()  # one that is no number makes the sum so
        with torch.inference_mode():
            logits[:, self.suppressed] = -math.inf
        numbers = [self._by_sequence[s.sequence] for s in complete]
        for number, row, fine in zip(numbers, logits, finite, strict=True):
            try:
                if not fine:
                    raise CabochonError("the model's logits are not finite for this prompt")
                token = sample(row[None], [self._requests[number].sampling])[0]
            except CabochonError as error:
                self._fail(number, error)
            except Exception as error:
                logger.exception("a token could not be drawn")
                self._fail(number, _internal(error))
            else:
                self._advance(number, token)

    def _advance(self, number: int, token: int) -> None:
        """Give `token` to a request: text to its sink, and its end if this was the last."""
        request = self._requests[number]
        request.sequence.tokens.append(token)
        request.sampling.observe(token)
        reason = request.finish_reason(token, self.ends)
        text, stopped = ("", False) if reason == "stop" else request.read(token)
        if stopped:
            reason = "stop"
        elif reason:
            text += request.rest()
        if reason:
            self._forget(number)
        self._emit(request, Delta((token,), text, reason))

    def _fail(self, number: int, error: CabochonError) -> None:
        request = self._requests[number]
        self._forget(number)
        self._emit(request, Delta(error=error))

    def _forget(self, number: int) -> None:
        request = self._requests.pop(number)
        del self._by_sequence[request.sequence]
        self.scheduler.remove(request.sequence)

    def _emit(self, request: _Request, delta: Delta) -> None:
        try:
            request.sink(delta)
        except Exception:  # a client's sink must not take the engine with it
            logger.exception("the sink of a request raised; the request is given up")
            if request.sequence in self._by_sequence:
                self._forget(self._by_sequence[request.sequence])


def _internal(error: Exception) -> CabochonError:
    return CabochonError(f"the engine failed at this request: {type(error).__name__}: {error}")
