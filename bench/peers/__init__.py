"""The stores that kvstore is measured beside: each started from its Debian package, loaded by its own tool, stopped.

Each has its own data directory in the run's scratch directory, its own loopback ports, and its package's default
durability (an answer means fsynced). An instance that the system runs by itself is never touched. A peer that is
missing fails the comparison by name, before anything is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from bench.results import BenchError, Measurement


class Peer(Protocol):
    """Used from one thread: `start`, then `measure` any number of times, then `stop` (also after a failed start)."""

    def start(self, scratch: Path) -> None:
        """Start it with an empty store below `scratch`, ready for load. Raises BenchError."""

    def measure(self, everything: bool) -> Iterator[Measurement]:
        """Load it: what the thresholds need, or all that the table shows. Raises BenchError."""

    def stop(self) -> None: ...


class Durations:
    """How long every load lasts; the same for all systems of a run."""

    __slots__ = ("keys", "warmup_s", "window_s")

    def __init__(self, keys: int, warmup_s: float, window_s: float) -> None:
        self.keys = keys
        self.warmup_s = warmup_s
        self.window_s = window_s


def open_peers(names: Sequence[str], durations: Durations) -> dict[str, Peer]:
    """The named peers, not yet started. Raises BenchError for one that we do not know or that is not installed."""
    from bench.peers.etcd import Etcd
    from bench.peers.postgres import Postgres
    from bench.peers.redis import Redis

    known: dict[str, type[Etcd] | type[Postgres] | type[Redis]] = {"etcd": Etcd, "postgres": Postgres, "redis": Redis}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BenchError(f"no such peer: {', '.join(unknown)}; there are {', '.join(known)}, and `none`")
    return {name: known[name](durations) for name in names}
