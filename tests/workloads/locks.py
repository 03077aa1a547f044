"""Locks that several clients contend for, with the client's own recipe: `async with kv.lock(...)`.

Holders write a register under the fence of `lock.held`, some of them once more after they gave the lock up. Others
die in the queue, or have their lease ended behind their back. Contenders run beside the steps of the workers: who
waits for a lock does nothing else, and a worker that waited would be one less to make trouble.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from random import Random
from typing import Any, cast

from kvstore import Client, Compare, Put, Range, RangeResult, TxnResult, Unavailable
from kvstore.client.lock import Lock, lock_prefix
from kvstore.model import LeaseResult, Operation, Result, SortBy
from tests.checkers.history import History
from tests.checkers.locks import Acquire, Die, End, Fenced, Held, Look, Release, Sight, Waiting, Write, check_lock
from tests.checkers.verdict import Inconsistent
from tests.workloads.base import noted

# Short, so that many are lost in a run; the others live through an election.
TTLS_S = (1.0, 2.0, 4.0)
WAITS_S = (0.0, 1.0, 4.0)
HOLDS_MAX_S = 0.6
# Enough that some wait behind one that waits.
CONTENDERS_MAX = 4
BEGIN_SHARE, DIE_SHARE, LATE_SHARE, END_SHARE = 0.3, 0.15, 0.1, 0.02
# Late enough that most of its time is over, as its holder has to know.
LATE_SHARE_OF_TTL = 0.7
# At the end: what dead ones leave ends within its time and a second or two, then so many at once get it in turn,
# and again, so that some go while another is about to wait for them.
LAST_CONTENDERS, LAST_ROUNDS, LAST_PAUSE_S, LAST_S = 3, 3, 0.02, 12.0

# That a lock could not be given up is told to people; here it happens all the time.
logging.getLogger("kvstore").addHandler(logging.NullHandler())


class _Late:
    """A client whose process gets to the answer of its grant late, and to no keep-alive after that."""

    def __init__(self, kv: Client, late_s: float) -> None:
        self._kv = kv
        self._late_s = late_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kv, name)

    async def grant_lease(self, *arguments: Any, **options: Any) -> LeaseResult:
        result = await self._kv.grant_lease(*arguments, **options)
        await asyncio.sleep(self._late_s)
        return result

    async def keep_lease(self, lease: int, *, timeout: float) -> LeaseResult:
        await asyncio.sleep(timeout)
        raise Unavailable("it was not sent", code="timeout")


class LockWorkload:
    name = "locks"

    def __init__(self, history: History, *, timeout_s: float, locks: int = 2, prefix: bytes = b"locks/") -> None:
        self.history = history.part(self.name)
        self._timeout_s = timeout_s
        self._prefix = prefix
        self._locks = [f"l{number}" for number in range(1, locks + 1)]
        self._numbers = itertools.count(1)
        self._first: dict[str, bytes] = {}  # by lock: the key that somebody last saw to hold it
        self._contenders: dict[asyncio.Task[None], None] = {}
        self._wrong: Inconsistent | None = None
        self._failed: BaseException | None = None  # what no client may see, and a contender saw

    async def set_up(self, kv: Client) -> None:
        """Nothing: locks begin as free."""

    async def step(self, kv: Client, worker: int, chance: Random) -> None:
        lock = chance.choice(self._locks)
        if len(self._contenders) < CONTENDERS_MAX and chance.random() < BEGIN_SHARE:
            self._begin(kv, worker, lock, Random(chance.getrandbits(64)))
        elif lock in self._first and chance.random() < END_SHARE:
            await self._end(kv, worker, lock)
        else:
            await self._look(kv, worker, lock)

    def _begin(self, kv: Client, worker: int, lock: str, chance: Random) -> None:
        work = self._die(kv, worker, lock) if chance.random() < DIE_SHARE else self._contend(kv, worker, lock, chance)
        task = asyncio.get_running_loop().create_task(work)
        self._contenders[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._contenders.pop(task, None)
        if not task.cancelled():
            self._failed = self._failed or task.exception()

    async def finish(self, kv: Client) -> None:
        left = list(self._contenders)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
        if self._failed is not None:
            raise self._failed
        for lock in self._locks:
            try:
                async with asyncio.timeout(LAST_S + self._timeout_s):
                    await asyncio.gather(*(self._last(kv, lock, Random(n)) for n in range(LAST_CONTENDERS)))
            except TimeoutError:
                await self._look(kv, -1, lock)
                last = self.history.entries[-1]
                self._wrong = Inconsistent("lock_stays", f"{lock} is not to be had at the end: {last}")

    async def _last(self, kv: Client, lock: str, chance: Random) -> None:
        for _ in range(LAST_ROUNDS):
            while not await self._hold_once(kv, -1, lock, max(TTLS_S), None, chance, holds=0):
                await asyncio.sleep(0.1)
            await asyncio.sleep(LAST_PAUSE_S * chance.random())

    def check(self) -> None:
        if self._wrong is not None:
            raise self._wrong
        for lock in self._locks:
            check_lock([entry for entry in self.history.entries if entry.operation.lock == lock])

    # --- contenders ---------------------------------------------------------------------------------------------------

    async def _contend(self, kv: Client, worker: int, lock: str, chance: Random) -> None:
        ttl_s, wait_s, holds = chance.choice(TTLS_S), chance.choice(WAITS_S), chance.choice([0, 1, 1, 2])
        if chance.random() < LATE_SHARE:
            kv, holds = cast(Client, _Late(kv, LATE_SHARE_OF_TTL * ttl_s)), -1
        await self._hold_once(kv, worker, lock, ttl_s, wait_s, chance, holds)

    async def _hold_once(
        self, kv: Client, worker: int, name: str, ttl_s: float, wait_s: float | None, chance: Random, holds: int
    ) -> bool:
        """Whether it got the lock. `holds`: so often it writes; -1: not at all, and it waits until it has lost it."""
        lock = Client.lock(kv, self._name(name), ttl_s=ttl_s, wait_s=wait_s)
        entry = self.history.begin(worker, Acquire(name, ttl_s))
        if await noted(entry, lock.__aenter__()) is None:
            return False
        entry.ok(Held(lock.key, lock.token, lock.valid_for_s))
        held, key, token = lock.held, lock.key, lock.token
        try:
            for _ in range(holds):
                await self._write(kv, worker, name, held, key, token, lock)
                await asyncio.sleep(HOLDS_MAX_S * chance.random())
            while holds < 0 and not lock.lost:
                await asyncio.sleep(lock.valid_for_s + 0.001)  # what is left may be less than a clock can tell
        finally:
            release = self.history.begin(worker, Release(name, token, lock.valid_for_s))
            if await noted(release, _left(lock)):
                release.ok()
        if chance.random() < 0.3:
            await self._write(kv, worker, name, held, key, token, lock)  # it has not noticed
        return True

    async def _die(self, kv: Client, worker: int, name: str) -> None:
        """Ask as `Lock` does, and keep nothing alive."""
        entry = self.history.begin(worker, Die(name))

        async def ask() -> bool:
            lease = (await kv.grant_lease(TTLS_S[0], timeout=self._timeout_s)).lease
            await kv.put(self._queue(name) + b"%016x" % lease, b"", lease=lease, timeout=self._timeout_s)
            return True

        if await noted(entry, ask()):
            entry.ok()

    # --- requests -----------------------------------------------------------------------------------------------------

    async def _write(
        self, kv: Client, worker: int, name: str, held: Compare, key: bytes, token: int, lock: Lock
    ) -> None:
        number = next(self._numbers)
        looks = self._looks(name)
        write = Put(self._register(name), b"%d %d" % (number, token))
        entry = self.history.begin(worker, Fenced(name, key, token, number))
        call = kv.txn(compare=[held], success=[*looks, write], failure=looks, timeout=self._timeout_s)
        result = await noted(entry, call)
        if isinstance(result, TxnResult):
            queue, register = _seen(result.results)
            sight = Sight(queue, register, result.succeeded, lock.valid_for_s)
            entry.ok(sight, revision=result.revision, changed=result.succeeded)

    async def _look(self, kv: Client, worker: int, name: str) -> None:
        entry = self.history.begin(worker, Look(name))
        result = await noted(entry, kv.txn(success=self._looks(name), timeout=self._timeout_s))
        if isinstance(result, TxnResult):
            queue, register = _seen(result.results)
            entry.ok(Sight(queue, register), revision=result.revision)
            if queue:
                self._first[name] = queue[0].key
            else:
                self._first.pop(name, None)

    async def _end(self, kv: Client, worker: int, name: str) -> None:
        key = self._first.pop(name)
        entry = self.history.begin(worker, End(name, key))
        if await noted(entry, kv.revoke_lease(int(key[-16:], 16), timeout=self._timeout_s)) is not None:
            entry.ok()

    def _looks(self, name: str) -> list[Operation]:
        queue = self._queue(name)
        return [
            Range(queue, queue[:-1] + b"\x01", keys_only=True, sort=SortBy.CREATE_REVISION),
            Range(self._register(name)),
        ]

    def _name(self, name: str) -> bytes:
        return self._prefix + name.encode()

    def _queue(self, name: str) -> bytes:
        return lock_prefix(self._name(name))

    def _register(self, name: str) -> bytes:
        return self._name(name) + b"/register"


async def _left(lock: Lock) -> bool:
    await lock.__aexit__(None, None, None)
    return True


def _seen(results: Sequence[Result]) -> tuple[tuple[Waiting, ...], Write | None]:
    queue, register = results[:2]
    assert isinstance(queue, RangeResult)
    assert isinstance(register, RangeResult)
    waiting = tuple(Waiting(record.key, record.create_revision) for record in queue.records)
    if not register.records:
        return waiting, None
    (record,) = register.records
    number, token = map(int, record.value.split())
    return waiting, Write(number, token, record.mod_revision)
