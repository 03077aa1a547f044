"""The state machine as anyone would write it who had all the time and memory in the world: plain dicts, a copy of
everything at every revision. Property tests hold the real one against it. Also what the state tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Raw

from kvstore import codec, model, versions
from kvstore.errors import Refused
from kvstore.model import (
    Add,
    AddResult,
    CloseSession,
    Compact,
    CompactResult,
    Compare,
    Delete,
    DeleteResult,
    DescribeLease,
    DoneResult,
    ErrorResult,
    ExpireLeases,
    ExpireSessions,
    GrantLease,
    KeepLease,
    KeepSession,
    LeaseResult,
    LeaseStatus,
    OpenSession,
    Put,
    PutResult,
    Range,
    RangeResult,
    Record,
    Relation,
    RevokeLease,
    SessionResult,
    SortBy,
    Target,
    Txn,
    TxnResult,
)

TTL_MS = 60_000
State = dict[bytes, Record]


@dataclass(frozen=True)
class Call:
    """A request in its session."""

    request: Any
    session: int = 0
    seq: int = 0
    acked_below: int = 0


def entry(log_time_ms: int, calls: Iterable[Call | Any], version: int = versions.VERSION) -> bytes:
    """The payload of a log entry; a bare request stands outside any session. `version`: by whose rules it is judged."""
    items = []
    for call in calls:
        call = call if isinstance(call, Call) else Call(call)
        request = Raw(codec.encode_request(call.request))
        items.append(codec.RawBatchItem(call.session, call.seq, call.acked_below, request))
    return codec.encode_batch(log_time_ms, items, version)


def code_of(result: Any) -> str:
    return result.code if isinstance(result, ErrorResult) else ""


def in_range(key: bytes, start: bytes, end: bytes | None) -> bool:
    return key == start if end is None else start <= key and (end == b"" or key < end)


def number_of(value: bytes) -> int | None:
    text = value[1:] if value[:1] == b"-" else value
    if not text or not all(48 <= byte <= 57 for byte in text) or (text[:1] == b"0" and len(text) > 1):
        return None
    number = int(value)
    return number if -(2**63) <= number < 2**63 else None


@dataclass
class ModelSession:
    last_ms: int
    acked_below: int = 1
    answers: dict[int, Any] = field(default_factory=dict)


@dataclass
class ModelLease:
    ttl_ms: int
    deadline_ms: int


class Model:
    """Leases have their limit here. What a request walks over has none: `test_state_walk.py` is about that."""

    def __init__(self) -> None:
        self.states: list[State] = [{}]  # by revision
        self.compacted = 0
        self.log_time_ms = 0
        self.members = b""
        self.index = 0
        self.sessions: dict[int, ModelSession] = {}
        self.leases: dict[int, ModelLease] = {}
        self._version = versions.VERSION
        self._written = 0  # by the transaction at work

    @property
    def revision(self) -> int:
        return len(self.states) - 1

    @property
    def now(self) -> State:
        return self.states[-1]

    # --- entries ----------------------------------------------------------------------------------------------------

    def apply(self, log_time_ms: int, calls: Iterable[Call | Any], version: int = versions.VERSION) -> list[Any]:
        self.index += 1
        self._version = version
        self.log_time_ms = max(self.log_time_ms, log_time_ms)
        return [
            self._call(position, call if isinstance(call, Call) else Call(call)) for position, call in enumerate(calls)
        ]

    def apply_members(self, members: bytes) -> None:
        self.index += 1
        self.members = members

    def _call(self, position: int, call: Call) -> Any:
        request = call.request
        if isinstance(request, (KeepSession, CloseSession)) or call.session:
            session = self.sessions.get(call.session)
            if session is None:
                return ErrorResult("session_expired", "")
            if isinstance(request, CloseSession):
                del self.sessions[call.session]
                return SessionResult(call.session, TTL_MS)
            session.last_ms = self.log_time_ms
            session.acked_below = max(session.acked_below, call.acked_below)
            session.answers = {seq: old for seq, old in session.answers.items() if seq >= session.acked_below}
            if isinstance(request, KeepSession):
                return SessionResult(call.session, TTL_MS)
            if call.seq in session.answers:
                return session.answers[call.seq]
            if call.seq < 1:
                return ErrorResult("invalid_request", "")
            if call.seq < session.acked_below:
                return ErrorResult("stale_sequence", "")
            if len(session.answers) >= 1024:
                return ErrorResult("session_full", "")
            answer = self._execute(position, request)
            session.answers[call.seq] = answer
            return answer
        return self._execute(position, request)

    def _execute(self, position: int, request: Any) -> Any:
        if isinstance(request, OpenSession):
            session_id = self.index * 65536 + position
            self.sessions[session_id] = ModelSession(self.log_time_ms)
            return SessionResult(session_id, TTL_MS)
        if isinstance(request, ExpireSessions):
            ended = [key for key, session in self.sessions.items() if session.last_ms + TTL_MS <= self.log_time_ms]
            for session_id in ended:
                del self.sessions[session_id]
            return DoneResult(self.revision, len(ended))
        if isinstance(request, (GrantLease, KeepLease, RevokeLease)):
            return self._lease(position, request)
        if isinstance(request, ExpireLeases):
            ended = [one for one, lease in self.leases.items() if lease.deadline_ms <= self.log_time_ms]
            for lease_id in sorted(ended, key=lambda one: (self.leases[one].deadline_ms, one)):
                self._end_lease(lease_id)
            return DoneResult(self.revision, len(ended))
        if isinstance(request, Compact):
            if request.revision > self.revision:
                return ErrorResult("revision_in_future", "")
            if request.revision <= self.compacted:
                return ErrorResult("revision_compacted", "")
            self.compacted = request.revision
            return CompactResult(request.revision)
        return self.operate(request)

    def _lease(self, position: int, request: GrantLease | KeepLease | RevokeLease) -> Any:
        if isinstance(request, GrantLease):
            lease_id = request.lease or self.index * 65536 + position
            if lease_id in self.leases:
                return ErrorResult("lease_exists", "")
            self.leases[lease_id] = ModelLease(request.ttl_ms, self.log_time_ms + request.ttl_ms)
            return LeaseResult(self.revision, lease_id, request.ttl_ms)
        lease = self.leases.get(request.lease)
        if lease is None:
            return ErrorResult("lease_not_found", "")
        if isinstance(request, KeepLease):
            lease.deadline_ms = self.log_time_ms + lease.ttl_ms
            return LeaseResult(self.revision, request.lease, lease.ttl_ms)
        deleted = self._end_lease(request.lease)
        return DoneResult(self.revision, deleted)

    def _end_lease(self, lease_id: int) -> int:
        del self.leases[lease_id]
        state = {key: record for key, record in self.now.items() if record.lease != lease_id}
        deleted = len(self.now) - len(state)
        if deleted:
            self.states.append(state)
        return deleted

    def lease_status(self, request: DescribeLease, log_time_ms: int) -> Any:
        lease = self.leases.get(request.lease)
        if lease is None:
            return ErrorResult("lease_not_found", "")
        keys = tuple(sorted(key for key, record in self.now.items() if record.lease == request.lease))
        remaining_ms = max(0, lease.deadline_ms - max(log_time_ms, self.log_time_ms))
        return LeaseStatus(request.lease, lease.ttl_ms, remaining_ms, len(keys), keys if request.keys else ())

    def operate(self, request: Any, write: bool = True) -> Any:
        before, state = self.now, dict(self.now)
        self._written = 0
        try:
            if isinstance(request, Txn):
                writes_of(request)
            result = self._operation(before, state, request)
        except Refused as refusal:
            return ErrorResult(refusal.code, "", refusal.operation)
        if state != before:
            assert write, "a read changed something"
            self.states.append(state)
        return result

    # --- operations: `before` is the state that the transaction found, `state` the one it makes ---------------------

    def _operation(self, before: State, state: State, request: Any) -> Any:
        next_revision = self.revision + 1
        if isinstance(request, Put):
            old = state.get(request.key)
            if request.lease:
                self._check_lease(before, state, old, request.lease)
            self._set(state, request.key, request.value, request.lease)
            return PutResult(next_revision, old if request.prev else None)
        if isinstance(request, Add):
            old = state.get(request.key)
            number = 0 if old is None else number_of(old.value)
            if number is None:
                raise Refused("", code="not_a_number")
            number += request.delta
            if not -(2**63) <= number < 2**63:
                raise Refused("", code="overflow")
            if (request.min is not None and number < request.min) or (request.max is not None and number > request.max):
                raise Refused("", code="out_of_range")
            self._set(state, request.key, str(number).encode(), 0 if old is None else old.lease)
            return AddResult(next_revision, number)
        if isinstance(request, Delete):
            doomed = [state[key] for key in sorted(state) if in_range(key, request.start, request.end)]
            for record in doomed:
                del state[record.key]
            self._written += len(doomed)
            revision = self.revision + (state != before)
            return DeleteResult(revision, len(doomed), tuple(doomed) if request.prev else ())
        if isinstance(request, Range):
            return self._range(before, state, request)
        assert isinstance(request, Txn)
        succeeded = all(holds(before, compare) for compare in request.compare)
        results = []
        for position, operation in enumerate(request.success if succeeded else request.failure):
            try:
                results.append(self._operation(before, state, operation))
            except Refused as refusal:
                raise Refused("", code=refusal.code, operation=(position, *refusal.operation)) from None
        return TxnResult(self.revision + (state != before), succeeded, tuple(results))

    def _check_lease(self, before: State, state: State, old: Record | None, lease: int) -> None:
        if lease not in self.leases:
            raise Refused("", code="lease_not_found")
        if self._version < 3:
            under = sum(record.lease == lease for record in before.values()) + self._written
        elif old is not None and old.lease == lease:
            return
        else:
            under = sum(record.lease == lease for record in state.values())
        if under >= model.LEASE_KEYS_MAX:
            raise Refused("", code="lease_full")

    def _set(self, state: State, key: bytes, value: bytes, lease: int) -> None:
        self._written += 1
        revision, old = self.revision + 1, state.get(key)
        if old is None:
            state[key] = Record(key, value, revision, revision, 1, lease)
        else:
            state[key] = Record(key, value, old.create_revision, revision, old.version + 1, lease)

    def _range(self, before: State, state: State, request: Range) -> RangeResult:
        revision = self.revision + (state != before)
        source = state
        if request.revision:
            if request.revision > revision:
                raise Refused("", code="revision_in_future")
            if request.revision < self.compacted:
                raise Refused("", code="revision_compacted")
            if request.revision < revision:
                source = self.states[request.revision]
        records = [source[key] for key in sorted(source) if in_range(key, request.start, request.end)]
        count = len(records)
        if request.count_only:
            return RangeResult(revision, (), count)
        records.sort(key=lambda record: (aspect(record, request.sort), record.key), reverse=request.reverse)
        if request.limit:
            records = records[: request.limit]
        if request.keys_only:
            records = [msgspec.structs.replace(record, value=b"") for record in records]
        return RangeResult(revision, tuple(records), count, len(records) < count)


def aspect(record: Record, sort: SortBy) -> Any:
    return {
        SortBy.KEY: record.key,
        SortBy.VERSION: record.version,
        SortBy.CREATE_REVISION: record.create_revision,
        SortBy.MOD_REVISION: record.mod_revision,
        SortBy.VALUE: record.value,
    }[sort]


def holds(state: State, compare: Compare) -> bool:
    records = [record for key, record in state.items() if in_range(key, compare.key, compare.end)]
    target = compare.target

    def related(left: Any) -> bool:
        if left is None:
            return False
        right: Any = compare.operand
        return bool(
            {
                Relation.EQUAL: left == right,
                Relation.NOT_EQUAL: left != right,
                Relation.LESS: left < right,
                Relation.GREATER: left > right,
            }[compare.relation]
        )

    if target is Target.COUNT:
        return related(len(records))
    if not records and compare.end is None:
        return related(None if target is Target.VALUE else 0)
    aspect_of: Callable[[Record], Any] = {
        Target.VALUE: lambda record: record.value,
        Target.NUMBER: lambda record: number_of(record.value),
        Target.VERSION: lambda record: record.version,
        Target.CREATE_REVISION: lambda record: record.create_revision,
        Target.MOD_REVISION: lambda record: record.mod_revision,
        Target.LEASE: lambda record: record.lease,
    }[target]
    return all(related(aspect_of(record)) for record in records)


def writes_of(txn: Txn) -> tuple[set[bytes], list[tuple[bytes, bytes | None]]]:
    """Keys that may be put and ranges that may be deleted; every pair of operations of a branch is compared."""
    every_put: set[bytes] = set()
    every_delete: list[tuple[bytes, bytes | None]] = []
    for branch in (txn.success, txn.failure):
        done: list[tuple[set[bytes], list[tuple[bytes, bytes | None]]]] = []
        for operation in branch:
            puts: set[bytes] = set()
            deletes: list[tuple[bytes, bytes | None]] = []
            if isinstance(operation, (Put, Add)):
                puts = {operation.key}
            elif isinstance(operation, Delete):
                deletes = [(operation.start, operation.end)]
            elif isinstance(operation, Txn):
                puts, deletes = writes_of(operation)
            for other_puts, other_deletes in done:
                clash = bool(puts & other_puts)
                clash |= any(in_range(key, *deleted) for key in puts for deleted in other_deletes)
                clash |= any(in_range(key, *deleted) for key in other_puts for deleted in deletes)
                if clash:
                    raise Refused("", code="duplicate_key")
            done.append((puts, deletes))
            every_put |= puts
            every_delete += deletes
    return every_put, every_delete


def bare(result: Any) -> Any:
    """A result without what may be worded freely: messages, and where a duplicate key was noticed."""
    if isinstance(result, ErrorResult):
        return ErrorResult(result.code, "", () if result.code == "duplicate_key" else result.operation)
    return result


def decoded(results: Iterable[bytes]) -> list[Any]:
    return [codec.decode_result(result) for result in results]
