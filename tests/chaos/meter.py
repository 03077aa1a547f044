"""What a campaign measures, as data and as pure functions of it. Times are seconds since the campaign began.

Unavailability is measured by one prober, a client that writes the same key again and again: the longest time between
two consecutive acknowledgements of its writes that overlaps a span. It contains everything a user would wait for: the
election, and this client's finding the new leader.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from bench.results import percentile

WINDOW_S = 0.1
# Latency percentiles need some hundred operations to mean something, so their windows are longer.
LATENCY_WINDOW_S = 1.0


class Meter:
    """Acknowledged operations and the prober's acknowledgements, noted as they come."""

    def __init__(self) -> None:
        self.acknowledged_at = array("d")
        self.latency_s = array("d")
        self.probe_began_at = array("d")
        self.probe_acknowledged_at = array("d")
        self.unknown = self.unavailable = self.refused = 0
        """Calls that ended otherwise: in doubt, without effect, with the store's no (a lost race, mostly)."""

    def operation(self, began_at: float, ended_at: float) -> None:
        self.acknowledged_at.append(ended_at)
        self.latency_s.append(ended_at - began_at)

    def probe(self, began_at: float, ended_at: float) -> None:
        self.probe_began_at.append(began_at)
        self.probe_acknowledged_at.append(ended_at)


class Span(msgspec.Struct, frozen=True):
    """A fault as it happened. `struck_at`: its first effect; `ended_at`: undone; `whole_at`: all nodes together
    again. `slowest_s`: of all operations that were acknowledged in that time, the longest."""

    number: int
    kind: str
    note: str
    struck_at: float
    ended_at: float
    whole_at: float
    unavailable_s: float
    slowest_s: float


class Kind(msgspec.Struct, frozen=True):
    """Unavailability after all faults of one kind, in seconds."""

    name: str
    count: int
    median_s: float
    p95_s: float
    longest_s: float
    slowest_s: float


class Throughput(msgspec.Struct, frozen=True):
    """Operations a second in windows of `WINDOW_S`, from 0 on."""

    per_second: list[float]


class Latency(msgspec.Struct, frozen=True):
    """In windows of `LATENCY_WINDOW_S`, by when operations ended; None where none did."""

    p50_ms: list[float | None]
    p99_ms: list[float | None]


def longest_gap(acknowledged_at: Sequence[float], begin: float, end: float) -> float:
    """The longest time between two consecutive acknowledgements (ascending) that overlaps `[begin, end]`. Where there
    is none before or after, `begin` and `end` stand in: what is not known is not counted. O(log n + those inside)."""
    if not acknowledged_at:
        return end - begin
    first = max(0, bisect_right(acknowledged_at, begin) - 1)
    last = min(len(acknowledged_at) - 1, bisect_left(acknowledged_at, end))
    moments = list(acknowledged_at[first : last + 1])
    if moments[0] > begin:
        moments.insert(0, begin)
    if moments[-1] < end:
        moments.append(end)
    return max((later - earlier for earlier, later in pairwise(moments)), default=0.0)


def by_kind(spans: Iterable[Span]) -> list[Kind]:
    """In the order of their names."""
    found: dict[str, list[Span]] = {}
    for span in spans:
        found.setdefault(span.kind, []).append(span)
    kinds = []
    for name in sorted(found):
        times = sorted(span.unavailable_s for span in found[name])
        slowest_s = max(span.slowest_s for span in found[name])
        kinds.append(Kind(name, len(times), percentile(times, 0.5), percentile(times, 0.95), times[-1], slowest_s))
    return kinds


def slowest(acknowledged_at: Sequence[float], latency_s: Sequence[float], begin: float, end: float) -> float:
    """The longest operation that was acknowledged (ascending) in `[begin, end]`; 0 if none was."""
    return max(latency_s[bisect_left(acknowledged_at, begin) : bisect_right(acknowledged_at, end)], default=0.0)


def throughput(acknowledged_at: Iterable[float], lasts_s: float) -> Throughput:
    counts = [0] * math.ceil(lasts_s / WINDOW_S)
    for moment in acknowledged_at:
        at = int(moment / WINDOW_S)
        if 0 <= at < len(counts):
            counts[at] += 1
    return Throughput([count / WINDOW_S for count in counts])


def latency(acknowledged_at: Sequence[float], latency_s: Sequence[float], lasts_s: float) -> Latency:
    windows: list[list[float]] = [[] for _ in range(math.ceil(lasts_s / LATENCY_WINDOW_S))]
    for moment, took_s in zip(acknowledged_at, latency_s, strict=True):
        at = int(moment / LATENCY_WINDOW_S)
        if 0 <= at < len(windows):
            windows[at].append(took_s)
    p50: list[float | None] = []
    p99: list[float | None] = []
    for window in windows:
        window.sort()
        p50.append(1000 * percentile(window, 0.5) if window else None)
        p99.append(1000 * percentile(window, 0.99) if window else None)
    return Latency(p50, p99)
