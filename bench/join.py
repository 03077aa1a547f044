"""A fourth node joins three that hold a gigabyte, under load: how long does it take, and who notices?

1. Three nodes with fsync are loaded. What they take in writes at most is found in some seconds.
2. From then on half of that arrives, at moments that do not depend on the answers: a write's latency counts from when
   it was due, so a pause shows in all that were due in it.
3. After a quiet while, `kvstore join` starts a new node, everything at its default. It is watched until it has its vote
   and has applied what the leader had committed.

Load and nodes share this machine, the new node as well: in production it brings cores and a disk of its own.

    python -m bench.join --help
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import uvloop
from msgspec import Struct
from rich.console import Console

import kvstore
from bench import bounds, bulk, machine
from bench.bounds import Bound
from bench.exits import exit_code
from bench.nodes import Nodes
from bench.results import BenchError, Machine, percentile
from kvstore import Client, KvError, PutResult
from kvstore.raft.snapshot import BYTES_PER_S

JOINED_S = 120.0
P99_RATIO = 5.0
NEW = "n4"

# Writes that are due go out in ticks of this length.
_TICK_S = 0.002
# Writes that may be unanswered at once: some seconds' worth. Past it the rate is not held, which the report says.
_UNANSWERED_MAX = 20_000
_ANSWER_S = 60.0
# Those that find the most: as many as the core benchmark has connections at the most.
_WRITERS_AT_MOST = 256
_VALUES = 100
_LOOK_S = 0.1
_SETTLED_S = 5.0
_RATE_HELD = 0.95


class Options(Struct, frozen=True, kw_only=True):
    """What the command line chose."""

    gigabytes: float = 1.0
    value_bytes: int = 1000
    share: float = 0.5
    # Long enough for the merging that so many writes cause: without it, half of the most is far more than half.
    most_s: float = 20.0
    quiet_s: float = 20.0
    joined_s: float = JOINED_S
    scratch: Path | None = None
    json: Path | None = None

    @property
    def records(self) -> int:
        return max(1, int(self.gigabytes * 1e9 / (bulk.KEY_BYTES + self.value_bytes)))


class Latencies(Struct, frozen=True, kw_only=True):
    """Of the writes that were due in one phase. `per_second` is what was answered."""

    writes: int
    per_second: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float


class Snapshot(Struct, frozen=True, kw_only=True):
    """What the new node's log says of it. `seconds` is from its offer until it was whole and verified."""

    size_bytes: int
    seconds: float


class Report(Struct, kw_only=True):
    machine: Machine
    command: str
    started: str
    options: Options
    throttle_bytes_per_s: int = BYTES_PER_S
    most_per_second: float = 0.0
    rate: float = 0.0
    quiet: Latencies | None = None
    joining: Latencies | None = None
    voter_s: float = 0.0
    joined_s: float = 0.0
    elections: int = 0
    snapshots: list[Snapshot] = []
    bounds: list[Bound] = []


class PacedWrites:
    """Writes that arrive at a rate, whatever becomes of them. Latencies by the moment at which each was due."""

    def __init__(self, kv: Client, rate: float, options: Options) -> None:
        self._kv = kv
        self._rate = rate
        self._records = options.records
        self._chance = random.Random(2)
        self._values = [self._chance.randbytes(options.value_bytes) for _ in range(_VALUES)]
        self._waiting: set[asyncio.Task[PutResult]] = set()
        self._over = False
        self._failed: BaseException | None = None
        # (due, latency), in seconds.
        self._answered: list[tuple[float, float]] = []
        self._task = asyncio.get_running_loop().create_task(self._write())

    async def end(self) -> None:
        """Send no more, and wait for all answers. Raises what a write raised."""
        self._over = True
        await self._task
        if self._waiting:
            await asyncio.wait(self._waiting)
        if self._failed is not None:
            raise self._failed

    def between(self, begin: float, end: float) -> Latencies:
        """Of those that were due between two moments. To be asked after `end`. Raises BenchError where the rate was
        not held: then the figures are those of another load."""
        taken = sorted(latency * 1000 for due, latency in self._answered if begin <= due < end)
        if len(taken) < _RATE_HELD * self._rate * (end - begin):
            raise BenchError(
                f"only {len(taken) / (end - begin):,.0f} writes a second were sent, of {self._rate:,.0f}: more than "
                f"{_UNANSWERED_MAX:,} were unanswered, or this process had no time"
            )
        return Latencies(
            writes=len(taken),
            per_second=len(taken) / (end - begin),
            p50_ms=percentile(taken, 0.5),
            p99_ms=percentile(taken, 0.99),
            p999_ms=percentile(taken, 0.999),
            max_ms=taken[-1],
        )

    async def _write(self) -> None:
        began = time.monotonic()
        sent = 0
        while not self._over and self._failed is None:
            now_due = int((time.monotonic() - began) * self._rate)
            while sent < now_due and len(self._waiting) < _UNANSWERED_MAX:
                self._send(began + sent / self._rate)
                sent += 1
            await asyncio.sleep(_TICK_S)

    def _send(self, due: float) -> None:
        key = bulk.key_of(self._chance.randrange(self._records))
        call = asyncio.get_running_loop().create_task(self._kv.put(key, self._chance.choice(self._values)))

        def answered(call: asyncio.Task[PutResult]) -> None:
            self._waiting.discard(call)
            self._answered.append((due, time.monotonic() - due))
            if not call.cancelled() and call.exception() is not None:
                self._failed = self._failed or call.exception()

        self._waiting.add(call)
        call.add_done_callback(answered)


