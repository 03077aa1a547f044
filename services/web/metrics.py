"""What a service tells Prometheus, at `/metrics`: how many requests, how long they took, how many are under way.

Several processes on one port (`workers.py`) answer for all: each writes its counts into files of a directory that they
share, named by PROMETHEUS_MULTIPROC_DIR, and whichever is asked adds them up.
"""

from __future__ import annotations

import os
import time
from typing import Final

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

SHARED_DIRECTORY: Final = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
# From a read served by a warm store to a sign-in with two dozen others before it, and the store's own timeout.
_BOUNDS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_UNMATCHED: Final = "(none)"


class Metrics:
    """Of one application. `registry` may hold what else its process tells."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._registry = registry or CollectorRegistry()
        self._seconds = Histogram(
            "http_request_seconds",
            "From a request's headers to its answer.",
            ("method", "path", "status"),
            registry=self._registry,
            buckets=_BOUNDS_S,
        )
        self._in_flight = Gauge(
            "http_requests_in_flight",
            "Requests under way.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._known: dict[tuple[str, str, int], Histogram] = {}  # by method, path and status: as many as there are

    def began(self) -> None:
        self._in_flight.inc()

    def ended(self, method: str, path: str | None, status: int, began_s: float) -> None:
        """`path` is that of the endpoint, with its parameters' names, or None where there is none; `began_s` is
        `time.perf_counter()` of then."""
        self._in_flight.dec()
        key = (method if path is not None else "", path or _UNMATCHED, status)
        seconds = self._known.get(key)
        if seconds is None:
            seconds = self._known[key] = self._seconds.labels(*map(str, key))
        seconds.observe(time.perf_counter() - began_s)

    def text(self) -> bytes:
        if SHARED_DIRECTORY in os.environ:
            together = CollectorRegistry()
            MultiProcessCollector(together)  # type: ignore[no-untyped-call]
            return generate_latest(together)
        return generate_latest(self._registry)
