"""`python -m bench core`: ours and the peers on one machine in one run, one of them up at a time.

Rounds, each starting every system anew: ours, then each peer. The first round measures the whole matrix, every round
what the thresholds need, and these use the medians over the rounds. So a moment in which the machine was busy with
something else decides nothing.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.console import Console

from bench import load, machine, report, workloads
from bench.cluster import Cluster
from bench.load import Load, Point
from bench.peers import Durations, Peer, open_peers
from bench.processes import Server, accepts, free_ports, wait_until
from bench.results import Measurement, Report
from bench.workloads import Kind

# What every round measures of ours, for the thresholds.
_EVERY_ROUND = (
    Point(kind=Kind.PUT, connections=1),
    Point(kind=Kind.PUT, connections=256),
    Point(kind=Kind.ORDER_HOT, connections=64),
)
_MATRIX = tuple(
    Point(kind=kind, connections=connections, pipeline=pipeline)
    for kind in Kind
    for connections, pipeline in ((1, 1), (64, 1), (256, 1), (64, 16))
)
_CEILING = (Point(kind=Kind.PUT, connections=256), Point(kind=Kind.ORDER_HOT, connections=64, pipeline=16))


class Options(Struct, frozen=True, kw_only=True):
    """What the command line chose."""

    peers: tuple[str, ...]
    endpoints: tuple[str, ...] = ()
    rounds: int = 3
    window_s: float = 10.0
    warmup_s: float = 2.0
    keys: int = 2000
    generators: int = 1
    kinds: tuple[Kind, ...] = tuple(Kind)
    scratch: Path | None = None
    json: Path | None = None


def run(options: Options, console: Console) -> Report:
    """Measure and report. Raises BenchError: a peer is missing, a request was refused, a node died."""
    durations = Durations(options.keys, options.warmup_s, options.window_s)
    peers = open_peers(options.peers, durations)
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=options.scratch) as name:
        scratch = Path(name)
        # PostgreSQL runs as another user and must get through to its own directory; nothing else is readable.
        os.chmod(scratch, 0o711)
        runner = _Runner(options, peers, scratch, console)
        described = machine.describe(scratch)
        ceiling = tuple(runner.ceiling())
        measurements = tuple(runner.rounds())
    result = Report(
        machine=described,
        command=report.command_line(sys.argv[1:]),
        started=started,
        window_s=options.window_s,
        warmup_s=options.warmup_s,
        generator_ceiling=ceiling,
        measurements=measurements,
        thresholds=report.thresholds(measurements),
    )
    report.show(result, console)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
        console.print(f"written to {options.json}")
    return result


class _Runner:
    def __init__(self, options: Options, peers: dict[str, Peer], scratch: Path, console: Console) -> None:
        self._options = options
        self._peers = peers
        self._scratch = scratch
        self._console = console
        self._load = Load(
            keys=options.keys,
            warmup_s=options.warmup_s,
            window_s=options.window_s,
            generators=options.generators,
            scratch=scratch,
        )
        # Tells the order ids of runs on one store apart; a store that is not ours may have seen others.
        self._runs = count(secrets.randbelow(9000) if options.endpoints else 0)

    def ceiling(self) -> Iterator[Measurement]:
        """What the generator can send, so that a reader sees whether it is the limit."""
        (port,) = free_ports(1)
        command = [sys.executable, "-m", "bench.answerer", str(port)]
        server = Server("answerer", command, self._scratch / "answerer.log", directory=Path(__file__).parent.parent)
        try:
            wait_until("the answering server", lambda: accepts(port) or None, [server])
            for point in _CEILING:
                pids = {"answerer": [server.pid]}
                yield load.measure("answerer", f"127.0.0.1:{port}", pids, point, self._load, next(self._runs))
        finally:
            server.stop()

    def rounds(self) -> Iterator[Measurement]:
        matrix = [point for point in _MATRIX if point.kind in self._options.kinds]
        repeated = [point for point in _EVERY_ROUND if point.kind in self._options.kinds]
        for turn in range(self._options.rounds):
            for one in self._ours(turn, matrix if turn == 0 else repeated):
                yield self._told(turn, one)
            for name, peer in self._peers.items():
                directory = self._scratch / f"{name}-{turn}"
                directory.mkdir()
                with ExitStack() as stack:
                    stack.callback(peer.stop)
                    peer.start(directory)
                    for one in peer.measure(everything=turn == 0):
                        yield self._told(turn, one)

    def _ours(self, turn: int, points: Sequence[Point]) -> Iterator[Measurement]:
        directory = self._scratch / f"kvstore-{turn}"
        directory.mkdir()
        cluster = Cluster(list(self._options.endpoints))
        with ExitStack() as stack:
            stack.callback(cluster.stop)
            cluster.start(directory)
            cluster.prepare(workloads.preparation(self._options.keys))
            for point in points:
                # Only nodes that we started are what the thresholds speak of.
                system = report.GIVEN if self._options.endpoints else report.OURS
                yield load.measure(system, cluster.leader, cluster.pids, point, self._load, next(self._runs))
                cluster.check()

    def _told(self, turn: int, one: Measurement) -> Measurement:
        pipeline = f" x {one.pipeline}" if one.pipeline > 1 else ""
        self._console.print(
            f"{time.strftime('%H:%M:%S')} round {turn + 1}: {one.system}, {one.workload}, {one.connections}{pipeline}: "
            f"{one.per_second:,.0f}/s, p50 {one.p50_ms or 0:.2f} ms",
            highlight=False,
            style="dim",
        )
        return msgspec.structs.replace(one, round=turn)