class _Joining:
    """The new node, looked at from a thread, so that the load's loop is left alone."""

    def __init__(self, cluster: Nodes, limit_s: float, shown: Console) -> None:
        self._cluster = cluster
        self._limit_s = limit_s
        self._shown = shown
        self._over = threading.Event()
        self.voter_s = self.joined_s = 0.0

    def stop(self) -> None:
        self._over.set()

    def watch(self) -> None:
        """Start it, and wait until it has its vote and has caught up. Raises BenchError past the limit."""
        began = time.monotonic()
        address = self._cluster.join(NEW)
        committed = 0
        with self._shown.status(f"{NEW} joins") as line:
            while not self._over.wait(_LOOK_S):
                took_s = time.monotonic() - began
                self._cluster.check()
                leader = self._cluster.look(self._cluster.leader)
                applied = self._applied(address)
                line.update(f"{NEW} joins: {took_s:.0f} s, {applied:,} of {leader.commit_index:,} entries applied")
                if not self.voter_s and any(member.name == NEW and member.voter for member in leader.members):
                    self.voter_s, committed = took_s, leader.commit_index
                if self.voter_s and applied >= committed:
                    self.joined_s = took_s
                    return
                if took_s > self._limit_s:
                    raise BenchError(f"{NEW} has no vote after {took_s:.0f} s; the end of its log:\n{self._log_tail()}")

    def _applied(self, address: str) -> int:
        try:
            return self._cluster.look(address).applied_index
        except BenchError:  # not listening yet; `check` says if it ended
            return 0

    def _log_tail(self) -> str:
        return "\n".join(next(iter(_log_of_new(self._cluster)), "").splitlines()[-10:])


def _log_of_new(cluster: Nodes) -> list[str]:
    return [cluster.log(address).read_text() for address, name in cluster.names.items() if name == NEW]


def snapshots_in(log: str) -> list[Snapshot]:
    """The snapshots that a node received and installed, from its JSON log."""
    found = []
    offered: tuple[datetime, int] | None = None
    for line in log.splitlines():
        try:
            said = msgspec.json.decode(line, type=_LogLine)
        except msgspec.DecodeError:  # a traceback
            continue
        if said.event == "receiving a snapshot":
            offered = said.timestamp, said.size_bytes
        elif said.event == "installing a snapshot" and offered is not None:
            found.append(Snapshot(size_bytes=offered[1], seconds=(said.timestamp - offered[0]).total_seconds()))
            offered = None
    return found


class _LogLine(Struct, frozen=True, kw_only=True):
    event: str
    timestamp: datetime
    size_bytes: int = 0


async def _most(kv: Client, options: Options) -> float:
    """Writes a second, as fast as answers come."""
    chance = random.Random(1)
    values = [chance.randbytes(options.value_bytes) for _ in range(_VALUES)]
    began = time.monotonic()
    done = 0

    async def write() -> None:
        nonlocal done
        while time.monotonic() - began < options.most_s:
            await kv.put(bulk.key_of(chance.randrange(options.records)), chance.choice(values))
            done += 1

    await asyncio.gather(*(write() for _ in range(_WRITERS_AT_MOST)))
    return done / (time.monotonic() - began)


async def _measure(cluster: Nodes, options: Options, told: Report, console: Console) -> None:
    async with kvstore.connect(",".join(cluster.endpoints), timeout_s=_ANSWER_S) as kv:
        with console.status("finding how many writes it takes"):
            told.most_per_second = await _most(kv, options)
        told.rate = options.share * told.most_per_second
        console.print(f"{told.most_per_second:,.0f} writes/s at most; now {told.rate:,.0f}/s", highlight=False)
        writes = PacedWrites(kv, told.rate, options)
        joining = _Joining(cluster, 2 * options.joined_s, console)
        try:
            # What the search for the most left behind is not part of the quiet.
            await asyncio.sleep(_SETTLED_S)
            term = _term(cluster)
            quiet = time.monotonic()
            with console.status("a quiet while"):
                await asyncio.sleep(options.quiet_s)
            begin = time.monotonic()
            await asyncio.to_thread(joining.watch)
            end = time.monotonic()
        finally:
            joining.stop()
            await writes.end()
        told.elections = _term(cluster) - term
    told.quiet, told.joining = writes.between(quiet, begin), writes.between(begin, end)
    told.voter_s, told.joined_s = joining.voter_s, joining.joined_s
    told.snapshots = [one for log in _log_of_new(cluster) for one in snapshots_in(log)]


