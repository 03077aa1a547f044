"""What only somebody who reads along wants to see: every call of a client with its answer, and every message.

It is put in from outside for one replay, around the classes that see them pass. So it costs a campaign nothing, and the
run and its digest are the same with it and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from kvstore.raft import messages
from kvstore.raft.node import RaftNode
from kvstore.server.node import ServerNode
from tests.checkers.history import Entry
from tests.simulation.machine import MachineClock
from tests.simulation.story import Event

PrintLine = Callable[[str], None]


@contextmanager
def tapped(print_line: PrintLine, *, every_message: bool = False) -> Iterator[None]:
    """Print what clients were told; with `every_message` also what arrives at each node."""
    taps: list[tuple[Any, str, Callable[..., Callable[..., None]]]]
    taps = [(Entry, "ok", _answered), (Entry, "failed", _answered), (Entry, "unknown", _answered)]
    if every_message:
        taps += [(RaftNode, "received", _received), (ServerNode, "handle", _handled)]
    patches = [patch.object(owner, name, make(getattr(owner, name), print_line)) for owner, name, make in taps]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def _answered(end: Callable[..., None], print_line: PrintLine) -> Callable[..., None]:
    def ended(entry: Entry, *args: Any, **kwargs: Any) -> None:
        end(entry, *args, **kwargs)
        now_s = entry.history.now_s()
        worker = f"c{entry.worker // 1000}" if entry.worker >= 1000 else f"c{entry.worker}"
        # Without its own times: ours stands in front, and how long it took is what a reader looks for.
        what = str(entry).partition(": ")[2]
        _print(print_line, now_s, worker, what, took_s=round(now_s - entry.called_at_s, 4))

    return ended


def _received(receive: Callable[..., None], print_line: PrintLine) -> Callable[..., None]:
    def received(node: RaftNode, name: str, body: bytes) -> None:
        try:
            message: object = messages.decode(body)
        except messages.MalformedMessage as error:
            message = f"malformed: {error}"
        _print(print_line, _now_s(node._env.clock), node.config.name, "<-", sender=name, message=message)
        receive(node, name, body)

    return received


def _handled(handle: Callable[..., None], print_line: PrintLine) -> Callable[..., None]:
    def handled(node: ServerNode, frame: Any, *args: Any, **kwargs: Any) -> None:
        _print(print_line, _now_s(node._env.clock), node.options.name, "asked", frame=frame)
        handle(node, frame, *args, **kwargs)

    return handled


def _now_s(clock: Any) -> float:
    """By the world's clock, not by the machine's, which drifts."""
    assert isinstance(clock, MachineClock)
    return clock._time.now_s


def _print(print_line: PrintLine, now_s: float, who: str, what: str, **fields: Any) -> None:
    print_line(Event(0, now_s, who, what, fields).line())
