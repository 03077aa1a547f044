"""Transactions that append to lists and read lists: were they strictly serializable?

The idea is Elle's (Kingsbury and Alvaro, "Elle: Inferring Isolation Anomalies from Experimental Observations", 2020):
every element is appended once, so a list that was read tells the order of all writes to its key, and who wrote what.
From the orders follow edges between transactions, which any serial order must respect:

- ww: wrote the element before; wr: wrote the last element that was read; rw: read the list without the element;
- real time: returned before the other was called. These go over one node per return (what has returned by then →
  that node → what was called after), so there are O(n) of them, not n².

A cycle of them is a violation. Its name says which isolation was lost: G0 is made of ww edges, G1c of ww and wr,
G-single has one rw edge, G2 has more of them (write skew); `-realtime` where an edge of real time takes part.

Before that, what no order can mend: reads that disagree on the order of a key, elements that are lost, doubled, of
a transaction that surely failed, or of none; a transaction read in its midst, or one that contradicts its own writes.

A transaction of unknown outcome took effect if somebody saw an element of it; otherwise it is left out, which is
sound: without its effects being seen it constrains nothing. Cost: O(n) and the lengths of the lists read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from msgspec import Struct

from tests.checkers.graph import Graph
from tests.checkers.history import NEVER, Entry, told
from tests.checkers.verdict import Inconsistent

# Of a long list, its end tells most.
LIST_TAIL = 12


class Append(Struct, frozen=True, gc=False):
    key: str
    element: int

    def __str__(self) -> str:
        return f"{self.key} += {self.element}"


class Read(Struct, frozen=True, gc=False):
    key: str

    def __str__(self) -> str:
        return f"read {self.key}"


class Steps(Struct, frozen=True):
    """A transaction: its appends and reads, in their order. Elements are unique in the whole history. Its result is a
    tuple of the same length: for each read the list that it saw, for each append None."""

    steps: tuple[Append | Read, ...]

    def __str__(self) -> str:
        return "{" + "; ".join(map(str, self.steps)) + "}"


class Lists(Struct, frozen=True):
    """The result: one list per read, None per append."""

    lists: tuple[tuple[int, ...] | None, ...]

    def __str__(self) -> str:
        return "; ".join("…" if seen is None else _list_text(seen) for seen in self.lists)


def _list_text(seen: tuple[int, ...]) -> str:
    skipped = f"{len(seen) - LIST_TAIL} more, then " if len(seen) > LIST_TAIL else ""
    return f"[{skipped}{' '.join(map(str, seen[-LIST_TAIL:]))}]"


class _Writer(NamedTuple):
    entry: Entry
    key: str
    is_last: bool  # of its transaction's elements on that key
    before: int | None  # the element that the same transaction appended to that key before


def check_append(entries: Sequence[Entry]) -> None:
    """Raises `Inconsistent`: `unwritten_element`, `failed_append_seen`, `duplicate_append`, `intermediate_read`,
    `own_writes`, `incompatible_orders`, `lost_append` or `cycle`."""
    writers = _writers(entries)
    reads: dict[str, list[tuple[Entry, tuple[int, ...]]]] = {}
    for entry in entries:
        if entry.is_ok:
            for key, seen in _outside_reads(entry):
                reads.setdefault(key, []).append((entry, seen))
    orders: dict[str, tuple[int, ...]] = {}
    for key, of_key in reads.items():
        longest_entry, longest = max(of_key, key=lambda read: len(read[1]))
        _check_elements(key, longest_entry, longest, writers)
        for entry, seen in of_key:
            if seen != longest[: len(seen)]:
                _check_elements(key, entry, seen, writers)
                raise Inconsistent("incompatible_orders", _parting(key, (longest_entry, longest), (entry, seen)))
            _check_whole(key, entry, seen, writers)
        orders[key] = longest
    _check_none_lost(entries, reads)
    _check_cycles(entries, writers, reads, orders)


def _writers(entries: Sequence[Entry]) -> dict[int, _Writer]:
    writers: dict[int, _Writer] = {}
    for entry in entries:
        last: dict[str, int] = {}
        for step in entry.operation.steps:
            if isinstance(step, Append):
                assert step.element not in writers, "the workload appends every element once"
                before = last.get(step.key)
                writers[step.element] = _Writer(entry, step.key, True, before)
                if before is not None:
                    writers[before] = writers[before]._replace(is_last=False)
                last[step.key] = step.element
    return writers


def _outside_reads(entry: Entry) -> list[tuple[str, tuple[int, ...]]]:
    """What others had written to each key that the transaction read, its own elements taken off and checked."""
    base: dict[str, tuple[int, ...]] = {}
    own: dict[str, list[int]] = {}
    for step, seen in zip(entry.operation.steps, entry.result.lists, strict=True):
        mine = own.setdefault(step.key, [])
        if isinstance(step, Append):
            mine.append(step.element)
            continue
        outside = seen[: len(seen) - len(mine)]
        if seen[len(outside) :] != tuple(mine) or base.setdefault(step.key, outside) != outside:
            raise Inconsistent(
                "own_writes", f"its reads of {step.key} contradict what it wrote or read itself:\n{told([entry])}"
            )
    return list(base.items())


def _parting(key: str, one: tuple[Entry, tuple[int, ...]], other: tuple[Entry, tuple[int, ...]]) -> str:
    place = next(place for place, pair in enumerate(zip(one[1], other[1], strict=False)) if pair[0] != pair[1])
    return (
        f"two reads of {key} cannot both be: after {place} elements they go on with {one[1][place]} and "
        f"{other[1][place]}:\n{told([one[0], other[0]])}"
    )


def _check_elements(key: str, entry: Entry, seen: tuple[int, ...], writers: dict[int, _Writer]) -> None:
    found: set[int] = set()
    for element in seen:
        writer = writers.get(element)
        if writer is None or writer.key != key:
            raise Inconsistent("unwritten_element", f"nobody appended {element} to {key}:\n{told([entry])}")
        if element in found:
            raise Inconsistent("duplicate_append", f"{element} is twice in {key}:\n{told([writer.entry, entry])}")
        if writer.entry.is_failed:
            raise Inconsistent("failed_append_seen", f"{element} must not be in {key}:\n{told([writer.entry, entry])}")
        if writer.entry.called > entry.returned:
            raise Inconsistent("unwritten_element", f"{element} was read too early:\n{told([entry, writer.entry])}")
        found.add(element)


def _check_whole(key: str, entry: Entry, seen: tuple[int, ...], writers: dict[int, _Writer]) -> None:
    """The elements are good (they are a prefix of the checked longest read); is the last one's transaction whole?"""
    if not seen:
        return
    last = writers[seen[-1]]
    if last.entry is entry or last.entry.called > entry.returned:
        raise Inconsistent("unwritten_element", f"{seen[-1]} was read too early:\n{told([entry, last.entry])}")
    torn = not last.is_last
    for place, element in enumerate(seen):
        before = writers[element].before
        torn = torn or (before is not None and (place == 0 or seen[place - 1] != before))
    if torn:
        raise Inconsistent("intermediate_read", f"{key} was read in the midst of one:\n{told([last.entry, entry])}")


