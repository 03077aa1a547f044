"""The state machine: log entries in, results out. What `kvstore/raft/fsm.py` calls a `StateMachine`.

Rules:
- `apply` is a function of the state and the entry alone: no clock, no chance, no setting of this node. Every replica
  that applied the same entries has the same logical state (`digest`), whatever it flushed, compacted or restarted.
- What a request did wrong is its result (`ErrorResult`). An exception from `apply` means a bug, a damaged or newer
  entry, or a failing disk: nothing of the entry is in the state that reads see, and no further entry is taken.
- An entry is judged by the rules of its own version, whatever the cluster's is when it is applied.
- One storage batch for each entry. It also holds the position (applied index, its term and the term before, revisions,
  log time), so data and position never disagree, wherever a crash falls.
- Log time is the greatest stamp so far. Nothing else here is time.
- A result is encoded once: the same bytes answer the client and are kept for repeats.

`read` runs between entries, on the same thread. `flush`, `checkpoint` and `inspect` may run in another thread, beside
`apply` and `read`; the caller sees to it that none of them runs during `restore` and `close`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import msgspec

from kvstore import codec, model, versions
from kvstore.errors import InternalError, Refused, StartupError, Unavailable
from kvstore.limits import is_read_only
from kvstore.model import (
    Checkpoint,
    CloseSession,
    Compact,
    CompactResult,
    Delete,
    DescribeLease,
    DoneResult,
    ExpireLeases,
    ExpireSessions,
    GrantLease,
    KeepLease,
    KeepSession,
    LeaseResult,
    ListLeases,
    OpenSession,
    Put,
    Range,
    RevokeLease,
    SessionResult,
    Txn,
)
from kvstore.state import layout, txn
from kvstore.state.feed import Changed, Feed, LargeRevision, Place
from kvstore.state.layout import FORMAT, M_EPOCHS, M_FORMAT, M_MEMBERS, M_POSITION, Epoch, Position, check_format
from kvstore.state.leases import EXPIRED_PER_ENTRY_MAX, EXPIRED_RECORDS_PER_ENTRY_MAX, Leases, listed
from kvstore.state.mvcc import Overlay, Records, Retention
from kvstore.state.prefetch import named_keys
from kvstore.state.sessions import POSITION_BITS, TTL_MS, Sessions, expired_answer
from kvstore.state.storage import OpenStorage, Storage, StorageFailed
from kvstore.state.txn import HELD_UP

# The kinds of log entries, as `raft` numbers them; a test holds the two equal. `state` does not import `raft`.
NOOP = 1
DATA = 16
MEMBERS = 17

# A flush starts after so much, so that a restart replays little (design section 5).
FLUSH_REQUESTS = 50_000
FLUSH_BYTES = 64 * 1024 * 1024

# So much of its time a restart of all nodes, or of the next leader, may add to a lease where nobody writes. An entry in
# five seconds costs an idle cluster nothing worth naming.
SILENCE_MS = 5_000

# Answers to one entry, which all lie in memory together, and those under sessions in one stored record. A full entry
# of ordinary requests has some 100 KiB of them; only requests that ask for large records back come here.
ANSWERS_BYTES_PER_ENTRY_MAX = 32 * 1024 * 1024

_OVERLOADED = txn.refused(
    Refused("the answers to the requests sent together with this one are too large; send it again", code="overloaded")
)
# So many requests of an entry may find out by themselves that it has done enough; then nobody tries any more.
HELD_UP_PER_ENTRY_MAX = 256
_RETENTION = Retention()
_SESSION_REQUESTS = frozenset({KeepSession, CloseSession})
_OPERATIONS = frozenset({Put, Delete, Range, model.Add, Txn})


class Machine:
    """The replicated state, at one path. Opening it finds what the last durable batch left there."""

    __slots__ = (
        "_feed",
        "_idle",
        "_leases",
        "_members",
        "_open_storage",
        "_position",
        "_records",
        "_retention",
        "_sessions",
        "_stamped_index",
        "_stopped",
        "_storage",
        "_unflushed_bytes",
        "_unflushed_requests",
        "_version",
    )

    def __init__(self, open_storage: OpenStorage, path: str, retention: Retention = _RETENTION) -> None:
        """Raises `StartupError` (`data_dir_in_use`, `state_damaged`, `data_format_newer`) or `StorageFailed`."""
        self._open_storage = open_storage
        self._retention = retention
        self._open(path)

    def _open(self, path: str) -> None:
        storage = self._open_storage(path)
        try:
            position, members, epochs = _read_position(storage, path)
            version = int(storage.get(M_FORMAT) or versions.FIRST)
            sessions = Sessions.load(storage, position.outcomes_from)
            leases = Leases.load(storage)
        except (msgspec.DecodeError, ValueError, KeyError) as error:
            storage.close()
            raise StartupError(f"the state in {path} is damaged: {error}", code="state_damaged") from error
        except BaseException:
            storage.close()
            raise
        self._storage: Storage = storage
        self._position = position
        self._members = members
        self._version = version
        self._sessions = sessions
        self._leases = leases
        self._records = Records(storage, position, epochs, self._retention)
        self._feed = Feed(storage, self._records)
        self._idle = Overlay(self._records, self._leases, self._version)  # the view of reads between entries
        self._stamped_index = position.index
        self._unflushed_requests = 0
        self._unflushed_bytes = 0
        self._stopped = ""

    # --- where it stands --------------------------------------------------------------------------------------------

    @property
    def applied_index(self) -> int:
        return self._position.index

    @property
    def applied_term(self) -> int:
        return self._position.term

    @property
    def previous_term(self) -> int:
        """Term of the entry before the last applied one; 0 if there is none."""
        return self._position.previous_term

    @property
    def revision(self) -> int:
        return self._position.revision

    @property
    def compacted_revision(self) -> int:
        """The oldest revision that can be read; 0 as long as nothing was compacted."""
        return self._position.compacted_revision

    @property
    def log_time_ms(self) -> int:
        return self._position.log_time_ms

    @property
    def stamped_index(self) -> int:
        """The last entry that said what log time is; that of the state as it was opened, before the first."""
        return self._stamped_index

    @property
    def members(self) -> bytes:
        return self._members

    @property
    def version(self) -> int:
        """The cluster's (see `versions.py`)."""
        return self._version

    @property
    def size_bytes(self) -> int:
        """What all records have together, and all history that is kept."""
        return self._records.records_bytes + self._records.history_bytes

    @property
    def session_count(self) -> int:
        return len(self._sessions.by_id)

    # --- applying ---------------------------------------------------------------------------------------------------

    def apply(self, index: int, term: int, kind: int, payload: bytes | memoryview) -> list[bytes]:
        """Apply the entry after `applied_index`. Returns the encoded result of each request of a DATA entry, in order;
        nothing for other kinds. Raises `InternalError`, `StartupError(data_format_newer)` or `StorageFailed`, after
        each of which no further entry is taken."""
        if self._stopped:
            raise InternalError(f"no entry is applied any more: {self._stopped}")
        position = self._position
        if index != position.index + 1:
            raise InternalError(f"entry {index} cannot be applied after entry {position.index}")
        try:
            if kind == DATA:
                return self._apply_batch(index, term, payload)
            if kind not in (NOOP, MEMBERS):
                raise InternalError(f"entry {index} is of the unknown kind {kind}")
            self._apply_other(index, term, bytes(payload) if kind == MEMBERS else None)
            return []
        except BaseException as error:
            self._stopped = f"entry {index} failed with {type(error).__name__}: {error}"
            raise

    def _apply_batch(self, index: int, term: int, payload: bytes | memoryview) -> list[bytes]:
        entry = _decode(index, payload)
        log_time_ms = max(self._position.log_time_ms, entry.log_time_ms)
        view = Overlay(self._records, self._leases, self._version, entry.version)
        sessions = self._sessions
        sessions.begin(index, log_time_ms)
        admit, settle, execute = sessions.admit, sessions.settle, txn.execute
        self._records.prefetch(named_keys([item.request for item in entry.items]))
        results: list[bytes] = []
        answered = results.append
        size_bytes = held_up = 0
        for item in entry.items:
            request = item.request
            kind = type(request)
            if size_bytes > ANSWERS_BYTES_PER_ENTRY_MAX:
                answered(_OVERLOADED)  # not executed and not kept: the same request may succeed in a later entry
                continue
            if held_up >= HELD_UP_PER_ENTRY_MAX:
                answered(HELD_UP)
                continue
            if item.session and kind not in _SESSION_REQUESTS:
                session = admit(item)
                if isinstance(session, bytes):
                    size_bytes += len(session)
                    answered(session)
                    continue
                if kind in _OPERATIONS:
                    answer = execute(view, request)  # type: ignore[arg-type]
                else:
                    answer = self._administer(view, len(results), item)
                if answer is HELD_UP:
                    sessions.send_back(session, item)
                    held_up += 1
                else:
                    settle(session, item, answer)
            else:
                if kind in _OPERATIONS:
                    answer = execute(view, request)  # type: ignore[arg-type]
                else:
                    answer = self._administer(view, len(results), item)
                held_up += answer is HELD_UP
            size_bytes += len(answer)
            answered(answer)
        self._commit(index, term, log_time_ms, view, None)
        self._stamped_index = index
        self._unflushed_requests += len(results)
        self._unflushed_bytes += 2 * len(payload)  # a value lies in its record, and once more where it was replaced
        return results

    def _apply_other(self, index: int, term: int, members: bytes | None) -> None:
        self._sessions.begin(index, self._position.log_time_ms)
        self._commit(
            index, term, self._position.log_time_ms, Overlay(self._records, self._leases, self._version), members
        )
        self._unflushed_requests += 1

    def _commit(self, index: int, term: int, log_time_ms: int, view: Overlay, members: bytes | None) -> None:
        """Everything an entry changed, in one batch; then, and only then, in what reads see."""
        records, sessions = self._records, self._sessions
        batch = self._storage.batch()
        epochs, records_bytes = records.prepare(view, batch, log_time_ms)
        replaced_bytes = epochs[-1].size_bytes
        if epochs[-1].id == records.epochs[-1].id:
            replaced_bytes -= records.epochs[-1].size_bytes
        view.leases.prepare(batch)
        sessions.end(batch)
        position = Position(
            FORMAT,
            index,
            term,
            self._position.term,
            view.revision,
            view.compacted_revision,
            log_time_ms,
            sessions.outcomes_from,
            epochs[-1],
            records_bytes,
        )
        batch.put(M_POSITION, layout.encode(position))
        if epochs[-1].id != records.epochs[-1].id or epochs[0].id != records.epochs[0].id:
            batch.put(M_EPOCHS, layout.encode(epochs[:-1]))
        if index == 1 or view.version != self._version:
            batch.put(M_FORMAT, b"%d" % view.version)
        if members is not None:
            batch.put(M_MEMBERS, members)
        self._storage.write(batch)
        records.committed(view, epochs, records_bytes)
        self._leases.committed(view.leases)
        self._feed.committed(view, replaced_bytes)
        self._position = position
        self._version = view.version
        if members is not None:
            self._members = members
        self._idle = Overlay(records, self._leases, self._version)

    def _administer(self, view: Overlay, at: int, item: codec.BatchItem) -> bytes:
        """Requests that are no operation."""
        request = item.request
        sessions = self._sessions
        if isinstance(request, KeepSession):
            kept = sessions.keep(item)
            return expired_answer if kept is None else codec.encode_result(SessionResult(kept.id, TTL_MS))
        if isinstance(request, CloseSession):
            if not sessions.close(item.session):
                return expired_answer
            return codec.encode_result(SessionResult(item.session, TTL_MS))
        if isinstance(request, OpenSession):
            opened = sessions.open(at)
            if opened is None:
                return txn.refused(Refused("too many sessions are open; try later", code="too_many_sessions"))
            return codec.encode_result(SessionResult(opened.id, TTL_MS))
        if isinstance(request, ExpireSessions):
            return codec.encode_result(DoneResult(view.revision, sessions.expire()))
        if isinstance(request, Compact):
            return _compact(view, request.revision)
        if isinstance(request, model.RaiseVersion):
            if request.version > versions.VERSION:
                raise _newer_entry(self._position.index + 1, request.version)
            view.version = max(view.version, request.version)
            return codec.encode_result(DoneResult(view.revision))
        try:
            return codec.encode_result(self._change_leases(view, at, request))
        except Refused as refusal:
            return txn.refused(refusal)
        except Unavailable:
            return HELD_UP

    def _change_leases(self, view: Overlay, at: int, request: model.Mutation) -> LeaseResult | DoneResult:
        now_ms = self._sessions.now_ms
        view.walk.next_request()
        if isinstance(request, GrantLease):
            lease_id = request.lease or (self._position.index + 1) << POSITION_BITS | at
            # Taken by a client's own choice, or by a lease of the store that this one was restored from.
            while not request.lease and view.leases.find(lease_id) is not None:
                lease_id += 1
            view.leases.grant(lease_id, request.ttl_ms, now_ms)
            return LeaseResult(view.revision, lease_id, request.ttl_ms)
        if isinstance(request, KeepLease):
            kept = view.leases.keep(request.lease, now_ms)
            return LeaseResult(view.revision, kept.id, kept.ttl_ms)
        if isinstance(request, RevokeLease):
            deleted = txn.end_lease(view, request.lease)
            return DoneResult(view.revision, deleted)
        assert isinstance(request, ExpireLeases)
        view.walk.begin()  # or nothing is taken from those that are due
        count = deleted = 0
        for lease in self._leases.expired(now_ms, view.leases):
            deleted += txn.end_lease(view, lease.id)
            count += 1
            if count >= EXPIRED_PER_ENTRY_MAX or deleted >= EXPIRED_RECORDS_PER_ENTRY_MAX or view.walk.spent:
                break
        return DoneResult(view.revision, count)

    # --- reading ----------------------------------------------------------------------------------------------------

    def prefetch(self, requests: Iterable[model.Read]) -> None:
        """Before several reads: makes them cheaper, and changes no answer. Raises `StorageFailed`."""
        self._records.prefetch(named_keys(requests))

    def read(self, request: model.Read, log_time_ms: int = 0) -> bytes:
        """The encoded result of what only reads, on the state as applied. `log_time_ms` is what log time would be
        now; it only says how long a lease has left."""
        if type(request) is Range:
            # One key as it is now: the hottest read there is.
            if request.end is None and not (
                request.limit or request.revision or request.keys_only or request.count_only
            ):
                return txn.read_point(self._position.revision, request.start, self._records.get(request.start))
        elif isinstance(request, (DescribeLease, ListLeases)):
            return self._read_leases(request, max(log_time_ms, self._position.log_time_ms))
        elif isinstance(request, model.Digest):
            return txn.read_digest(self._idle, request)
        elif not is_read_only(request):  # type: ignore[arg-type]
            return txn.refused(Refused("a read may hold only ranges; send it as a write"))
        return txn.execute(self._idle, request)

    def _read_leases(self, request: DescribeLease | ListLeases, log_time_ms: int) -> bytes:
        if isinstance(request, ListLeases):
            return codec.encode_result(listed(self._storage, request))
        try:
            return codec.encode_result(self._leases.describe(request, log_time_ms))
        except Refused as refusal:
            return txn.refused(refusal)

    def fresh_changes(self, first: int, most: int) -> list[Changed | LargeRevision] | None:
        """Every change from revision `first` on, in order, or None where memory does not hold them any more. Those of
        a revision that has more than `most` come as one `LargeRevision`."""
        return self._feed.fresh(first, most)

    def read_changes(self, place: Place) -> Iterator[Changed]:
        """Every change from `place` on, in order; its revision must lie above `compacted_revision`. Each step may raise
        `StorageFailed`."""
        return self._feed.read(place)

    def event(self, changed: Changed, prev: bool) -> bytes:
        """The encoded `model.Event` of a change. Raises `StorageFailed`."""
        return self._feed.event(changed, prev)

    def lease_expiry_due(self, log_time_ms: int) -> bool:
        """True if at `log_time_ms` an ExpireLeases would end a lease. Cheap: ask as often as you like."""
        return self._leases.expiry_due(log_time_ms)

    def stamp_due(self, log_time_ms: int) -> bool:
        """True if there are leases and for long no entry has said how time goes on: a node that started anew would not
        know, and they would last longer. Any entry will do."""
        return log_time_ms - self._position.log_time_ms >= SILENCE_MS and bool(self._leases.by_id)

    def expiry_due(self, log_time_ms: int) -> bool:
        """True if at `log_time_ms` an ExpireSessions would end a session. Cheap: ask as often as you like."""
        return self._sessions.expiry_due(log_time_ms)

    def compaction_due(self, log_time_ms: int) -> int | None:
        """The revision that an automatic Compact should name at `log_time_ms`, if any. Cheap."""
        return self._records.compaction_due(max(log_time_ms, self._position.log_time_ms))

    def describe(self, digest: bool) -> dict[str, int | str]:
        """Where it stands, as plain data; with `digest` also what it holds, which takes a walk over everything."""
        position = self._position
        described: dict[str, int | str] = {
            "applied_index": position.index,
            "applied_term": position.term,
            "revision": position.revision,
            "compacted_revision": position.compacted_revision,
            "log_time_ms": position.log_time_ms,
            "sessions": len(self._sessions.by_id),
            "leases": len(self._leases.by_id),
            "records_bytes": self._records.records_bytes,
            "history_bytes": self._records.history_bytes,
        }
        if digest:
            described["records"] = sum(1 for _ in self._records.scan(b"", b""))
            described["digest"] = self.digest()
        return described

    def digest(self) -> str:
        """A hash of the whole logical state: equal on replicas that applied the same entries. Walks every record, at
        about 1 us each, on the calling thread."""
        state = hashlib.blake2b(digest_size=16)
        position = self._position
        stands = (position.revision, position.compacted_revision, position.log_time_ms, self._members)
        # As version 1 did it, which knew no versions: its members' digests can be compared with ours.
        state.update(layout.encode(stands if self._version == versions.FIRST else (*stands, self._version)))
        state.update(layout.encode(self._sessions.observable()))
        state.update(layout.encode(self._leases.observable()))
        for key, packed in self._records.scan(b"", b""):
            state.update(b"%d %d " % (len(key), len(packed)))
            state.update(key)
            state.update(packed)
        return state.hexdigest()

    # --- durability -------------------------------------------------------------------------------------------------

    def flush_due(self) -> bool:
        return self._unflushed_requests >= FLUSH_REQUESTS or self._unflushed_bytes >= FLUSH_BYTES

    def flush(self) -> int:
        """Make the state durable. Runs in a thread, beside `apply`. Returns an index that is covered for sure. Raises
        `StorageFailed`."""
        index = self._position.index
        self._unflushed_requests = self._unflushed_bytes = 0
        self._storage.flush()
        return index

    def checkpoint(self, path: str) -> Checkpoint:
        """Flush, then write a consistent, durable copy into the new directory `path`. Runs in a thread, beside
        `apply`. Raises `StorageFailed`."""
        self.flush()
        self._storage.checkpoint(path)
        return self.inspect(path)

    def inspect(self, path: str) -> Checkpoint:
        """What a checkpoint directory holds. Raises `StartupError` if it is damaged or newer. Runs in a thread."""
        storage = self._open_storage(path, True)
        try:
            position, members, _ = _read_position(storage, path)
        finally:
            storage.close()
        return Checkpoint(position.index, position.term, members)

    def restore(self, path: str) -> None:
        """Replace the whole state by the checkpoint in `path`, which is the machine's own directory from now on.
        If that cannot be opened, the machine stays closed, and the error says why."""
        self._storage.close()
        self._open(path)

    def close(self) -> None:
        """Release everything. Flushes first where that is possible: where it is not, the log still has it all."""
        self._stopped = self._stopped or "the machine is closed"
        for step in (self._storage.flush, self._storage.close):
            try:
                step()
            except StorageFailed as error:
                self._stopped += f"; and at the end {error}"


