"""Backups of a running cluster, and the comparison of its replicas. What `kvstore backup` and `kvstore verify` do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import BinaryIO

from msgspec import Struct

from kvstore.backup import FORMAT, BackupWriter, End, Header, PagedHash, SavedLease
from kvstore.client.client import Client
from kvstore.client.transaction import key_after
from kvstore.errors import KvError, Refused
from kvstore.model import LEASE_TTL_MS_MIN, Member

# Enough to keep a node busy between two round trips.
_LEASES_AT_ONCE = 64

# Called with how many records are done, of how many.
Progress = Callable[[int, int], object]


class Made(Struct, frozen=True):
    """A backup that was made."""

    revision: int
    end: End
    size_bytes: int


async def back_up(client: Client, file: BinaryIO, version: str, progress: Progress = lambda done, all: None) -> Made:
    """Write what the store holds now, at one revision, into an open file. Memory is bounded by a page. Raises
    `Refused(revision_compacted)` if the history of that revision goes before all is read."""
    status = await client.status()
    counted = await client.range(prefix=b"", count_only=True)
    revision = counted.revision
    writer = BackupWriter(file)
    writer.header(Header(FORMAT, status.cluster_id, revision, time.time_ns() // 1_000_000, version))
    leases = await _leases(client)
    done = 0
    if revision:
        async for record in client.scan(prefix=b"", revision=revision):
            writer.record(record)
            if record.lease and record.lease not in leases:
                # It ended after the revision and before we asked: what was under it is to go soon.
                leases[record.lease] = SavedLease(record.lease, LEASE_TTL_MS_MIN, 0)
            done += 1
            if done % 1000 == 0:
                progress(done, counted.count)
    progress(done, counted.count)
    # Leases have no revision of their own; those that are granted meanwhile have no record in here.
    writer.leases(tuple(leases.values()))
    end = writer.end()
    return Made(revision, end, writer.size_bytes)


async def _leases(client: Client) -> dict[int, SavedLease]:
    ids = [lease async for lease in client.leases()]
    leases: dict[int, SavedLease] = {}

    async def look(lease: int) -> None:
        try:
            status = await client.lease_status(lease)
        except Refused:  # it has ended since it was listed
            return
        leases[lease] = SavedLease(lease, status.ttl_ms, status.remaining_ms)

    for at in range(0, len(ids), _LEASES_AT_ONCE):
        await asyncio.gather(*(look(lease) for lease in ids[at : at + _LEASES_AT_ONCE]))
    return leases


class ReplicaDigest(Struct, frozen=True):
    """One node's records at a revision. `differs_since` is the first revision at which they are not those of most
    others, where that is known; 0 where they are the same."""

    member: Member
    digest: bytes = b""
    count: int = 0
    differs_since: int = 0
    error: KvError | None = None


class Verified(Struct, frozen=True):
    revision: int
    replicas: tuple[ReplicaDigest, ...]

    @property
    def agree(self) -> bool:
        return all(replica.error is None and not replica.differs_since for replica in self.replicas)


async def verify(client: Client, progress: Progress = lambda done, all: None) -> Verified:
    """Compare the records of all replicas at one revision. Each reads its own, page by page, beside its other work."""
    counted = await client.range(prefix=b"", count_only=True)
    revision = counted.revision
    members = [member for member in (await client.status()).members if member.client_address]
    if not revision:
        return Verified(0, tuple(ReplicaDigest(member, PagedHash().digest()) for member in members))
    total = counted.count * len(members)
    done = 0

    def page_done(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    found = await asyncio.gather(*(_pages(client, member, revision, page_done) for member in members))
    whole = [pages for pages in found if not isinstance(pages, KvError)]
    most = max(whole, key=whole.count, default=[])
    replicas = []
    for member, pages in zip(members, found, strict=True):
        if isinstance(pages, KvError):
            replicas.append(ReplicaDigest(member, error=pages))
            continue
        hashed = PagedHash()
        for _, _, digest, count in pages:
            hashed.add_page(digest, count)
        since = 0 if pages == most else await _differs_since(client, members, found, member, revision)
        replicas.append(ReplicaDigest(member, hashed.digest(), hashed.count, since))
    return Verified(revision, tuple(replicas))


_Pages = list[tuple[bytes, bytes, bytes, int]]  # start, last key, digest, count


async def _pages(client: Client, member: Member, revision: int, done: Callable[[int], None]) -> _Pages | KvError:
    pages: _Pages = []
    start = b""
    try:
        while True:
            page = await client.digest(start, revision=revision, address=member.client_address)
            pages.append((start, page.last, page.digest, page.count))
            done(page.count)
            if not page.last:
                return pages
            start = key_after(page.last)
    except KvError as error:
        return error


async def _differs_since(
    client: Client, members: list[Member], found: list[_Pages | KvError], member: Member, revision: int
) -> int:
    """The first revision, as far as history goes back, at which this replica's first page that differs does so."""
    whole = [pages for pages in found if not isinstance(pages, KvError)]
    most = max(whole, key=whole.count)
    good = members[found.index(most)]
    own = found[members.index(member)]
    assert not isinstance(own, KvError)
    at = next((n for n, (a, b) in enumerate(zip(own, most, strict=False)) if a != b), min(len(own), len(most)) - 1)
    start = own[at][0]
    ends = [pages[at][1] for pages in (own, most)]
    end = key_after(max(ends)) if all(ends) else b""

    async def differs(revision: int) -> bool:
        theirs = await client.digest(start, end, revision=revision, address=good.client_address)
        ours = await client.digest(start, end, revision=revision, address=member.client_address)
        return theirs.digest != ours.digest

    low, high = 1, revision
    while low < high:
        middle = (low + high) // 2
        try:
            later = not await differs(middle)
        except Refused as error:
            if error.code != "revision_compacted":
                raise
            later = True  # it is not known of revisions that are forgotten
        if later:
            low = middle + 1
        else:
            high = middle
    return low
