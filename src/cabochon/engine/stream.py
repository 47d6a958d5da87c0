"""One request as an iterator, for callers that wait in a thread of their own."""

from __future__ import annotations

import queue

from cabochon.engine.engine import Engine
from cabochon.engine.request import Completion, Delta, Prompt, SamplingParams


class Stream:
    """Submits at once; yields deltas as they come; `close` cancels what has not ended.

    Raises:
        RequestError: on construction, if the engine refuses the request.
        CabochonError: while iterating, if the request fails.
    """

    def __init__(self, engine: Engine, prompt: Prompt, params: SamplingParams) -> None:
        self.prompt = prompt
        self._engine = engine
        self._deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._ended = False
        self._number = engine.submit(prompt, params, self._deltas.put)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Delta:
        if self._ended:
            raise StopIteration
        delta = self._deltas.get()
        self._ended = delta.last
        if delta.error is not None:
            raise delta.error
        return delta

    def collect(self) -> Completion:
        """The whole answer."""
        deltas = list(self)
        reason = deltas[-1].finish_reason
        assert reason is not None
        text = "".join(delta.text for delta in deltas)
        tokens = tuple(token for delta in deltas for token in delta.tokens)
        reasoning = "".join(delta.reasoning for delta in deltas)
        calls = tuple(call for delta in deltas for call in delta.calls)
        return Completion(text, tokens, reason, len(self.prompt.tokens), reasoning, calls)

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._engine.cancel(self._number)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
