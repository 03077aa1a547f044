"""The resident memory of processes, from /proc, in MB of 2**20 bytes: now, at its highest, and watched over time.

A node's block cache, memtables and Python objects are all in it; the page cache of its files is not, but for pages
that are mapped.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from msgspec import Struct

from bench.results import BenchError

_EVERY_S = 0.25


class Memory(Struct, frozen=True):
    """`resident_mb` is VmRSS, `highest_mb` VmHWM: the most that it ever was since the process started."""

    resident_mb: float
    highest_mb: float


def memory_of(pid: int) -> Memory:
    """Raises BenchError where the process has ended."""
    found = {}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                found[name] = int(value.split()[0]) / 1024
        return Memory(found["VmRSS"], found["VmHWM"])
    except (OSError, KeyError):
        raise BenchError(f"process {pid} has no memory: it has ended") from None


class MemoryWatch:
    """`with MemoryWatch(pids) as watch: …`; `most_mb` is the highest VmRSS of any of them at any look within."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
        self.most_mb = 0.0

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            over = self._over.wait(_EVERY_S)
            try:
                self.most_mb = max(self.most_mb, *(memory_of(pid).resident_mb for pid in self._pids))
            except BenchError:  # whoever loads the node says that it has ended
                return
            if over:
                return
