"""How leases, locks and elections sit out a time without a majority, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar, cast

import pytest

from kvstore import Client, KvError, Lease, Lock, Refused, Unavailable
from kvstore.client.lease import keep_alive
from kvstore.client.lock import Election, lock_prefix
from kvstore.client.seconds import checked_timeout
from kvstore.model import DoneResult, LeaseResult, PutResult, RangeResult, Record, TxnResult
from tests.simulation.loop import VirtualLoop
from tests.virtual_time import VirtualTime

T = TypeVar("T")
CALL_S, WATCH_S = 5.0, 5.0
FIRST = lock_prefix("a") + b"%016x" % 1


class Store:
    """As much of a client as leases, locks and elections need. While it is down, calls end at their timeout."""

    def __init__(self) -> None:
        self.time = VirtualTime()
        self.loop: Any = VirtualLoop(self.time.call_later, self.time.monotonic, self._failed)
        self.down_at: float | None = None
        self.is_closed = False
        self.ttl_s = 60.0
        self.revoked = False
        self.kept_at: list[float] = []
        self.watches: list[FakeWatch] = []
        self.queue = [FIRST]
        """The keys of those who want the lock, in order; the first is somebody else's."""

    @staticmethod
    def _failed(context: dict[str, Any]) -> None:
        raise AssertionError(context)

    @property
    def is_down(self) -> bool:
        return self.down_at is not None

    @is_down.setter
    def is_down(self, is_down: bool) -> None:
        self.down_at = self.time.now_s if is_down else None

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task: asyncio.Task[T] = self.loop.create_task(work)
        self.time.advance(0.0)
        return task

    def run(self, work: Coroutine[Any, Any, T], within_s: float = 1000.0) -> T:
        task = self.begin(work)
        self.time.run_until(task.done, within_s)
        return task.result()

    async def grant_lease(self, ttl_s: float, *, lease: int = 0, timeout: float | None = None) -> LeaseResult:
        self.ttl_s = ttl_s
        await self._answer(timeout)
        return LeaseResult(1, 7, round(ttl_s * 1000))

    async def keep_lease(self, lease: int, *, timeout: float | None = None) -> LeaseResult:
        await self._answer(timeout)
        if self.revoked:
            raise Refused("there is no such lease", code="lease_not_found")
        self.kept_at.append(self.time.now_s)
        return LeaseResult(1, lease, round(self.ttl_s * 1000))

    async def revoke_lease(self, lease: int, *, timeout: float | None = None) -> DoneResult:
        await self._answer(timeout)
        return DoneResult(1, 1)

    async def txn(self, *, success: list[Any], timeout: float | None = None) -> TxnResult:
        await self._answer(timeout)
        if len(success) == 2 and len(self.queue) == 1:  # it asks for a place
            self.queue.append(success[1].key)
            return TxnResult(2, True, (_records(FIRST), PutResult(2)))
        mine = [key for key in self.queue if key == success[0].start]
        others = [_records(*(key for key in self.queue if key == look.start)) for look in success[2:]]
        return TxnResult(3, True, (_records(*mine), _records(*self.queue[:1]), *others))

    async def range(self, *, timeout: float | None = None, **_: object) -> RangeResult:
        await self._answer(timeout)
        return _records(*self.queue[:1])

    def watch(self, *_: object, **__: object) -> FakeWatch:
        self.watches.append(FakeWatch(self))
        return self.watches[-1]

    async def _answer(self, timeout: float | None) -> None:
        timeout_s = checked_timeout(CALL_S if timeout is None else timeout)
        try:
            async with asyncio.timeout(timeout_s):
                await self.until(lambda: not self.is_down)
        except TimeoutError:
            raise Unavailable("no node knows a leader", code="no_leader") from None

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            if self.is_closed:
                raise Unavailable("this client was closed", code="closed")
            await asyncio.sleep(0.05)


