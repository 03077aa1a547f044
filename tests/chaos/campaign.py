"""One campaign: a cluster under load, one fault after the other, and what it all came to.

The next fault comes when the cluster is whole again, so that each is measured by itself: its unavailability is the
longest time without an acknowledged write of the prober from its first effect until all nodes are together again.

What ends a campaign badly (`Violation`):
- a node's process that ended by itself;
- no write acknowledged within `WRITES_AGAIN_S` after a fault was undone, or a cluster not whole within `WHOLE_S`;
- a worker that met an error no client may meet;
- at the end: replicas that differ, a history that cannot be, a promise about leader kills that was not kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Protocol

import msgspec

from bench.results import percentile
from tests.chaos.cluster import ProxiedCluster
from tests.chaos.faults import Fault, KillLeader
from tests.chaos.load import Load
from tests.chaos.meter import Meter, Span, longest_gap, slowest
from tests.chaos.schedule import Planned, only_leader_kills, schedule
from tests.checkers.verdict import Inconsistent

# Writes go on as soon as a majority reaches each other, but for a client that waits for a deaf connection first (2 s),
# a node that starts (1 s), and a machine that is busy with other things.
WRITES_AGAIN_S = 15.0
WHOLE_S = 40.0
# Thirty in 20 minutes, in proportion; a campaign without them goes on until it has them, for so much longer at most.
LEADER_KILLS_PER_MINUTE = 1.5
LONGER_MAX = 0.25
# No step of a fault takes longer but where something hangs; joining and rolling restarts are the longest.
FAULT_S = 120.0
CONVERGE_S = 60.0
# Calls in doubt end after 20 s; then come the last reads, of a store of a few hundred thousand small records.
FINISH_S = 180.0
# Logs and stores of a cluster with small limits are a few megabytes; a store that grows without end is a fault too.
DISK_BYTES_MAX = 4 * 1024**3
_LOOK_S = 0.05


class Violation(Exception):
    """Something that must not happen. `rule` is what was broken."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule
        self.message = message


class Options(msgspec.Struct, frozen=True, kw_only=True):
    minutes: float = 20.0
    seed: int = 1
    nodes: int = 3
    workers: int = 2
    """Of each workload that comes in epochs."""
    pause_s: float = 0.02
    """Between two steps of a worker."""
    only: str = ""
    """Only kinds of fault with this in their names: to look at one closely."""
    main: str = "tests.cluster.small_limits"
    """What a node runs: the `kvstore` command with limits so small that logs are cut, stores flushed and snapshots
    sent all the time; or the command itself."""


class Watcher(Protocol):
    """Who is told how it goes: the terminal."""

    def planned(self, planned: Planned) -> None: ...

    def struck(self, fault: Fault) -> None: ...

    def over(self, span: Span) -> None: ...

    def says(self, text: str) -> None: ...


class _Nobody:
    """Watches nothing."""

    def planned(self, planned: Planned) -> None: ...

    def struck(self, fault: Fault) -> None: ...

    def over(self, span: Span) -> None: ...

    def says(self, text: str) -> None: ...


