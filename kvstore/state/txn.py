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
- A request walks over so much and replaces so much at most, in all its parts together: see `walk.py`.

Pure: the view is the only thing it touches.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import chain
from typing import NamedTuple

from kvstore import codec, model, versions
from kvstore.backup import RecordsHash
from kvstore.errors import Refused, Unavailable
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
from kvstore.state.leases import LeaseMoves
from kvstore.state.mvcc import Overlay
from kvstore.state.walk import LARGE_BYTES, Pairs, Walk, held_up

# What a record takes in a result beside its key and value: four numbers and the lengths, at their longest.
_RECORD_OVERHEAD_BYTES = 48
# So many of the smallest records fill a result.
_RECORDS_MAX = model.RESULT_BYTES_MAX // _RECORD_OVERHEAD_BYTES + 1
# A sorted range keeps up to so much until it looks what of it can still be in the result.
_CHOSEN_BYTES = 4 * model.RESULT_BYTES_MAX
_CHOSEN_RECORDS = 256
_NUMBER_BYTES_MAX = 20  # "-9223372036854775808"

_encode = codec.encode_result
Pending = dict[bytes, bytes | None]


def execute(view: Overlay, request: Operation) -> bytes:
    """Run a request against the view and return its encoded result. What it changes is in the view afterwards.
    `HELD_UP` itself says that it was not executed, as its entry has done enough."""
    kind = type(request)
    try:
        if kind is Put:
            return _encode(_put_alone(view, request))  # type: ignore[arg-type]
        view.walk.next_request()
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
    except Unavailable:
        return HELD_UP


def refused(refusal: Refused | Unavailable) -> bytes:
    return _encode(ErrorResult(refusal.code, refusal.message, refusal.operation))


HELD_UP = refused(held_up())


# --- writes ---------------------------------------------------------------------------------------------------------


def _next_record(before: bytes | None, value: bytes, revision: int) -> bytes:
    if before is None:
        return pack_header(FORMAT, revision, revision, 1, 0) + value
    _, create_revision, _, version, lease = unpack_header(before)
    return pack_header(FORMAT, create_revision, revision, version + 1, lease) + value


def _put_record(put: Put, before: bytes | None, revision: int) -> bytes:
    if before is None:
        return pack_header(FORMAT, revision, revision, 1, put.lease) + put.value
    _, create_revision, _, version, _ = unpack_header(before)
    return pack_header(FORMAT, create_revision, revision, version + 1, put.lease) + put.value


def _put_alone(view: Overlay, put: Put) -> PutResult:
    key = put.key
    before = view.get(key)
    if before is not None and len(before) >= LARGE_BYTES:
        view.walk.next_request()
        _count_replaced(view, key, before)
    revision = view.revision + 1
    record = _put_record(put, before, revision)
    if put.lease:
        if view.rules < versions.WITH_BUDGETS:
            view.leases.check_room(put.lease, 1)
        else:
            LeaseMoves(view.leases, view.get).write(key, before, put.lease, len(record))
    view.write(key, record, before, revision)
    view.revision = revision
    if put.prev and before is not None:
        return PutResult(revision, record_of(key, before))
    return PutResult(revision)


def _count_replaced(view: Overlay, key: bytes, before: bytes) -> None:
    view.walk.begin()
    view.walk.note_replaced(1, len(key) + len(before))


