"""Locks and elections: one at a time, in the order of asking, with a fencing token.

    async with kv.lock("reports") as lock:
        await kv.txn(compare=[lock.held], success=[...])

Each who asks puts a key of its own under the lock's name, under a lease that it keeps alive. The key that was created
first holds the lock; each other waits for the one right before it to go, so that an end wakes one waiter and not all.
(Where the last few before it all gave up, it waits for the holder.) What a waiter reads is a few keys, however many
wait; the store walks over all of them for it, of which there may be `WALK_MAX`.

What this gives, and what it cannot:

- While `lock.valid_for_s` is above 0, nobody else holds the lock. That is counted on this process's clock, as a lease's
  time is (`client/lease.py`).
- A holder that is paused, cut off, or slow may lose the lock and not know it yet, as with every lock that outlives its
  holder's death. So the lock alone keeps nobody from writing late. Two things do:
  - `lock.held`, a compare for transactions in this store: they take effect only if the lock is still held at that
    moment, whatever any clock says. This is exact.
  - `lock.token`, a number that grows with each holder: send it along to other systems, and have them refuse a token
    below the greatest that they have seen. It is the create revision of the holder's key.
- It is fair: first come, first served, as the store received them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING

from kvstore.client.lease import Lease
from kvstore.errors import KvError, Refused, Unavailable
from kvstore.model import Compare, Put, Range, RangeResult, Record, Relation, SortBy, Target, prefix_end

if TYPE_CHECKING:
    from kvstore.client.client import Client

# Long enough to sit out an election with a keep-alive lost in it; so long a dead holder keeps others waiting.
LOCK_TTL_S = 10.0
# Where the keys of all locks and elections lie.
LOCKS = b"_lock/"
# So many of those right before it a waiter knows: waiters give up one by one, and the next is known when one does.
_KNOWN_BEFORE = 8

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
        self._ttl_s = ttl_s
        self._wait_s = wait_s
        self._on_lost = on_lost
        self._lease: Lease | None = None
        self.key = b""
        """This holder's own key."""
        self.token = 0
        """The fencing token: greater than that of every holder before."""

    @property
    def valid_for_s(self) -> float:
        """For how many seconds from now nobody else can hold it; 0 once that is not sure any more."""
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
        kv, loop = self._client, asyncio.get_running_loop()
        wait_until = None if self._wait_s is None else loop.time() + self._wait_s
        self.key = self._prefix + b"%016x" % lease.id
        put = Put(self.key, self._value, lease.id)
        asked = await kv.txn(success=[self._queue(_KNOWN_BEFORE, newest_first=True), put])
        place, revision = asked.revision, asked.revision
        before = [record.key for record in _records(asked.results[0])]
        while before:
            if wait_until is not None and loop.time() >= wait_until:
                message = f"others came before, and hold or want this lock; waited {self._wait_s:g} s"
                raise Unavailable(message, code="lock_held")
            await self._gone(before[0], revision + 1, lease, wait_until)
            before, revision = await self._look(before, place)
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

    async def _look(self, known: list[bytes], place: int) -> tuple[list[bytes], int]:
        """Which of those that are known to have come before are left, the nearest first, and as of which revision. If
        there are none, it is the one who is first now; if that is this one, nobody. Raises `lock_lost`."""
        own = Range(self.key)
        seen = await self._client.txn(success=[own, self._queue(1), *(Range(key, keys_only=True) for key in known)])
        mine, first, *others = (_records(result) for result in seen.results)
        if not mine or not first:
            raise _lost_in_line()
        if first[0].key == self.key:
            return [], seen.revision
        left = [record.key for records in others for record in records if record.create_revision < place]
        return left or [first[0].key], seen.revision

    async def _gone(self, key: bytes, from_revision: int, lease: Lease, wait_until: float | None) -> None:
        """Wait until a key goes, our own lease is not sure any more, or the time is over. It may return early."""
        loop = asyncio.get_running_loop()
        watch = self._client.watch(key, from_revision=from_revision, puts=False)
        try:
            while not lease.lost and (wait_until is None or loop.time() < wait_until):
                until = loop.time() + lease.valid_for_s
                try:
                    async with asyncio.timeout_at(until if wait_until is None else min(until, wait_until)):
                        await anext(watch)
                    return
                except TimeoutError:
                    continue
                except KvError as error:
                    if error.code != "revision_compacted":
                        raise
                    return  # it may have gone in what is forgotten
        finally:
            await watch.close()


def _records(result: object) -> tuple[Record, ...]:
    assert isinstance(result, RangeResult)
    return result.records


def _lost_in_line() -> Unavailable:
    return Unavailable("the lease of this lock ended while it waited for its turn", code="lock_lost")


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
        found = await self._client.range(prefix=self._prefix, sort=SortBy.CREATE_REVISION, limit=1, timeout=timeout)
        return found.records[0] if found.records else None

    async def observe(self) -> AsyncIterator[Record | None]:
        """Who leads: now, and each time that it changes. None: nobody. Every leader that it gives did lead at some
        time, in this order; one that led very shortly may be left out."""
        known: int | None = None
        while True:
            found = await self._client.range(prefix=self._prefix, sort=SortBy.CREATE_REVISION, limit=1)
            leader = found.records[0] if found.records else None
            current = leader.create_revision if leader is not None else 0
            if current != known:
                known = current
                yield leader
            try:
                async with self._client.watch(prefix=self._prefix, from_revision=found.revision + 1) as watch:
                    await anext(watch)
            except KvError as error:
                if error.code != "revision_compacted":
                    raise


__all__ = ["LOCKS", "LOCK_TTL_S", "Election", "Lock", "lock_prefix"]