class Campaign:
    """Made, run once, then looked at: `spans`, `meter`, `violations`."""

    def __init__(
        self, options: Options, path: Path, watcher: Watcher | None = None, plan: Sequence[Planned] | None = None
    ) -> None:
        """`plan`: these faults, however long they take, and no promises about them; else what the seed says."""
        self.options = options
        self.path = path
        self._plan = plan
        self.watcher = watcher or _Nobody()
        self.meter = Meter()
        self.spans: list[Span] = []
        self.violations: list[Violation] = []
        self.judged: dict[str, int] = {}
        """By workload: how many of its histories were judged, and hold."""
        self.digest = ""
        self.lasted_s = 0.0
        self.longest_lag_s = 0.0
        self.longest_calm_s = 0.0
        """The longest time without an acknowledged write while there was no fault."""
        self._began = time.monotonic()
        self._fault: Fault | None = None

    def now(self) -> float:
        return time.monotonic() - self._began

    async def run(self) -> None:
        """Raises nothing for what it finds: see `violations`."""
        options = self.options
        async with ProxiedCluster(self.path, options.nodes, seed=options.seed, main=options.main) as cluster:
            self._began = time.monotonic()
            load = Load(
                lambda: cluster.endpoints, self.meter, self.now,
                seed=options.seed, workers=options.workers, pause_s=options.pause_s,
                backups=self.path / "backups",
            )  # fmt: skip
            try:
                await load.start()
                await self._until_it_fails(load.failure, cluster)
                self.lasted_s = self.now()
                if not self.violations:
                    await self._end(cluster, load)
            except Violation as violation:
                self.violations.append(violation)
            finally:
                self.lasted_s = self.lasted_s or self.now()
                self.longest_lag_s = load.longest_lag_s
                self.judged = dict(load.judged)
                await load.close()
                if self.violations:
                    cluster.show_logs()
        if self._plan is None and not self.violations:
            self.violations += [
                Violation("promise", f"{promise.text}: {promise.measured}")
                for promise in promises(self.spans, options)
                if not promise.kept
            ]

    # --- faults -------------------------------------------------------------------------------------------------------

    async def _until_it_fails(self, failure: asyncio.Future[None], cluster: ProxiedCluster) -> None:
        """Faults until the time is up. Raises Violation."""
        faults = asyncio.create_task(self._faults(cluster))
        watch = asyncio.create_task(self._watch(cluster))
        try:
            await asyncio.wait((faults, watch, failure), return_when=asyncio.FIRST_COMPLETED)
            for first in (watch, failure, faults):
                if first.done():
                    try:
                        first.result()
                    except Exception as error:
                        rule = "a client met what it must not" if first is failure else "a fault could not be done"
                        during = f" (during: {self._fault.kind}, {self._fault.note})" if self._fault else ""
                        raise _violation_of(error, rule, during) from error
        finally:
            for task in (faults, watch):
                task.cancel()
            await asyncio.gather(faults, watch, return_exceptions=True)

    async def _faults(self, cluster: ProxiedCluster) -> None:
        if self._plan is not None:
            for planned in self._plan:
                await self._one(cluster, planned)
            return
        lasts_s = 60 * self.options.minutes
        kills_min = 0 if self.options.only else int(LEADER_KILLS_PER_MINUTE * self.options.minutes)
        number = 0
        for planned in schedule(self.options.seed, self.options.only):
            if self.now() >= lasts_s:
                break
            await self._one(cluster, planned)
            number = planned.number
        more: Iterator[Planned] = only_leader_kills(self.options.seed, number)
        while self.leader_kills < kills_min and self.now() < lasts_s * (1 + LONGER_MAX):
            await self._one(cluster, next(more))

    @property
    def leader_kills(self) -> int:
        return sum(span.kind == KillLeader.kind for span in self.spans)

    async def _one(self, cluster: ProxiedCluster, planned: Planned) -> None:
        leader = await self._whole(cluster, "before")
        await self._writes_since(self.now(), "before a fault")
        calm_from = self.spans[-1].whole_at if self.spans else 0.0
        self.watcher.planned(planned)
        fault = self._fault = planned.fault(cluster, leader, Random(planned.chance_seed), self.now)
        try:
            async with asyncio.timeout(FAULT_S):
                await fault.begin()
                self.longest_calm_s = max(
                    self.longest_calm_s, longest_gap(self.meter.probe_acknowledged_at, calm_from, fault.struck_at)
                )
                self.watcher.struck(fault)
                await asyncio.sleep(planned.holds_s)
                if isinstance(fault, KillLeader):
                    # The two that are left elect one of them: the third's return must have no part in that.
                    await self._writes_since(fault.struck_at, fault.kind)
                await fault.end()
        except TimeoutError:
            raise Violation("a fault could not be done", f"{fault.kind} ({fault.note}) hung") from None
        ended_at = self.now()
        await self._writes_since(ended_at, fault.kind)
        await self._whole(cluster, f"after: {fault.kind} ({fault.note})")
        whole_at = self.now()
        gap_s = longest_gap(self.meter.probe_acknowledged_at, fault.struck_at, whole_at)
        slowest_s = slowest(self.meter.acknowledged_at, self.meter.latency_s, fault.struck_at, whole_at)
        self.spans.append(
            Span(planned.number, fault.kind, fault.note, fault.struck_at, ended_at, whole_at, gap_s, slowest_s)
        )
        self._fault = None
        self.watcher.over(self.spans[-1])
        if cluster.disk_bytes() > DISK_BYTES_MAX:
            raise Violation("bounded disk", f"the nodes' directories hold more than {DISK_BYTES_MAX} bytes")
        await asyncio.sleep(planned.calm_s)

    async def _writes_since(self, moment: float, what: str) -> None:
        """Wait until a write that began after a moment is acknowledged."""
        began = self.meter.probe_began_at
        while not began or began[-1] < moment:
            if self.now() - moment > WRITES_AGAIN_S:
                raise Violation("writes go on", f"none was acknowledged for {WRITES_AGAIN_S:g} s ({what})")
            await asyncio.sleep(_LOOK_S / 5)

    async def _whole(self, cluster: ProxiedCluster, when: str) -> str:
        try:
            return await cluster.whole(WHOLE_S)
        except AssertionError as error:
            raise Violation("the cluster comes together", f"{error} ({when})") from None

    async def _watch(self, cluster: ProxiedCluster) -> None:
        """No process ends but where a fault ends it."""
        while True:
            for name, node in list(cluster.nodes.items()):
                code = node.process.poll() if node.process is not None else None
                if code is not None and not (self._fault is not None and name in self._fault.may_end):
                    raise Violation(
                        "no node ends by itself", f"{name} ended with {code}; its log:\n{node.log()[-3000:]}"
                    )
            await asyncio.sleep(_LOOK_S)

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _end(self, cluster: ProxiedCluster, load: Load) -> None:
        self.watcher.says("faults are over: the last reads, and the replicas side by side")
        try:
            async with asyncio.timeout(FINISH_S):
                await load.stop()
                await load.finish()
        except Exception as error:
            raise _violation_of(error, "the last histories", "") from error
        await self._whole(cluster, "at the end")
        try:
            self.digest = await cluster.converged(CONVERGE_S)
        except AssertionError as error:
            raise Violation("replicas are equal", str(error)) from None


