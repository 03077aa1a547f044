"""Locks and elections: one at a time, in the order of asking, with a fencing token.

    async with kv.lock("reports") as lock:
        await kv.txn(compare=[lock.held], success=[...])

Each who asks puts a key of its own under the lock's name, under a lease that it keeps alive. The key that was created
first holds the lock; each other waits for the one right before it to go, so that an end wakes one waiter and not all.
(Where the last few before it all gave up, it waits for the holder.) What a waiter reads is a few keys, however many
wait; the store walks over all of them for it, of which there may be `WALK_MAX`.

What this gives, and what it cannot:

- While `lock.valid_for_s` is above 0, nobody else holds the lock. That is counted on this process's clock, as a lease's
  time is (`client/lease.py`). It is so unless somebody ends it from outside: who deletes the holder's key (an ordinary
  key, which `delete_prefix(b"")` deletes, too) lets the next one in, and the holder hears of it when it next uses
  `lock.held`; who revokes its lease does, too, and the holder hears of that within a third of its time to live.
- A holder that is paused, cut off, or slow may lose the lock and not know it yet, as with every lock that outlives its
  holder's death. So the lock alone keeps nobody from writing late. Two things do:
  - `lock.held`, a compare for transactions in this store: they take effect only if the lock is still held at that
    moment, whatever any clock says. This is exact.
  - `lock.token`, a number that grows with each holder: send it along to other systems, and have them refuse a token
    below the greatest that they have seen. It is the create revision of the holder's key.
- It is fair: first come, first served, as the store received them.

Where no majority answers, who holds it or waits goes on for as long as its lease is surely there, a waiter also until
its own time is over; after that it is `lock_lost` (or `lock_held`), which says why the store did not answer. Who has no
place in line yet gets what any call gets, within the client's timeout, and holds nothing: a lease that was granted all
the same ends by itself. Leaving the line is a call, too.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from kvstore.client.lease import Lease
from kvstore.client.seconds import TIMEOUT_MAX_S, checked_wait, ttl_ms
from kvstore.errors import KvError, Refused, Unavailable
from kvstore.model import Compare, Put, Range, RangeResult, Record, Relation, SortBy, Target, prefix_end

if TYPE_CHECKING:
    from kvstore.client.client import Client
    from kvstore.client.watch import Watch

_T = TypeVar("_T")

# Long enough to sit out an election with a keep-alive lost in it; so long a dead holder keeps others waiting.
LOCK_TTL_S = 10.0
# Where the keys of all locks and elections lie.
LOCKS = b"_lock/"
# So many of those right before it a waiter knows: waiters give up one by one, and the next is known when one does.
_KNOWN_BEFORE = 8
# A read that the store did not answer is asked again after this: soon, beside the seconds for which it was waited for.
_AGAIN_S = 0.5

_log = logging.getLogger("kvstore")


def lock_prefix(name: str | bytes) -> bytes:
    """The prefix of the keys of those who hold or want the lock of this name."""
    text = name.encode() if isinstance(name, str) else name
    if not text or b"\x00" in text:
        raise ValueError("a lock's name is not empty and has no NUL in it")
    return LOCKS + text + b"\x00"  # nothing else begins so, also where one name begins another


class Lock:
    """Made by `Client.lock` and `Client.campaign`. Use it with `async with`; it can be used again afterwards."""

    def __init__(
        self,
        client: Client,
        name: str | bytes,
        value: bytes,
        ttl_s: float,
        wait_s: float | None,
        on_lost: Callable[[], object] | None,
    ) -> None:
        self._client = client
        self._name = name
        self._prefix = lock_prefix(name)
        self._value = value
        ttl_ms(ttl_s)  # raises for what no lease can live
        self._ttl_s = ttl_s
        self._wait_s = checked_wait(wait_s)
        self._on_lost = on_lost
        self._lease: Lease | None = None
        self.key = b""
        """This holder's own key."""
        self.token = 0
        """The fencing token: greater than that of every holder before."""

    @property
    def valid_for_s(self) -> float:
        """For how many seconds from now its lease is surely there, and so nobody else can hold it; 0 once that is not
        sure any more. What somebody else deletes or revokes does not show here (see the module), but in `held`."""
        return self._lease.valid_for_s if self._lease is not None and self.token else 0.0

    @property
    def lost(self) -> bool:
        return self.valid_for_s == 0.0

    @property
    def held(self) -> Compare:
        """True exactly while this holder has the lock: for the `compare` of a transaction."""
        if not self.token:
            raise Refused("this lock is not held", code="lock_not_held")
        return Compare(self.key, Target.CREATE_REVISION, Relation.EQUAL, self.token)

    async def __aenter__(self) -> Lock:
        if self._lease is not None:
            raise RuntimeError("this lock is in use; make another")
        self._lease = Lease(self._client, self._ttl_s, self._lost)
        try:
            await self._lease.__aenter__()
        except BaseException:
            self._lease = None
            raise
        try:
            await self._acquire(self._lease)
        except GeneratorExit:
            self._lease.drop()
            self._lease = None
            raise
        except BaseException as error:
            lease, self._lease = self._lease, None
            await lease.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it up, at once for who waits. If the store cannot be reached it ends with its lease."""
        lease, self._lease = self._lease, None
        self.token = 0
        assert lease is not None
        try:
            await lease.__aexit__(kind, error, trace)
        except KvError as failed:
            text = "lock %r could not be given up; it ends with its lease, within %g s: %s"
            _log.warning(text, self._name, lease.ttl_s, failed)

    def _lost(self) -> None:
        if self.token and self._on_lost is not None:
            self._on_lost()

    async def _acquire(self, lease: Lease) -> None:
        kv, patience = self._client, _Patience(lease, self._wait_s)
        self.key = self._prefix + b"%016x" % lease.id
        put = Put(self.key, self._value, lease.id)
        asked = await kv.txn(success=[self._queue(_KNOWN_BEFORE, newest_first=True), put])
        place, revision = asked.revision, asked.revision
        before = [record.key for record in _records(asked.results[0])]
        while before:
            await patience.change(kv.watch(before[0], from_revision=revision + 1, puts=False))
            before, revision = await self._look(before, place, patience)
        if lease.lost:
            raise _lost_in_line()
        self.token = place

    def _queue(self, limit: int, *, newest_first: bool = False) -> Range:
        """The first (or last) of those who hold or want it, in the order in which they came."""
        return Range(
            self._prefix,
            prefix_end(self._prefix),
            limit=limit,
            keys_only=True,
            reverse=newest_first,
            sort=SortBy.CREATE_REVISION,
        )

    async def _look(self, known: list[bytes], place: int, patience: _Patience) -> tuple[list[bytes], int]:
        """Which of those that are known to have come before are left, the nearest first, and as of which revision. If
        there are none, it is the one who is first now; if that is this one, nobody. Raises `lock_lost`, `lock_held`."""
        looks = [Range(self.key), self._queue(1), *(Range(key, keys_only=True) for key in known)]
        seen = await patience.answer(lambda timeout_s: self._client.txn(success=looks, timeout=timeout_s))
        mine, first, *others = (_records(result) for result in seen.results)
        if not mine or not first:
            raise _lost_in_line()
        if first[0].key == self.key:
            return [], seen.revision
        left = [record.key for records in others for record in records if record.create_revision < place]
        return left or [first[0].key], seen.revision


class _Patience:
    """How long one goes on to wait: a waiter while its lease is surely there, and until its time is over. What the
    store does not answer meanwhile is asked again."""

    def __init__(self, lease: Lease | None = None, wait_s: float | None = None) -> None:
        """`lease` None: without one. `wait_s` None: as long as it takes."""
        self._loop = asyncio.get_running_loop()
        self._lease = lease
        self._wait_s = wait_s
        self._until = math.inf if wait_s is None else self._loop.time() + wait_s
        self._trouble = ""  # why the store did not answer, if it did not the last time

    async def answer(self, ask: Callable[[float], Awaitable[_T]]) -> _T:
        """What the store answers to `ask(timeout_s)`, which only reads. Raises `lock_lost`, `lock_held`."""
        while True:
            left_s = self._left_s()
            try:
                answer = await ask(left_s)
            except Unavailable as error:
                if error.code == "closed":
                    raise
                self._trouble = f"; the store does not answer: {error}"
                await asyncio.sleep(_AGAIN_S)
            else:
                self._trouble = ""
                return answer

    async def change(self, watch: Watch) -> None:
        """Wait until a watch shows something, and close it. It may return early: who waited looks anyway. Raises
        `lock_lost`, `lock_held`."""
        try:
            while True:
                left_s = self._left_s()
                try:
                    async with asyncio.timeout(left_s):
                        await anext(watch)
                    return
                except TimeoutError:
                    continue  # a keep-alive may have given it more time
                except KvError as error:
                    # No node serves it now, or it is to show what is forgotten by now. Other troubles are real ones.
                    if error.code not in ("timeout", "revision_compacted"):
                        raise
                    return
        finally:
            await watch.close()

    def _left_s(self) -> float:
        """As much as one call may take of it."""
        left_s = self._until - self._loop.time()
        if left_s <= 0.0:
            message = f"others came before, and hold or want this lock; waited {self._wait_s:g} s{self._trouble}"
            raise Unavailable(message, code="lock_held")
        if self._lease is not None:
            left_s = min(left_s, self._lease.valid_for_s)
            if left_s == 0.0:
                raise _lost_in_line(self._trouble)
        return min(left_s, TIMEOUT_MAX_S)


def _records(result: object) -> tuple[Record, ...]:
    assert isinstance(result, RangeResult)
    return result.records


def _lost_in_line(trouble: str = "") -> Unavailable:
    return Unavailable(f"the lease of this lock ended while it waited for its turn{trouble}", code="lock_lost")


class Election:
    """Who leads what: a lock whose holder's value all can see. Made by `Client.election`."""

    def __init__(self, client: Client, name: str | bytes) -> None:
        self._client = client
        self._name = name
        self._prefix = lock_prefix(name)

    def campaign(
        self,
        value: bytes,
        *,
        ttl_s: float = LOCK_TTL_S,
        wait_s: float | None = None,
        on_lost: Callable[[], object] | None = None,
    ) -> Lock:
        """Lead while a block runs: `async with election.campaign(b"host-1") as lead: ...`. Waits until all who came
        before are gone. What holds of a `Lock` holds of this."""
        return Lock(self._client, self._name, value, ttl_s, wait_s, on_lost)

    async def leader(self, *, timeout: float | None = None) -> Record | None:
        """Who leads now: the record of its key, whose value is what it campaigned with."""
        return _first(await self._look(timeout))

    async def observe(self) -> AsyncIterator[Record | None]:
        """Who leads: now, and each time that it changes. None: nobody. Every leader that it gives did lead at some
        time, in this order; one that led very shortly may be left out.

        It goes on for as long as you iterate. Where no majority answers it waits, and tells nothing new meanwhile: who
        it gave last may not lead any more."""
        patience = _Patience()
        known: int | None = None
        while True:
            found = await patience.answer(self._look)
            leader = _first(found)
            current = leader.create_revision if leader is not None else 0
            if current != known:
                known = current
                yield leader
            await patience.change(self._client.watch(prefix=self._prefix, from_revision=found.revision + 1))

    async def _look(self, timeout_s: float | None) -> RangeResult:
        return await self._client.range(prefix=self._prefix, sort=SortBy.CREATE_REVISION, limit=1, timeout=timeout_s)


def _first(found: RangeResult) -> Record | None:
    return found.records[0] if found.records else None


__all__ = ["LOCKS", "LOCK_TTL_S", "Election", "Lock", "lock_prefix"]
