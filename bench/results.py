"""What a run measured, as data: the same types feed the table, the thresholds and the JSON file.

Latencies are milliseconds as the load's sender saw them; CPU is microseconds per operation; `None` means that the
tool which made the load does not say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from msgspec import Struct


class BenchError(Exception):
    """The run cannot be done, or what it measured does not count. The message says why and what to do."""


class Measurement(Struct, frozen=True, kw_only=True):
    """One workload on one system for one window."""

    system: str
    workload: str
    connections: int
    pipeline: int = 1
    round: int = 0
    seconds: float
    operations: int
    per_second: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    p999_ms: float | None = None
    # By process: "leader", "followers", "generator" and so on. Empty where the processes are not ours to look at.
    cpu_us_per_op: dict[str, float] = {}
    # What other processes on this machine used meanwhile, in cores: above a few hundredths the figure is too low.
    others_cores: float | None = None


class Threshold(Struct, frozen=True, kw_only=True):
    """One of the promises that a run with peers checks. `met` is None where one side was not measured."""

    name: str
    ours: float | None
    theirs: float | None
    unit: str
    ratio: float | None
    required: str
    met: bool | None


class Machine(Struct, frozen=True, kw_only=True):
    cpu: str
    cores: int
    kernel: str
    python: str
    filesystem: str
    fdatasync_512_p50_ms: float
    fdatasync_4096_p50_ms: float


class Report(Struct, frozen=True, kw_only=True):
    machine: Machine
    command: str
    started: str
    window_s: float
    warmup_s: float
    generator_ceiling: tuple[Measurement, ...]
    measurements: tuple[Measurement, ...]
    thresholds: tuple[Threshold, ...]


def percentile(ordered: Sequence[int] | Sequence[float], share: float) -> float:
    """The smallest of `ordered` (ascending, not empty) that at least `share` of them do not exceed."""
    return float(ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def pick(
    measurements: Iterable[Measurement], system: str, workload: str, connections: int, pipeline: int = 1
) -> list[Measurement]:
    return [
        one
        for one in measurements
        if (one.system, one.workload, one.connections, one.pipeline) == (system, workload, connections, pipeline)
    ]


def merge_rounds(measurements: Iterable[Measurement]) -> list[Measurement]:
    """One measurement for each point: that of the round whose throughput is the median one (the lower of two)."""
    points: dict[tuple[str, str, int, int], list[Measurement]] = {}
    for one in measurements:
        points.setdefault((one.system, one.workload, one.connections, one.pipeline), []).append(one)
    return [sorted(rounds, key=lambda one: one.per_second)[(len(rounds) - 1) // 2] for rounds in points.values()]


def median_per_second(rounds: Sequence[Measurement]) -> float | None:
    return median(one.per_second for one in rounds) if rounds else None


def median_p50_ms(rounds: Sequence[Measurement]) -> float | None:
    known = [one.p50_ms for one in rounds if one.p50_ms is not None]
    return median(known) if known else None