def end_lease(view: Overlay, lease_id: int) -> int:
    """Delete the records of a lease, in one revision, and the lease. Returns how many there were. Raises
    `Refused(lease_not_found)`, and `Unavailable(overloaded)` as `Walk.begin` does."""
    keys = sorted(view.leases.need(lease_id).keys)
    view.walk.begin()
    revision = view.revision + 1
    size_bytes = 0
    for key in keys:
        before = view.get(key)
        assert before is not None, f"{key!r} is under lease {lease_id} and is not there"
        size_bytes += len(key) + len(before)
        view.write(key, None, before, revision)
    if keys:
        view.revision = revision
    view.walk.end_lease(len(keys), size_bytes)
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

    __slots__ = (
        "_before",
        "_lease_moves",
        "_record_bytes",
        "_records",
        "_revision",
        "_view",
        "_writes",
    )

    def __init__(self, view: Overlay) -> None:
        self._view = view
        self._revision = view.revision + 1
        self._writes: Pending = {}
        self._before: Pending = {}
        self._records = 0
        self._record_bytes = 0
        # Where there are no leases, no record is under one.
        self._lease_moves = LeaseMoves(view.leases, view.get) if view.leases.count else None

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
            if before is not None and len(before) >= LARGE_BYTES:
                _count_replaced(self._view, key, before)
            packed = _put_record(operation, before, self._revision)  # type: ignore[arg-type]
            if self._lease_moves is not None or operation.lease:  # type: ignore[union-attr]
                self._put_under(operation.lease, key, before, len(packed))  # type: ignore[union-attr]
            self._writes[key] = packed
            if operation.prev and before is not None:  # type: ignore[union-attr]
                return PutResult(self._revision, self._taken(key, before))
            return PutResult(self._revision)
        if kind is Add:
            key = operation.key  # type: ignore[union-attr]
            before = self._before[key] = self._view.get(key)
            if before is not None and len(before) >= LARGE_BYTES:
                _count_replaced(self._view, key, before)
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
            if before is not None and len(before) >= LARGE_BYTES:
                _count_replaced(view, delete.start, before)
        else:
            view.walk.begin()
            pairs = list(view.walk.replacing(view.scan(delete.start, delete.end, False, writes)))
        for key, before in pairs:
            if self._lease_moves is not None:
                self._put_under(0, key, before, 0)
            self._before[key] = before
            writes[key] = None
            deleted += 1
            if delete.prev:
                previous.append(self._taken(key, before))
        return DeleteResult(self._reached(), deleted, tuple(previous))

    def _put_under(self, lease: int, key: bytes, before: bytes | None, size_bytes: int) -> None:
        """A record, `before` until now, will be under a lease (0: none). Raises `Refused`: `lease_not_found`,
        `lease_full`."""
        if self._lease_moves is None or self._view.rules < versions.WITH_BUDGETS:
            # Each write of the transaction counted as one under this lease, also where the record was under it before.
            if lease:
                self._view.leases.check_room(lease, len(self._writes) + 1)
        else:
            self._lease_moves.write(key, before, lease, size_bytes)

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
            raise _result_too_large()

    def finish(self) -> None:
        writes = self._writes
        if writes:
            view, revision, before = self._view, self._revision, self._before
            for key, record in writes.items():
                view.write(key, record, before[key], revision)
            view.revision = revision


def _result_too_large() -> Refused:
    return Refused(
        f"the result is over the limit of {model.RESULT_BYTES_MAX} bytes; ask for less at a time",
        code="result_too_large",
    )


def check_written_once(txn: Txn) -> None:
    """Raises `Refused(duplicate_key)` if a branch of the transaction may write a key twice."""
    # The usual transaction writes single keys where it succeeds, and at most reads where it does not.
    keys = []
    for operation in txn.success:
        kind = type(operation)
        if kind is Put or kind is Add:
            keys.append(operation.key)  # type: ignore[union-attr]
        elif kind is not Range:
            _written(txn)
            return
    for operation in txn.failure:
        if type(operation) is not Range:
            _written(txn)
            return
    if len(set(keys)) != len(keys):
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
            twice = written.keys & writer_of.keys()
            if twice:  # the words are part of the state, and the order of a set is another one in each process
                raise Refused(f"{min(twice)!r} is written twice in one transaction", code="duplicate_key")
            writer_of.update(dict.fromkeys(written.keys, position))
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
        _count_read(view, compare.key, packed)
        if target is Target.COUNT:
            return _related(0 if packed is None else 1, operand, compare.relation)
        if packed is None:
            return target is not Target.VALUE and _related(0, operand, compare.relation)
        return _related(_aspect(packed, target), operand, compare.relation)
    view.walk.begin()
    pairs = view.walk.over(view.scan(compare.key, compare.end))
    if target is Target.COUNT:
        return _related(sum(1 for _ in pairs), operand, compare.relation)
    return all(_related(_aspect(packed, target), operand, compare.relation) for _, packed in pairs)


def _count_read(view: Overlay, key: bytes, packed: bytes | None) -> None:
    """A record is read by itself."""
    if packed is not None and len(packed) >= LARGE_BYTES:
        view.walk.begin()
        view.walk.take(1, len(key) + len(packed))


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
        _count_read(view, start, packed)
        if request.count_only:
            return RangeResult(revision, (), 1)
        return RangeResult(revision, (record_of(start, packed, request.keys_only),), 1)
    view.walk.begin()
    if now:
        pairs = view.scan(start, end, request.reverse, pending)
    else:
        if pending is not None:
            view.walk.take_past_range()
        pairs = view.scan_at(start, end, at, request.reverse)
    if request.count_only:
        return _counted(revision, view.walk, pairs, pending is None)
    if request.sort is not SortBy.KEY:
        return _sorted_range(revision, request, view.walk, pairs, pending is None)
    return _page(revision, request, view.walk, pairs, pending is None)


def _counted(revision: int, walk: Walk, pairs: Pairs, may_cut: bool) -> RangeResult:
    count, size_bytes, last = 0, 0, b""
    count_max, bytes_max = walk.room_to_count
    for key, packed in pairs:
        size_bytes += len(key) + len(packed)
        if count == count_max or size_bytes > bytes_max:
            if not count or not (may_cut or walk.is_each_by_itself):
                raise walk.too_far(count + 1, size_bytes)
            walk.take(count, min(size_bytes, bytes_max))
            return RangeResult(revision, (Record(last, b"", 0, 0, 0),), count, True)
        count += 1
        last = key
    walk.take(count, size_bytes)
    return RangeResult(revision, (), count)