def _check_none_lost(entries: Sequence[Entry], reads: dict[str, list[tuple[Entry, tuple[int, ...]]]]) -> None:
    """The cycle check would find these too, but this is the plainest thing to say of them."""
    latest = {key: max(of_key, key=lambda read: read[0].called) for key, of_key in reads.items()}
    for entry in entries:
        if not entry.is_ok:
            continue
        for step in entry.operation.steps:
            if isinstance(step, Append) and step.key in latest:
                reader, seen = latest[step.key]
                if entry.returned < reader.called and step.element not in seen:
                    raise Inconsistent(
                        "lost_append",
                        f"{step.element} was acknowledged and is not in {step.key} later:\n{told([entry, reader])}",
                    )


def _check_cycles(
    entries: Sequence[Entry],
    writers: dict[int, _Writer],
    reads: dict[str, list[tuple[Entry, tuple[int, ...]]]],
    orders: dict[str, tuple[int, ...]],
) -> None:
    observed = {id(writers[element].entry) for order in orders.values() for element in order}
    nodes = [entry for entry in entries if entry.is_ok or id(entry) in observed]
    number = {id(entry): place for place, entry in enumerate(nodes)}
    events = sorted(
        [(entry.called, place) for place, entry in enumerate(nodes)]
        + [(entry.returned, ~place) for place, entry in enumerate(nodes) if entry.returned != NEVER]
    )
    graph = Graph(len(nodes), len(nodes))
    unseen: dict[str, list[int]] = {}
    for place, entry in enumerate(nodes):
        for step in entry.operation.steps:
            if isinstance(step, Append) and step.element not in orders.get(step.key, ()):
                unseen.setdefault(step.key, []).append(place)
    for key, order in orders.items():
        holders = [number[id(writers[element].entry)] for element in order]
        # What nobody saw, although it happened, comes after all that was seen.
        after = unseen.get(key, ())
        for one, other in pairwise(holders):
            graph.add(one, other, f"ww on {key}")
        for target in after:
            if holders:
                graph.add(holders[-1], target, f"ww on {key}")
        for entry, seen in reads[key]:
            reader = number[id(entry)]
            if seen:
                graph.add(holders[len(seen) - 1], reader, f"wr on {key}")
            if len(seen) < len(order):
                graph.add(reader, holders[len(seen)], f"rw on {key}")
            else:
                for target in after:
                    graph.add(reader, target, f"rw on {key}")
    barrier = len(nodes) - 1
    for _, place in events:
        if place >= 0:
            if barrier >= len(nodes):
                graph.add(barrier, place, "real time")
        else:
            if barrier >= len(nodes):
                graph.add(barrier, barrier + 1, "real time")
            barrier += 1
            graph.add(~place, barrier, "real time")
    cycle = graph.cycle()
    if cycle:
        raise Inconsistent("cycle", _story(cycle, nodes))


def _story(cycle: list[tuple[int, str]], nodes: Sequence[Entry]) -> str:
    steps = [(nodes[place], name) for place, name in cycle if place < len(nodes)]
    names = [name for _, name in steps]
    rws = sum(1 for name in names if name.startswith("rw"))
    anomaly = "G2" if rws > 1 else "G-single" if rws else "G1c" if any(n.startswith("wr") for n in names) else "G0"
    if "real time" in names:
        anomaly += "-realtime"
    lines = [f"{anomaly}: each of these must come before the next, and the last before the first:"]
    for entry, name in steps:
        lines += [f"  {entry}", f"    {_WHY[name.split()[0]]} ({name})"]
    return "\n".join(lines)


_WHY = {
    "ww": "wrote the element before the next one's",
    "wr": "wrote the last element that the next one read",
    "rw": "read the list before the next one appended to it",
    "real": "was answered before the next one was called",
}
