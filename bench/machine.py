"""The machine under a run: what it is, what its disk does, and who used its CPU. Linux, from /proc.

Absolute figures mean little on shared machines; this is what lets a reader judge them.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path

from bench.results import BenchError, Machine, percentile

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def describe(scratch: Path) -> Machine:
    """What stands in the report's machine line. Takes about a tenth of a second, for the disk."""
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        filesystem=_filesystem(scratch),
        fdatasync_512_p50_ms=_fdatasync_p50_ms(scratch, 512),
        fdatasync_4096_p50_ms=_fdatasync_p50_ms(scratch, 4096),
    )


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time that these processes have used, with that of children they have waited for."""
    ticks = 0
    for pid in pids:
        ticks += sum(int(field) for field in _stat_fields(pid)[11:15])
    return ticks / _TICKS_PER_SECOND


def tree_seconds(pid: int) -> float:
    """`cpu_seconds` of a process and its direct children, living and ended."""
    for _ in range(20):  # each turn that fails, a child ended; far more turns than a server ends children at once
        try:
            return cpu_seconds([pid, *children(pid)])
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise BenchError(f"process {pid} has ended, or its children end faster than they can be looked at")


def children(pid: int) -> list[int]:
    """The living direct children of a process."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if int(_stat_fields(int(entry))[1]) == pid:
                    found.append(int(entry))
            except (FileNotFoundError, ProcessLookupError):  # it ended since the listing
                continue
    return found


def tools_seconds() -> float:
    """CPU time of this process's ended and awaited children: the difference is what a tool in between used."""
    times = os.times()
    return times.children_user + times.children_system


def busy_seconds() -> float:
    """CPU time that all processes of this machine together have used since it started."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, irq, softirq = (int(field) for field in file.readline().split()[1:8])
    return (user + nice + system + irq + softirq) / _TICKS_PER_SECOND


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third one (state) on; the second, the name, may hold anything."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(") ")[2].split()


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _filesystem(path: Path) -> str:
    """Type of the file system that holds `path`: the longest mount point above it."""
    resolved = str(path.resolve())
    best, kind = "", "unknown"
    with open("/proc/mounts") as file:
        for line in file:
            mount, kind_here = line.split()[1:3]
            above = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
            if above and len(mount) >= len(best):
                best, kind = mount, kind_here
    return kind


def _fdatasync_p50_ms(scratch: Path, size_bytes: int) -> float:
    """Appending to a preallocated file, as a write-ahead log does. 200 syncs: enough for a median, and a moment."""
    path = scratch / "fdatasync-probe"
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(fd, 0, 200 * size_bytes)
        os.fsync(fd)
        data = os.urandom(size_bytes)
        taken = []
        for turn in range(200):
            start = time.perf_counter_ns()
            os.pwrite(fd, data, turn * size_bytes)
            os.fdatasync(fd)
            taken.append(time.perf_counter_ns() - start)
    finally:
        os.close(fd)
        os.unlink(path)
    return percentile(sorted(taken), 0.5) / 1e6
