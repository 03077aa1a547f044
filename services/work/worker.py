"""A worker: finds steps that are due, claims them one by one, and has their handlers do them.

Any number of workers run at once, in any number of processes. Each holds one lease; all its claims are under it. If the
worker dies they go with the lease, and others go on; if it loses the lease and lives, it stops what it is at.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

import structlog
from prometheus_client import CollectorRegistry

import kvstore
from services.web import tracing
from services.web.ids import now_ms
from services.web.leases import forget_lost
from services.work.metrics import WorkMetrics
from services.work.steps import (
    UNREADABLE,
    Again,
    AlsoParked,
    ClaimLost,
    Ending,
    Park,
    Step,
    StepRun,
    park_unread,
    read_step,
    step_at,
    steps_of,
)

# A dead worker's steps wait so long for another one; a keep-alive goes out three times meanwhile.
LEASE_S: Final = 10.0
# Steps wait for the network, not for a processor; more at once would wait at the provider.
AT_ONCE_MAX: Final = 32
# Looked for so often though no event came: also what another worker claimed, and died.
LOOK_EVERY_S: Final = 2.0
LOOK_AT: Final = 512  # more than a dozen workers may be at, so that what they leave is always seen
PAUSE_S: Final = 1.0

STORE_REFUSED: Final = "store_refused"
INTERNAL: Final = "internal"

Handler = Callable[[StepRun], Awaitable[None]]
log = structlog.get_logger("services.work")


class Worker:
    def __init__(
        self,
        store: kvstore.Client,
        handlers: Mapping[str, Handler],
        *,
        queue: str = "",
        lease_s: float = LEASE_S,
        chance: random.Random | None = None,
        also_parked: AlsoParked | None = None,
        metrics: WorkMetrics | None = None,
    ) -> None:
        self._store = store
        self._handlers = handlers
        self._queue = queue
        self._steps = steps_of(queue)
        self._lease_s = lease_s
        self._also_parked = also_parked
        self._chance = chance or random.Random()
        self._metrics = metrics or WorkMetrics(CollectorRegistry(), handlers)
        self._is_working = False  # it has a lease, and has seen what is due
        # By kind and subject, not by key: the same subject may be due twice, as a webhook may ask for what is asked for
        # already, and a claim is by subject.
        self._running: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._woken = asyncio.Event()

    @property
    def why_not_working(self) -> str:
        """Why it takes no steps now; empty: it does."""
        return "" if self._is_working else "This worker has no lease now, or has not seen yet what is due"

    async def run(self) -> None:
        """Work until cancelled. Outages of the store are sat out."""
        while True:
            try:
                await self._work_under_a_lease()
            except* kvstore.KvError as group:  # a task group's, or the lease's own
                log.warning("worker waits for the store", errors=[str(error) for error in group.exceptions])
                await asyncio.sleep(PAUSE_S)

    async def _work_under_a_lease(self) -> None:
        lost = asyncio.Event()
        async with self._store.lease(self._lease_s, on_lost=lost.set) as lease, asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch())
            losing = group.create_task(lost.wait())
            try:
                while not lost.is_set():
                    self._woken.clear()
                    next_due_s = await self._start_due(group, lease.id)
                    self._is_working = True
                    waking = asyncio.ensure_future(self._woken.wait())
                    await asyncio.wait((waking, losing), timeout=next_due_s, return_when=asyncio.FIRST_COMPLETED)
                    waking.cancel()
                self._metrics.lease_lost()
                log.warning("worker lost its lease", running=len(self._running))
            finally:
                self._is_working = False
                for task in (watching, losing, *self._running.values()):
                    task.cancel()

    async def _watch(self) -> None:
        """Be woken by each new step."""
        while True:
            try:
                async with self._store.watch(prefix=self._steps, deletes=False) as events:
                    async for _ in events:
                        self._woken.set()
            except kvstore.KvError:
                await asyncio.sleep(PAUSE_S)  # looking every few seconds does without

    async def _start_due(self, group: asyncio.TaskGroup, lease: int) -> float:
        """Begin what is due, as far as there is room. How many seconds to wait if nothing happens."""
        now = now_ms()
        found = await self._store.range(self._steps, b"%b%016d0" % (self._steps, now), limit=LOOK_AT)
        read = [(await self._read(record), record.mod_revision) for record in found.records]
        due = [(step, revision) for step, revision in read if step is not None]
        # The key of one that asks to look at once holds no time.
        self._metrics.oldest_due(min((max(step.due_ms, step.created_ms) for step, _ in due), default=None))
        self._chance.shuffle(due)  # so that workers seldom want the same one
        for step, revision in due:
            if len(self._running) >= AT_ONCE_MAX:
                break
            name = (step.kind, step.subject)
            if name in self._running:
                continue
            task = group.create_task(self._do(step, revision, lease))
            self._running[name] = task
            task.add_done_callback(partial(self._done, name))
        end = kvstore.prefix_end(self._steps)
        following = await self._store.range(b"%b%016d0" % (self._steps, now), end, limit=1)
        if following.records:
            coming = step_at(following.records[0].key, self._queue)
            if coming is not None:
                return min(LOOK_EVERY_S, max(0.0, (coming.due_ms - now_ms()) / 1000))
        return LOOK_EVERY_S

    async def _read(self, record: kvstore.Record) -> Step | None:
        """One that cannot be read is parked: the rest must not wait for it."""
        step = read_step(record)
        if step is None:
            said = step_at(record.key, self._queue)
            # Nothing that is no step's key was ever written there: it stays, and is told with each look.
            parked = said is not None and await self._park_unread(record, said)
            log.error("step cannot be read", key=record.key.decode(errors="replace"), parked=parked)
        return step

    async def _park_unread(self, record: kvstore.Record, said: Step) -> bool:
        """Where the store refuses what was to be written with it, without; where it refuses that, too, it stays."""
        for also in (self._parking, None):
            try:
                parked = await park_unread(self._store, record, said, also)
            except kvstore.Refused as refused:
                log.error("parking refused", kind=said.kind, subject=said.subject, alone=also is None, exc_info=refused)
                continue
            if parked:
                self._metrics.parked_unread(said.kind, UNREADABLE)
            return parked
        return False

    async def _parking(self, step: Step, code: str) -> tuple[list[kvstore.Compare], list[kvstore.Operation]]:
        """What is written with a step that is parked. Where that cannot be said (what it is about cannot be read,
        perhaps) the step is parked without it: nobody else may have to wait for that."""
        if self._also_parked is None:
            return [], []
        try:
            return await self._also_parked(step, code)
        except (kvstore.Unavailable, kvstore.OutcomeUnknown):
            raise
        except Exception as error:
            log.error("parked without more", kind=step.kind, subject=step.subject, code=code, exc_info=error)
            return [], []

    def _done(self, name: tuple[str, str], _: asyncio.Task[None]) -> None:
        del self._running[name]
        self._woken.set()

    async def _do(self, step: Step, revision: int, lease: int) -> None:
        """One attempt at one step, in a task and so a context of its own. Raises nothing but being cancelled."""
        tracing.resume(step.traceparent)
        try:
            run = await StepRun.claim(self._store, step, revision, lease)
            if run is None:
                await asyncio.sleep(PAUSE_S)  # another worker is at it: do not ask again at once
                return
            run.also_parked, run.chance = self._parking, self._chance.random
            self._metrics.began(step.kind)
            try:
                ending, code = await self._attempt(run)
            except BaseException:  # also where it is cut off: its lease is lost, or the process stops
                self._metrics.cut_off(step.kind)
                raise
            self._metrics.ended(step.kind, ending, code)
        except ClaimLost:
            log.warning("claim lost", kind=step.kind, subject=step.subject)
        except kvstore.KvError as error:
            # It may be done all the same; if not, its claim is taken up again with the next look.
            log.warning("step interrupted", kind=step.kind, subject=step.subject, code=error.code)
            await asyncio.sleep(PAUSE_S)

    async def _attempt(self, run: StepRun) -> tuple[Ending, str]:
        """How it ended, and why."""
        step, began_s = run.step, time.monotonic()
        handler = self._handlers.get(step.kind)
        try:
            if handler is None:
                raise Park("unknown_kind", f"this worker has no handler for {step.kind}")
            await handler(run)
            if not run.is_ended:
                raise RuntimeError(f"the handler of {step.kind} neither ended its step nor said why not")
        except Again as again:
            log.info("step put off", kind=step.kind, subject=step.subject, attempt=step.attempt, code=again.code)
            return await run.again(again.code, again.after_s), again.code
        except Park as park:
            log.error("step parked", kind=step.kind, subject=step.subject, code=park.code, detail=park.detail)
            return await run.park(park.code, park.detail), park.code
        except kvstore.Refused as refused:
            if refused.code == "conflict":  # others were quicker, again and again: as an outage, no attempt
                raise
            # No outage, which would pass: the same is refused the next time, unless it was for want of a lease.
            forget_lost(refused, began_s)
            log.error("step refused", kind=step.kind, subject=step.subject, attempt=step.attempt, exc_info=refused)
            return await run.again(STORE_REFUSED, detail=str(refused)), STORE_REFUSED
        except (ClaimLost, kvstore.KvError):
            raise
        except Exception as error:
            log.error("step failed", kind=step.kind, subject=step.subject, attempt=step.attempt, exc_info=error)
            return await run.again(INTERNAL), INTERNAL
        return Ending.FINISHED, ""
