"""Redis: one node, every write fsynced before it is answered (appendfsync always), loaded by redis-benchmark.

For information, not for a threshold: it is one node written in C without replicas to wait for.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from bench import machine, workloads
from bench.peers import Durations
from bench.processes import Server, accepts, free_ports, require, run_tool, wait_until
from bench.results import BenchError, Measurement

SYSTEM = "Redis (1 node, appendfsync always)"
# (redis-benchmark's test, our name, connections, pipeline, requests per second of window): it runs a count, not a
# time; these counts last about as long as the window here, and a few times longer or shorter elsewhere.
_POINTS = (
    ("set", "put", 1, 1, 4_000),
    ("set", "put", 64, 1, 50_000),
    ("set", "put", 256, 1, 70_000),
    ("set", "put", 64, 16, 400_000),
    ("get", "get-local", 64, 1, 70_000),
    ("get", "get-local", 256, 1, 80_000),
)
# Longer than any of the counts takes on a disk whose sync takes 10 ms.
_TOOL_S = 300.0


class Redis:
    def __init__(self, durations: Durations) -> None:
        self._durations = durations
        self._redis = require("redis", "redis-server")
        self._benchmark = require("redis", "redis-benchmark")
        self._server: Server | None = None
        self._port = 0

    def start(self, scratch: Path) -> None:
        (self._port,) = free_ports(1)
        command = [self._redis, "--port", str(self._port), "--bind", "127.0.0.1", "--dir", str(scratch)]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", "--daemonize", "no"]
        self._server = Server("Redis", command, scratch / "redis.log")
        wait_until("Redis to answer", lambda: accepts(self._port) or None, [self._server])

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def measure(self, everything: bool) -> Iterator[Measurement]:
        if not everything:
            return  # no threshold needs it
        for test, workload, connections, pipeline, per_second in _POINTS:
            yield self._load(test, workload, connections, pipeline, round(per_second * self._durations.window_s))

    def _load(self, test: str, workload: str, connections: int, pipeline: int, count: int) -> Measurement:
        assert self._server is not None
        command = [self._benchmark, "-h", "127.0.0.1", "-p", str(self._port), "-t", test, "-n", str(count), "--csv"]
        command += ["-d", str(workloads.VALUE_BYTES), "-r", str(self._durations.keys)]
        command += ["-c", str(connections), "-P", str(pipeline)]
        before, busy_before = machine.cpu_seconds([self._server.pid]), machine.busy_seconds()
        times_before = os.times()
        printed = run_tool(command, timeout_s=_TOOL_S)
        times = os.times()
        used, busy = machine.cpu_seconds([self._server.pid]) - before, machine.busy_seconds() - busy_before
        tool = times.children_user + times.children_system - times_before.children_user - times_before.children_system
        self._server.check()
        rows = list(csv.DictReader(printed.splitlines()))
        if len(rows) != 1:
            raise BenchError(f"redis-benchmark printed no result:\n{printed[-800:]}")
        per_second = float(rows[0]["rps"])
        return Measurement(
            system=SYSTEM,
            workload=workload,
            connections=connections,
            pipeline=pipeline,
            seconds=count / per_second,
            operations=count,
            per_second=per_second,
            p50_ms=float(rows[0]["p50_latency_ms"]),
            p99_ms=float(rows[0]["p99_latency_ms"]),
            cpu_us_per_op={"nodes": used * 1e6 / count, "generator": tool * 1e6 / count},
            others_cores=max(0.0, busy - used - tool) * per_second / count,
        )