def _violation_of(error: Exception, rule: str, during: str) -> Violation:
    if isinstance(error, Violation):
        return error
    if isinstance(error, Inconsistent):
        return Violation(f"history: {error.rule}", error.message + during)
    return Violation(rule, f"{type(error).__name__}: {error}{during}")


class Promise(msgspec.Struct, frozen=True):
    """One line of what a campaign must show."""

    text: str
    measured: str
    kept: bool


LEADER_KILL_P95_S, LEADER_KILL_MAX_S = 1.5, 3.0
# Of fewer, a p95 is the maximum by another name.
KILLS_FOR_P95 = 20


def promises(spans: Sequence[Span], options: Options) -> list[Promise]:
    times = sorted(span.unavailable_s for span in spans if span.kind == KillLeader.kind)
    least = int(LEADER_KILLS_PER_MINUTE * options.minutes)
    found = []
    if not options.only:
        found.append(Promise(f"at least {least} leader kills", str(len(times)), len(times) >= least))
    if len(times) >= KILLS_FOR_P95:
        p95_s = percentile(times, 0.95)
        text = f"p95 of unavailability after a leader kill under {LEADER_KILL_P95_S:g} s"
        found.append(Promise(text, f"{p95_s:.2f} s", p95_s < LEADER_KILL_P95_S))
    if times:
        text = f"no unavailability after a leader kill over {LEADER_KILL_MAX_S:g} s"
        found.append(Promise(text, f"longest {times[-1]:.2f} s", times[-1] <= LEADER_KILL_MAX_S))
    return found
