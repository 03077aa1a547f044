"""Backups of a running cluster, and the comparison of its replicas. What `kvstore backup` and `kvstore verify` do."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import BinaryIO, Literal

from msgspec import Struct

from kvstore.backup import FORMAT, BackupWriter, End, Header, PagedHash, SavedLease
from kvstore.client.client import Client
from kvstore.client.members import member_status, newest_status
from kvstore.client.transaction import key_after
from kvstore.env import SystemClock
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


async def back_up(
    client: Client,
    file: BinaryIO,
    version: str,
    progress: Progress = lambda done, all: None,
    wall_ms: Callable[[], int] = SystemClock.wall_ms,
) -> Made:
    """Write what the store holds now, at one revision, into an open file. Memory is bounded by a page. `wall_ms` says
    when that is, for people. Raises `Refused(revision_compacted)` if the history of that revision goes before all is
    read."""
    status = await client.status()
    counted = await client.range(prefix=b"", count_only=True)
    revision = counted.revision
    writer = BackupWriter(file)
    writer.header(Header(FORMAT, status.cluster_id, revision, wall_ms(), version))
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


Status = Literal["same", "differs", "unreachable", "another node", "no client address"]


class ReplicaDigest(Struct, frozen=True):
    """One node's records at a revision, held against those of most others. `differs_since` is the first revision at
    which they differ, as far as history goes back; 0 where that is not known. `error` is what kept us from asking."""

    member: Member
    digest: bytes = b""
    count: int = 0
    differs: bool = False
    differs_since: int = 0
    error: KvError | None = None

    @property
    def status(self) -> Status:
        if self.differs:
            return "differs"
        if self.error is not None:
            return "another node" if self.error.code == "wrong_node" else "unreachable"
        return "same" if self.member.client_address else "no client address"


class Verified(Struct, frozen=True):
    """What each member holds. `undecided`: they differ, and no content is held by more than any other, so that none
    can be told to be the damaged one; then every one that was compared `differs`."""

    revision: int
    replicas: tuple[ReplicaDigest, ...]
    undecided: bool = False

    @property
    def agree(self) -> bool:
        """All members were compared, and are the same."""
        return all(replica.status == "same" for replica in self.replicas)


class _Page(Struct, frozen=True):
    """What one `Digest` found. Equal pages one after another hold equal records."""

    start: bytes
    last: bytes
    digest: bytes
    count: int


_Pages = tuple[_Page, ...]


async def verify(client: Client, progress: Progress = lambda done, all: None) -> Verified:
    """Compare the records of all replicas at one revision. Each reads its own, page by page, beside its other work.
    One that cannot be asked ends nothing: it is told. Raises `KvError` where no member can be asked for a revision."""
    counted = await client.range(prefix=b"", count_only=True)
    revision = counted.revision
    members = (await newest_status(client)).members
    asked = [member for member in members if member.client_address]
    total = counted.count * len(asked)
    done = 0

    def page_done(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    answers = await asyncio.gather(*(_replica(client, member, revision, page_done) for member in asked))
    found = {member.name: answer for member, answer in zip(asked, answers, strict=True)}
    # What is held, by how many; the most first.
    held = Counter(pages for pages in found.values() if not isinstance(pages, KvError)).most_common()
    undecided = len(held) > 1 and held[0][1] == held[1][1]

    async def compared(member: Member) -> ReplicaDigest:
        pages = found.get(member.name)
        if pages is None or isinstance(pages, KvError):
            return ReplicaDigest(member, error=pages)
        hashed = PagedHash()
        for page in pages:
            hashed.add_page(page.digest, page.count)
        if pages == held[0][0] and not undecided:
            return ReplicaDigest(member, hashed.digest(), hashed.count)
        theirs = held[1][0] if pages == held[0][0] else held[0][0]
        others = [other for other in asked if found[other.name] == theirs]
        since = await _differs_since(client, (member, pages), (others, theirs), revision)
        error = since if isinstance(since, KvError) else None
        known = 0 if isinstance(since, KvError) else since
        return ReplicaDigest(member, hashed.digest(), hashed.count, True, known, error)

    return Verified(revision, tuple([await compared(member) for member in members]), undecided)


async def _replica(client: Client, member: Member, revision: int, done: Callable[[int], None]) -> _Pages | KvError:
    try:
        await member_status(client, member)
        # There is no digest of what was never written.
        return await _pages(client, member, revision, done=done) if revision else ()
    except KvError as error:
        return error


async def _pages(
    client: Client,
    member: Member,
    revision: int,
    start: bytes = b"",
    end: bytes = b"",
    done: Callable[[int], None] = lambda count: None,
) -> _Pages:
    pages: list[_Page] = []
    while True:
        page = await client.digest(start, end, revision=revision, address=member.client_address)
        pages.append(_Page(start, page.last, page.digest, page.count))
        done(page.count)
        start = key_after(page.last) if page.last else b""
        if not start:  # there is nothing after the largest key of all either
            return tuple(pages)


async def _differs_since(
    client: Client, own: tuple[Member, _Pages], others: tuple[list[Member], _Pages], revision: int
) -> int | KvError:
    """The first revision, as far as history goes back, at which this replica's first page that differs does so from
    the others', who are all the same. 0 if none of the others answers any more, the error if this one does not."""
    member, good = own[0], list(others[0])
    # Where their records differ, so may the ends of their pages, and with one end all pages after it: so it is the
    # first one that counts, and the range of both. At an older revision that range may take several pages.
    ours, theirs = next(pair for pair in zip(own[1], others[1], strict=False) if pair[0] != pair[1])
    start = ours.start
    end = key_after(max(ours.last, theirs.last)) if ours.last and theirs.last else b""

    async def differs(revision: int) -> bool:
        pages = await _pages(client, member, revision, start, end)
        while True:
            try:
                return await _pages(client, good[0], revision, start, end) != pages
            except KvError as error:
                if error.code == "revision_compacted":
                    raise
                good.pop(0)
                if not good:
                    raise

    low, high = 1, revision
    while low < high:
        middle = (low + high) // 2
        try:
            later = not await differs(middle)
        except KvError as error:
            if error.code != "revision_compacted":
                return error if good else 0
            later = True  # it is not known of revisions that are forgotten
        if later:
            low = middle + 1
        else:
            high = middle
    return low