def _page(revision: int, request: Range, walk: Walk, pairs: Pairs, may_cut: bool) -> RangeResult:
    """The first records of `pairs`. What it walks over is counted once, and not with each of them."""
    page = _fill(request, pairs, *walk.room)
    walk.take(len(page.records), page.walked_bytes)
    if page.next is None:
        return RangeResult(revision, page.records, len(page.records))
    if page.is_cut and not (may_cut and page.records):
        key, packed = page.next
        walk.take(1, len(key) + len(packed))
        raise _result_too_large()
    count = len(page.records) + walk.count_ahead(chain((page.next,), pairs))
    return RangeResult(revision, page.records, count, True)


class _Page(NamedTuple):
    """Records; the bytes that were read for them; the first pair that is not among them; and whether it is not because
    of the limit that it is not."""

    records: tuple[Record, ...]
    walked_bytes: int
    next: tuple[bytes, bytes] | None = None
    is_cut: bool = False


def _fill(request: Range, pairs: Pairs, records_max: int, bytes_max: int) -> _Page:
    """The first records of `pairs` that the limit, the size of a result and what may be walked over allow."""
    records: list[Record] = []
    limit, keys_only = request.limit or model.INT64_MAX, request.keys_only
    most = min(limit, records_max)
    size_bytes, size_max, walked_bytes = 0, model.RESULT_BYTES_MAX, 0
    for key, packed in pairs:
        if len(records) == most:
            return _Page(tuple(records), walked_bytes, (key, packed), most != limit)
        record = record_of(key, packed, keys_only)
        size_bytes += len(key) + len(record.value) + _RECORD_OVERHEAD_BYTES
        walked_bytes += len(key) + len(packed)
        if (size_bytes > size_max or walked_bytes > bytes_max) and records:
            return _Page(tuple(records), walked_bytes - len(key) - len(packed), (key, packed), True)
        records.append(record)
    return _Page(tuple(records), walked_bytes)


def _sorted_range(revision: int, request: Range, walk: Walk, pairs: Pairs, may_cut: bool) -> RangeResult:
    """Sorted by something else than the key, ties by key. Walks over all of it, and keeps little more than what a
    result can hold (sorted by the value, and without it in the result, up to all that it walks over)."""
    target = {
        SortBy.VERSION: Target.VERSION,
        SortBy.CREATE_REVISION: Target.CREATE_REVISION,
        SortBy.MOD_REVISION: Target.MOD_REVISION,
        SortBy.VALUE: Target.VALUE,
    }[request.sort]
    chosen = _Chosen(request)
    count = 0
    for key, packed in walk.over(pairs):
        count += 1
        chosen.add((_aspect(packed, target), key), packed)
    page = _fill(request, chosen.pairs(), model.INT64_MAX, model.INT64_MAX)
    if page.is_cut and not may_cut:
        raise _result_too_large()
    return RangeResult(revision, page.records, count, len(page.records) < count)


_Place = tuple[bytes | int | None, bytes]  # in the order of a sorted range


class _Chosen:
    """The first of many records: as many as a limit and the size of a result allow, and the next, if it is only the
    size that shuts it out. Costs O(log n) a record at worst, and next to nothing where it comes too late in the order.
    """

    __slots__ = ("_first", "_keys_only", "_last", "_limit", "_reverse", "_size_bytes")

    def __init__(self, request: Range) -> None:
        self._limit = min(request.limit or _RECORDS_MAX, _RECORDS_MAX)
        self._keys_only = request.keys_only
        self._reverse = request.reverse
        self._first: list[tuple[_Place, bytes]] = []  # with the packed record, or its header
        self._size_bytes = 0
        self._last: _Place | None = None  # what comes after it is not among the first

    def add(self, place: _Place, packed: bytes) -> None:
        last = self._last
        if last is not None and (place < last if self._reverse else place > last):
            return
        if self._keys_only:
            packed = packed[:HEADER_BYTES]
        self._first.append((place, packed))
        self._size_bytes += _size_in_result(place[1], packed)
        if len(self._first) >= 2 * self._limit + _CHOSEN_RECORDS or self._size_bytes > _CHOSEN_BYTES:
            self._cut()

    def pairs(self) -> Pairs:
        """Their keys and packed records, in order."""
        self._cut()
        return iter([(place[1], packed) for place, packed in self._first])

    def _cut(self) -> None:
        first, size_bytes = self._first, 0
        first.sort(reverse=self._reverse)
        for at, (place, packed) in enumerate(first):
            if at == self._limit or size_bytes > model.RESULT_BYTES_MAX:
                del first[at:]
                self._last = first[-1][0]
                break
            size_bytes += _size_in_result(place[1], packed)
        self._size_bytes = size_bytes


def _size_in_result(key: bytes, packed: bytes) -> int:
    return len(key) + len(packed) - HEADER_BYTES + _RECORD_OVERHEAD_BYTES
