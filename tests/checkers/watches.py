"""Watches: what a watcher saw is all that happened, once, in order, a transaction's events together.

A `Segment` is what one watcher saw without a break, over however many connections and nodes: every event from its
first revision up to its end. Judged are

- order: revisions rise, and no key comes twice in one;
- completeness: a change whose acknowledgement names a revision within a segment stands there, whole;
- truth: every event was asked for by a change that did not surely fail, and no two changes by one value;
- the records before, as the events before them say;
- agreement: two segments tell the same of the revisions that both cover.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from kvstore.model import Event
from tests.checkers.history import Entry
from tests.checkers.verdict import Inconsistent


class Change(Struct, frozen=True):
    """One transaction: values by key, None for a deletion. A value is written by one change only. Result: those of the
    writes that changed something (a deletion of what is not there does not)."""

    writes: dict[bytes, bytes | None]


class Segment(Struct):
    watcher: str
    first: int
    """The first revision that it covers; 0 as long as the watch has not said."""
    next: int = 0
    """The first revision that it does not cover any more."""
    revisions: list[tuple[Event, ...]] = []

    def __str__(self) -> str:
        return f"{self.watcher} from {self.first} to {self.next}"


def check_watches(entries: Iterable[Entry], segments: Sequence[Segment]) -> None:
    """`entries`: the changes, whose revision is noted where it is known. Raises `Inconsistent`."""
    changes = [entry for entry in entries if isinstance(entry.operation, Change)]
    made = {entry.revision: entry for entry in changes if entry.is_ok and entry.changed}
    asked_for = {
        (key, value): entry for entry in changes for key, value in entry.operation.writes.items() if value is not None
    }
    deletes = {key for entry in changes if not entry.is_failed for key, value in entry.operation.writes.items()
               if value is None}  # fmt: skip
    seen_by: list[dict[int, tuple[Event, ...]]] = []
    for segment in segments:
        _check_order(segment)
        seen = {events[0].revision: events for events in segment.revisions}
        seen_by.append(seen)
        for revision, entry in made.items():
            if segment.first <= revision < segment.next:
                told = {event.key: _value(event) for event in seen.get(revision, ())}
                if told != entry.result:
                    raise Inconsistent("watch_misses", f"{segment} has {told} at revision {revision}, which is {entry}")
        for revision, events in seen.items():
            for event in events:
                value = _value(event)
                if value is None:
                    if event.key not in deletes:
                        raise Inconsistent("watch_invents", f"{segment}: nobody deletes {event}")
                    continue
                asker = asked_for.get((event.key, value))
                if asker is None or asker.is_failed or (asker.is_ok and asker.revision != revision):
                    raise Inconsistent("watch_invents", f"{segment}: {event} is not what was asked for: {asker}")
    everything = {revision: events for seen in seen_by for revision, events in seen.items()}
    for segment, seen in zip(segments, seen_by, strict=True):
        for revision, events in everything.items():
            if segment.first <= revision < segment.next and _told(seen.get(revision, ())) != _told(events):
                raise Inconsistent(
                    "watches_disagree", f"{segment} has {seen.get(revision)} at {revision}, another has {events}"
                )


def _told(events: Iterable[Event]) -> list[tuple[bytes, bytes | None]]:
    return [(event.key, _value(event)) for event in events]


def _check_order(segment: Segment) -> None:
    newest = segment.first - 1
    records: dict[bytes, tuple[bytes | None]] = {}
    for events in segment.revisions:
        revision = events[0].revision
        if revision <= newest or len({event.key for event in events}) != len(events):
            raise Inconsistent("watch_order", f"{segment}: {events} comes after revision {newest}")
        for event in events:
            if event.revision != revision:
                raise Inconsistent("watch_order", f"{segment}: {event} comes with revision {revision}")
            before = None if event.prev is None else event.prev.value
            if event.key in records and records[event.key] != (before,):
                raise Inconsistent("watch_prev", f"{segment}: {event}, after {records[event.key]}")
            records[event.key] = (_value(event),)
        newest = revision
    if newest >= segment.next:
        raise Inconsistent("watch_order", f"{segment} has an event of revision {newest}")


def _value(event: Event) -> bytes | None:
    return None if event.record is None else event.record.value