def _term(cluster: Nodes) -> int:
    """The highest that any node knows: an election that nobody won counts as well."""
    return max(cluster.look(address).term for address in cluster.names)


def judge(options: Options, told: Report) -> list[Bound]:
    assert told.quiet is not None
    assert told.joining is not None
    judged = [
        Bound(name="from the new node's start to its vote, caught up", value=told.joined_s, unit="s", below=JOINED_S),
        Bound(
            name="p99 of writes during the join, as a multiple of the quiet one",
            value=told.joining.p99_ms / told.quiet.p99_ms,
            unit="",
            digits=2,
            below=P99_RATIO,
        ),
        Bound(name="elections during the join", value=told.elections, unit="", digits=0, below=1),
        Bound(name="writes at most, a second", value=told.most_per_second, unit="/s", digits=0),
    ]
    for phase, seen in (("quiet", told.quiet), ("during the join", told.joining)):
        judged.append(Bound(name=f"writes a second, {phase}", value=seen.per_second, unit="/s", digits=0))
        for name, value_ms in (
            ("p50", seen.p50_ms),
            ("p99", seen.p99_ms),
            ("p99.9", seen.p999_ms),
            ("longest", seen.max_ms),
        ):
            judged.append(Bound(name=f"{name} of writes, {phase}", value=value_ms, unit="ms", digits=1))
    mb = 1e6
    judged.append(Bound(name="rate that a snapshot may take", value=BYTES_PER_S / mb, unit="MB/s"))
    for one in told.snapshots:
        judged.append(Bound(name="snapshot", value=one.size_bytes / mb, unit="MB"))
        judged.append(Bound(name="received and verified in", value=one.seconds, unit="s"))
        judged.append(Bound(name="which is", value=one.size_bytes / mb / one.seconds, unit="MB/s"))
    return judged


def run(options: Options, console: Console) -> int:
    """Start, measure, print. 0: every bound is held; 1: one is not. Raises BenchError."""
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=options.scratch) as name:
        scratch = Path(name)
        told = Report(
            machine=machine.describe(scratch),
            command=shlex.join(["python", "-m", "bench.join", *sys.argv[1:]]),
            started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            options=options,
        )
        cluster = Nodes()
        try:
            cluster.start(scratch)
            bulk.load_shown(",".join(cluster.endpoints), 0, options.records, options.value_bytes, console)
            cluster.find_leader()
            uvloop.run(_measure(cluster, options, told, console))
        except KvError as error:
            raise BenchError(f"a write failed: {error}") from error
        finally:
            cluster.stop()
    told.bounds = judge(options, told)
    code = bounds.show(told.bounds, f"A node joins three of {options.gigabytes:g} GB under load", console)
    if not told.snapshots:
        console.print("no snapshot was needed: the log still held everything")
    bounds.write_json(options.json, told, console)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every bound is held. 1: one is not. 2: the run could not be done."""
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="python -m bench.join", description=(__doc__ or "").splitlines()[0], epilog="See bench/README.md."
    )
    parser.add_argument("--gigabytes", type=float, default=defaults.gigabytes, help="of records (%(default)s)")
    parser.add_argument("--value-bytes", type=int, default=defaults.value_bytes, help="of a record (%(default)s)")
    parser.add_argument("--share", type=float, default=defaults.share, help="of the most, that arrives (%(default)s)")
    parser.add_argument("--most", type=float, default=defaults.most_s, help="seconds to find it (%(default)s)")
    parser.add_argument("--quiet", type=float, default=defaults.quiet_s, help="seconds before the join (%(default)s)")
    parser.add_argument("--scratch", type=Path, help="directory whose disk is measured (default: the temporary one)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    chosen = parser.parse_args(arguments)
    if not 0 < chosen.gigabytes <= 1000 or not 1 <= chosen.value_bytes <= 200_000 or not 0 < chosen.share <= 1:
        parser.error("gigabytes are above 0, a value has 1 to 200,000 bytes, a share is above 0 and at most 1")
    if min(chosen.most, chosen.quiet) < 0.2:
        parser.error("seconds are at least 0.2")
    options = Options(
        gigabytes=chosen.gigabytes,
        value_bytes=chosen.value_bytes,
        share=chosen.share,
        most_s=chosen.most,
        quiet_s=chosen.quiet,
        scratch=chosen.scratch,
        json=chosen.json,
    )
    console = Console() if sys.stdout.isatty() else Console(width=180)
    return exit_code(lambda: run(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