class FakeWatch:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._before = list(store.queue)
        self.is_closed = False

    async def __anext__(self) -> None:
        await self._store.until(lambda: self._changed or self._given_up)
        if not self._changed:
            raise Unavailable("no node has served this watch for 5 s", code="timeout")

    @property
    def _changed(self) -> bool:
        return not self._store.is_down and self._store.queue != self._before

    @property
    def _given_up(self) -> bool:
        down_at = self._store.down_at
        return down_at is not None and self._store.time.now_s >= down_at + WATCH_S

    async def close(self) -> None:
        self.is_closed = True


def _records(*keys: bytes) -> RangeResult:
    return RangeResult(3, tuple(Record(key, b"", 1, 1, 1, 7) for key in keys), len(keys), False)


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    outer = asyncio._get_running_loop()
    asyncio._set_running_loop(store.loop)
    yield store
    for task in asyncio.all_tasks(store.loop):
        task.cancel()
    store.time.advance(0.0)
    asyncio._set_running_loop(outer)


def lock_of(store: Store, ttl_s: float = 60.0, wait_s: float | None = None) -> Lock:
    return Lock(cast(Client, store), "a", b"", ttl_s, wait_s, None)


async def held(lock: Lock) -> Lock:
    async with lock:
        return lock


def error_of(store: Store, work: Coroutine[Any, Any, object]) -> KvError:
    with pytest.raises(KvError) as caught:
        store.run(work)
    return caught.value


# --- leases -----------------------------------------------------------------------------------------------------------


async def begun(ways: Awaitable[Lease]) -> Lease:
    return await ways


def test_a_lease_sits_out_an_outage_and_is_kept_again_at_once(store: Store) -> None:
    lease = store.run(begun(Lease(store, 60.0, None).__aenter__()))
    store.time.advance(25.0)
    store.is_down = True
    store.time.advance(50.0)
    assert store.kept_at == [pytest.approx(20.0)]
    store.is_down = False
    store.time.advance(5.0)
    assert not lease.lost
    assert len(store.kept_at) == 3, "the late answer counts from when it was asked for, so the next one is due"
    assert lease.valid_for_s > 50.0


def test_a_lease_that_lives_for_longer_than_a_call_may_last_is_kept(store: Store) -> None:
    lease = store.run(begun(Lease(store, 30_000.0, None).__aenter__()))
    store.time.advance(59_000.0)
    assert not lease.lost
    assert len(store.kept_at) == 5


def test_a_lease_is_lost_when_its_time_is_over(store: Store) -> None:
    lost: list[float] = []
    lease = store.run(begun(Lease(store, 60.0, lambda: lost.append(store.time.now_s)).__aenter__()))
    store.is_down = True
    store.time.advance(58.0)
    assert not lease.lost
    store.time.advance(30.0)
    assert lease.lost
    assert len(lost) == 1


async def kept(store: Store, lives: list[int]) -> None:
    async for answer in keep_alive(store, 7):
        lives.append(answer.ttl_ms)


def test_a_granted_lease_is_kept_through_an_outage_until_it_may_have_ended(store: Store) -> None:
    lives: list[int] = []
    keeping = store.begin(kept(store, lives))
    store.time.advance(30.0)
    store.is_down = True
    store.time.advance(27.0)
    store.is_down = False
    store.time.advance(1.0)
    assert lives == [60_000] * 3
    assert not keeping.done()
    store.is_down = True
    store.time.advance(90.0)
    with pytest.raises(Unavailable, match=r"lease 7 for its whole time to live, 60 s.*no node knows a leader"):
        keeping.result()


def test_a_granted_lease_that_is_revoked_or_was_never_there_says_so(store: Store) -> None:
    keeping = store.begin(kept(store, []))
    store.revoked = True
    store.time.advance(30.0)
    with pytest.raises(Refused, match="no such lease"):
        keeping.result()
    assert error_of(store, kept(store, [])).code == "lease_not_found"
    store.is_down = True
    assert error_of(store, kept(store, [])).code == "no_leader", "nothing is known of it yet: one call, as any other"


# --- locks ------------------------------------------------------------------------------------------------------------


