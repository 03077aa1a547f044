"""Millions of records: how soon does a killed node come back, what memory does a node take, and do rates hold?

Two clusters of three nodes with fsync. One holds few records, which all lie in every cache; the other many. They are
measured in turns, so that a moment in which the machine was busy decides nothing; the one that has no turn only beats.

1. Load both. On the way, at `restart_records`, kill nodes of the large one and start them again: a follower several
   times, the leader, all three at once. Before each kill there are writes, so that something has to be replayed.
2. Load the large one to `records`, and look at its nodes' memory.
3. Rounds of uniform reads and writes, of the kinds and connections of the core benchmark, with an eye on memory.

    python -m bench.scale --help
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from msgspec import Struct
from rich.console import Console
from rich.table import Table

from bench import bounds, bulk, machine, uniform
from bench.bounds import Bound
from bench.exits import exit_code
from bench.load import Point
from bench.memory import Memory, MemoryWatch, memory_of
from bench.nodes import Nodes
from bench.results import Machine
from bench.uniform import Round, UniformSpec
from bench.workloads import Kind

RECORD_BYTES = 200
RESTART_S = 5.0
RESIDENT_MB = 600.0
RATIO = 0.70

# Of the core benchmark: the connections that its figures are quoted for, and the most that it asks of a node.
POINTS = (
    Point(kind=Kind.PUT, connections=256),
    Point(kind=Kind.PUT, connections=64, pipeline=16),
    Point(kind=Kind.GET, connections=64),
    Point(kind=Kind.GET, connections=64, pipeline=16),
    Point(kind=Kind.GET_LOCAL, connections=64),
    Point(kind=Kind.GET_LOCAL, connections=64, pipeline=16),
)
# The share is judged for linearizable requests that are sent one after another on each connection. Local reads and
# pipelines are for information: they cost 7 to 16 us where every record lies in a cache, and to find one that does not
# takes RocksDB 4 to 5.
JUDGED = tuple(point for point in POINTS if point.pipeline == 1 and point.kind is not Kind.GET_LOCAL)
# Nodes that together use less of a core than this have nothing left to compact.
_QUIET_CORES = 0.15
_QUIET_WITHIN_S = 120.0
_QUIET_LOOK_S = 0.5
# Other processes of this machine that use more than this make figures too low.
_OTHERS_CORES = 0.1


class Options(Struct, frozen=True, kw_only=True):
    """What the command line chose."""

    records: int = 5_000_000
    restart_records: int = 1_000_000
    small: int = 10_000
    record_bytes: int = RECORD_BYTES
    kills: int = 3
    kinds: tuple[Kind, ...] = (Kind.PUT, Kind.GET, Kind.GET_LOCAL)
    rounds: int = 5
    window_s: float = 3.0
    warmup_s: float = 1.0
    scratch: Path | None = None
    json: Path | None = None

    @property
    def points(self) -> list[Point]:
        return [point for point in POINTS if point.kind in self.kinds]


class Restart(Struct, frozen=True, kw_only=True):
    """`seconds` from the start of the process until it has caught up with a living leader."""

    who: str
    records: int
    seconds: float


class NodeMemory(Struct, frozen=True, kw_only=True):
    """Of one node of the large cluster: `most_mb` is the highest VmRSS that was seen, `highest_mb` VmHWM."""

    when: str
    node: str
    most_mb: float
    highest_mb: float


class Report(Struct, kw_only=True):
    machine: Machine
    command: str
    started: str
    options: Options
    load_seconds: float = 0.0
    loaded_records: int = 0
    restarts: list[Restart] = []
    memory: list[NodeMemory] = []
    rounds: list[Round] = []
    # What other processes used during the rounds, in cores.
    others_cores: float = 0.0
    bounds: list[Bound] = []


class _Run:
    def __init__(self, options: Options, told: Report, console: Console) -> None:
        self._options = options
        self._report = told
        self._console = console
        self._value_bytes = options.record_bytes - bulk.KEY_BYTES
        self._seed = 0

    def measure(self, scratch: Path) -> None:
        with ExitStack() as stack:
            small, large = Nodes(), Nodes()
            for cluster, name in ((small, "small"), (large, "large")):
                (scratch / name).mkdir()
                stack.callback(cluster.stop)
                cluster.start(scratch / name)
            self._load(small, 0, self._options.small)
            at = min(self._options.restart_records, self._options.records)
            self._load(large, 0, at)
            if self._options.kills:
                self._restart_all_ways(large, at)
            self._load(large, at, self._options.records)
            self._note_memory(large, "right after the load")
            self._quiet([*small.all_pids(), *large.all_pids()])
            self._note_memory(large, "after the load, at rest")
            self._rates(small, large)
            self._note_memory(large, "after reads and writes")
            if self._options.kills:
                self._restart(large, "a follower", large.followers[:1], self._options.records)

    # --- loading ------------------------------------------------------------------------------------------------------

    def _load(self, cluster: Nodes, first: int, last: int) -> None:
        if last <= first:
            return
        endpoints = ",".join(cluster.endpoints)
        took_s = bulk.load_shown(endpoints, first, last, self._value_bytes, self._console)
        cluster.find_leader()
        self._report.load_seconds += took_s
        self._report.loaded_records += last - first

    def _quiet(self, pids: Sequence[int]) -> None:
        """Wait until the nodes have nothing to do any more. What goes on for too long is part of the measurement."""
        until = time.monotonic() + _QUIET_WITHIN_S
        used = _QUIET_CORES
        with self._console.status("waiting for the nodes to come to rest"):
            while used >= _QUIET_CORES and time.monotonic() < until:
                before = machine.cpu_seconds(pids)
                time.sleep(_QUIET_LOOK_S)
                used = (machine.cpu_seconds(pids) - before) / _QUIET_LOOK_S
        if used >= _QUIET_CORES:
            self._say(f"the nodes still use {used:.2f} cores after {_QUIET_WITHIN_S:.0f} s without a request")

    # --- restarts -----------------------------------------------------------------------------------------------------

    def _restart_all_ways(self, cluster: Nodes, records: int) -> None:
        for turn in range(self._options.kills):
            self._restart(cluster, "a follower", [cluster.followers[turn % 2]], records)
        self._restart(cluster, "the leader", [cluster.leader], records)
        self._restart(cluster, "all three", list(cluster.endpoints), records)

    def _restart(self, cluster: Nodes, who: str, addresses: list[str], records: int) -> None:
        # At most what stays unflushed (50,000 requests), so that a restart has as much to replay as it may have.
        self._round(cluster, POINTS[0], records)
        with self._console.status(f"killing {who}"):
            took_s = cluster.bring_back(addresses)
        self._report.restarts.append(Restart(who=who, records=records, seconds=took_s))
        self._say(f"{who} killed and back at {records:,} records: {took_s:.2f} s")

    # --- memory -------------------------------------------------------------------------------------------------------

    def _note_memory(self, cluster: Nodes, when: str) -> None:
        looks = {address: memory_of(cluster.pid(address)) for address in cluster.endpoints}
        for address, look in looks.items():
            self._note(cluster, address, when, look.resident_mb, look)
        self._say(f"{when}: " + ", ".join(f"{look.resident_mb:.0f} MB" for look in looks.values()))

    def _note(self, cluster: Nodes, address: str, when: str, most_mb: float, look: Memory) -> None:
        node = f"{cluster.names[address]}{', leader' if address == cluster.leader else ''}"
        self._report.memory.append(NodeMemory(when=when, node=node, most_mb=most_mb, highest_mb=look.highest_mb))

    # --- rates --------------------------------------------------------------------------------------------------------

    def _rates(self, small: Nodes, large: Nodes) -> None:
        pids = [*small.all_pids(), *large.all_pids()]
        began, others = time.monotonic(), _others_seconds(pids)
        for point in self._options.points:
            watches = {address: MemoryWatch([large.pid(address)]) for address in large.endpoints}
            with ExitStack() as stack:
                for watch in watches.values():
                    stack.enter_context(watch)
                for turn in range(self._options.rounds):
                    for cluster, records in ((small, self._options.small), (large, self._options.records)):
                        one = self._round(cluster, point, records)
                        self._report.rounds.append(one)
                        self._say(
                            f"round {turn + 1}: {_named(point)}, {records:,} records: {one.per_second:,.0f}/s, "
                            f"p50 {one.p50_ms:.2f} ms"
                        )
            for address, watch in watches.items():
                self._note(large, address, f"during {_named(point)}", watch.most_mb, memory_of(large.pid(address)))
        self._report.others_cores = (_others_seconds(pids) - others) / (time.monotonic() - began)

    def _round(self, cluster: Nodes, point: Point, records: int) -> Round:
        self._seed += 1
        one = uniform.measure(
            UniformSpec(
                address=cluster.leader,
                kind=point.kind,
                connections=point.connections,
                pipeline=point.pipeline,
                records=records,
                value_bytes=self._value_bytes,
                seed=self._seed,
                warmup_s=self._options.warmup_s,
                window_s=self._options.window_s,
            )
        )
        cluster.check()
        return one

    def _say(self, text: str) -> None:
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, style="dim")


def _others_seconds(pids: Sequence[int]) -> float:
    """CPU time that was used by neither these processes, nor us, nor the load that we have waited for."""
    ours = os.times()
    return machine.busy_seconds() - machine.cpu_seconds(pids) - sum(ours[:4])


def judge(options: Options, told: Report) -> list[Bound]:
    """The figures that count, with their bounds: from the slowest restart, the largest node, the medians of rates."""
    judged = []
    for who, records in dict.fromkeys((one.who, one.records) for one in told.restarts):
        took = [one.seconds for one in told.restarts if (one.who, one.records) == (who, records)]
        bounded = who == "a follower"
        name = f"{who} back after SIGKILL, {records:,} records" + (f", slowest of {len(took)}" if len(took) > 1 else "")
        judged.append(Bound(name=name, value=max(took), unit="s", digits=2, below=RESTART_S if bounded else None))
    for when in dict.fromkeys(one.when for one in told.memory):
        most_mb = max(one.most_mb for one in told.memory if one.when == when)
        judged.append(Bound(name=f"memory of a node {when}", value=most_mb, unit="MB", digits=0, below=RESIDENT_MB))
    if told.memory:
        highest_mb = max(one.highest_mb for one in told.memory)
        judged.append(Bound(name="memory of a node, VmHWM", value=highest_mb, unit="MB", digits=0))
    for point in options.points:
        few, many = (_rate(told, point, records) for records in (options.small, options.records))
        if few and many:
            name = f"{_named(point)}: {options.records:,} records as a share of {options.small:,}"
            at_least = RATIO if point in JUDGED else None
            judged.append(Bound(name=name, value=many / few, unit="", digits=2, at_least=at_least))
    return judged


def _rate(told: Report, point: Point, records: int) -> float:
    return uniform.median_rate(_rounds_of(told, point, records)) if _rounds_of(told, point, records) else 0.0


def _rounds_of(told: Report, point: Point, records: int) -> list[Round]:
    where = (point.kind, point.connections, point.pipeline, records)
    return [one for one in told.rounds if (one.kind, one.connections, one.pipeline, one.records) == where]


def _named(point: Point) -> str:
    return f"{point.kind} at {point.connections}" + (f" x {point.pipeline}" if point.pipeline > 1 else "")


def _rates_table(options: Options, told: Report) -> Table:
    table = Table(title="Uniform over all records; medians, and the rounds' range", title_justify="left", box=None)
    table.add_column("workload", no_wrap=True)
    for column in ("records", "per second", "lowest", "highest", "p50 ms", "p99 ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in options.points:
        for records in (options.small, options.records):
            rounds = sorted(_rounds_of(told, point, records), key=lambda one: one.per_second)
            if rounds:
                middle = rounds[(len(rounds) - 1) // 2]
                rates = (uniform.median_rate(rounds), rounds[0].per_second, rounds[-1].per_second)
                table.add_row(
                    _named(point),
                    f"{records:,}",
                    *(f"{rate:,.0f}" for rate in rates),
                    f"{middle.p50_ms:.2f}",
                    f"{middle.p99_ms:.2f}",
                )
    return table


def run(options: Options, console: Console) -> int:
    """Start, measure, print. 0: every bound is held; 1: one is not. Raises BenchError."""
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=options.scratch) as name:
        told = Report(
            machine=machine.describe(Path(name)),
            command=shlex.join(["python", "-m", "bench.scale", *sys.argv[1:]]),
            started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            options=options,
            restarts=[],
            memory=[],
            rounds=[],
        )
        _Run(options, told, console).measure(Path(name))
    told.bounds = judge(options, told)
    console.print(_rates_table(options, told))
    console.print(
        f"loaded {told.loaded_records:,} records of {options.record_bytes} bytes, "
        f"{told.loaded_records / told.load_seconds:,.0f}/s",
        highlight=False,
    )
    if told.others_cores > _OTHERS_CORES:
        console.print(
            f"[yellow]Other processes used {told.others_cores:.2f} cores during the rounds: rates are too low, and "
            "ratios as good as their ranges say.[/yellow]",
            highlight=False,
        )
    code = bounds.show(told.bounds, "Size: each figure is the worst that was seen; ratios are of medians", console)
    bounds.write_json(options.json, told, console)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every bound is held. 1: one is not. 2: the run could not be done."""
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description=(__doc__ or "").splitlines()[0], epilog="See bench/README.md."
    )
    parser.add_argument("--records", type=int, default=defaults.records, help="default: %(default)s")
    parser.add_argument(
        "--restart-records", type=int, default=defaults.restart_records, help="kill nodes at so many (%(default)s)"
    )
    parser.add_argument("--small", type=int, default=defaults.small, help="records that compare (%(default)s)")
    parser.add_argument("--record-bytes", type=int, default=defaults.record_bytes, help="with its key (%(default)s)")
    parser.add_argument("--kills", type=int, default=defaults.kills, help="of a follower; 0: of nobody (%(default)s)")
    parser.add_argument("--workloads", default=",".join(defaults.kinds), help="of %(default)s")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="of each point (default: %(default)s)")
    parser.add_argument("--window", type=float, default=defaults.window_s, help="seconds of a round (%(default)s)")
    parser.add_argument("--warmup", type=float, default=defaults.warmup_s, help="seconds before it (%(default)s)")
    parser.add_argument("--scratch", type=Path, help="directory whose disk is measured (default: the temporary one)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    chosen = parser.parse_args(arguments)
    if min(chosen.records, chosen.restart_records, chosen.small, chosen.rounds) < 1 or chosen.kills < 0:
        parser.error("records, restart-records, small and rounds are at least 1, kills at least 0")
    if not bulk.KEY_BYTES < chosen.record_bytes <= 100_000:
        parser.error(f"a record has {bulk.KEY_BYTES + 1} to 100,000 bytes")
    if chosen.window < 0.1 or chosen.warmup < 0:
        parser.error("a window is at least 0.1 s, a warm-up at least 0")
    kinds = tuple(kind for kind in defaults.kinds if kind in chosen.workloads.split(","))
    if len(kinds) != len(chosen.workloads.split(",")):
        parser.error(f"workloads are of {', '.join(defaults.kinds)}")
    options = Options(
        records=chosen.records,
        restart_records=chosen.restart_records,
        small=chosen.small,
        record_bytes=chosen.record_bytes,
        kills=chosen.kills,
        kinds=kinds,
        rounds=chosen.rounds,
        window_s=chosen.window,
        warmup_s=chosen.warmup,
        scratch=chosen.scratch,
        json=chosen.json,
    )
    # Into a file or a pipe the tables keep the width that they need.
    console = Console() if sys.stdout.isatty() else Console(width=180)
    return exit_code(lambda: run(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
