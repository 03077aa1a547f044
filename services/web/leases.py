"""Leases that many records share, for records that end some day: one lease for each would cost as much as the record,
and the store holds half a million leases at most.

A lease may be gone before its time: revoked, or expired while the machine slept, or of a store that was restored. Then
the store refuses what is to be put under it, and nothing has changed. Who runs the requests and the steps of a process
(`endpoints.py`, `worker.py`) tells `forget_lost`, and does it again with the leases that are granted then.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable
from typing import Final

import kvstore

# Each entry of the store's log that puts a record under a lease copies what the lease holds: 10,000 records, as many as
# it allows nearly, cost every node some 150 µs an entry. At 1,000, one request in a thousand waits for a new lease, and
# half a million leases are enough for 5,000 requests a second all day long.
LEASE_RECORDS_MAX: Final = 1000

# The refusal does not say which lease it was, so all of the process are forgotten; each costs one grant.
_all: Final[weakref.WeakSet[SharedLease]] = weakref.WeakSet()


def forget_lost(refusal: kvstore.Refused, began_s: float) -> bool:
    """Whether `refusal` says that a lease has gone. Those that were granted before `began_s` (by `time.monotonic`),
    when what was refused began, are not handed out any more: of many requests that meet the same one, the first grants
    another, and the rest find that."""
    if refusal.code != "lease_not_found":
        return False
    for lease in _all:
        lease.forget(began_s)
    return True


class SharedLease:
    """Hands out a lease that records are put under. Each is kept for `kept_s` at least, and for two `fills_s` more at
    most (one while the lease fills, one for clocks that differ). One per process and kind of record."""

    def __init__(
        self, store: kvstore.Client, kept_s: float, fills_s: float, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._kept_s = kept_s
        self._fills_s = fills_s
        self._clock_s = clock_s
        self._granting = asyncio.Lock()
        self._lease = self._room = 0
        self._fills_until_s = 0.0
        self._granted_at_s = 0.0  # by the real clock: `clock_s` may be a test's
        _all.add(self)

    async def take(self, records: int = 1) -> int:
        """The lease for so many more records. (Many never come to be: a request that is refused writes none.)"""
        if not self._has_room(records):
            async with self._granting:
                if not self._has_room(records):
                    granted_at_s = self._clock_s()
                    self._lease = (await self._store.grant_lease(self._kept_s + 2 * self._fills_s)).lease
                    self._room, self._fills_until_s = LEASE_RECORDS_MAX, granted_at_s + self._fills_s
                    self._granted_at_s = time.monotonic()
        self._room -= records
        return self._lease

    def forget(self, before_s: float) -> None:
        """Hand out another one next, if this was granted before then."""
        if self._granted_at_s < before_s:
            self._room = 0

    def _has_room(self, records: int) -> bool:
        return self._room >= records and self._clock_s() < self._fills_until_s
