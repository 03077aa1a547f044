"""What happened in a run, told as it happens: who, when, what.

`Story.tell` is called for every event worth a line, thousands of times a run, and mostly nobody reads along. So it only
keeps: each event goes into the digest at once (two runs of one seed tell the same), and is made a line of text when
somebody wants one. Hence the one rule for tellers: **plain values only** (str, int, float, bool, None, bytes, and lists
or dicts of them that nobody changes afterwards). Anything else is told as its `str`, which must not hold an address in
memory, nor a set, whose order means nothing.

The last events of each teller are kept for the story of a violation. What only a reader wants (each call, each message)
is not told here but shown by `tap.py`, so the digest of a run does not depend on who reads along.

`tell` takes 0.6 µs where nobody reads along:
`python -m timeit -s 'from tests.simulation.story import Story; s = Story(lambda: 1.0)' 's.tell("n1", "up", term=7)'`.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec

# Enough to see an election and what led to it, and little enough to read.
EVENTS_PER_TELLER = 25
# What waits to be hashed: large enough that hashing is cheap per event.
BUFFER_BYTES = 64 * 1024
# A value longer than this says no more to a reader: room for the names of all kinds of fault.
VALUE_MAX = 400


class Event(NamedTuple):
    number: int
    at_s: float
    who: str
    what: str
    fields: dict[str, Any]

    def line(self) -> str:
        """One line of the story, at most a screen wide or two."""
        told = "".join(f"  {name}={_shown(value)}" for name, value in self.fields.items())
        return f"{self.at_s:9.4f}  {self.who:<9} {self.what}{told}"


class Story:
    """`now_s` is virtual time. `print_line` hears every line as it happens."""

    def __init__(self, now_s: Callable[[], float], print_line: Callable[[str], None] | None = None) -> None:
        self._now_s = now_s
        self._print_line = print_line
        self._hash = hashlib.blake2b(digest_size=16)
        self._buffer = bytearray()
        self._encode_into = msgspec.msgpack.Encoder(enc_hook=_plain).encode_into
        self._last: dict[str, deque[Event]] = {}
        self._count = 0

    def tell(self, who: str, what: str, /, **fields: Any) -> None:
        """`who` is a node, a client, `faults`, `operator`, `world` or `checks`."""
        self._count = count = self._count + 1
        event = _event((count, self._now_s(), who, what, fields))
        buffer = self._buffer
        self._encode_into(event, buffer, -1)
        if len(buffer) > BUFFER_BYTES:
            self._hash.update(buffer)
            buffer.clear()
        try:
            self._last[who].append(event)
        except KeyError:
            self._last[who] = deque((event,), maxlen=EVENTS_PER_TELLER)
        if self._print_line is not None:
            self._print_line(event.line())

    @property
    def count(self) -> int:
        """How many events were told."""
        return self._count

    def digest(self) -> str:
        """Of everything told so far."""
        self._hash.update(self._buffer)
        self._buffer.clear()
        return self._hash.hexdigest()

    def last(self, who: str, limit: int = EVENTS_PER_TELLER) -> list[Event]:
        """The last events that this one told, oldest first."""
        return list(self._last.get(who, ()))[-limit:]

    @property
    def tellers(self) -> list[str]:
        """Who told something, in the order of their first words."""
        return list(self._last)

    def tail(self, lines: int = 60) -> str:
        """The last lines of everybody, in the order in which they were told."""
        return "\n".join(event.line() for event in in_order(self._last.values())[-lines:])


def in_order(told: Iterable[Iterable[Event]]) -> list[Event]:
    """Events of several tellers in the order in which they were told."""
    return sorted((event for events in told for event in events), key=lambda event: event.number)


_event = Event._make


def _plain(value: Any) -> str:
    """What the digest takes for a value that is not plain."""
    text = str(value)
    if " at 0x" in text:
        raise TypeError(f"tell it in plain values, not as {text}: two runs of one seed would differ")
    return text


def _shown(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, bytes):
        text = repr(value)[1:]
    elif isinstance(value, (list, tuple)):
        text = "[" + " ".join(_shown(each) for each in value) + "]"
    else:
        text = str(value)
    # A traceback or a reason of several lines still is one line of the story.
    text = text.replace("\n", " | ")
    return text if len(text) <= VALUE_MAX else f"{text[:VALUE_MAX]}… ({len(text)} characters)"
