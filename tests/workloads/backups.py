"""Backups of the whole store, taken with the client's own code while all else goes on. They go into memory.

Beside them a few keys of its own are changed, so that each backup has records of which everything is known. What is in
a backup is held against a replica's digest at that revision, and at the end against a scan at that revision, where
history goes back so far.
"""

from __future__ import annotations

import asyncio
import io
import itertools
from collections.abc import AsyncIterator, Sequence
from random import Random
from typing import Any, cast

from kvstore import Client, Delete, OutcomeUnknown, Put, Record, Refused, TxnResult, Unavailable
from kvstore.backup import PagedHash
from kvstore.client.backup import back_up
from kvstore.client.transaction import key_after
from kvstore.errors import KvError
from kvstore.model import Operation
from tests.checkers.backups import (
    Backup,
    Change,
    TakeBackup,
    check_changes,
    check_digest,
    check_failed,
    check_same,
    read_whole,
)
from tests.checkers.history import History
from tests.checkers.revisions import check_revisions
from tests.checkers.verdict import Inconsistent
from tests.workloads.base import BackedUp, insist, noted, one_or_several

KEYS = 12
# A handful in each run: each reads the whole store.
SHARE = 0.05
# So that most backups take several pages, and history may be compacted between two of them.
PAGES_RECORDS = (30, 100, 1000)
# Some are slow to write down what they read: between two pages, much happens.
PAUSES_S = (0.0, 0.0, 0.1)
# Held until the end, to be compared once more.
KEPT = 2


class _Paged:
    """A client whose scans have small pages, and time between them."""

    def __init__(self, kv: Client, page_records: int, pause_s: float) -> None:
        self._kv = kv
        self._page_records = page_records
        self._pause_s = pause_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kv, name)

    async def scan(self, **arguments: Any) -> AsyncIterator[Record]:
        count = 0
        async for record in self._kv.scan(**arguments, page_records=self._page_records):
            yield record
            count += 1
            if self._pause_s and count % self._page_records == 0:
                await asyncio.sleep(self._pause_s)


class BackupWorkload:
    name = "backups"

    def __init__(
        self, history: History, *, timeout_s: float, readers: Sequence[BackedUp] = (), prefix: bytes = b"backups/"
    ) -> None:
        """`readers`: for whom each backup is a reading."""
        self.history = history.part(self.name)
        self._timeout_s = timeout_s
        self._readers = readers
        self._keys = [prefix + b"%d" % number for number in range(KEYS)]
        self._numbers = itertools.count(1)
        self._is_busy = False
        self._kept: list[Backup] = []
        self._wrong: Inconsistent | None = None

    async def set_up(self, kv: Client) -> None:
        """Nothing: its keys begin as absent."""

    async def step(self, kv: Client, worker: int, chance: Random) -> None:
        if chance.random() < SHARE and not self._is_busy:
            self._is_busy = True
            try:
                await self._take(kv, worker, chance)
            except Inconsistent as wrong:
                self._wrong = self._wrong or wrong
            finally:
                self._is_busy = False
        else:
            await one_or_several(lambda: self._change(kv, worker, chance), chance)

    async def _take(self, kv: Client, worker: int, chance: Random) -> None:
        file = io.BytesIO()
        entry = self.history.begin(worker, TakeBackup(next(self._numbers)))
        readings = [reader.begin_reading(worker) for reader in self._readers]
        client = cast(Client, _Paged(kv, chance.choice(PAGES_RECORDS), chance.choice(PAUSES_S)))
        try:
            # No clock is read: a run follows from its seed.
            made = await back_up(client, file, "simulated", wall_ms=lambda: 0)
        except (Refused, Unavailable, OutcomeUnknown) as error:
            for open_entry in (entry, *(reading for reading, _ in readings)):
                open_entry.failed(error.code)
            check_failed(file.getvalue())
            return
        backup = read_whole(file.getvalue(), made.revision, made.end.digest)
        for reading, result_of in readings:
            reading.ok(result_of(backup.records), revision=backup.revision)
        entry.ok(f"{len(backup.records)} records", revision=backup.revision)
        self._kept = [*self._kept, backup][-KEPT:]
        check_changes(backup, self._keys, [entry for entry in self.history.entries if _is_change(entry.operation)])
        await self._compare(kv, backup, chance)

    async def _compare(self, kv: Client, backup: Backup, chance: Random) -> None:
        """With a replica's own digest of that revision, if it gives one."""
        hashed, start, where = PagedHash(), b"", ""
        try:
            where = chance.choice([member.client_address for member in (await kv.status()).members])
            while backup.revision:
                page = await kv.digest(start, revision=backup.revision, address=where, timeout=self._timeout_s)
                hashed.add_page(page.digest, page.count)
                if not page.last:
                    break
                start = key_after(page.last)
        except KvError:
            return  # it is compacted, too far behind, or not to be reached
        check_digest(backup, hashed.digest(), where)

    async def _change(self, kv: Client, worker: int, chance: Random) -> None:
        writes: dict[bytes, bytes | None] = {}
        for key in chance.sample(self._keys, chance.randint(1, 4)):
            writes[key] = None if chance.random() < 0.2 else b"%d" % next(self._numbers)
        operations: list[Operation] = [
            Delete(key) if value is None else Put(key, value) for key, value in writes.items()
        ]
        entry = self.history.begin(worker, Change(writes))
        result = await noted(entry, kv.txn(success=operations, timeout=self._timeout_s))
        if isinstance(result, TxnResult):
            changed = any(getattr(part, "deleted", 1) for part in result.results)
            entry.ok(revision=result.revision, changed=changed)

    async def finish(self, kv: Client) -> None:
        for backup in self._kept:

            async def scan(backup: Backup = backup) -> list[Record]:
                return [record async for record in kv.scan(prefix=b"", revision=backup.revision)]

            try:
                records = await insist(scan) if backup.revision else []
                check_same(backup, records, "a scan")
            except Refused:
                continue  # compacted
            except Inconsistent as wrong:
                self._wrong = self._wrong or wrong

    def check(self) -> None:
        if self._wrong is not None:
            raise self._wrong
        check_revisions(self.history.root.entries)


def _is_change(operation: object) -> bool:
    return isinstance(operation, Change)
