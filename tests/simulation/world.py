"""One simulated cluster from its first start to its last check: machines, network, clients, faults.

`run(options)` is all that the campaign knows. A run

1. boots the cluster, waits for its first leader, sets the workloads up;
2. lets clients work while the nemesis (`faults.py`) breaks things, for `options.duration_s`;
3. heals everything, replaces what is broken for good, and demands progress within a bounded time;
4. checks what the clients saw, and that all replicas are the same.

Everything happens in virtual time on one thread, and follows from the seed: each consumer of chance has a generator
of its own, seeded in a fixed order. Product limits are made small for the run, so that segments, flushes, compactions
and snapshots happen within seconds.
"""

from __future__ import annotations

import asyncio
import time as real_time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from random import Random
from types import ModuleType
from typing import Any, NoReturn

from kvstore import model
from kvstore.client import watch as client_watch
from kvstore.client.client import Client
from kvstore.errors import KvError
from kvstore.model import Member
from kvstore.raft import engine, flush
from kvstore.raft import node as raft_node
from kvstore.raft.members import Configuration
from kvstore.raft.wal import Wal
from kvstore.server import watch as watch_hub
from kvstore.state import feed, sessions
from kvstore.state import machine as state_machine
from tests.checkers.history import History
from tests.checkers.history import Outcome as Answered
from tests.checkers.verdict import CheckBudgetExceeded, Inconsistent
from tests.fake_network import FakeNetwork, VirtualTime
from tests.simulation.autopsy import autopsy_of
from tests.simulation.checks import Checks
from tests.simulation.clients import CALL_TIMEOUT_S, Operator, SimulatedConnector, Worker
from tests.simulation.exam import examine
from tests.simulation.faults import Nemesis
from tests.simulation.loop import VirtualLoop
from tests.simulation.machine import Machine
from tests.simulation.outcome import Counts, Options, Outcome, Violation
from tests.simulation.story import Story
from tests.workloads import Workload, all_workloads

WORKERS = 5
# Mean pause of a worker between two operations; ten operations a second in all are enough for races, and cheap.
PAUSE_S = 0.25
# What comes of it where faults hold up half of them; only to size the workloads by.
STEPS_PER_S = 20
# A run of 60 s has at least 510 operations: it goes on for up to five times as long where it has fewer.
OPERATIONS_PER_S = 8.5
LONGER_MAX = 5
# After everything is healed: some times what the slowest of a hundred runs took (0.9 s to the first leader, 2 s to
# another, 4 s until all replicas hold the same, 7 s until what is lost is replaced).
FIRST_LEADER_S = 5.0
PROGRESS_S = 10.0
REPAIR_S = 30.0
# Some samples in each of the shortest elections.
SAMPLE_EVERY_S = 0.1
# A run that makes no end is a bug of the simulation: setup, duration, repair and last reads, with room.
ENDS_WITHIN_S = 600.0


def run(options: Options, print_line: Callable[[str], None] | None = None) -> Outcome:
    """Run one seed. What was wrong is in the outcome; an exception is a bug of the simulation itself."""
    began = real_time.perf_counter()
    if options.mutant:
        from tests.simulation.mutants import MUTANTS

        patched: Any = MUTANTS[options.mutant].applied()
    else:
        patched = nullcontext()
    chance = Random(f"{options.seed}/{options.nodes}")
    with patched, _small_limits(Random(chance.getrandbits(64))):
        world = World(options, chance, print_line)
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(world.loop)
        try:
            found = world.live()
        finally:
            asyncio._set_running_loop(outer)
    outcome = Outcome(options=options, counts=world.counts, at_s=world.time.now_s, story_digest=world.story.digest())
    outcome.real_s = real_time.perf_counter() - began
    if found is not None:
        outcome.rule, outcome.violation = found.rule, found.message
        outcome.story = autopsy_of(world, found)
    return outcome


