"""The client: what a user of kvstore calls.

`Client` turns calls into requests and results into return values. It holds no logic of its own beyond that: routing is
`pool.py`, attempts and retries `call.py`, exactly-once sessions `session.py`, optimistic transactions `transaction.py`.

What every call promises:

- It ends within its `timeout` (seconds; the client's `timeout_s` where none is given).
- It raises nothing but the families of `kvstore.errors`, told apart by what a caller can do: `Refused` (nothing
  changed, and sending the same again will not help), `Unavailable` (nothing changed, try later), `OutcomeUnknown` (may
  have taken effect, once). Wrong argument types raise `TypeError` or `ValueError` before anything is sent.
- A mutation takes effect at most once, however often the client had to send it.
- Cancelling the task that awaits it is clean; a mutation that was already sent may still take effect.

A client belongs to the event loop that it is first used on, and is not thread safe.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from types import TracebackType
from typing import Literal, TypeVar

from kvstore import codec, limits, model
from kvstore.client.call import AdminCall, Call, Dispatcher, ReadCall, WriteCall
from kvstore.client.connection import Connector, TcpConnector
from kvstore.client.deadlines import Deadlines
from kvstore.client.lease import Lease
from kvstore.client.lock import LOCK_TTL_S, Election, Lock
from kvstore.client.pool import Pool, Route
from kvstore.client.seconds import checked_timeout, ttl_ms
from kvstore.client.session import Sessions
from kvstore.client.transaction import Transaction, key_after
from kvstore.client.watch import Stream, Watch, What
from kvstore.errors import InternalError, Refused, Unavailable
from kvstore.model import (
    Add,
    AddResult,
    Compact,
    CompactResult,
    Compare,
    Delete,
    DeleteResult,
    DescribeLease,
    DigestResult,
    DoneResult,
    GrantLease,
    KeepLease,
    LeaseList,
    LeaseResult,
    LeaseStatus,
    ListLeases,
    Member,
    NodeStatus,
    Operation,
    Put,
    PutResult,
    Range,
    RangeResult,
    Record,
    RevokeLease,
    SortBy,
    Txn,
    TxnResult,
    prefix_end,
)

Level = Literal["linearizable", "local"]
# How each level is asked for, and whom.
_LEVELS: dict[str, tuple[int, Route]] = {
    "linearizable": (codec.ReadLevel.LINEARIZABLE, Route.ANY),
    "local": (codec.ReadLevel.LOCAL, Route.REPLICA),
}

# A transaction that lost this often meets more writers than waiting will cure; `Add` in a plain `txn` needs no retries.
TRANSACTION_ATTEMPTS = 32
# The first wait is about a commit's time; the last spreads hundreds of contenders over as many commits.
TRANSACTION_BACKOFF_MIN_S, TRANSACTION_BACKOFF_MAX_S = 0.002, 0.250
# A page of `scan`: a thousand small records are some 100 KiB, well under a result's limit (which cuts larger ones).
SCAN_PAGE_RECORDS = 1000
# A session that is not closed ends by itself after its ttl, so closing waits only as long as a healthy store needs.
CLOSE_TIMEOUT_S = 1.0

_T = TypeVar("_T")
_Result = TypeVar("_Result")


class Client:
    """A connection to a cluster. Made by `kvstore.connect` or `kvstore.open_embedded`.

    Use it as `async with connect(...) as kv:`, or `kv = await connect(...)` and later `await kv.close()`. Connecting
    is lazy: starting waits for nothing, and a call made while no node can be reached waits within its own timeout.
    One client serves any number of concurrent callers; make one per process, not one per request.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        timeout_s: float = 5.0,
        cluster_id: str = "",
        connector: Connector | None = None,
        chance: random.Random | None = None,
    ) -> None:
        """Takes no network step. `connector` and `chance` (backoff jitter) are for embedding and for simulation."""
        self._endpoints = tuple(endpoints)
        self._timeout_s = checked_timeout(timeout_s)
        self._cluster_id = cluster_id
        self._connector = connector
        self._chance = chance if chance is not None else random.Random()
        self._revision = 0
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[Stream, None] = {}
        self._deadlines: Deadlines
        self._pool: Pool
        self._dispatcher: Dispatcher
        self._sessions: Sessions

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to connect. Waits for nothing. Calls do it by themselves; starting early only saves the first its
        handshake."""
        self._bind()
        self._pool.seek()

    async def close(self) -> None:
        """Close the session and all connections. What is still unanswered ends with `Unavailable(closed)` or, if it
        may have been taken, `OutcomeUnknown`. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._loop is None:
            return
        for stream in tuple(self._streams):
            stream.close(Unavailable("this client was closed", code="closed"))
        try:
            await self._sessions.close(CLOSE_TIMEOUT_S)
        finally:
            self._dispatcher.close()
            await self._pool.close()

    async def __aenter__(self) -> Client:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __await__(self) -> Generator[None, None, Client]:
        yield from self.start().__await__()
        return self

    @property
    def revision(self) -> int:
        """The newest store revision that any answer to this client has shown; `local` reads never see an older one."""
        return self._revision

    # --- writes -------------------------------------------------------------------------------------------------------

    async def put(
        self, key: bytes, value: bytes, *, lease: int = 0, prev: bool = False, timeout: float | None = None
    ) -> PutResult:
        """Set `key` to `value`. With `prev`, the result holds the record as it was (None if there was none).

        With `lease`, the record is deleted when that lease ends; without, it stays, also if it was under one before.
        Raises `Refused`: `lease_not_found`, `lease_full`.
        """
        _check_bytes("key", key)
        _check_bytes("value", value)
        _check_int("lease", lease)
        return _expect(await self._write(Put(key, value, lease, prev), timeout), PutResult)

    async def delete(
        self, key: bytes, end: bytes | None = None, *, prev: bool = False, timeout: float | None = None
    ) -> DeleteResult:
        """Delete one key, or every key in `[key, end)` (`end=b""`: no upper bound). Deleting nothing is no error:
        `deleted` says how many there were. With `prev`, the result holds them.

        All at once, so only so much: `Refused(range_too_large)` past 25,000 records or 32 MiB (`model.REPLACED_MAX`).
        Who needs it not all at once reads a page, deletes up to its last key, and so on.
        """
        _check_bytes("key", key)
        if end is not None:
            _check_bytes("end", end)
        return _expect(await self._write(Delete(key, end, prev), timeout), DeleteResult)

    async def delete_prefix(self, prefix: bytes, *, prev: bool = False, timeout: float | None = None) -> DeleteResult:
        """Delete every key that starts with `prefix`, as `delete` does."""
        _check_bytes("prefix", prefix)
        return _expect(await self._write(Delete(prefix, prefix_end(prefix), prev), timeout), DeleteResult)

    async def add(
        self,
        key: bytes,
        delta: int,
        *,
        min: int | None = None,
        max: int | None = None,
        timeout: float | None = None,
    ) -> AddResult:
        """Add to a signed 64-bit decimal (absent is 0) and return what it is now, in `value`.

        Raises `Refused` with code `out_of_range` where the sum would leave `[min, max]`, `overflow`, or
        `not_a_number`; nothing has changed then.
        """
        _check_bytes("key", key)
        for name, number in (("delta", delta), ("min", min), ("max", max)):
            if number is not None:
                _check_int(name, number)
        return _expect(await self._write(Add(key, delta, min, max), timeout), AddResult)

    async def txn(
        self,
        compare: Sequence[Compare] = (),
        success: Sequence[Operation] = (),
        failure: Sequence[Operation] = (),
        *,
        timeout: float | None = None,
    ) -> TxnResult:
        """One atomic transaction: if every compare holds, do `success`, else `failure`, in one revision.

        A compare that does not hold is no error: `succeeded` is then False, and `results` are those of `failure`. An
        operation that cannot be done (an `Add` out of its bounds, a key written twice) refuses the whole: `Refused`,
        whose `operation` is the path to it. A transaction that only reads is sent as a linearizable read.

        All its ranges and compares together walk over 100,000 records or 64 MiB of them (`model.WALK_MAX`), and its
        writes replace what `delete` may, or it is refused with `range_too_large`.
        """
        request = Txn(tuple(compare), tuple(success), tuple(failure))
        if limits.is_read_only(request):
            return _expect(await self._read(request, codec.ReadLevel.LINEARIZABLE, 0, timeout, Route.ANY), TxnResult)
        return _expect(await self._write(request, timeout), TxnResult)

    async def compact(self, revision: int, *, timeout: float | None = None) -> CompactResult:
        """Forget history below `revision`: reads at an older one are refused with `revision_compacted` from then
        on."""
        _check_int("revision", revision)
        return _expect(await self._write(Compact(revision), timeout), CompactResult)

    # --- leases -------------------------------------------------------------------------------------------------------

    def lease(self, ttl_s: float, *, on_lost: Callable[[], object] | None = None) -> Lease:
        """A lease for as long as a block runs, kept alive meanwhile: `async with kv.lease(10) as lease: ...`. Leaving
        the block revokes it, and deletes its records. `on_lost` is called if it is lost before that."""
        return Lease(self, ttl_s, on_lost)

    async def grant_lease(self, ttl_s: float, *, lease: int = 0, timeout: float | None = None) -> LeaseResult:
        """Grant a lease that lives `ttl_s` seconds (one at least) after this or its last keep-alive. `lease` is an id
        of your own; 0 has the store choose. Raises `Refused`: `lease_exists`, `too_many_leases`."""
        _check_int("lease", lease)
        return _expect(await self._write(GrantLease(ttl_ms(ttl_s), lease), timeout), LeaseResult)

    async def keep_lease(self, lease: int, *, timeout: float | None = None) -> LeaseResult:
        """Let a lease live for its whole time from now on. Raises `Refused(lease_not_found)`."""
        _check_int("lease", lease)
        return _expect(await self._write(KeepLease(lease), timeout), LeaseResult)

    async def revoke_lease(self, lease: int, *, timeout: float | None = None) -> DoneResult:
        """End a lease and delete its records, in one revision. `count` is how many there were. Raises
        `Refused(lease_not_found)`."""
        _check_int("lease", lease)
        return _expect(await self._write(RevokeLease(lease), timeout), DoneResult)

    async def lease_status(self, lease: int, *, keys: bool = False, timeout: float | None = None) -> LeaseStatus:
        """How long a lease has to live, and how many records are under it; with `keys`, which. Raises
        `Refused`: `lease_not_found`, and with `keys` `result_too_large` where they do not fit a result of 1 MiB."""
        _check_int("lease", lease)
        request = DescribeLease(lease, bool(keys))
        return _expect(await self._read(request, codec.ReadLevel.LINEARIZABLE, 0, timeout, Route.ANY), LeaseStatus)

    async def leases(self, *, timeout: float | None = None) -> AsyncIterator[int]:
        """The ids of all leases, in order, a page at a time; `timeout` is for each page."""
        after, more = 0, True
        while more:
            request = ListLeases(after)
            answer = await self._read(request, codec.ReadLevel.LINEARIZABLE, 0, timeout, Route.ANY)
            page = _expect(answer, LeaseList)
            for lease in page.leases:
                yield lease
            more = page.more
            after = page.leases[-1] if page.leases else after

    # --- locks and elections ------------------------------------------------------------------------------------------

    def lock(
        self,
        name: str | bytes,
        *,
        ttl_s: float = LOCK_TTL_S,
        wait_s: float | None = None,
        on_lost: Callable[[], object] | None = None,
    ) -> Lock:
        """Hold a lock while a block runs: `async with kv.lock("reports") as lock: ...`. First come, first served.

        `ttl_s`: so long a dead holder keeps the others waiting. `wait_s`: so long to wait for others that came before
        (0: only if it is free; None: as long as it takes), after which it raises `Unavailable(lock_held)`. Joining
        them takes two calls that end as any call does, within the client's timeout; who has a place keeps it through
        an outage, for as long as its lease is sure (`Unavailable(lock_lost)` then). `on_lost` is called if it is lost
        before the block ends. What keeps a holder that does not know that it lost it from writing is `lock.held` and
        `lock.token`: see `kvstore/client/lock.py`, or docs/consistency.md.
        """
        return Lock(self, name, b"", ttl_s, wait_s, on_lost)

    def election(self, name: str | bytes) -> Election:
        """Who leads what: `async with kv.election("billing").campaign(b"host-1") as lead: ...`."""
        return Election(self, name)

    # --- reads --------------------------------------------------------------------------------------------------------

    async def get(
        self, key: bytes, *, level: Level = "linearizable", revision: int = 0, timeout: float | None = None
    ) -> Record | None:
        """The record of one key, or None.

        `level`: `linearizable` sees every write that was acknowledged, to anyone, before the call began. `local`
        costs the cluster nothing and may be a little old, but never older than what this client has already seen.
        `revision`: as the store was then (0 is newest); `Refused(revision_compacted)` if that is forgotten,
        `Refused(revision_in_future)` if it is yet to come (a `local` read waits for its replica to get there).
        """
        _check_bytes("key", key)
        _check_int("revision", revision)
        ask, whom = _level(level)
        result = await self._read(Range(key, None, 0, revision), ask, revision, timeout, whom)
        records = _expect(result, RangeResult).records
        return records[0] if records else None

    async def range(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
        count_only: bool = False,
        reverse: bool = False,
        sort: SortBy = SortBy.KEY,
        level: Level = "linearizable",
        timeout: float | None = None,
    ) -> RangeResult:
        """Records of `[start, end)` (`end=b""`: no upper bound; no `end`: the one key), or of all keys that start
        with `prefix` (then no start and end).

        At most `limit` of them (0: as many as fit a result of 1 MiB). `more` says that something was left out;
        `count` is how many there are in the whole range, or with `more` at least are: it looks no further than a
        thousand ahead. `count_only` counts them all. `sort` walks over the whole range, which must not hold more than
        100,000 records or 64 MiB (`Refused(range_too_large)`); only `SortBy.KEY` does not. `level` and `revision` as
        for `get`. `scan` pages by itself.
        """
        start, end = _bounds(start, end, prefix)
        _check_int("limit", limit)
        _check_int("revision", revision)
        request = Range(start, end, limit, revision, bool(keys_only), bool(count_only), bool(reverse), SortBy(sort))
        ask, whom = _level(level)
        result = _expect(await self._read(request, ask, revision, timeout, whom), RangeResult)
        while count_only and result.more:  # so many that they are counted in parts, all at one revision
            at = revision or result.revision
            rest = Range(key_after(result.records[0].key), end, 0, at, False, True)
            part = await self._read_at(rest, timeout)
            result = RangeResult(result.revision, part.records, result.count + part.count, part.more)
        return result

    async def scan(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        revision: int = 0,
        keys_only: bool = False,
        reverse: bool = False,
        page_records: int = SCAN_PAGE_RECORDS,
        level: Level = "linearizable",
        timeout: float | None = None,
    ) -> AsyncIterator[Record]:
        """Every record of a range or prefix, in key order, all as of one revision: the first page's.

        Fetches `page_records` at a time; `timeout` is for each page. A scan that runs for longer than history is kept
        ends with `Refused(revision_compacted)`.
        """
        start, end = _bounds(start, end, prefix)
        _check_int("revision", revision)
        _check_int("page_records", page_records)
        if page_records < 1:
            raise ValueError("page_records must be at least 1")
        ask, whom = _level(level)
        request = Range(start, end, page_records, revision, bool(keys_only), False, bool(reverse))
        page = _expect(await self._read(request, ask, revision, timeout, whom), RangeResult)
        at = revision or page.revision
        while True:
            for record in page.records:
                yield record
            if not page.more:
                return
            if not page.records:
                raise InternalError("the server left out every record of a page")
            last = page.records[-1].key
            start, end = (start, last) if reverse else (key_after(last), end)
            request = Range(start, end, page_records, at, bool(keys_only), False, bool(reverse))
            page = await self._read_at(request, timeout)

    async def digest(
        self,
        start: bytes = b"",
        end: bytes = b"",
        *,
        revision: int,
        limit: int = model.DIGEST_RECORDS_MAX,
        limit_bytes: int = model.DIGEST_BYTES_MAX,
        address: str = "",
        timeout: float | None = None,
    ) -> DigestResult:
        """A hash over the first records of `[start, end)` (`b""`: no upper bound), `limit` of them or as many as make
        `limit_bytes`, as they were at a revision, by the node at `address` (any, if empty). Equal on all replicas, or
        one of them is damaged. It goes on at `key_after(last)`, unless `last` is empty."""
        _check_bytes("start", start)
        _check_bytes("end", end)
        request = model.Digest(start, end, revision, limit, limit_bytes)
        level = codec.ReadLevel.LOCAL
        return _expect(await self._read(request, level, revision, timeout, Route.ANY, address), DigestResult)

    # --- watches ------------------------------------------------------------------------------------------------------

    def watch(
        self,
        start: bytes = b"",
        end: bytes | None = None,
        *,
        prefix: bytes | None = None,
        from_revision: int = 0,
        prev: bool = False,
        puts: bool = True,
        deletes: bool = True,
        marks: bool = False,
        future: bool = False,
        timeout: float | None = None,
    ) -> Watch:
        """Every event of one key, of `[start, end)`, or of a prefix, once and in order: `async for event in
        kv.watch(prefix=b"order/"): ...`. It goes on through leader changes and restarts of nodes.

        `from_revision`: the first revision of interest; 0 is from now on. A later one than the next is refused with
        `revision_in_future` (what was restored from a backup may know fewer revisions than you do), unless `future`
        says that you mean to wait. One that was compacted is refused with `revision_compacted`.
        `prev` adds the record as it was before. `puts` and `deletes` say which events are wanted. `marks` has
        `Watch.revisions` also tell when nothing has happened up to some revision.
        `timeout`: seconds without any node that serves it, after which iterating raises `Unavailable`. A range that
        is empty is refused with `invalid_range`.
        """
        start, end = _bounds(start, end, prefix)
        _check_int("from_revision", from_revision)
        if not puts and not deletes:
            raise ValueError("a watch wants puts, deletes, or both")
        limits.check_watch(start, end, from_revision, model.WATCH_WINDOW_BYTES_MAX)
        loop = self._bind()
        what = What(start, end, from_revision, bool(prev), bool(puts), bool(deletes), bool(future))
        stream = Stream(loop, self._pool, self._chance, what, self._timeout(timeout), self._streams.pop)
        self._streams[stream] = None
        stream.begin()
        return Watch(stream, marks)

    # --- optimistic transactions --------------------------------------------------------------------------------------

    def transaction(self, *, timeout: float | None = None) -> Transaction:
        """One attempt at a serializable transaction: `async with kv.transaction() as txn: ...`. Its end raises
        `Refused(conflict)` when another writer was faster; `run_transaction` is the one that tries again.

        All reads see one revision, and the transaction's own writes. Leaving the block commits: if anything that was
        read has changed since, also by a key that newly appeared in a range, it raises `Refused(conflict)` and
        nothing was written. An exception inside the block writes nothing. `timeout` is for each read and the commit.

        A block cannot be run again by its own `async with`; for retries use `run_transaction`.
        """
        return Transaction(self._transaction_read, self._transaction_commit, timeout)

    async def run_transaction(
        self,
        body: Callable[[Transaction], Awaitable[_T]],
        *,
        attempts: int = TRANSACTION_ATTEMPTS,
        timeout: float | None = None,
    ) -> _T:
        """Run `body(txn)` and commit; on a conflict run it again from the start, up to `attempts` times, with backoff
        and jitter in between. Returns what `body` returned.

        `body` must have no effect outside `txn`, because it may run several times. Its own exceptions end the
        transaction, and nothing is written. Raises `Refused(conflict)` when all attempts conflicted, and
        `OutcomeUnknown` (never retried here) when it is not known whether the commit took effect.
        """
        if attempts < 1:
            raise ValueError("attempts must be at least 1")
        for attempt in range(1, attempts + 1):
            txn = self.transaction(timeout=timeout)
            try:
                async with txn:
                    return await body(txn)
            except Refused:
                if not txn.conflicted or attempt == attempts:
                    raise
            await self.wait_for_others(attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def wait_for_others(self, attempt: int) -> None:
        """Back off after a conflict, the longer the more attempts there were, with full jitter."""
        ceiling_s = min(TRANSACTION_BACKOFF_MAX_S, TRANSACTION_BACKOFF_MIN_S * 2 ** min(attempt, 10))
        await asyncio.sleep(self._chance.random() * ceiling_s)

    # --- the cluster --------------------------------------------------------------------------------------------------

    async def status(self, address: str = "", *, digest: bool = False, timeout: float | None = None) -> NodeStatus:
        """What one node says of itself: the one at `address` (`host:port`), or any that answers. `digest` also hashes
        its whole state, which takes time in proportion to it."""
        loop = self._bind()
        call = AdminCall(
            self._dispatcher,
            loop,
            loop.time() + self._timeout(timeout),
            lambda id: codec.StatusRequest(id, digest),
            changes=False,
            address=address,
        )
        self._dispatcher.submit(call)
        return _expect(await self._settle(call), codec.StatusAnswer).status

    async def member_add(
        self,
        name: str,
        peer_address: str,
        client_address: str,
        node_id: str,
        cluster_id: str,
        *,
        timeout: float | None = None,
    ) -> tuple[Member, ...]:
        """Add a node as a learner. Returns the members after it. `Refused(invalid_request)` where a name, an id or an
        address is none, or another member has the address."""
        return await self._admin(
            lambda id: codec.MemberAdd(id, cluster_id, name, peer_address, client_address, node_id), timeout
        )

    async def member_promote(self, name: str, *, timeout: float | None = None) -> tuple[Member, ...]:
        """Give a learner its vote. `Refused(not_caught_up)` while the leader does not hear it, or it lacks too much of
        the log."""
        return await self._admin(lambda id: codec.MemberPromote(id, name), timeout)

    async def member_remove(
        self, name: str, *, force: bool = False, timeout: float | None = None
    ) -> tuple[Member, ...]:
        """Remove a member. `Refused(would_lose_quorum)` where the rest could not go on; with `force` it is removed all
        the same, and the cluster stands still until enough of the rest are back."""
        return await self._admin(lambda id: codec.MemberRemove(id, name, force), timeout)

    async def transfer_leader(self, name: str = "", *, timeout: float | None = None) -> tuple[Member, ...]:
        """Hand leadership to `name`, or to whom the leader chooses. `Unavailable(transfer_failed)` if that failed;
        `Refused`: `member_unknown`, `not_voter`."""
        return await self._admin(lambda id: codec.TransferLeader(id, name), timeout)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _bind(self) -> asyncio.AbstractEventLoop:
        """Build everything that needs the running loop, once."""
        if self._closed:
            raise Unavailable("this client is closed", code="closed")
        if self._loop is not None:
            return self._loop
        loop = asyncio.get_running_loop()
        next_id = itertools.count(1).__next__
        connector = self._connector if self._connector is not None else TcpConnector(loop, next_id)
        self._deadlines = Deadlines(loop)
        self._pool = Pool(loop, connector, self._endpoints, self._cluster_id, self._chance, next_id)
        self._dispatcher = Dispatcher(loop, self._pool, self._deadlines, self._chance, next_id)
        self._sessions = Sessions(loop, self._dispatcher, self._timeout_s)
        self._loop = loop
        return loop

    def _timeout(self, timeout: float | None) -> float:
        return self._timeout_s if timeout is None else checked_timeout(timeout)

    async def _write(self, request: model.Mutation, timeout: float | None) -> object:
        body = _encode(request)
        limits.check_mutation(request, len(body))
        loop = self._bind()
        call = WriteCall(self._dispatcher, loop, loop.time() + self._timeout(timeout), body, self._sessions)
        self._sessions.submit(call)
        return await self._settle(call)

    async def _read(
        self, request: model.Read, level: int, revision: int, timeout: float | None, route: Route, address: str = ""
    ) -> object:
        body = _encode(request)
        limits.check_read(request, len(body))
        loop = self._bind()
        # A later answer may raise what this client has seen while a read waits; its promise is of its beginning.
        least = max(self._revision, revision) if level == codec.ReadLevel.LOCAL else 0
        deadline = loop.time() + self._timeout(timeout)
        call = ReadCall(self._dispatcher, loop, deadline, body, level, least, route, address)
        self._dispatcher.submit_read(call)
        return await self._settle(call)

    async def _read_at(self, request: Range, timeout: float | None) -> RangeResult:
        """Read at a revision that a linearizable read has shown: it is committed, and its state never changes, so any
        node that has it answers alike, without a quorum round. The leader surely has it; a replica may lag."""
        result = await self._read(request, codec.ReadLevel.LOCAL, request.revision, timeout, Route.ANY)
        return _expect(result, RangeResult)

    async def _settle(self, call: Call) -> object:
        try:
            result = await call.future
        except asyncio.CancelledError:
            self._dispatcher.abandon(call)
            raise
        revision: int = getattr(result, "revision", 0)
        if revision > self._revision:
            self._revision = revision
        return result

    async def _admin(self, make_frame: Callable[[int], codec.ClientFrame], timeout: float | None) -> tuple[Member, ...]:
        loop = self._bind()
        call = AdminCall(self._dispatcher, loop, loop.time() + self._timeout(timeout), make_frame, changes=True)
        self._dispatcher.submit(call)
        return _expect(await self._settle(call), codec.AdminAnswer).members

    async def _transaction_read(self, request: Range, timeout: float | None) -> RangeResult:
        if request.revision:
            return await self._read_at(request, timeout)
        return _expect(await self._read(request, codec.ReadLevel.LINEARIZABLE, 0, timeout, Route.ANY), RangeResult)

    async def _transaction_commit(self, request: Txn, timeout: float | None) -> TxnResult:
        return _expect(await self._write(request, timeout), TxnResult)


def _encode(request: model.Mutation | model.Read) -> bytes:
    try:
        return codec.encode_request(request)
    except (OverflowError, RecursionError) as error:
        raise Refused(f"this request cannot be written down: {error}", code="invalid_request") from None


def _level(level: str) -> tuple[int, Route]:
    try:
        return _LEVELS[level]
    except (KeyError, TypeError):
        raise ValueError(f"level is 'linearizable' or 'local', not {level!r}") from None


def _check_bytes(name: str, value: object) -> None:
    if type(value) is not bytes and not isinstance(value, bytes):
        raise TypeError(f"{name} must be bytes, not {type(value).__name__}")


def _check_int(name: str, value: object) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")


def _bounds(start: bytes, end: bytes | None, prefix: bytes | None) -> tuple[bytes, bytes | None]:
    if prefix is not None:
        if start or end is not None:
            raise ValueError("give either prefix, or start and end")
        _check_bytes("prefix", prefix)
        return prefix, prefix_end(prefix)
    _check_bytes("start", start)
    if end is not None:
        _check_bytes("end", end)
    return start, end


def _expect(result: object, kind: type[_Result]) -> _Result:
    if not isinstance(result, kind):
        raise InternalError(f"the server answered {type(result).__name__} where {kind.__name__} belongs")
    return result
