"""Locks: one holder at a time, in the order of asking, and nothing fenced is written by anybody else.

A lock is a queue of keys in the store, so each look at it shows who holds it and who waits, at one revision. Every
fenced write takes such a look along, in its own transaction. Rules, of one lock each:

- `lock_fence_open`: a fenced write took effect only while its holder's key was there, before all others;
- `lock_fence_shut`: and was refused only when the key was gone;
- `lock_fence_order`: in the store's order the tokens of fenced writes never go back;
- `lock_writes`: a look shows the newest fenced write, as it was asked for, and none that surely failed;
- `lock_token`: no two holders have one token, and who asks after another has it gets a greater one;
- `lock_out_of_order`: once somebody has it, nobody who asked before is in the queue any more;
- `lock_held_twice`: nobody gets it while another surely has it;
- `lock_lost_early`: who surely has it stands first in the queue;
- `lock_entered_lost`: nobody gets it without a time for which he surely has it.

The first five are exact: they compare revisions, and no clock. For the others: a client that sees `valid_for_s` surely
has the lock for that long, unless it gives it up, or somebody ends its lease behind its back. Times are those of the
history, one clock for all clients: what their own clocks differ from it is the product's to allow for.

Cost: O(n log n), but for the pairs of holders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import Struct

from tests.checkers.history import Entry, told
from tests.checkers.verdict import Inconsistent


class Waiting(NamedTuple):
    """One place in the queue."""

    key: bytes
    create_revision: int


class Write(NamedTuple):
    """What the fenced register holds."""

    number: int  # unique
    token: int
    revision: int

    def __str__(self) -> str:
        return f"write {self.number} of token {self.token} at revision {self.revision}"


class Acquire(Struct, frozen=True, gc=False):
    """Its result is `Held`."""

    lock: str
    ttl_s: float

    def __str__(self) -> str:
        return f"{self.lock}: acquire, with {self.ttl_s:g} s to live"


class Held(Struct, frozen=True, gc=False):
    key: bytes
    token: int
    valid_for_s: float

    def __str__(self) -> str:
        return f"token {self.token}, for {self.valid_for_s:.3f} s at least"


class Fenced(Struct, frozen=True, gc=False):
    """Write the register if the lock is held; look first. Its result is a `Sight`."""

    lock: str
    key: bytes
    token: int
    number: int

    def __str__(self) -> str:
        return f"{self.lock}: write {self.number}, fenced by token {self.token}"


class Look(Struct, frozen=True, gc=False):
    """Its result is a `Sight`."""

    lock: str

    def __str__(self) -> str:
        return f"{self.lock}: look"


class Sight(Struct, frozen=True):
    """The queue in its order, and the register, as they were before any write."""

    queue: tuple[Waiting, ...]
    register: Write | None
    written: bool = False
    valid_for_s: float = 0.0
    """As the holder saw it when it had the answer; 0 of a look by others."""

    def __str__(self) -> str:
        queue = " ".join(str(place.create_revision) for place in self.queue)
        return f"{'written; ' if self.written else ''}queue [{queue}], before: {self.register}"


class Release(Struct, frozen=True, gc=False):
    lock: str
    token: int
    valid_for_s: float
    """As the holder saw it when it began."""

    def __str__(self) -> str:
        return f"{self.lock}: release token {self.token}"


class End(Struct, frozen=True, gc=False):
    """Somebody else revokes the lease of a holder or waiter."""

    lock: str
    key: bytes

    def __str__(self) -> str:
        return f"{self.lock}: end {self.key[-16:].decode()} behind its back"


class Die(Struct, frozen=True, gc=False):
    """Ask for the lock, and never be heard of again."""

    lock: str

    def __str__(self) -> str:
        return f"{self.lock}: ask, and die"


def check_lock(entries: Sequence[Entry]) -> None:
    """All operations on one lock, in the order of their calls. Raises `Inconsistent`."""
    sights = [entry for entry in entries if isinstance(entry.operation, (Fenced, Look)) and entry.is_ok]
    holders = [entry for entry in entries if isinstance(entry.operation, Acquire) and entry.is_ok]
    _check_fences(sights)
    _check_writes(entries, sights)
    _check_tokens(holders)
    _check_order(holders, sights)
    _check_exclusion(holders, sights, _surely_until(entries, holders))


def _check_fences(sights: Sequence[Entry]) -> None:
    for entry in sights:
        if not isinstance(entry.operation, Fenced):
            continue
        own = Waiting(entry.operation.key, entry.operation.token)
        queue = entry.result.queue
        if entry.result.written and queue[:1] != (own,):
            raise Inconsistent("lock_fence_open", f"its holder did not hold the lock then:\n{told([entry])}")
        if not entry.result.written and own in queue:
            raise Inconsistent("lock_fence_shut", f"its holder's key was there:\n{told([entry])}")


def _check_writes(entries: Sequence[Entry], sights: Sequence[Entry]) -> None:
    asked = {entry.operation.number: entry for entry in entries if isinstance(entry.operation, Fenced)}
    known: dict[int, tuple[Write, Entry]] = {}  # by revision
    for entry in sights:
        if isinstance(entry.operation, Fenced) and entry.result.written:
            known[entry.revision] = Write(entry.operation.number, entry.operation.token, entry.revision), entry
    for entry in sights:
        seen = entry.result.register
        if seen is None:
            continue
        writer = asked.get(seen.number)
        is_good = (
            writer is not None
            and not writer.is_failed
            and seen.token == writer.operation.token
            and not (writer.is_ok and (not writer.result.written or writer.revision != seen.revision))
        )
        if not is_good:
            who = [entry] if writer is None else [writer, entry]
            raise Inconsistent("lock_writes", f"{seen} cannot be there:\n{told(who)}")
        known.setdefault(seen.revision, (seen, entry))
    newest: tuple[Write, Entry] | None = None
    revisions = sorted(known)
    for revision in revisions:
        write, entry = known[revision]
        if newest is not None and write.token < newest[0].token:
            raise Inconsistent("lock_fence_order", f"{write} comes after {newest[0]}:\n{told([newest[1], entry])}")
        newest = write, entry
    at = 0
    for entry in sorted(sights, key=_looked_at):
        while at < len(revisions) and revisions[at] <= _looked_at(entry):
            at += 1
        expected = known[revisions[at - 1]] if at else None
        if entry.result.register != (expected[0] if expected else None):
            who = [entry, *([expected[1]] if expected else [])]
            raise Inconsistent("lock_writes", f"the newest write was {expected and expected[0]}:\n{told(who)}")


def _looked_at(sight: Entry) -> int:
    """A fenced write that took effect made its revision, and looked before that."""
    seen: Sight = sight.result
    return sight.revision - seen.written


def _check_tokens(holders: Sequence[Entry]) -> None:
    by_token: dict[int, Entry] = {}
    greatest: Entry | None = None  # of those that had returned
    events = [(entry.called, entry) for entry in holders] + [(entry.returned, entry) for entry in holders]
    for event, entry in sorted(events, key=lambda event: event[0]):
        token = entry.result.token
        if event == entry.called:
            other = by_token.setdefault(token, entry)
            if other is not entry:
                raise Inconsistent("lock_token", f"two holders have one token:\n{told([other, entry])}")
            if greatest is not None and token < greatest.result.token:
                raise Inconsistent("lock_token", f"the second asked later:\n{told([greatest, entry])}")
        elif greatest is None or token > greatest.result.token:
            greatest = entry


def _check_order(holders: Sequence[Entry], sights: Sequence[Entry]) -> None:
    """What a key's create revision is never changes, and none comes again: whoever is still in the queue was in it."""
    greatest: Entry | None = None
    events = [(entry.returned, entry) for entry in holders] + [(entry.called, entry) for entry in sights]
    for _, entry in sorted(events, key=lambda event: event[0]):
        if isinstance(entry.operation, Acquire):
            if greatest is None or entry.result.token > greatest.result.token:
                greatest = entry
        elif greatest is not None:
            for place in entry.result.queue:
                if place.create_revision < greatest.result.token:
                    why = f"{place.create_revision} asked first, and waits or holds it yet"
                    raise Inconsistent("lock_out_of_order", f"{why}:\n{told([greatest, entry])}")