@contextmanager
def _small_limits(chance: Random) -> Iterator[None]:
    """Product limits of the run: small ones, each from a range, so that everything that they bound happens."""
    segment_bytes = chance.choice([16, 32, 64]) * 1024

    class SmallWal(Wal):
        @classmethod
        def open(cls, *args: Any, **kwargs: Any) -> Wal:
            return super().open(*args, segment_bytes=segment_bytes, **kwargs)

    ttl_ms = chance.choice([1_500, 5_000, 60_000])
    values: list[tuple[ModuleType, str, object]] = [
        (sessions, "TTL_MS", ttl_ms),
        (state_machine, "TTL_MS", ttl_ms),
        # No entry of the workloads is as large: the engine would split it.
        (engine, "APPEND_BYTES_MAX", chance.choice([4, 4, 64, 4096]) * 1024),
        (raft_node, "Wal", SmallWal),
        (flush, "LOG_TAIL_BYTES", chance.choice([1, 4, 16]) * 1024),
        (state_machine, "FLUSH_REQUESTS", chance.choice([10, 40, 120, 2000])),
        # Watches whose frames hold an event or two, whose window is soon used up, and who fall behind.
        (watch_hub, "FRAME_BYTES", chance.choice([40, 200, 65536])),
        (watch_hub, "SLICE_CHANGES", chance.choice([1, 10, 512])),
        (feed, "_FRESH_BATCHES", chance.choice([1, 8])),
        (model, "WATCH_WINDOW_BYTES_MIN", 1),
        (client_watch, "WINDOW_BYTES", chance.choice([100, 2000, 1024 * 1024])),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in values]
    try:
        for module, name, value in values:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class World:
    """The cluster and all around it."""

    def __init__(self, options: Options, chance: Random, print_line: Callable[[str], None] | None = None) -> None:
        self.options = options
        self.chance = chance
        self.time = VirtualTime()
        self.network = FakeNetwork(self.time, chance=Random(chance.getrandbits(64)))
        self.network.enter = self._enter
        self.network.ready_at = self._ready_at
        self.loop = VirtualLoop(self.time.call_later, lambda: self.time.now_s, self._loop_failed)
        self.story = Story(lambda: self.time.now_s, print_line)
        self.counts = Counts(runs=1)
        self.found: Violation | None = None
        self.cluster_id = "simulated"
        # Some runs have patient clients: a session may expire while a call that began in it is still tried.
        self.call_timeout_s = chance.choice([CALL_TIMEOUT_S, 4.0 * CALL_TIMEOUT_S])
        self.is_over = False  # clients and faults stop
        # Elections up to the begin of the nemesis, and up to its end: the first one is no fault's, nor are the exam's.
        self._elections_before = 0
        self._elections_until: int | None = None
        self.machines: dict[str, Machine] = {}
        self.retired: list[Machine] = []
        self._machine_count = 0
        self._ambushes: dict[int, tuple[str, Callable[[Machine], None]]] = {}
        self._ambush_count = 0
        self.checks = Checks(self)
        self.history = History(lambda: self.time.now_s)
        self.workloads: list[Workload] = []
        self.workers: list[Worker] = []
        for _ in range(options.nodes):
            self.add_machine()
        self.nemesis = Nemesis(self)
        self.operator: Operator

    # --- the run ------------------------------------------------------------------------------------------------------

    def live(self) -> Violation | None:
        main = self.loop.create_task(self._main())
        try:
            self.time.run_until(lambda: main.done() or self.found is not None, within_s=ENDS_WITHIN_S)
            if self.found is None:
                main.result()
        except Violation as violation:
            self.found = self.found or violation
        finally:
            self._abandon(main)
        until = self.counts.elections if self._elections_until is None else self._elections_until
        self.counts.elections = until - self._elections_before
        history = self.history
        self.counts.client_operations = len(history.entries)
        self.counts.acknowledged = history.count(Answered.OK)
        self.counts.unknown = history.count(Answered.UNKNOWN, Answered.OPEN)
        self.counts.virtual_s = self.time.now_s
        self.counts.node_s = self.time.now_s * self.options.nodes
        return self.found

    def _abandon(self, main: asyncio.Task[None]) -> None:
        """Nothing of the run goes on after it; nobody is told of tasks that it leaves behind."""
        for machine in (*self.machines.values(), *self.retired):
            if machine.process is not None:
                machine.process.is_alive = False
        for task in asyncio.all_tasks(self.loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        if main.done() and not main.cancelled():
            main.exception()

    async def _main(self) -> None:
        initial = tuple(machine.endpoint for machine in self.machines.values())
        for machine in self.machines.values():
            machine.boot(initial)
        await self.wait(lambda: self.leader() is not None, FIRST_LEADER_S, "a first leader")
        self.operator = Operator(self)
        self.workloads = all_workloads(
            self.history,
            Random(self.chance.getrandbits(64)),
            int(self.options.duration_s * STEPS_PER_S),
            timeout_s=self.call_timeout_s,
        )
        for workload in self.workloads:
            await workload.set_up(self.operator.client)
        self.workers = [Worker(self, number, self.workloads, PAUSE_S) for number in range(1, WORKERS + 1)]
        enough = len(self.history.entries) + self.options.duration_s * OPERATIONS_PER_S
        self._elections_before = self.counts.elections
        self.nemesis.begin()
        self._sample_leadership()
        await asyncio.sleep(self.options.duration_s)
        # Where faults leave clients little to do, they go on until enough was asked, within bounds.
        while len(self.history.entries) < enough and self.time.now_s < LONGER_MAX * self.options.duration_s:
            await asyncio.sleep(1.0)
        self.is_over = True
        self.story.tell("world", "everything heals now")
        await self.nemesis.end()
        self._elections_until = self.counts.elections
        await self._settle()
        for worker in self.workers:
            await worker.ended()
        for workload in self.workloads:
            await workload.finish(self.operator.client)
        await self.operator.client.close()
        await asyncio.sleep(0.0)  # callbacks of the calls that this ended
        await self._quiet()
        self.checks.at_end()
        for workload in self.workloads:
            try:
                workload.check()
            except Inconsistent as wrong:
                self.violation(wrong.rule, wrong.message)
            except CheckBudgetExceeded as undecided:
                self.violation("undecided", f"{workload.name}: {undecided}")

    def _sample_leadership(self) -> None:
        if not self.is_over:
            self.counts.faulty_s += SAMPLE_EVERY_S
            self.counts.led_s += SAMPLE_EVERY_S if self.leader() is not None else 0.0
            self.later(SAMPLE_EVERY_S, self._sample_leadership)

    async def _settle(self) -> None:
        """Bring every member back, replace what is lost, and demand progress."""
        began_s = self.time.now_s
        await self.wait(lambda: not self.operator.is_busy, REPAIR_S, "the operator ends")
        removed = [machine for machine in self.machines.values() if machine.is_removed]
        self._revive_all()
        broken = [machine for machine in self.machines.values() if machine.is_broken]
        self.story.tell("world", "repair", broken=[machine.name for machine in broken])
        if len(broken) < len(self.machines):
            await self.wait(self._revived_leader, PROGRESS_S, "a leader once everything is healed")
            # Not those that were emptied: under their new ids they were no members.
            told = [machine for machine in removed if not machine.is_broken]
            await self.wait(
                lambda: not any(map(_knows_no_better, told)),
                PROGRESS_S,
                f"{' '.join(machine.name for machine in told)} hear that they were removed",
            )
        for machine in removed:
            self.retire(machine.name)
        while True:
            if self.time.now_s > began_s + REPAIR_S:
                self.violation("liveness", f"the cluster is not whole {REPAIR_S:.0f} s after everything was healed")
            todo = await self._next_repair()
            if todo is None:
                break
            self.operator.begin(*todo)
            await self.wait(lambda: not self.operator.is_busy, REPAIR_S, "the operator ends")
            self._revive_all()
        try:
            await self.operator.client.put(b"probe", b"%f" % self.time.now_s, timeout=PROGRESS_S)
        except KvError as error:
            self.violation("liveness", f"no write within {PROGRESS_S:.0f} s though everything is healed: {error!r}")
        await examine(self, Random(self.chance.getrandbits(64)))

    async def _next_repair(self) -> tuple[str, str] | None:
        """What keeps the configuration from being the machines that there are."""
        try:
            status = await self.operator.client.status(timeout=PROGRESS_S)
        except KvError as error:
            self.violation("liveness", f"no status within {PROGRESS_S:.0f} s though everything is healed: {error!r}")
        members = {member.name: member for member in status.members}
        for name in members:
            machine = self.machines.get(name)
            if machine is None:
                return "leave", name
            if machine.is_broken:
                return "replace", name
        for name, machine in list(self.machines.items()):
            member = members.get(name)
            if member is None and machine.is_broken:
                self.retire(name)
            elif member is None or not member.voter:
                return "join", name
        return None

    def _revived_leader(self) -> Machine | None:
        """One that found its disk full a moment ago may stop yet: the operator restarts it again."""
        self._revive_all()
        return self.leader()

    def _revive_all(self) -> None:
        for machine in self.machines.values():
            node = machine.node
            if node is not None and node.raft.failure is not None:
                machine.switch_off()
            if machine.process is None and not machine.is_broken:
                machine.boot()

    async def _quiet(self) -> None:
        """Wait until all members hold the same."""

        def same() -> bool:
            nodes = [machine.node for machine in self.machines.values()]
            applied = {node.machine.applied_index for node in nodes if node is not None}
            last = {node.raft.status().last_index for node in nodes if node is not None}
            return None not in nodes and len(applied) == 1 and applied == last

        await self.wait(same, PROGRESS_S, "all replicas hold the same")

    # --- for faults, clients, checks ----------------------------------------------------------------------------------

    def violation(self, rule: str, message: str, error: BaseException | None = None) -> NoReturn:
        """Something must not be. Ends the run, even where product code swallows the exception."""
        if error is not None:
            lines = traceback.format_exception(error)
            message = f"{message}\n{''.join(lines[-6:])}"
        violation = Violation(rule, message)
        if self.found is None:
            self.found = violation
            self.story.tell("checks", "VIOLATION", rule=rule)
        raise violation

    def leader(self) -> Machine | None:
        """The machine that leads in the highest term, if one does."""
        best: Machine | None = None
        for machine in self.machines.values():
            node = machine.node
            if (
                node is not None
                and node.raft.is_leader
                and (best is None or best.node is None or node.raft.term > best.node.raft.term)
            ):
                best = machine
        return best

    def client(self, connector: SimulatedConnector) -> Client:
        endpoints = [machine.client_address for machine in self.machines.values()]
        return Client(
            endpoints,
            timeout_s=self.call_timeout_s,
            connector=connector,
            chance=Random(self.chance.getrandbits(64)),
        )

    def add_machine(self, name: str = "") -> Machine:
        self._machine_count += 1
        machine = Machine(self, name or f"n{self._machine_count}", self._machine_count)
        assert machine.name not in self.machines
        self.machines[machine.name] = machine
        return machine

    def retire(self, name: str) -> None:
        """Its member was removed: the machine is switched off, and never comes back."""
        machine = self.machines.pop(name, None)
        if machine is not None:
            machine.switch_off()
            machine.is_broken = machine.is_broken or "retired"
            self.retired.append(machine)

    def booted(self, machine: Machine) -> None:
        self.checks.booted(machine)
        self.nemesis.booted(machine)

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that nobody waits for: what it raises is a violation."""

        def ended(task: asyncio.Task[Any]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None and not isinstance(error, Violation):
                self.violation("client", f"a task of the operator or of a fault raised {error!r}", error)

        task = self.loop.create_task(coroutine)
        task.add_done_callback(ended)
        return task

    def later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> None:
        self.time.call_later(delay_s, callback, *args)

    def ambush(self, event: str, action: Callable[[Machine], None]) -> None:
        """Once, when a node next logs something that contains `event`, do `action(its machine)`."""
        self._ambush_count += 1
        self._ambushes[self._ambush_count] = (event, action)

    def clear_ambushes(self) -> None:
        self._ambushes.clear()

    def heard(self, machine: Machine, event: str) -> None:
        for number, (awaited, action) in list(self._ambushes.items()):
            if awaited in event:
                del self._ambushes[number]
                action(machine)

    async def wait(self, condition: Callable[[], object], within_s: float, what: str) -> None:
        """Let time pass until the condition holds; not to reach it in time is a violation."""
        until_s = self.time.now_s + within_s
        while not condition():
            if self.time.now_s > until_s:
                self.violation("liveness", f"{what}: not within {within_s:.0f} virtual seconds; {self._states()}")
            await asyncio.sleep(0.01)

    def _states(self) -> str:
        lines = []
        for machine in self.machines.values():
            node = machine.node
            if node is None:
                lines.append(f"{machine.name} down {machine.is_broken}")
            else:
                status = node.raft.status()
                lines.append(
                    f"{machine.name} {status.role} term={status.term} commit={status.commit_index} "
                    f"applied={status.applied_index} last={status.last_index} {status.storage_error}"
                )
        return "; ".join(lines)

    # --- hooks --------------------------------------------------------------------------------------------------------

    def _enter(self, host: str, callback: Callable[..., object], *args: Any) -> None:
        machine = self.machines.get(host)
        if machine is None:
            callback(*args)  # a client's
        elif machine.process is not None:
            machine.process.enter(callback, *args)

    def _ready_at(self, host: str) -> float:
        machine = self.machines.get(host)
        return 0.0 if machine is None else machine.ready_at_s

    def _loop_failed(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if self.found is None and not isinstance(error, Violation):
            self.violation("client", f"in a client's task: {context}", error)


def _knows_no_better(machine: Machine) -> bool:
    """It runs, though it was removed, and was a member by all that it has applied, or a voter by its log. (A learner
    that has not applied that it is one cannot tell whether it ever was: it may still be joining.)"""
    node = machine.node
    if node is None or node.raft.failure is not None or machine.name not in member_names(node.raft.members):
        return False
    applied = node.machine.members
    return any(member.name == machine.name and member.voter for member in node.raft.members) or (
        bool(applied) and Configuration.decode(applied).get(machine.name) is not None
    )


def member_names(members: tuple[Member, ...]) -> list[str]:
    return [member.name for member in members]
