"""What a worker tells Prometheus of its steps: how many it took, what came of them, and how late it is.

Labels take few values, whatever stands in the store: a kind or reason code that this worker's owner did not name is
`(other)`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from services.work.steps import Ending

_OTHER: Final = "(other)"
_INTERRUPTED: Final = "interrupted"


class WorkMetrics:
    """Of one worker. `codes` are the reason codes that a step of its kinds may be put off or parked with."""

    def __init__(self, registry: CollectorRegistry, kinds: Iterable[str], codes: Iterable[str] = ()) -> None:
        self._kinds, self._codes = frozenset(kinds), frozenset(codes)
        self._taken = Counter("steps_taken", "Attempts that began.", ("kind",), registry=registry)
        self._ended = Counter(
            "steps_ended",
            "What came of attempts, and why: finished, retried (it comes again), parked (it needs a person), dropped "
            "(it was one too many), interrupted (the store was away, or the claim lost; it is taken up again).",
            ("kind", "outcome", "code"),
            registry=registry,
        )
        self._running = Gauge("steps_running", "Attempts under way.", registry=registry)
        lag = Gauge(
            "steps_lag_seconds", "How long the oldest step that is due has been so; 0: none is.", registry=registry
        )
        lag.set_function(self._lag_s)
        self._lost = Counter("worker_leases_lost", "How often it lost its lease, and all claims.", registry=registry)
        self._oldest_due_ms: int | None = None
        # An alert looks for an increase, and would miss the first if there were nothing before it.
        for kind in sorted({*self._kinds, _OTHER}):
            self._taken.labels(kind)
            self._ended.labels(kind, Ending.FINISHED, "")
            for code in sorted({*self._codes, _OTHER}):
                self._ended.labels(kind, Ending.PARKED, code)

    def began(self, kind: str) -> None:
        self._running.inc()
        self._taken.labels(self._kind(kind)).inc()

    def ended(self, kind: str, ending: Ending, code: str) -> None:
        """`code` is empty where it finished."""
        self._running.dec()
        self._count(kind, ending, code)

    def cut_off(self, kind: str) -> None:
        """Instead of `ended`: nobody knows what came of it, or it was another worker's by then."""
        self._running.dec()
        self._ended.labels(self._kind(kind), _INTERRUPTED, "").inc()

    def parked_unread(self, kind: str, code: str) -> None:
        """A step that no attempt was made at."""
        self._count(kind, Ending.PARKED, code)

    def lease_lost(self) -> None:
        self._lost.inc()

    def oldest_due(self, due_ms: int | None) -> None:
        """When the oldest step was due of those that are; None: there are none."""
        self._oldest_due_ms = due_ms

    def _count(self, kind: str, ending: Ending, code: str) -> None:
        known = code if not code or code in self._codes else _OTHER
        self._ended.labels(self._kind(kind), ending, known).inc()

    def _kind(self, kind: str) -> str:
        return kind if kind in self._kinds else _OTHER

    def _lag_s(self) -> float:
        """Also while the store is away, and nothing is seen of what it holds: what was due then is later now."""
        return max(0.0, time.time() - self._oldest_due_ms / 1000) if self._oldest_due_ms is not None else 0.0
