"""An asyncio event loop in virtual time, as far as a node's and a client's coroutines need one.

It owns no queue: every callback goes to a `post` function, so that each process may have a loop of its own (whose
callbacks die with it) on one `VirtualTime`. Sockets, threads, signals and subprocesses are not there: whoever asks for
one gets NotImplementedError from the base class.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Cancellable(Protocol):
    def cancel(self) -> object: ...


# Runs a callback after a delay in seconds.
Post = Callable[..., Cancellable]


class VirtualLoop(asyncio.AbstractEventLoop):
    """`post(delay_s, callback, *args)` runs a callback later; `now_s()` is this loop's clock; `failed(context)` hears
    of exceptions that nobody else will."""

    def __init__(self, post: Post, now_s: Callable[[], float], failed: Callable[[dict[str, Any]], None]) -> None:
        self._post = post
        self._failed = failed
        self.time = now_s  # type: ignore[method-assign]  # called for every deadline: one call less

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:
        return self._post(0.0, callback, *args)

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        return self._post(max(0.0, delay), callback, *args)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:
        return self._post(max(0.0, when - self.time()), callback, *args)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[T]:
        return asyncio.Task(coro, loop=self, name=name)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self._failed(context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False
