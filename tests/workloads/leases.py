"""Leases that are granted, kept alive, revoked or left alone, each with one record under it."""

from __future__ import annotations

import asyncio
import itertools
from random import Random

from msgspec import Struct

from kvstore import Client, OutcomeUnknown, Refused, Unavailable
from tests.checkers.history import History
from tests.checkers.leases import GONE, Attach, Grant, Keep, LastLook, Look, Revoke, check_lease
from tests.workloads.base import noted, one_or_several

# Short, so that many end in a run, and long enough for some keep-alives through an election.
TTLS_S = (1.0, 2.0, 4.0)
# At the end a lease goes within its time, and a second or two for the leader to look and to propose.
LAST_LOOKS, LAST_LOOK_EVERY_S = 30, 0.5


class _Granted(Struct):
    name: str
    id: int
    key: bytes


class LeaseWorkload:
    name = "leases"

    def __init__(self, history: History, *, timeout_s: float, hot: int = 3, prefix: bytes = b"leases/") -> None:
        self.history = history.part(self.name)
        self._timeout_s = timeout_s
        self._hot = hot
        self._prefix = prefix
        self._numbers = itertools.count(1)
        self._granted: list[_Granted] = []

    async def set_up(self, kv: Client) -> None:
        """Nothing: there are no leases yet."""

    async def step(self, kv: Client, worker: int, chance: Random) -> None:
        await one_or_several(lambda: self._step(kv, worker, chance), chance)

    async def _step(self, kv: Client, worker: int, chance: Random) -> None:
        kind = chance.random()
        if kind < 0.15 or not self._granted:
            await self._grant(kv, worker, chance.choice(TTLS_S))
            return
        lease = chance.choice(self._granted[-self._hot :])
        if kind < 0.5:
            entry = self.history.begin(worker, Keep(lease.name))
            result = await noted(entry, kv.keep_lease(lease.id, timeout=self._timeout_s), answers=(GONE,))
            if result is not None:
                entry.ok(GONE if isinstance(result, Refused) else None)
        elif kind < 0.95:
            entry = self.history.begin(worker, Look(lease.name))
            record = await noted(entry, kv.range(lease.key, timeout=self._timeout_s))
            if record is not None and not isinstance(record, Refused):
                entry.ok(bool(record.records))
        else:
            entry = self.history.begin(worker, Revoke(lease.name))
            revoked = await noted(entry, kv.revoke_lease(lease.id, timeout=self._timeout_s), answers=(GONE,))
            if revoked is not None:
                entry.ok(GONE if isinstance(revoked, Refused) else None)

    async def _grant(self, kv: Client, worker: int, ttl_s: float) -> None:
        name = f"l{next(self._numbers)}"
        entry = self.history.begin(worker, Grant(name, ttl_s))
        result = await noted(entry, kv.grant_lease(ttl_s, timeout=self._timeout_s))
        if result is None or isinstance(result, Refused):
            return
        entry.ok()
        lease = _Granted(name, result.lease, self._prefix + name.encode())
        self._granted.append(lease)
        entry = self.history.begin(worker, Attach(name))
        put = await noted(entry, kv.put(lease.key, b"", lease=lease.id, timeout=self._timeout_s), answers=(GONE,))
        if put is not None:
            entry.ok(GONE if isinstance(put, Refused) else None)

    async def finish(self, kv: Client) -> None:
        left = list(self._granted)
        for _ in range(LAST_LOOKS):
            left = [lease for lease in left if await self._is_there(kv, lease)]
            if not left:
                break
            await asyncio.sleep(LAST_LOOK_EVERY_S)
        for lease in self._granted:
            self.history.begin(-1, LastLook(lease.name)).ok(lease in left)

    async def _is_there(self, kv: Client, lease: _Granted) -> bool:
        try:
            return await kv.get(lease.key, timeout=self._timeout_s) is not None
        except (Unavailable, OutcomeUnknown):
            return True  # not known: it is asked again

    def check(self) -> None:
        for lease in self._granted:
            check_lease([entry for entry in self.history.entries if entry.operation.lease == lease.name])
