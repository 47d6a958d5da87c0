"""Two runs side by side: each halts behind every module, so that little of either is in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from cabochon.nn.weight import Weight


@dataclass(slots=True)
class Call:
    """A call of a module. The run goes on with `instead` in place of the output, if it is set."""

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    output: Any
    instead: Any = None


class Pair(NamedTuple):
    """The calls of one name in two runs; None where only the other has it."""

    name: str
    expected: Call | None
    found: Call | None


class _Left(BaseException):
    """Nobody wants to know how the run goes on."""


class Halting:
    """A run of `work` that halts behind every call of a module of `model`.

    It has a thread of its own: nothing else in Python halts in the middle of a call. Outside a
    `with` it has no end.

    Attributes:
        result: what `work` returned.
    """

    result: Any

    def __init__(self, model: nn.Module, work: Callable[[], Any]) -> None:
        self._work = work
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._on: SimpleQueue[bool] = SimpleQueue()
        self._error: BaseException | None = None
        self._ended = False
        self._thread = Thread(target=self._run, daemon=True)
        self._hooks = [
            module.register_forward_hook(self._halt(name))
            for name, module in model.named_modules()
            if name and not isinstance(module, Weight)  # which is no module to a user
        ]

    def next(self) -> Call | None:
        """Lets the run go on to the end of the next call; None when it has ended."""
        if self._ended:
            return None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._on.put(True)
        call = self._calls.get()
        self._ended = call is None
        if self._error is not None:
            raise self._error
        return call

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._on.put(False)
        if self._thread.ident is not None:
            self._thread.join()
        for hook in self._hooks:
            hook.remove()

    def _halt(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def halt(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if current_thread() is not self._thread:
                return None  # somebody looks into what the run is made of
            call = Call(name, module, inputs, output)
            self._calls.put(call)
            if not self._on.get():
                raise _Left
            return call.instead

        return halt

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self.result = self._work()
        except _Left:
            pass
        except BaseException as error:
            self._error = error
        self._calls.put(None)


def paired(
    first: Halting, second: Halting, known: Container[str], alike: Callable[[Call], Call]
) -> Iterator[Pair]:
    """The calls of both runs by their names, in the order of `second`.

    The two need not call the modules inside of one in the same order.

    Args:
        first, second: the original, and what is judged by it.
        known: the modules of `second`; calls of others are no business of anybody.
        alike: puts a call of `first` as `second` would have it.
    """
    early: dict[str, deque[Call]] = {}
    while (found := second.next()) is not None:
        yield Pair(found.name, _counterpart(first, found.name, early, known, alike), found)
        inside = f"{found.name}."
        for name in [name for name in early if name.startswith(inside)]:
            yield from (Pair(name, call, None) for call in early.pop(name))
    while first.next() is not None:
        pass


def _counterpart(
    first: Halting,
    name: str,
    early: dict[str, deque[Call]],
    known: Container[str],
    alike: Callable[[Call], Call],
) -> Call | None:
    """The call of `name`, unless the module around it has come to its end without one."""
    if early.get(name):
        return early[name].popleft()
    if any(name.startswith(f"{around}.") for around, calls in early.items() if calls):
        return None
    while (call := first.next()) is not None:
        call = alike(call)
        if call.name == name:
            return call
        if call.name in known:
            early.setdefault(call.name, deque()).append(_kept(call))
        if name.startswith(f"{call.name}."):
            return None
    return None


def _kept(call: Call) -> Call:
    """`call` with an output of its own: who made it may go on in place."""
    output = call.output
    if isinstance(output, tuple):
        return replace(call, output=tuple(part.clone() for part in output))
    return replace(call, output=output.clone() if isinstance(output, Tensor) else output)
