"""One computer of the cluster: its disk, its clocks, and the process that runs on it now and then.

`Machine` survives its processes: disk and clocks go on. `Process` is one run of the real `ServerNode`; whatever it
scheduled dies with it. All of its code is entered through `Process.run`, one callback at a time, and

- dies where its disk stops it (`Stopped`, in the middle of a file operation);
- does not run while the machine is blocked: paused, or in a slow fsync, or in a slow apply;
- is looked at by the checks after each callback.

Time as a process sees it: its monotonic clock runs a little fast or slow, its wall clock may jump.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from kvstore.env import Environment
from kvstore.errors import StartupError
from kvstore.model import Member
from kvstore.server.assembly import build_node
from kvstore.server.node import ServerNode, ServerOptions
from tests.fake_files import FaultyFile, FaultyFiles, Stopped, keep_random
from tests.fake_network import run
from tests.simulation.loop import VirtualLoop
from tests.simulation.outcome import Violation
from tests.simulation.storage import FileStorage

if TYPE_CHECKING:
    from tests.simulation.world import World

# Crystals differ by 0.02 %; twenty-five times that leaves nothing to luck.
DRIFT_MAX = 0.005
# What a hop to a thread and back takes, as the design measured it beside a busy loop; drawn anew each time.
THREAD_MIN_S, THREAD_MAX_S = 0.0002, 0.010
DATA_DIR = "/data"
# What a node may say, and stop taking part, or not start, while its disk fails or is full.
DISK_FAILURES = frozenset({"storage_failed", "startup_failed"})
# Batches after which the storage flushes by itself: seldom, as RocksDB does, but in each run.
OWN_FLUSH_SHARE = 0.005


class MachineClock:
    """Monotonic and wall clock of one machine. Within a callback that blocks (a slow fsync) time goes on."""

    def __init__(self, machine: Machine, rate: float) -> None:
        self._machine = machine
        self._time = machine.world.time
        self._rate = rate
        self.jump_ms = 0
        self._stall_readings = 0
        self._stall_share = self._stall_s = 0.0
        self._has_stalled = False

    def stalls(self, readings: int, share: float, seconds: float) -> None:
        """Of the next so many readings, at this share, the process stands still for so long before it goes on."""
        self._stall_readings, self._stall_share, self._stall_s = readings, share, seconds
        self._has_stalled = False

    def monotonic(self) -> float:
        machine = self._machine
        if self._stall_readings:
            self._stall_readings -= 1
            if machine.chance.random() < self._stall_share:
                machine.block(self._stall_s)
                if not self._has_stalled:
                    self._has_stalled = True
                    machine.world.nemesis.stalled()
        now_s = self._time.now_s
        if machine.ready_at_s > now_s:
            now_s = machine.ready_at_s
        return (now_s + machine.thread_lag_s) * self._rate

    def wall_ms(self) -> int:
        return self._time.wall_ms() + self.jump_ms

    def elapse_s(self, delay_s: float) -> float:
        """How long a delay by this clock takes in real (virtual) time."""
        return delay_s / self._rate


class _Handle:
    """Something that a process will do. May be cancelled until it is done, also while its machine is blocked."""

    __slots__ = ("args", "callback", "timer")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args
        self.timer: Any = None

    def cancel(self) -> None:
        self.callback = None
        if self.timer is not None:
            self.timer.cancel()


class Process:
    """One life of a node; its scheduler, its loop and its environment."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.is_alive = True
        self._time = machine.world.time
        self._clock = machine.clock
        self.loop = VirtualLoop(self.call_later, machine.clock.monotonic, self._loop_failed)
        self.env = Environment(
            machine.clock, machine.chance, self, machine.world.network.host(machine.name), machine.files
        )

    # --- env.Scheduler ------------------------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[..., object], *args: Any) -> _Handle:
        lag_s = self.machine.ready_at_s - self._time.now_s
        return self._call_later(lag_s if lag_s > 0.0 else 0.0, callback, args)

    def call_later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> _Handle:
        lag_s = self.machine.ready_at_s - self._time.now_s
        return self._call_later((lag_s if lag_s > 0.0 else 0.0) + self._clock.elapse_s(delay_s), callback, args)

    def _call_later(self, delay_s: float, callback: Callable[..., object], args: tuple[Any, ...]) -> _Handle:
        handle = _Handle(callback, args)
        handle.timer = self._time.call_later(delay_s, self._due, handle)
        return handle

    def _due(self, handle: _Handle) -> None:
        machine, callback = self.machine, handle.callback
        if callback is None or not self.is_alive:
            return
        if machine.ready_at_s > self._time.now_s:
            handle.timer = self._time.call_at(machine.ready_at_s, self._due, handle)
        else:
            self.enter(callback, *handle.args)

    def run_in_thread(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """The work is done at once, so a sync covers what was written before it; what it makes durable is so, and
        `done` is called, only when the thread has had its time."""
        machine = self.machine
        result: Any = None
        error: BaseException | None = None
        token = machine.files.begin_deferred()
        machine.in_thread = True
        try:
            result = work()
        except Exception as raised:
            error = raised
        finally:
            machine.in_thread = False
            took_s, machine.thread_lag_s = machine.thread_lag_s, 0.0
            machine.files.end_deferred(token)

        def ended() -> None:
            machine.files.commit(token)
            done(result, error)

        chance = machine.chance
        took_s += THREAD_MIN_S + (THREAD_MAX_S - THREAD_MIN_S) * chance.random() ** 4
        self._time.call_later(took_s, self.run, ended)

    # --- its code -----------------------------------------------------------------------------------------------------

    def run(self, callback: Callable[..., object], *args: Any) -> None:
        """Enter this process's code, once its machine runs."""
        self._due(_Handle(callback, args))

    def enter(self, callback: Callable[..., object], *args: Any) -> None:
        machine = self.machine
        if not self.is_alive:
            return
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(self.loop)
        try:
            callback(*args)
        except Stopped:
            machine.stopped_inside()
            return
        except Violation:
            raise
        except Exception as error:
            machine.world.violation("no exception", f"a callback of {machine.name} raised {error!r}", error)
        finally:
            asyncio._set_running_loop(outer)
        if self.is_alive:
            machine.world.checks.observe(machine)

    def _loop_failed(self, context: dict[str, Any]) -> None:
        if self.is_alive:
            error = context.get("exception")
            if isinstance(error, Stopped):
                self.machine.stopped_inside()
                return
            self.machine.world.violation("no exception", f"in a task of {self.machine.name}: {context}", error)


class StoryLog:
    """A process's structured log, told as part of the story; `heard` is for faults that wait for a moment."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def info(self, event: str, /, **fields: Any) -> None:
        machine = self._machine
        machine.world.story.tell(machine.name, event, **fields)
        machine.world.heard(machine, event)

    warning = error = info


class _Disk(FaultyFiles):
    """Tells when it fails: from then on its machine's node may say so, and the fault counts."""

    machine: Machine

    def open(self, path: str, create: bool = False) -> FaultyFile:
        super().open(path, create)
        return _DiskFile(self, self._inode(path), path)

    def take_sync_failure(self) -> bool:
        fails = super().take_sync_failure()
        if fails:
            self.fails("failing sync")
        return fails

    def fails(self, kind: str) -> None:
        machine = self.machine
        machine.expected_failures |= DISK_FAILURES
        machine.world.nemesis.met(machine, kind)


class _DiskFile(FaultyFile):
    _files: _Disk

    def write_at(self, *arguments: Any) -> None:
        try:
            super().write_at(*arguments)
        except OSError as error:
            self._failed(error)
            raise

    def allocate(self, size_bytes: int) -> None:
        try:
            super().allocate(size_bytes)
        except OSError as error:
            self._failed(error)
            raise

    def _failed(self, error: OSError) -> None:
        if error.errno == errno.ENOSPC:
            self._files.fails("full disk")


class _Storage(FileStorage):
    """Its machine may be slow at applying; and, as RocksDB does, it may flush by itself after any batch."""

    machine: Machine

    def write(self, batch: Any) -> None:
        super().write(batch)
        machine = self.machine
        if machine.apply_takes_s:
            machine.block(machine.apply_takes_s)
            machine.world.nemesis.met(machine, "slow apply")
        if machine.chance.random() < OWN_FLUSH_SHARE and machine.may_flush:
            self.flush()


class Machine:
    """One computer. `node` is the running process's, None while it is down."""

    def __init__(self, world: World, name: str, number: int) -> None:
        self.world = world
        self.name = name
        self.chance = Random(world.chance.getrandbits(64))
        self.files = self._new_disk(Random(world.chance.getrandbits(64)))
        self.peer_address = f"127.0.0.{number}:7410"
        self.client_address = f"127.0.0.{number}:7420"
        self.ready_at_s = 0.0
        self.in_thread = False
        self.thread_lag_s = 0.0
        self.apply_takes_s = 0.0
        self.clock = MachineClock(self, 1.0 + DRIFT_MAX * (2.0 * self.chance.random() - 1.0))
        self.process: Process | None = None
        self.node: ServerNode | None = None
        self.starting: ServerNode | None = None
        # Codes with which this machine's node may stop taking part; a fault adds them when it strikes.
        self.expected_failures: set[str] = set()
        # Why its disk is of no more use: nothing of it may be needed again, and it is to be replaced.
        self.is_broken = ""
        # Something on its disk has rotten, and may not have been found yet.
        self.is_rotten = False
        # No member any more; it may still run, and is switched off some time later.
        self.is_removed = False
        self.stops_by_power_loss = False
        self.members: tuple[Member, ...] = ()

    @property
    def is_up(self) -> bool:
        return self.node is not None

    @property
    def endpoint(self) -> Member:
        return Member(self.name, self.peer_address, self.client_address, "", voter=True)

    @property
    def may_flush(self) -> bool:
        """Nothing else flushes now."""
        if self.node is None:
            return False
        raft: Any = self.node.raft
        return not raft._flush.running and not raft._snapshots.taking

    def block(self, seconds: float) -> None:
        """Nothing of this machine's code runs for so long; called by a fault, or from inside by a slow fsync."""
        if self.in_thread:
            self.thread_lag_s += seconds
        else:
            self.ready_at_s = max(self.ready_at_s, self.world.time.now_s) + seconds

    # --- life ---------------------------------------------------------------------------------------------------------

    def boot(self, members: tuple[Member, ...] | None = None) -> bool:
        """Start the node; False where it refuses to, or dies in its start. `members` are those to begin with."""
        assert self.process is None
        if members is not None:
            self.members = members
        world = self.world
        world.network.revive(self.name)
        self.ready_at_s = world.time.now_s
        self.process = process = Process(self)
        options = ServerOptions(
            name=self.name,
            data_dir=DATA_DIR,
            cluster_id=world.cluster_id,
            members=self.members,
            peer_listen=self.peer_address,
            client_listen=self.client_address,
        )
        world.nemesis.booting(self)
        self.starting = node = build_node(options, process.env, StoryLog(self), self._open_storage)
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(process.loop)
        try:
            run(node.start())
        except Stopped:
            self.stopped_inside()
            return False
        except StartupError as error:
            world.story.tell(self.name, "refused to start", code=error.code, message=error.message)
            if error.code not in self.expected_failures:
                world.violation("starts again", f"{self.name} refuses to start: {error} [{error.code}]", error)
            self._gone(silently=False)
            self.files.kill()
            if error.code != "startup_failed":  # a disk that only failed for now
                self.is_broken = self.is_broken or error.code
            return False
        except Exception as error:
            if not isinstance(error, Violation):
                world.violation("no exception", f"{self.name} raised {error!r} in its start", error)
            raise
        finally:
            asyncio._set_running_loop(outer)
            self.starting = None
        self.node = node
        if self.files.capacity_bytes is None and not self.files.sync_failures_due:
            self.expected_failures -= DISK_FAILURES
        world.story.tell(self.name, "up", term=node.raft.term, applied=node.machine.applied_index)
        world.booted(self)
        return True

    def _open_storage(self, path: str, read_only: bool = False) -> Any:
        storage = _Storage(self.files, path, read_only)
        storage.machine = self
        return storage

    def wipe(self) -> None:
        """All that was on the disk is gone; nothing may rely on this machine again under its present name and id."""
        assert self.process is None
        self.files = self._new_disk(Random(self.chance.getrandbits(64)))
        self.is_broken = "wiped"

    def _new_disk(self, chance: Random) -> _Disk:
        disk = _Disk(chance)
        disk.machine = self
        disk.on_slow = self.block
        return disk

    def kill(self) -> None:
        """SIGKILL: what was written stays written."""
        self._died("killed", power_loss=False)

    def switch_off(self) -> None:
        """By the operator: no fault, but as sudden as a SIGKILL."""
        if self.process is not None:
            self.world.story.tell(self.name, "switched off")
            self._gone(silently=False)
            self.files.kill()

    def lose_power(self) -> None:
        """What was not synced is kept, lost or torn, sector by sector; nobody is told."""
        self._died("power lost", power_loss=True)

    def stopped_inside(self) -> None:
        self._died("stopped inside a file operation", power_loss=self.stops_by_power_loss)
        self.world.nemesis.stopped_inside(self)

    def _died(self, how: str, *, power_loss: bool) -> None:
        if self.process is None:
            return
        self.world.story.tell(self.name, how)
        self.world.counts.crashes += 1
        self._gone(silently=power_loss)
        if power_loss:
            self.files.crash(keep_random(self.files.chance))
        else:
            self.files.kill()

    async def stop(self) -> None:
        """SIGTERM: the node's own orderly end."""
        node, process = self.node, self.process
        assert node is not None
        assert process is not None
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(task: asyncio.Task[None]) -> None:
            error = task.exception()
            if isinstance(error, Stopped):
                self.stopped_inside()
            elif error is not None:
                self.world.violation("no exception", f"{self.name} raised {error!r} in its stop", error)
            if not ended.done():
                ended.set_result(None)

        process.run(lambda: process.loop.create_task(node.stop()).add_done_callback(done))
        await self.world.wait(lambda: ended.done() or not process.is_alive, within_s=30.0, what=f"{self.name} stops")
        if process.is_alive:
            self.world.story.tell(self.name, "stopped")
            self._gone(silently=False)
            self.files.kill()

    def _gone(self, *, silently: bool) -> None:
        process = self.process
        assert process is not None
        if self.node is not None:
            self.world.checks.crashed(self)
        process.is_alive = False
        self.process = self.node = None
        self.world.network.kill(self.name, silently=silently)
        self.ready_at_s = 0.0
        self.thread_lag_s = 0.0
        self.in_thread = False
