"""A work queue: jobs are put, and taken from a range by transactions that delete them. Every job is done once.

What a take reads is a range of one record. Another taker makes that record vanish, a producer makes one appear before
it: only the check of the range that was read keeps two from doing one job.
"""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

from kvstore import Client, RangeResult, Refused, Transaction
from tests.checkers.history import History
from tests.checkers.queue import LookAtQueue, PutJob, Standing, Take, check_queue
from tests.checkers.revisions import check_revisions
from tests.workloads.base import insist, noted, one_or_several

# A reading brings all jobs along; after so many the queue is left for a new one.
JOBS_PER_QUEUE = 60
ATTEMPTS = 4


class QueueWorkload:
    name = "queue"

    def __init__(self, history: History, *, timeout_s: float, prefix: bytes = b"queue/") -> None:
        self.history = history.part(self.name)
        self._timeout_s = timeout_s
        self._prefix = prefix
        self._jobs = itertools.count(1)
        self._takers = itertools.count(1)
        self._queues = ["q1"]
        self._put = 0  # into the last queue

    async def set_up(self, kv: Client) -> None:
        """Nothing: a queue begins as empty."""

    async def step(self, kv: Client, worker: int, chance: Random) -> None:
        await one_or_several(lambda: self._step(kv, worker, chance), chance)

    async def _step(self, kv: Client, worker: int, chance: Random) -> None:
        kind = chance.random()
        queue = self._queues[-1]
        if kind < 0.42:
            if self._put == JOBS_PER_QUEUE:
                queue = f"q{len(self._queues) + 1}"
                self._queues.append(queue)
                self._put = 0
            self._put += 1
            await self._produce(kv, worker, queue)
        elif kind < 0.87:
            await self._take(kv, worker, queue, newest=chance.random() < 0.3)
        else:
            await self._look(kv, worker, queue, is_local=kind < 0.93)

    async def finish(self, kv: Client) -> None:
        for queue in self._queues:

            async def read(queue: str = queue) -> None:
                entry = self.history.begin(-1, LookAtQueue(queue))
                result = await kv.range(prefix=self._key(queue), timeout=self._timeout_s)
                entry.ok(self._standing(queue, result), revision=result.revision)

            await insist(read)

    def check(self) -> None:
        check_revisions(self.history.root.entries)
        for queue in self._queues:
            check_queue([entry for entry in self.history.entries if entry.operation.queue == queue])

    # --- operations ---------------------------------------------------------------------------------------------------

    async def _produce(self, kv: Client, worker: int, queue: str) -> None:
        job = f"{next(self._jobs):06}"
        entry = self.history.begin(worker, PutJob(queue, job))
        result = await noted(entry, kv.put(self._key(queue, "waiting", job), b"to do", timeout=self._timeout_s))
        if result is not None and not isinstance(result, Refused):
            entry.ok(revision=result.revision, changed=True)

    async def _take(self, kv: Client, worker: int, queue: str, *, newest: bool) -> None:
        taker = f"{worker}-{next(self._takers)}"
        entry = self.history.begin(worker, Take(queue, taker, newest))
        used: list[Transaction] = []

        async def body(txn: Transaction) -> str:
            used[:] = [txn]
            waiting = self._key(queue, "waiting", "")
            found = await txn.range(prefix=waiting, limit=1, reverse=newest)
            if not found.records:
                return ""
            key = found.records[0].key
            job = key[len(waiting) :].decode()
            txn.delete(key)
            txn.put(self._key(queue, "done", job), taker.encode())
            return job

        job = await noted(entry, kv.run_transaction(body, attempts=ATTEMPTS, timeout=self._timeout_s))
        if isinstance(job, str):
            (txn,) = used
            if txn.result is not None:
                entry.ok(job, revision=txn.result.revision, changed=True)
            else:
                entry.ok(None, revision=txn.revision or 0)

    async def _look(self, kv: Client, worker: int, queue: str, *, is_local: bool) -> None:
        entry = self.history.begin(worker, LookAtQueue(queue, is_local))
        level: Any = "local" if is_local else "linearizable"
        result = await noted(entry, kv.range(prefix=self._key(queue), level=level, timeout=self._timeout_s))
        if isinstance(result, RangeResult):
            entry.ok(self._standing(queue, result), revision=0 if is_local else result.revision)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _key(self, queue: str, state: str = "", job: str = "") -> bytes:
        return self._prefix + "/".join([queue, state, job] if state else [queue, ""]).encode()

    def _standing(self, queue: str, result: RangeResult) -> Standing:
        assert not result.more, "a queue fits one result"
        prefix, skip = self._key(queue, "waiting", ""), len(self._key(queue, "done", ""))
        waiting: list[str] = []
        done: dict[str, str] = {}
        for record in result.records:
            if record.key.startswith(prefix):
                waiting.append(record.key[len(prefix) :].decode())
            else:
                done[record.key[skip:].decode()] = record.value.decode()
        return Standing(frozenset(waiting), done)
