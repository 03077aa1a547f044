"""The store as it was at one revision, read in pages: what the auditor sees of it.

A reader holds a page of each scan that it has under way, however large the store is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Final, TypeVar

import msgspec

import kvstore
from services.audit.findings import Findings, declare
from services.web.reading import read_ranges

# Reads of single keys in one request: enough that a round trip does not count, and their records, orders of some
# kilobytes, fit one result of 1 MiB. (Where they do not, they are read in halves.)
READS_AT_ONCE: Final = 40
PAGE_RECORDS: Final = 500

UNREADABLE: Final = declare("unreadable", "Every record can be read as what its key says that it is.")
RECORD_KEY: Final = declare("record_key", "Every record stands at the key that its content says.")

T = TypeVar("T")
# How far it is: records that were read, of how many.
Progress = Callable[[int, int], None]


class View:
    """`revision` 0: as it is with each read."""

    def __init__(
        self, store: kvstore.Client, revision: int, findings: Findings, progress: Progress | None = None
    ) -> None:
        self._store = store
        self._progress = progress
        self._done = self._expected = 0
        self.revision = revision
        self.findings = findings

    async def expect(self, prefixes: Sequence[bytes]) -> None:
        """These are what will be scanned: for the progress alone."""
        for prefix in prefixes:
            counted = await self._store.range(prefix=prefix, revision=self.revision, count_only=True)
            self._expected += counted.count

    async def scan(self, prefix: bytes, *, keys_only: bool = False) -> AsyncIterator[kvstore.Record]:
        scanning = self._store.scan(
            prefix=prefix, revision=self.revision, keys_only=keys_only, page_records=PAGE_RECORDS
        )
        async for record in scanning:
            self._done += 1
            if self._progress is not None and self._done % PAGE_RECORDS == 0:
                self._progress(self._done, self._expected)
            yield record

    async def get(self, keys: Sequence[bytes], *, keys_only: bool = False) -> list[kvstore.Record | None]:
        """The record of each key, or None."""
        found: list[kvstore.Record | None] = []
        for some in batches(keys, READS_AT_ONCE):
            ranges = [kvstore.Range(key, revision=self.revision, keys_only=keys_only) for key in some]
            found += [records[0] if records else None for records in await self.read(ranges)]
        return found

    async def read(self, ranges: Sequence[kvstore.Range]) -> list[tuple[kvstore.Record, ...]]:
        return await read_ranges(self._store, ranges)

    def decode(self, decoder: Callable[[bytes], T], record: kvstore.Record) -> T | None:
        """None, and a violation, if it cannot be read."""
        try:
            return decoder(record.value)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
            self.findings.add(UNREADABLE, record.key, "a record of this kind", error)
            return None

    def number(self, record: kvstore.Record) -> int:
        """0, and a violation, if it is none."""
        try:
            return int(record.value)
        except ValueError:
            self.findings.add(UNREADABLE, record.key, "a number", record.value[:40])
            return 0


class Grouped:
    """Records `{prefix}{order}/{number}`, taken order by order as their keys go. Orders by their key go alike, since
    `/` sorts before the digits. What belongs to no order that was asked for is handed to `orphan`."""

    def __init__(self, view: View, prefix: bytes, orphan: Callable[[kvstore.Record], None]) -> None:
        self._records = view.scan(prefix)
        self._prefix = prefix
        self._orphan = orphan
        self._next: kvstore.Record | None = None
        self._begun = False

    async def take(self, order: bytes) -> list[kvstore.Record]:
        """Those of an order, which must come after all that were asked for before."""
        if not self._begun:
            self._begun = True
            await self._advance()
        taken: list[kvstore.Record] = []
        while self._next is not None and (owner := self._owner(self._next)) <= order:
            if owner == order:
                taken.append(self._next)
            else:
                self._orphan(self._next)
            await self._advance()
        return taken

    async def finish(self) -> None:
        """There are no more orders."""
        await self.take(b"\xff")

    def _owner(self, record: kvstore.Record) -> bytes:
        return record.key[len(self._prefix) :].partition(b"/")[0]

    async def _advance(self) -> None:
        self._next = await anext(self._records, None)


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


async def batched(items: AsyncIterator[T], size: int) -> AsyncIterator[list[T]]:
    batch: list[T] = []
    async for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
