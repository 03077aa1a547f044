"""Thousands of watches while others write: is each complete and in order, and what does it cost?

Every write matches one narrow watch (a prefix of its own) and all broad ones (everything). A write's value is its
number under its prefix and when it was sent, so a watcher sees at once what is missing, doubled or out of order, and
how late it is. Load and watchers share this process and the machine with the nodes.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

from msgspec import Struct
from rich.console import Console
from rich.table import Table

import kvstore
from bench.cluster import Cluster
from bench.results import BenchError
from kvstore import Client, KvError, PutResult

PREFIX = b"w/"
# Writes are sent in ticks of this length.
TICK_S = 0.005
# After the last write: what is late is on its way, what is lost never comes.
LAST_EVENTS_S = 20.0
# Writes that may be unanswered at once; past it the rate is not held, which the report says.
UNANSWERED_MAX = 2000


class Options(Struct, frozen=True):
    watches: int = 10_000
    connections: int = 100
    broad: int = 10
    rate: int = 2_000
    seconds: float = 60.0
    seed: int = 1
    growth_mb_max: float = 300.0


class Report(Struct):
    """`violations` is what was wrong: missing, doubled, out of order. Delays in seconds, from sending a write to having
    its event. `growth_mb` is the resident memory of each node at the end, less that before the first watch."""

    written: int = 0
    seconds: float = 0.0
    narrow_events: int = 0
    broad_events: int = 0
    opening_s: float = 0.0
    delay_p50_s: float = 0.0
    delay_p99_s: float = 0.0
    delay_max_s: float = 0.0
    growth_mb: tuple[float, ...] = ()
    violations: list[str] = []


class _Watcher:
    """Reads one watch, and notes what is wrong. `seen` counts by prefix."""

    def __init__(self, name: str, prefix: bytes, delays: list[float] | None) -> None:
        self.name = name
        self.prefix = prefix
        self.seen: dict[bytes, int] = {}
        self.count = 0
        self.wrong = ""
        self._delays = delays
        self._revision = 0

    async def read(self, kv: Client, standing: asyncio.Semaphore, opened: asyncio.Event) -> None:
        watch = kv.watch(prefix=self.prefix)
        async with standing:
            await watch.standing()
        opened.set()
        async for event in watch:
            assert event.record is not None, "nothing is deleted here"
            number, sent = event.record.value.split(b" ")
            before = self.seen.get(event.key, 0)
            if int(number) != before + 1 or event.revision < self._revision:
                self.wrong = self.wrong or f"{self.name}: {event.key!r} number {int(number)} after {before}"
            self.seen[event.key] = int(number)
            self._revision = event.revision
            self.count += 1
            if self._delays is not None:
                self._delays.append(time.monotonic() - float(sent))


async def measure(endpoints: str, pids: Sequence[int], options: Options) -> Report:
    """Run it against a cluster. `pids` are its nodes', if they are to be looked at."""
    report = Report(violations=[])
    before = [_resident_mb(pid) for pid in pids]
    clients = [await kvstore.connect(endpoints, timeout_s=20.0) for _ in range(options.connections)]
    writer = await kvstore.connect(endpoints, timeout_s=20.0)
    delays: list[float] = []
    narrow = [_Watcher(f"watch {n}", PREFIX + b"%06d/" % n, delays) for n in range(options.watches)]
    broad = [_Watcher(f"broad watch {n}", PREFIX, delays if n == 0 else None) for n in range(options.broad)]
    # A connection opens its own watches side by side, some at a time: a barrier serves many.
    standing = asyncio.Semaphore(1000)
    opened = [asyncio.Event() for _ in (*narrow, *broad)]
    began = time.monotonic()
    tasks = [
        asyncio.create_task(watcher.read(clients[number % len(clients)], standing, event))
        for number, (watcher, event) in enumerate(zip((*narrow, *broad), opened, strict=True))
    ]
    try:
        await _all_opened(tasks, opened)
        report.opening_s = time.monotonic() - began
        written = await _write(writer, options, report)
        await _settle(tasks, narrow, broad, written, report)
        report.growth_mb = tuple(_resident_mb(pid) - was for pid, was in zip(pids, before, strict=True))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in (*clients, writer):
            await client.close()
    delays.sort()
    if delays:
        report.delay_p50_s = delays[len(delays) // 2]
        report.delay_p99_s = delays[len(delays) * 99 // 100]
        report.delay_max_s = delays[-1]
    report.narrow_events = sum(watcher.count for watcher in narrow)
    report.broad_events = sum(watcher.count for watcher in broad)
    for pid, growth in zip(pids, report.growth_mb, strict=True):
        if growth > options.growth_mb_max:
            report.violations.append(
                f"node process {pid} grew by {growth:.0f} MB; the limit is {options.growth_mb_max:.0f}"
            )
    return report


async def _all_opened(tasks: list[asyncio.Task[None]], opened: list[asyncio.Event]) -> None:
    for event in opened:
        waiting = asyncio.ensure_future(event.wait())
        # Few end before they stand; whoever does says why.
        while not waiting.done():
            await asyncio.wait([waiting], timeout=1.0)
            for task in tasks:
                if task.done():
                    await task


async def _write(kv: Client, options: Options, report: Report) -> dict[bytes, int]:
    """Writes at the rate, each to one prefix. How many each got."""
    chance = Random(options.seed)
    written: dict[bytes, int] = {}
    waiting: set[asyncio.Task[PutResult]] = set()
    began = time.monotonic()
    sent = 0
    while (elapsed := time.monotonic() - began) < options.seconds:
        due = int(elapsed * options.rate)
        while sent < due and len(waiting) < UNANSWERED_MAX:
            key = PREFIX + b"%06d/k" % chance.randrange(options.watches)
            # One write of a key at a time would be in order by itself; a session keeps the order of those in flight.
            written[key] = written.get(key, 0) + 1
            value = b"%d %f" % (written[key], time.monotonic())
            call = asyncio.create_task(kv.put(key, value))
            waiting.add(call)
            call.add_done_callback(waiting.discard)
            sent += 1
        await asyncio.sleep(TICK_S)
    await asyncio.gather(*waiting)
    report.written, report.seconds = sent, time.monotonic() - began
    if sent < 0.95 * options.rate * options.seconds:
        report.violations.append(f"only {sent / report.seconds:.0f} writes a second were answered, of {options.rate}")
    return written


async def _settle(
    tasks: list[asyncio.Task[None]],
    narrow: list[_Watcher],
    broad: list[_Watcher],
    written: dict[bytes, int],
    report: Report,
) -> None:
    until = time.monotonic() + LAST_EVENTS_S
    total = sum(written.values())

    def complete() -> bool:
        return sum(watcher.count for watcher in narrow) >= total and all(watcher.count >= total for watcher in broad)

    while not complete() and time.monotonic() < until:
        for task in tasks:
            if task.done():
                await task  # raises why a watch ended
        await asyncio.sleep(TICK_S)
    for watcher in (*narrow, *broad):
        expected = {key: count for key, count in written.items() if key.startswith(watcher.prefix)}
        if watcher.wrong:
            report.violations.append(watcher.wrong)
        elif watcher.seen != expected:
            missing = sum(expected.values()) - sum(watcher.seen.values())
            report.violations.append(f"{watcher.name} misses {missing} events")


def _resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"process {pid} has no memory: it has ended")


def run(options: Options, console: Console) -> int:
    """Start a cluster, measure, print. 0: all is complete and in order, and within the limit; 1: not."""
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as scratch:
        cluster = Cluster([])
        try:
            cluster.start(Path(scratch))
            pids = [pid for group in cluster.pids.values() for pid in group]
            console.print(
                f"{options.watches} watches on {options.connections} connections, {options.broad} on everything, "
                f"{options.rate} writes/s for {options.seconds:g} s"
            )
            report = asyncio.run(measure(",".join(cluster.endpoints), pids, options))
        except KvError as error:
            raise BenchError(f"a watch or a write failed: {error}") from error
        finally:
            cluster.stop()
    table = Table("what", "is", box=None)
    table.add_row("writes", f"{report.written} in {report.seconds:.1f} s, {report.written / report.seconds:.0f}/s")
    table.add_row("opening all watches", f"{report.opening_s:.1f} s")
    table.add_row("events to narrow watches", str(report.narrow_events))
    table.add_row("events to broad watches", str(report.broad_events))
    delays = (report.delay_p50_s, report.delay_p99_s, report.delay_max_s)
    table.add_row("write to event, p50 / p99 / max", " / ".join(f"{delay * 1000:.1f} ms" for delay in delays))
    table.add_row("growth of the nodes", ", ".join(f"{growth:.0f} MB" for growth in report.growth_mb))
    console.print(table)
    for violation in report.violations[:20]:
        console.print(f"[red]{violation}[/red]", highlight=False)
    console.print("each watch was complete and in order" if not report.violations else "NOT as promised")
    return 1 if report.violations else 0