def _surely_until(entries: Sequence[Entry], holders: Sequence[Entry]) -> dict[int, float]:
    """By token: the time at which it was surely held yet, as its holder could know at the time."""
    until_s: dict[int, float] = {}
    ends_s: dict[int, float] = {}
    token_of = {entry.result.key: entry.result.token for entry in holders}
    for entry in holders:
        token = entry.result.token
        until_s[token] = entry.returned_at_s + entry.result.valid_for_s
    for entry in entries:
        match entry.operation:
            case Fenced(token=token) if entry.is_ok and entry.result.valid_for_s:
                until_s[token] = max(until_s[token], entry.returned_at_s + entry.result.valid_for_s)
            case Release(token=token, valid_for_s=valid_for_s):
                if valid_for_s:
                    until_s[token] = max(until_s[token], entry.called_at_s + valid_for_s)
                ends_s[token] = min(ends_s.get(token, entry.called_at_s), entry.called_at_s)
            case End(key=key) if not entry.is_failed and key in token_of:
                ends_s[token_of[key]] = min(ends_s.get(token_of[key], entry.called_at_s), entry.called_at_s)
    return {token: min(until, ends_s.get(token, until)) for token, until in until_s.items()}


def _check_exclusion(holders: Sequence[Entry], sights: Sequence[Entry], until_s: dict[int, float]) -> None:
    for entry in holders:
        if not entry.result.valid_for_s:
            raise Inconsistent("lock_entered_lost", f"its lease was over when it got the lock:\n{told([entry])}")
    for one in holders:
        until = until_s[one.result.token]
        for other in holders:
            if other.result.token > one.result.token and other.returned_at_s < until:
                why = f"the one with the lower token surely held it until {until:.4f} s"
                raise Inconsistent("lock_held_twice", f"{why}:\n{told([one, other])}")
        for entry in sights:
            if one.returned < entry.called and entry.returned_at_s < until:
                queue = entry.result.queue
                if not queue or queue[0].create_revision != one.result.token:
                    why = f"token {one.result.token} surely held the lock until {until:.4f} s"
                    raise Inconsistent("lock_lost_early", f"{why}:\n{told([one, entry])}")
