"""The parent's side of a load: generator processes started together, CPU looked at when the window opens and closes."""

from __future__ import annotations

import subprocess
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
from msgspec import Struct

from bench import generator, machine
from bench.generator import Outcome, Spec
from bench.results import BenchError, Measurement, percentile
from bench.workloads import Kind

# From the word to all generators until the load starts to count as warm-up; they only have to read one line.
_START_S = 0.05


class Point(Struct, frozen=True, kw_only=True):
    """One place in the matrix."""

    kind: Kind
    connections: int
    pipeline: int = 1


class Load(Struct, frozen=True, kw_only=True):
    """How every point is loaded."""

    keys: int
    warmup_s: float
    window_s: float
    generators: int
    scratch: Path


def measure(
    system: str, address: str, pids: Mapping[str, Sequence[int]], point: Point, load: Load, run: int
) -> Measurement:
    """Load one point and say what came of it. `pids`: processes whose CPU is reported, by their name in the report.
    Raises BenchError when a request is refused or the server goes away."""
    with ExitStack() as stack:
        # No more processes than connections, and connections shared out evenly.
        count = min(load.generators, point.connections)
        shares = [point.connections // count + (turn < point.connections % count) for turn in range(count)]
        children = []
        for turn, share in enumerate(shares):
            spec = Spec(
                address=address,
                kind=point.kind,
                connections=share,
                pipeline=point.pipeline,
                keys=load.keys,
                run=run,
                first_connection=sum(shares[:turn]),
                samples=str(load.scratch / f"samples-{turn}"),
            )
            child = _Child(spec)
            stack.callback(child.end)
            children.append(child)
        for child in children:
            child.wait_ready()
        begin = time.monotonic() + _START_S + load.warmup_s
        end = begin + load.window_s
        for child in children:
            child.go(int(begin * 1e9), int(end * 1e9))
        watched = {**pids, "generator": [child.pid for child in children]}
        _sleep_until(begin)
        before, busy_before = _cpu(watched), machine.busy_seconds()
        _sleep_until(end)
        after, busy_after = _cpu(watched), machine.busy_seconds()
        latencies_ns = sorted(latency for child in children for latency in child.finish())
    if not latencies_ns:
        raise BenchError(f"no {point.kind} request was answered within {load.window_s:.1f} s")
    used = {name: after[name] - before[name] for name in watched}
    operations = len(latencies_ns)
    return Measurement(
        system=system,
        workload=point.kind,
        connections=point.connections,
        pipeline=point.pipeline,
        seconds=load.window_s,
        operations=operations,
        per_second=operations / load.window_s,
        p50_ms=percentile(latencies_ns, 0.5) / 1e6,
        p99_ms=percentile(latencies_ns, 0.99) / 1e6,
        p999_ms=percentile(latencies_ns, 0.999) / 1e6,
        cpu_us_per_op={name: seconds * 1e6 / operations for name, seconds in used.items()},
        # Known only where all of the servers' processes are.
        others_cores=max(0.0, busy_after - busy_before - sum(used.values())) / load.window_s if pids else None,
    )


class _Child:
    """One generator process and the few lines that are said to it."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._process = subprocess.Popen(
            [sys.executable, "-m", generator.__name__, msgspec.json.encode(spec).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        line = self._line()
        if line != "ready":
            self._outcome(line)

    def go(self, begin_ns: int, end_ns: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{begin_ns} {end_ns}\n")
        self._process.stdin.flush()

    def finish(self) -> array[int]:
        outcome = self._outcome(self._line())
        latencies_ns = array("q")
        with open(self._spec.samples, "rb") as file:
            latencies_ns.fromfile(file, outcome.operations)
        self._process.wait()
        return latencies_ns

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _line(self) -> str:
        # Bounded by the generator itself: it fails whatever takes longer than its ANSWER_S.
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _outcome(self, line: str) -> Outcome:
        if not line:
            raise BenchError(f"a generator process ended without a word (code {self._process.wait()})")
        outcome = msgspec.json.decode(line, type=Outcome)
        if outcome.error:
            raise BenchError(outcome.error)
        return outcome


def _cpu(watched: Mapping[str, Sequence[int]]) -> dict[str, float]:
    return {name: machine.cpu_seconds(pids) for name, pids in watched.items()}


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
