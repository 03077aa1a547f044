"""What a simulation counts: latencies by endpoint, answers by code, outcomes of visits, and errors with their story."""

from __future__ import annotations

import math
from collections import Counter
from typing import Final

from msgspec import Struct

# Each bucket is 5 % wider than the one before it, so a percentile is off by no more; from 0.1 ms to 10 minutes.
_GROWTH: Final = math.log(1.05)
_LEAST_MS: Final = 0.1
_BUCKETS: Final = 321
# Errors beyond this are counted and not kept: they would say the same again.
STORIES_MAX: Final = 100


class Histogram:
    """Latencies in logarithmic buckets: its size does not depend on how many there are."""

    __slots__ = ("_buckets", "count", "longest_ms")

    def __init__(self) -> None:
        self._buckets = [0] * _BUCKETS
        self.count = 0
        self.longest_ms = 0.0

    def add(self, latency_ms: float) -> None:
        bucket = int(math.log(max(latency_ms, _LEAST_MS) / _LEAST_MS) / _GROWTH)
        self._buckets[min(bucket, _BUCKETS - 1)] += 1
        self.count += 1
        self.longest_ms = max(self.longest_ms, latency_ms)

    def percentile_ms(self, share: float) -> float:
        """0 where nothing was measured."""
        rank = math.ceil(share * self.count)
        seen = 0
        for bucket, count in enumerate(self._buckets):
            seen += count
            if seen >= rank > 0:
                return min(_LEAST_MS * math.exp((bucket + 1) * _GROWTH), self.longest_ms)
        return 0.0


class EndpointFigures(Struct, frozen=True):
    """`answers` counts by status or, of problems, by code; what got no answer by what happened instead."""

    endpoint: str
    requests: int
    p50_ms: float
    p99_ms: float
    longest_ms: float
    answers: dict[str, int]


class Tally:
    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.stories: list[str] = []
        self.error_count = 0
        self._latencies: dict[str, Histogram] = {}
        self._answers: dict[str, Counter[str]] = {}

    @property
    def requests(self) -> int:
        return sum(histogram.count for histogram in self._latencies.values())

    def answered(self, endpoint: str, what: str, latency_ms: float) -> None:
        """`what` is a status, a problem's code, or how it ended without an answer."""
        self._latencies.setdefault(endpoint, Histogram()).add(latency_ms)
        self._answers.setdefault(endpoint, Counter())[what] += 1

    def error(self, story: str) -> None:
        """Something that the services must not do."""
        self.error_count += 1
        if len(self.stories) < STORIES_MAX:
            self.stories.append(story)

    def problems(self) -> dict[str, int]:
        """All answers that were no success, and requests without one, over all endpoints."""
        total: Counter[str] = Counter()
        for answers in self._answers.values():
            total.update({what: count for what, count in answers.items() if not what.isdigit()})
        return dict(total.most_common())

    def endpoints(self) -> list[EndpointFigures]:
        return [
            EndpointFigures(
                endpoint,
                histogram.count,
                round(histogram.percentile_ms(0.5), 1),
                round(histogram.percentile_ms(0.99), 1),
                round(histogram.longest_ms, 1),
                dict(self._answers[endpoint].most_common()),
            )
            for endpoint, histogram in sorted(self._latencies.items())
        ]
