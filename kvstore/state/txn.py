"""Evaluates one operation or transaction against a view, as etcd does.

Rules:
- A request changes the view as a whole or not at all. What it did wrong becomes its `ErrorResult`; nothing is raised.
- All compares, those of nested transactions included, look at the state before the transaction.
- Operations run in order, and a Range sees what earlier operations of its transaction wrote.
- A key is written at most once in a transaction. That is judged by the request alone, before it runs, on both branches
  of every transaction in it: two writes of one key, or a write of a key in a range that the same branch deletes, are
  refused; two branches of which only one runs may write the same key, and deletes may overlap each other.
- A transaction that changes something takes one revision. Inside it, an operation's `revision` is the store's as the
  operation left it.
- A result holds at most `RESULT_BYTES_MAX` of records, or one record of any size. A Range by itself leaves out what
  does not fit and says so (`more`); anything else is refused.

Pure: the view is the only thing it touches.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import nlargest, nsmallest
from itertools import chain, islice
from typing import NamedTuple

from kvstore import codec, model
from kvstore.backup import RecordsHash
from kvstore.errors import Refused
from kvstore.model import (
    Add,
    AddResult,
    Compare,
    Delete,
    DeleteResult,
    ErrorResult,
    Operation,
    Put,
    PutResult,
    Range,
    RangeResult,
    Record,
    Relation,
    SortBy,
    Target,
    Txn,
    TxnResult,
)
from kvstore.state.layout import FORMAT, HEADER_BYTES, pack_header, record_of, unpack_header
from kvstore.state.mvcc import Overlay, Pairs

# What a record takes in a result beside its key and value: four numbers and the lengths, at their longest.
_RECORD_OVERHEAD_BYTES = 48
# So many of the smallest records fill a result.
_RECORDS_MAX = model.RESULT_BYTES_MAX // _RECORD_OVERHEAD_BYTES + 1
_NUMBER_BYTES_MAX = 20  # "-9223372036854775808"

_encode = codec.encode_result
Pending = dict[bytes, bytes | None]


def execute(view: Overlay, request: Operation) -> bytes:
    """Run a request against the view and return its encoded result. What it changes is in the view afterwards."""
    kind = type(request)
    try:
        if kind is Put:
            return _encode(_put_alone(view, request))  # type: ignore[arg-type]
        if kind is Txn:
            return _transaction(view, request)  # type: ignore[arg-type]
        if kind is Range:
            return _encode(read_range(view, request, None))  # type: ignore[arg-type]
        # Delete and Add alone are transactions of one operation whose result is theirs.
        run = _Run(view)
        result = run.operation(request)
        run.finish()
        return _encode(result)
    except Refused as refusal:
        return refused(refusal)


def refused(refusal: Refused) -> bytes:
    return _encode(ErrorResult(refusal.code, refusal.message, refusal.operation))


# --- writes ---------------------------------------------------------------------------------------------------------


def _next_record(before: bytes | None, value: bytes, revision: int) -> bytes:
    if before is None:
        return pack_header(FORMAT, revision, revision, 1, 0) + value
    _, create_revision, _, version, lease = unpack_header(before)
    return pack_header(FORMAT, create_revision, revision, version + 1, lease) + value


def _put_record(view: Overlay, put: Put, before: bytes | None, revision: int, others: int = 0) -> bytes:
    """`others`: writes before this one that the view does not know yet."""
    if put.lease:
        view.leases.check_room(put.lease, others + 1)
    if before is None:
        return pack_header(FORMAT, revision, revision, 1, put.lease) + put.value
    _, create_revision, _, version, _ = unpack_header(before)
    return pack_header(FORMAT, create_revision, revision, version + 1, put.lease) + put.value


def _put_alone(view: Overlay, put: Put) -> PutResult:
    key = put.key
    before = view.get(key)
    revision = view.revision + 1
    view.write(key, _put_record(view, put, before, revision), before, revision)
    view.revision = revision
    if put.prev and before is not None:
        return PutResult(revision, record_of(key, before))
    return PutResult(revision)


def end_lease(view: Overlay, lease_id: int) -> int:
    """Delete the records of a lease, in one revision, and the lease. Returns how many there were. Raises
    `Refused(lease_not_found)`."""
    keys = sorted(view.leases.need(lease_id).keys)
    revision = view.revision + 1
    for key in keys:
        view.write(key, None, view.get(key), revision)
    if keys:
        view.revision = revision
    view.leases.end(lease_id)
    return len(keys)


def number_of(text: bytes) -> int:
    """The number in a value. Raises `Refused(not_a_number)`."""
    if len(text) <= _NUMBER_BYTES_MAX:
        try:
            number = int(text)
        except ValueError:
            pass
        else:
            # int() takes more than we do (spaces, underscores, "+1", "007"): only what it prints back is a number.
            if (b"%d" % number == text or text == b"-0") and model.INT64_MIN <= number <= model.INT64_MAX:
                return number
    raise Refused("the value is no signed 64-bit decimal number", code="not_a_number")


def _sum(add: Add, before: bytes | None) -> int:
    number = (0 if before is None else number_of(before[HEADER_BYTES:])) + add.delta
    if not model.INT64_MIN <= number <= model.INT64_MAX:
        raise Refused("the sum leaves the signed 64-bit range", code="overflow")
    if add.min is not None and number < add.min:
        raise Refused(f"the sum {number} is below the minimum of {add.min}", code="out_of_range")
    if add.max is not None and number > add.max:
        raise Refused(f"the sum {number} is above the maximum of {add.max}", code="out_of_range")
    return number


# --- transactions ---------------------------------------------------------------------------------------------------


def _transaction(view: Overlay, txn: Txn) -> bytes:
    check_written_once(txn)
    run = _Run(view)
    result = run.transaction(txn)
    encoded = _encode(result)
    run.finish()
    return encoded


class _Run:
    """One transaction at work: its writes so far, which the view learns of in `finish`."""

    __slots__ = ("_before", "_record_bytes", "_records", "_revision", "_view", "_writes")

    def __init__(self, view: Overlay) -> None:
        self._view = view
        self._revision = view.revision + 1
        self._writes: Pending = {}
        self._before: Pending = {}
        self._records = 0
        self._record_bytes = 0

    def transaction(self, txn: Txn) -> TxnResult:
        succeeded = True
        for compare in txn.compare:
            if not holds(self._view, compare):
                succeeded = False
                break
        results = []
        position = 0
        try:
            for operation in txn.success if succeeded else txn.failure:
                results.append(self.operation(operation))
                position += 1
        except Refused as refusal:
            refusal.operation = (position, *refusal.operation)
            raise
        return TxnResult(self._reached(), succeeded, tuple(results))

    def operation(self, operation: Operation) -> PutResult | DeleteResult | RangeResult | AddResult | TxnResult:
        # Written out for the two that make up nearly all of a busy store's transactions.
        kind = type(operation)
        if kind is Put:
            key = operation.key  # type: ignore[union-attr]
            before = self._before[key] = self._view.get(key)
            packed = _put_record(self._view, operation, before, self._revision, len(self._writes))  # type: ignore[arg-type]
            self._writes[key] = packed
            if operation.prev and before is not None:  # type: ignore[union-attr]
                return PutResult(self._revision, self._taken(key, before))
            return PutResult(self._revision)
        if kind is Add:
            key = operation.key  # type: ignore[union-attr]
            before = self._before[key] = self._view.get(key)
            number = _sum(operation, before)  # type: ignore[arg-type]
            self._writes[key] = _next_record(before, b"%d" % number, self._revision)
            return AddResult(self._revision, number)
        if kind is Delete:
            return self._delete(operation)  # type: ignore[arg-type]
        if kind is Range:
            result = read_range(self._view, operation, self._writes)  # type: ignore[arg-type]
            for record in result.records:
                self._count(record)
            return result
        assert isinstance(operation, Txn)
        return self.transaction(operation)

    def _delete(self, delete: Delete) -> DeleteResult:
        deleted = 0
        previous: list[Record] = []
        writes, view = self._writes, self._view
        if delete.end is None:
            before = view.get(delete.start)
            # An earlier delete of this transaction may have been here. (A put may not: it is refused beforehand.)
            pairs = [] if before is None or delete.start in writes else [(delete.start, before)]
        else:
            pairs = list(within_walk(view.scan(delete.start, delete.end, False, writes)))
        for key, before in pairs:
            self._before[key] = before
            writes[key] = None
            deleted += 1
            if delete.prev:
                previous.append(self._taken(key, before))
        return DeleteResult(self._reached(), deleted, tuple(previous))

    def _reached(self) -> int:
        return self._revision if self._writes else self._revision - 1

    def _taken(self, key: bytes, packed: bytes) -> Record:
        record = record_of(key, packed)
        self._count(record)
        return record

    def _count(self, record: Record) -> None:
        self._records += 1
        self._record_bytes += len(record.key) + len(record.value) + _RECORD_OVERHEAD_BYTES
        if self._record_bytes > model.RESULT_BYTES_MAX and self._records > 1:
            raise Refused(
                f"the result is over the limit of {model.RESULT_BYTES_MAX} bytes; ask for less at a time",
                code="result_too_large",
            )

    def finish(self) -> None:
        writes = self._writes
        if writes:
            view, revision, before = self._view, self._revision, self._before
            for key, record in writes.items():
                view.write(key, record, before[key], revision)
            view.revision = revision


def check_written_once(txn: Txn) -> None:
    """Raises `Refused(duplicate_key)` if a branch of the transaction may write a key twice."""
    keys = []
    for operation in txn.success:
        kind = type(operation)
        if kind is Put or kind is Add:
            keys.append(operation.key)  # type: ignore[union-attr]
        elif kind is not Range:
            _written(txn)
            return
    if txn.failure or len(set(keys)) != len(keys):
        _written(txn)


class _Written(NamedTuple):
    """What one operation, nested transactions included, may write: single keys, and deleted ranges."""

    keys: set[bytes]
    deleted: list[tuple[bytes, bytes]]


def _written(txn: Txn, depth: int = 1) -> _Written:
    """What the transaction may write on either branch. Each branch is judged by itself."""
    if depth > model.TXN_DEPTH_MAX:
        raise Refused(f"transactions nested deeper than {model.TXN_DEPTH_MAX}", code="too_many_operations")
    success, failure = _branch_written(txn.success, depth), _branch_written(txn.failure, depth)
    return _Written(success.keys | failure.keys, success.deleted + failure.deleted)


def _branch_written(branch: tuple[Operation, ...], depth: int) -> _Written:
    writer_of: dict[bytes, int] = {}  # key -> position of the operation that may write it
    deletes: list[tuple[bytes, bytes, int]] = []  # start, end, position
    for position, operation in enumerate(branch):
        try:
            written = _written_by(operation, depth)
            for key in written.keys:
                if key in writer_of:
                    raise Refused(f"{key!r} is written twice in one transaction", code="duplicate_key")
                writer_of[key] = position
        except Refused as refusal:
            refusal.operation = (position, *refusal.operation)
            raise
        deletes += [(start, end, position) for start, end in written.deleted]
    if deletes and writer_of:
        keys = sorted(writer_of)
        for start, end, position in deletes:
            for at in range(bisect_left(keys, start), bisect_left(keys, end) if end else len(keys)):
                if writer_of[keys[at]] != position:
                    raise Refused(
                        f"{keys[at]!r} is written and also deleted in one transaction",
                        code="duplicate_key",
                        operation=(position,),
                    )
    return _Written(set(writer_of), [(start, end) for start, end, _ in deletes])


def _written_by(operation: Operation, depth: int) -> _Written:
    if isinstance(operation, (Put, Add)):
        return _Written({operation.key}, [])
    if isinstance(operation, Delete):
        end = operation.start + b"\x00" if operation.end is None else operation.end
        return _Written(set(), [(operation.start, end)])
    if isinstance(operation, Txn):
        return _written(operation, depth + 1)
    return _Written(set(), [])


# --- compares -------------------------------------------------------------------------------------------------------


def holds(view: Overlay, compare: Compare) -> bool:
    """True if the condition holds. Raises `Refused(invalid_request)` for an operand of the wrong type."""
    target, operand = compare.target, compare.operand
    if isinstance(operand, bytes) is not (target is Target.VALUE):
        raise Refused("a compare on VALUE takes bytes, any other a number", code="invalid_request")
    if compare.end is None:
        packed = view.get(compare.key)
        if target is Target.COUNT:
            return _related(0 if packed is None else 1, operand, compare.relation)
        if packed is None:
            return target is not Target.VALUE and _related(0, operand, compare.relation)
        return _related(_aspect(packed, target), operand, compare.relation)
    pairs = within_walk(view.scan(compare.key, compare.end))
    if target is Target.COUNT:
        return _related(sum(1 for _ in pairs), operand, compare.relation)
    return all(_related(_aspect(packed, target), operand, compare.relation) for _, packed in pairs)


def _aspect(packed: bytes, target: Target) -> bytes | int | None:
    if target is Target.VALUE:
        return packed[HEADER_BYTES:]
    if target is Target.NUMBER:
        try:
            return number_of(packed[HEADER_BYTES:])
        except Refused:
            return None  # what is no number stands in no relation to any
    _, create_revision, mod_revision, version, lease = unpack_header(packed)
    if target is Target.VERSION:
        return version
    if target is Target.CREATE_REVISION:
        return create_revision
    return mod_revision if target is Target.MOD_REVISION else lease


def _related(left: bytes | int | None, right: bytes | int, relation: Relation) -> bool:
    if left is None:
        return False
    if relation is Relation.EQUAL:
        return left == right
    if relation is Relation.NOT_EQUAL:
        return left != right
    return left < right if relation is Relation.LESS else left > right  # type: ignore[operator]


# --- ranges ---------------------------------------------------------------------------------------------------------


def read_point(revision: int, key: bytes, packed: bytes | None) -> bytes:
    """The encoded result of a plain Range over one key: the hottest read there is."""
    if packed is None:
        return _encode(RangeResult(revision, (), 0))
    return _encode(RangeResult(revision, (record_of(key, packed),), 1))


def read_digest(view: Overlay, request: model.Digest) -> bytes:
    """The encoded result of a Digest, or of its refusal."""
    revision = view.revision
    try:
        _check_readable(view, request.revision, revision)
    except Refused as refusal:
        return refused(refusal)
    start, end = request.start, request.end
    if request.revision == revision:
        pairs = view.scan(start, end)
    else:
        pairs = view.scan_at(start, end, request.revision)
    hashed = RecordsHash()
    count, last = 0, b""
    for key, packed in pairs:
        hashed.add(key, packed)
        count += 1
        if count == request.limit or hashed.size_bytes >= request.limit_bytes:
            last = key
            break
    return _encode(model.DigestResult(revision, hashed.digest(), count, last))


def _check_readable(view: Overlay, at: int, newest: int) -> None:
    """Raises `Refused`: `revision_in_future`, `revision_compacted`."""
    if at > newest:
        raise Refused(f"revision {at} is in the future; the newest is {newest}", code="revision_in_future")
    if at and at < view.compacted_revision:
        raise Refused(
            f"revision {at} is compacted; the oldest that can be read is {view.compacted_revision}",
            code="revision_compacted",
        )


def read_range(view: Overlay, request: Range, pending: Pending | None) -> RangeResult:
    """Read a range. `pending` is what its transaction wrote before it; without one, what does not fit is left out.
    Raises `Refused`."""
    revision = view.revision + 1 if pending else view.revision
    at = request.revision
    if at < 0 or request.limit < 0:
        raise Refused("limit and revision must not be negative", code="invalid_range")
    _check_readable(view, at, revision)
    now = not at or at == revision
    start, end = request.start, request.end
    if end is None:
        packed: bytes | None
        if not now:
            packed = view.get_at(start, at)
        elif pending and start in pending:
            packed = pending[start]
        else:
            packed = view.get(start)
        if packed is None:
            return RangeResult(revision, (), 0)
        if request.count_only:
            return RangeResult(revision, (), 1)
        return RangeResult(revision, (record_of(start, packed, request.keys_only),), 1)
    pairs = view.scan(start, end, request.reverse, pending) if now else view.scan_at(start, end, at, request.reverse)
    if request.count_only:
        return _counted(revision, pairs)
    if request.sort is not SortBy.KEY:
        return _sorted_range(revision, request, pairs, pending is None)
    return _page(revision, request, pairs, pending is None)


def _counted(revision: int, pairs: Pairs) -> RangeResult:
    count, last = 0, b""
    for key, _ in pairs:
        if count == model.WALK_MAX:
            return RangeResult(revision, (Record(last, b"", 0, 0, 0),), count, True)
        count += 1
        last = key
    return RangeResult(revision, (), count)


def within_walk(pairs: Pairs) -> Pairs:
    """The pairs, all of which some operation must see. Raises `Refused(range_too_large)` past `WALK_MAX`."""
    for walked, pair in enumerate(pairs):
        if walked == model.WALK_MAX:
            raise Refused(
                f"there are more than {model.WALK_MAX} records in this range; do it in parts", code="range_too_large"
            )
        yield pair


def _page(revision: int, request: Range, pairs: Pairs, may_cut: bool, counted: int = 0) -> RangeResult:
    """The first records of `pairs` that the limit and the size allow. `counted`: how many there are, if known."""
    records: list[Record] = []
    limit = request.limit or -1
    size_bytes = 0
    for key, packed in pairs:
        if len(records) == limit:
            pairs = chain(((key, packed),), pairs)
            break
        record = record_of(key, packed, request.keys_only)
        size_bytes += len(key) + len(record.value) + _RECORD_OVERHEAD_BYTES
        if size_bytes > model.RESULT_BYTES_MAX and records:
            if not may_cut:
                raise Refused(
                    f"the result is over the limit of {model.RESULT_BYTES_MAX} bytes; ask for less at a time",
                    code="result_too_large",
                )
            pairs = chain(((key, packed),), pairs)
            break
        records.append(record)
    else:
        return RangeResult(revision, tuple(records), len(records))
    count = counted or len(records) + sum(1 for _ in islice(pairs, model.COUNT_AHEAD_MAX))
    return RangeResult(revision, tuple(records), count, True)


def _sorted_range(revision: int, request: Range, pairs: Pairs, may_cut: bool) -> RangeResult:
    """Sorted by something else than the key, ties by key. Holds no more records than a result could."""
    target = {
        SortBy.VERSION: Target.VERSION,
        SortBy.CREATE_REVISION: Target.CREATE_REVISION,
        SortBy.MOD_REVISION: Target.MOD_REVISION,
        SortBy.VALUE: Target.VALUE,
    }[request.sort]
    count = 0

    def counting() -> Pairs:
        nonlocal count
        for pair in within_walk(pairs):
            count += 1
            yield pair

    most = min(request.limit or _RECORDS_MAX, _RECORDS_MAX) + 1
    choose = nlargest if request.reverse else nsmallest
    chosen = choose(most, counting(), key=lambda pair: (_aspect(pair[1], target), pair[0]))
    result = _page(revision, request, iter(chosen), may_cut, count)
    return RangeResult(revision, result.records, count, len(result.records) < count)
