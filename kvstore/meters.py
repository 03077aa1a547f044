"""Counted times, for metrics: how often something took how long. Cheap enough for every log entry."""

from __future__ import annotations

from bisect import bisect_left

# Upper bounds in seconds: from a fast sync to what is felt as an outage.
BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Meter:
    """A histogram. `counts[i]` is how many took at most `BOUNDS_S[i]` and more than the bound before; the last, beyond
    all bounds."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def observe(self, took_s: float) -> None:
        self.counts[bisect_left(BOUNDS_S, took_s)] += 1
        self.total_s += took_s