def _decode(index: int, payload: bytes | memoryview) -> codec.Batch:
    try:
        entry = codec.decode_batch(payload)
    except Refused as error:
        entry_version = _version_of(payload)
        if entry_version is not None and entry_version > versions.VERSION:
            raise _newer_entry(index, entry_version) from error
        raise InternalError(f"entry {index} is damaged: {error.message}") from error
    if entry.version > versions.VERSION:
        raise _newer_entry(index, entry.version)
    if len(entry.items) > 1 << POSITION_BITS:
        raise InternalError(f"entry {index} holds {len(entry.items)} requests; at most {1 << POSITION_BITS} may be")
    return entry


def _version_of(payload: bytes | memoryview) -> int | None:
    try:
        return msgspec.msgpack.decode(payload, type=_AnyVersion).version
    except msgspec.DecodeError:
        return None


class _AnyVersion(msgspec.Struct, array_like=True):
    version: int


def _newer_entry(index: int, entry_version: int) -> StartupError:
    return StartupError(
        f"entry {index} is of version {entry_version}, and this program knows versions up to {versions.VERSION}: "
        "run a newer one",
        code="data_format_newer",
    )


def _compact(view: Overlay, revision: int) -> bytes:
    if revision > view.revision:
        return txn.refused(
            Refused(f"revision {revision} is in the future; the newest is {view.revision}", code="revision_in_future")
        )
    if revision <= view.compacted_revision:
        return txn.refused(Refused(f"revision {revision} is compacted already", code="revision_compacted"))
    view.compacted_revision = revision
    return codec.encode_result(CompactResult(revision))


def _read_position(storage: Storage, path: str) -> tuple[Position, bytes, list[Epoch]]:
    """Raises `StartupError`."""
    stored_format = storage.get(M_FORMAT)
    encoded = storage.get(M_POSITION)
    if stored_format is None or encoded is None:
        for _ in storage.scan(b"", b"\xff"):
            raise StartupError(f"the state in {path} is damaged: it has no position", code="state_damaged")
        first = Epoch(0, 1, 0)
        return Position(FORMAT, 0, 0, 0, 0, 0, 0, 1, first), b"", [first]
    try:
        if int(stored_format) > versions.VERSION:
            raise StartupError(
                f"the state in {path} is of version {int(stored_format)}, and this program knows versions up to "
                f"{versions.VERSION}: run a newer one",
                code="data_format_newer",
            )
        position = layout.decode_position(encoded)
        check_format(position.format)
        stored_epochs = storage.get(M_EPOCHS)
        epochs = [] if stored_epochs is None else layout.decode_epochs(stored_epochs)
    except (msgspec.DecodeError, ValueError) as error:
        raise StartupError(f"the state in {path} is damaged: {error}", code="state_damaged") from error
    return position, storage.get(M_MEMBERS) or b"", [*epochs, position.epoch]