def test_who_waits_keeps_its_place_through_an_outage(store: Store) -> None:
    waiting = store.begin(held(lock_of(store)))
    store.time.advance(10.0)
    store.is_down = True
    store.time.advance(35.0)
    assert not waiting.done()
    store.is_down = False
    store.time.advance(2.0)
    assert not waiting.done(), "the other one holds it still"
    del store.queue[0]
    store.time.advance(1.0)
    assert waiting.result().key == store.queue[0]
    assert all(watch.is_closed for watch in store.watches)


def test_who_waits_for_so_long_hears_why_it_has_not_got_it(store: Store) -> None:
    waiting = store.begin(held(lock_of(store, wait_s=20.0)))
    store.time.advance(1.0)
    store.is_down = True
    store.time.run_until(waiting.done, 21.0 + CALL_S)  # it also tries to leave the line
    error = waiting.exception()
    assert isinstance(error, Unavailable)
    assert error.code == "lock_held"
    assert "waited 20 s" in error.message
    assert "no node knows a leader" in error.message
    assert "watch" not in error.message


def test_who_waits_longer_than_its_lease_lives_loses_its_place(store: Store) -> None:
    waiting = store.begin(held(lock_of(store, ttl_s=30.0)))
    store.time.advance(1.0)
    store.is_down = True
    store.time.advance(25.0)
    assert not waiting.done()
    store.time.advance(35.0)
    error = waiting.exception()
    assert isinstance(error, Unavailable)
    assert error.code == "lock_lost"
    assert "no node knows a leader" in error.message


def test_who_has_no_place_yet_gets_what_any_call_gets(store: Store) -> None:
    store.is_down = True
    assert error_of(store, held(lock_of(store))).code == "no_leader"
    assert store.time.now_s == pytest.approx(CALL_S, abs=0.2)


@pytest.mark.parametrize("is_down", [False, True])
def test_a_closed_client_ends_every_wait(store: Store, is_down: bool) -> None:
    waiting, seen = store.begin(held(lock_of(store))), []
    observing = store.begin(observed(store, seen))
    store.time.advance(1.0)
    store.is_down = is_down
    store.time.advance(7.0)
    store.is_closed = True
    store.time.advance(1.0)
    for task in (waiting, observing):
        error = task.exception()
        assert isinstance(error, Unavailable)
        assert error.code == "closed"


async def observed(store: Store, seen: list[bytes | None]) -> None:
    async for leader in Election(cast(Client, store), "a").observe():
        seen.append(None if leader is None else leader.key)


def test_who_observes_sits_out_an_outage(store: Store) -> None:
    seen: list[bytes | None] = []
    observing = store.begin(observed(store, seen))
    store.time.advance(1.0)
    store.is_down = True
    store.time.advance(10_000.0)
    assert not observing.done()
    del store.queue[0]
    store.is_down = False
    store.time.advance(5.0)
    assert seen == [FIRST, None]


# --- coroutines that nobody runs to their end -------------------------------------------------------------------------


async def in_line(store: Store, made: list[Coroutine[Any, Any, object]]) -> None:
    made.append(lock_of(store).__aenter__())
    made[0].send(None)


def test_what_is_closed_in_its_middle_ends_quietly() -> None:
    """As the garbage collector does, after the loop or during it."""
    made: list[Coroutine[Any, Any, object]] = []
    asyncio.run(in_line(Store(), made))
    made[0].close()

    async def holding(store: Store, lock: Lock) -> None:
        async with lock:
            await asyncio.sleep(1000.0)

    async def begin(store: Store, lock: Lock) -> Coroutine[Any, Any, object]:
        store.queue.clear()
        coroutine = holding(store, lock)
        coroutine.send(None)
        return coroutine

    store = Store()
    lock = lock_of(store)
    coroutine = asyncio.run(begin(store, lock))
    coroutine.close()
    assert lock.lost

    async def closed_while_it_runs(store: Store) -> None:
        made.clear()
        await in_line(store, made)
        before = asyncio.all_tasks()
        made[0].close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() < before, "its lease is not kept alive any more"

    asyncio.run(closed_while_it_runs(Store()))
