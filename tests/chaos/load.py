"""The clients of a campaign: workers that run workloads, and the prober that measures unavailability.

One workload lasts for the whole campaign, the ledger: at its end everything that was ever acknowledged must be there.
The others (tests/workloads) come in epochs of half a minute: each epoch has keys of its own, and its histories are
judged when it is over, so that a violation is found soon and memory stays bounded. A worker goes from one epoch to the
next between two steps; an epoch is over when no worker is in it any more.

Workers wait a little between two steps, so that the machine is busy and not swamped: on a swamped one every figure
would be that of the machine's scheduler.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from random import Random
from typing import Any, cast

import kvstore
from kvstore import Client, OutcomeUnknown, Refused, Unavailable
from tests.chaos.backups import EVERY_S as BACKUP_EVERY_S
from tests.chaos.backups import Backups
from tests.chaos.meter import Meter
from tests.checkers.history import History
from tests.cluster.histories import Ledger, everything, write
from tests.workloads import all_workloads

# Longer than any outage here, so that nearly every request is sent again until it is answered: what is acknowledged at
# last is what is checked. A session lives 60 s.
TIMEOUT_S = 20.0
# Nobody but the prober's own patience ends its calls: after this it begins anew, as a user would who reloads.
PROBE_TIMEOUT_S = 2.0
PROBE_EVERY_S = 0.01
PROBE_KEY = b"probe"
# Long enough to span several faults, short enough to be judged within a fraction of a second.
EPOCH_S = 30.0
# Of every kind of workload in an epoch, and of the ledger.
WORKERS = 2
LEDGER_WORKERS = 4
CLIENTS = 4
LAG_LOOK_S = 0.01


class LedgerWorkload:
    """Keys with one writer each and counters with many (tests/cluster/histories.py): no acknowledged write lost, none
    applied twice, no transaction torn."""

    name = "ledger"

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._numbers: Counter[int] = Counter()
        self._wrong = ["the store was not read at the end"]

    async def step(self, kv: Client, worker: int, chance: Random) -> None:
        self._numbers[worker] += 1
        await write(kv, self._ledger, b"w%d" % worker, self._numbers[worker], chance)

    async def finish(self, kv: Client) -> None:
        floor = self._ledger.floor()
        found = await everything(kv)
        mine = (b"put/", b"sums/", b"receipt/", b"receipts/")
        self._wrong = self._ledger.judge({k: v for k, v in found.items() if k.startswith(mine)}, floor)

    def check(self) -> None:
        assert not self._wrong, f"{len(self._wrong)} contradictions:\n" + "\n".join(self._wrong[:20])


class Metered:
    """A client whose calls are timed. Everything else is the client's own."""

    def __init__(self, kv: Client, meter: Meter, now: Callable[[], float]) -> None:
        self._kv = kv
        self._meter = meter
        self._now = now

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._kv, name)
        return self._timed(method) if inspect.iscoroutinefunction(method) else method

    def _timed(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            began_at = self._now()
            try:
                result = await method(*args, **kwargs)
            except OutcomeUnknown:
                self._meter.unknown += 1
                raise
            except Unavailable:
                self._meter.unavailable += 1
                raise
            except Refused:
                self._meter.refused += 1
                raise
            self._meter.operation(began_at, self._now())
            return result

        return call


class _Epoch:
    """The workloads of half a minute."""

    def __init__(self, number: int, now: Callable[[], float], chance: Random, steps: int) -> None:
        self._history = History(now)
        prefix = b"epoch/%d/" % number
        self.workloads = all_workloads(self._history, chance, steps, timeout_s=TIMEOUT_S, prefix=prefix, backups=False)
        self.inside = 0
        self.is_over = False
        self.idle = asyncio.Event()

    def leave(self) -> None:
        self.inside -= 1
        self.look()

    def forget(self) -> None:
        """Entries and histories refer to each other: left to the collector, it would hold up the prober one day."""
        for history in (self._history, *(workload.history for workload in self.workloads)):
            history.entries.clear()

    def look(self) -> None:
        if self.is_over and not self.inside:
            self.idle.set()


class Load:
    """`start`, let it run, `stop`, `finish`; `failure` is set as soon as a worker met what it cannot explain, or a
    history cannot be."""

    def __init__(
        self,
        endpoints: Callable[[], str],
        meter: Meter,
        now: Callable[[], float],
        *,
        seed: int,
        pause_s: float,
        workers: int = WORKERS,
        epoch_s: float = EPOCH_S,
        backups: Path | None = None,
    ) -> None:
        """`endpoints` as they are now: members come and go. `backups`: a directory for them, if any are to be taken."""
        self._endpoints = endpoints
        self._meter = meter
        self._now = now
        self._seed = seed
        self._pause_s = pause_s
        self._workers = workers
        self._epoch_s = epoch_s
        self._ledger = LedgerWorkload()
        self._backups = Backups(backups, endpoints) if backups is not None else None
        self._clients: list[Client] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._judging: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self._epoch = self._new_epoch(1)
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.judged: Counter[str] = Counter()
        """By workload: how many of its histories were judged and hold."""
        self.longest_lag_s = 0.0
        """The longest time for which this process itself did not get to its work: no measured gap is finer."""

    async def start(self) -> None:
        """`workers` of each workload, those of the ledger, and the prober with a client of its own."""
        clients = [self._connect(TIMEOUT_S) for _ in range(CLIENTS)]
        metered = [cast(Client, Metered(kv, self._meter, self._now)) for kv in clients]
        for workload in self._epoch.workloads:
            await workload.set_up(clients[0])
        for worker in range(LEDGER_WORKERS):
            self._run(self._keep_ledger(metered[worker % CLIENTS], worker))
        for worker in range(self._workers * len(self._epoch.workloads)):
            self._run(self._work(metered[worker % CLIENTS], worker))
        self._run(self._turn_epochs(clients[0]))
        if self._backups is not None:
            self._run(self._back_up(self._backups, clients[0]))
        self._run(self._probe(self._connect(PROBE_TIMEOUT_S)))
        self._run(self._watch_lag())
        gc.collect()
        gc.freeze()  # modules and the like: no later collection need look at them

    async def stop(self) -> None:
        """Let every worker end its step."""
        self._over.set()
        await asyncio.gather(*self._tasks)

    async def finish(self) -> None:
        """The last reads, by a client that has seen nothing yet, and the last histories. Raises `Inconsistent`, or
        AssertionError."""
        async with kvstore.connect(self._endpoints(), timeout_s=TIMEOUT_S) as kv:
            await asyncio.gather(*self._judging)
            await self._judge(self._epoch, kv)
            await self._ledger.finish(kv)
            self._ledger.check()
            self.judged[self._ledger.name] += 1
            if self._backups is not None:
                await self._backups.take_last(kv)
                self.judged["backups"] += self._backups.taken

    async def close(self) -> None:
        self._over.set()
        tasks = [*self._tasks, *self._judging]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for kv in self._clients:
            await kv.close()
        if self.failure.done() and not self.failure.cancelled():
            self.failure.exception()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _connect(self, timeout_s: float) -> Client:
        self._clients.append(kvstore.connect(self._endpoints(), timeout_s=timeout_s))
        return self._clients[-1]

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self.failure.done():
            error = task.exception()
            if error is not None:
                self.failure.set_exception(error)

    def _new_epoch(self, number: int) -> _Epoch:
        kinds = len(all_workloads(History(self._now), Random(0), 1, backups=False))
        # A step takes about 5 ms here; it only decides how many products the sale has.
        steps = int(kinds * self._workers * self._epoch_s / (self._pause_s + 0.005))
        return _Epoch(number, self._now, Random(f"{self._seed}/epoch/{number}"), steps)

    async def _turn_epochs(self, kv: Client) -> None:
        number = 1
        while not await self._over_within(self._epoch_s):
            number += 1
            fresh = self._new_epoch(number)
            for workload in fresh.workloads:
                await workload.set_up(kv)
            gone, self._epoch = self._epoch, fresh
            judging = asyncio.create_task(self._judge(gone, kv))
            self._judging.add(judging)
            judging.add_done_callback(self._judging.discard)
            judging.add_done_callback(self._ended)

    async def _judge(self, epoch: _Epoch, kv: Client) -> None:
        epoch.is_over = True
        epoch.look()
        await epoch.idle.wait()
        for workload in epoch.workloads:
            await workload.finish(kv)
            await asyncio.to_thread(workload.check)
            self.judged[workload.name] += 1
        epoch.forget()

    async def _over_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._over.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _work(self, kv: Client, worker: int) -> None:
        chance = Random(f"{self._seed}/worker/{worker}")
        while not self._over.is_set():
            epoch = self._epoch
            epoch.inside += 1
            try:
                await epoch.workloads[worker % len(epoch.workloads)].step(kv, worker, chance)
            finally:
                epoch.leave()
            await asyncio.sleep(chance.uniform(0.5, 1.5) * self._pause_s)

    async def _keep_ledger(self, kv: Client, worker: int) -> None:
        chance = Random(f"{self._seed}/ledger/{worker}")
        while not self._over.is_set():
            await self._ledger.step(kv, worker, chance)
            await asyncio.sleep(chance.uniform(0.5, 1.5) * self._pause_s)

    async def _back_up(self, backups: Backups, kv: Client) -> None:
        while not await self._over_within(BACKUP_EVERY_S):
            await backups.take(kv)

    async def _probe(self, kv: Client) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            began_at = self._now()
            try:
                await kv.put(PROBE_KEY, b"%d" % number)
            except (OutcomeUnknown, Unavailable):
                continue
            ended_at = self._now()
            self._meter.probe(began_at, ended_at)
            await asyncio.sleep(max(0.0, began_at + PROBE_EVERY_S - ended_at))

    async def _watch_lag(self) -> None:
        while not self._over.is_set():
            before = self._now()
            await asyncio.sleep(LAG_LOOK_S)
            self.longest_lag_s = max(self.longest_lag_s, self._now() - before - LAG_LOOK_S)
