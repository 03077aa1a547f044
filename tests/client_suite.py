"""What a client promises, whatever stands behind it: one suite for the fake server, the embedded store and a cluster.

Subclass `ClientSuite` and give it a `kv_factory` fixture that opens another client of the same store at each call and
closes them all at the end. A store may be shared by many tests: each test keeps to a prefix of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

import kvstore
from kvstore import Add, Client, Compare, Delete, Put, Range, Refused, Relation, SortBy, Target, Transaction, Txn, model
from kvstore.model import INT64_MAX, INT64_MIN, KEY_BYTES_MAX, REQUEST_BYTES_MAX, TXN_OPERATIONS_MAX, VALUE_BYTES_MAX

KvFactory = Callable[[], Awaitable[Client]]


def drop_connections(kv: Client) -> None:
    """End every channel of a client, as a failing network would: what is under way is in doubt."""
    for link in tuple(kv._pool._links.values()):
        link.close("the test dropped it")


@contextlib.asynccontextmanager
async def refused(code: str, operation: tuple[int, ...] | None = None) -> AsyncIterator[None]:
    """The block ends with `Refused` of this code (and path)."""
    with pytest.raises(Refused) as caught:
        yield
    assert caught.value.code == code, caught.value
    assert caught.value.message
    if operation is not None:
        assert caught.value.operation == operation


class ClientSuite:
    @pytest.fixture
    async def kv(self, kv_factory: KvFactory) -> Client:
        return await kv_factory()

    @pytest.fixture
    def p(self) -> bytes:
        """A prefix that no other test uses."""
        return uuid.uuid4().hex.encode() + b"/"

    # --- single keys --------------------------------------------------------------------------------------------------

    async def test_put_then_get(self, kv: Client, p: bytes) -> None:
        first = await kv.put(p + b"a", b"1")
        second = await kv.put(p + b"a", b"2")
        assert second.revision > first.revision
        record = await kv.get(p + b"a")
        assert record is not None
        assert (record.key, record.value, record.version) == (p + b"a", b"2", 2)
        assert (record.create_revision, record.mod_revision) == (first.revision, second.revision)
        assert kv.revision >= second.revision

    async def test_get_of_what_is_not_there(self, kv: Client, p: bytes) -> None:
        assert await kv.get(p + b"nothing") is None
        assert await kv.get(p + b"nothing", level="local") is None

    async def test_keys_and_values_are_any_bytes(self, kv: Client, p: bytes) -> None:
        for key, value in ((b"\0", b""), (b"\xff\xff", b"\0\xff"), ("schlüssel".encode(), b"\r\n")):
            await kv.put(p + key, value)
            record = await kv.get(p + key)
            assert record is not None
            assert record.value == value

    async def test_put_and_delete_return_what_was_before(self, kv: Client, p: bytes) -> None:
        assert (await kv.put(p + b"a", b"1", prev=True)).prev is None
        before = (await kv.put(p + b"a", b"2", prev=True)).prev
        assert before is not None
        assert before.value == b"1"
        assert (await kv.put(p + b"a", b"3")).prev is None
        gone = await kv.delete(p + b"a", prev=True)
        assert (gone.deleted, [record.value for record in gone.prev]) == (1, [b"3"])
        again = await kv.delete(p + b"a", prev=True)
        assert (again.deleted, again.prev) == (0, ())
        assert await kv.get(p + b"a") is None

    async def test_delete_ranges(self, kv: Client, p: bytes) -> None:
        for letter in b"abcde":
            await kv.put(p + bytes([letter]), b"x")
        assert (await kv.delete(p + b"b", p + b"d")).deleted == 2
        assert [record.key[-1:] for record in (await kv.range(prefix=p)).records] == [b"a", b"d", b"e"]
        assert (await kv.delete_prefix(p)).deleted == 3
        assert (await kv.range(prefix=p)).count == 0

    async def test_a_deleted_key_starts_anew(self, kv: Client, p: bytes) -> None:
        await kv.put(p + b"a", b"1")
        await kv.put(p + b"a", b"2")
        await kv.delete(p + b"a")
        created = await kv.put(p + b"a", b"3")
        record = await kv.get(p + b"a")
        assert record is not None
        assert (record.version, record.create_revision) == (1, created.revision)

    async def test_add(self, kv: Client, p: bytes) -> None:
        assert (await kv.add(p + b"n", 5)).value == 5
        assert (await kv.add(p + b"n", -7)).value == -2
        record = await kv.get(p + b"n")
        assert record is not None
        assert record.value == b"-2"
        assert (await kv.add(p + b"n", 2, min=0, max=0)).value == 0

    async def test_add_refuses_and_changes_nothing(self, kv: Client, p: bytes) -> None:
        await kv.put(p + b"text", b"12x")
        await kv.add(p + b"n", 3)
        async with refused("out_of_range"):
            await kv.add(p + b"n", -4, min=0)
        async with refused("out_of_range"):
            await kv.add(p + b"n", 1, max=3)
        async with refused("not_a_number"):
            await kv.add(p + b"text", 1)
        await kv.put(p + b"big", str(INT64_MAX).encode())
        async with refused("overflow"):
            await kv.add(p + b"big", 1)
        record = await kv.get(p + b"n")
        assert record is not None
        assert (record.value, record.version) == (b"3", 1)

    # --- ranges -------------------------------------------------------------------------------------------------------

    async def test_ranges(self, kv: Client, p: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        for letter in b"edcba":
            await kv.put(p + bytes([letter]), bytes([letter]) * 3)

        def names(result: kvstore.RangeResult) -> bytes:
            return b"".join(record.key[-1:] for record in result.records)

        assert names(await kv.range(prefix=p)) == b"abcde"
        assert names(await kv.range(p + b"b", p + b"d")) == b"bc"
        assert names(await kv.range(p + b"b")) == b"b"
        assert names(await kv.range(prefix=p, reverse=True)) == b"edcba"
        limited = await kv.range(prefix=p, limit=2)
        assert (names(limited), limited.count, limited.more) == (b"ab", 5, True)
        exact = await kv.range(prefix=p, limit=5)
        assert (names(exact), exact.count, exact.more) == (b"abcde", 5, False)
        counted = await kv.range(prefix=p, count_only=True)
        assert (counted.records, counted.count) == ((), 5)
        with monkeypatch.context() as few:
            few.setattr(model, "WALK_MAX", 2)  # where the store is in this process, it counts in parts
            assert (await kv.range(prefix=p, count_only=True)).count == 5
        keys = await kv.range(prefix=p, keys_only=True)
        assert names(keys) == b"abcde"
        assert {record.value for record in keys.records} == {b""}
        assert names(await kv.range(p + b"c", p + b"c")) == b""

    async def test_sorted_ranges(self, kv: Client, p: bytes) -> None:
        for key, value in ((b"a", b"3"), (b"b", b"1"), (b"c", b"2"), (b"a", b"9")):
            await kv.put(p + key, value)
        order = {
            SortBy.KEY: b"abc",
            SortBy.VALUE: b"bca",
            SortBy.VERSION: b"bca",
            SortBy.CREATE_REVISION: b"abc",
            SortBy.MOD_REVISION: b"bca",
        }
        for sort, expected in order.items():
            found = await kv.range(prefix=p, sort=sort)
            assert b"".join(record.key[-1:] for record in found.records) == expected, sort

    async def test_reads_at_older_revisions(self, kv: Client, p: bytes) -> None:
        await kv.put(p + b"before", b"")
        first = (await kv.put(p + b"a", b"1")).revision
        second = (await kv.put(p + b"a", b"2")).revision
        third = (await kv.delete(p + b"a")).revision
        await kv.put(p + b"b", b"")
        assert await kv.get(p + b"a") is None
        for revision, value in ((first - 1, None), (first, b"1"), (second, b"2"), (third, None)):
            record = await kv.get(p + b"a", revision=revision)
            assert (record.value if record else None) == value
            found = await kv.range(prefix=p, revision=revision, level="local")
            values = [record.value for record in found.records if record.key == p + b"a"]
            assert values == ([value] if value else [])
        async with refused("revision_in_future"):
            await kv.get(p + b"a", revision=kv.revision + 1_000_000)

    async def test_compacted_history_is_refused(self, kv: Client, p: bytes) -> None:
        old = (await kv.put(p + b"a", b"1")).revision
        new = (await kv.put(p + b"a", b"2")).revision
        await kv.compact(new)
        async with refused("revision_compacted"):
            await kv.get(p + b"a", revision=old)
        record = await kv.get(p + b"a", revision=new)
        assert record is not None
        assert record.value == b"2"

    async def test_scan_pages_at_one_revision(self, kv: Client, kv_factory: KvFactory, p: bytes) -> None:
        await kv.txn(success=[Put(p + b"%04d" % number, b"v") for number in range(100)])
        seen: list[bytes] = []
        async for record in kv.scan(prefix=p, page_records=7):
            if len(seen) == 10:  # none of this is seen by a scan that began before
                await kv.put(p + b"0050x", b"later")
                await kv.delete(p + b"0060")
            seen.append(record.key)
        assert seen == [p + b"%04d" % number for number in range(100)]
        backwards = [record.key async for record in kv.scan(prefix=p, page_records=7, reverse=True)]
        assert len(backwards) == 100
        assert backwards == sorted(backwards, reverse=True)
        assert [record.key async for record in kv.scan(p + b"0003", p + b"0006", page_records=2)] == seen[3:6]
        assert [record async for record in kv.scan(prefix=p + b"none")] == []

    async def test_pages_cut_by_size(self, kv: Client, p: bytes) -> None:
        value = random.Random(1).randbytes(300_000)
        for number in range(8):
            await kv.put(p + b"%d" % number, value)
        whole = await kv.range(prefix=p)
        assert whole.more
        assert 0 < len(whole.records) < 8
        assert whole.count == 8
        assert [record.value async for record in kv.scan(prefix=p)] == [value] * 8

    async def test_the_largest_value_and_key(self, kv: Client, p: bytes) -> None:
        key = p + b"k" * (KEY_BYTES_MAX - len(p))
        value = random.Random(2).randbytes(VALUE_BYTES_MAX - KEY_BYTES_MAX - 64)  # a result holds its record whole
        await kv.put(key, value)
        record = await kv.get(key)
        assert record is not None
        assert (record.key, record.value) == (key, value)
        assert [found.key async for found in kv.scan(prefix=p, page_records=1)] == [key]

    # --- transactions as data -----------------------------------------------------------------------------------------

    async def test_txn_takes_one_branch(self, kv: Client, p: bytes) -> None:
        create = [Compare(p + b"a", Target.VERSION, Relation.EQUAL, 0)]
        done = await kv.txn(create, [Put(p + b"a", b"1")], [Range(p + b"a")])
        assert done.succeeded
        other = await kv.txn(create, [Put(p + b"a", b"2")], [Range(p + b"a")])
        assert not other.succeeded
        (found,) = other.results
        assert isinstance(found, kvstore.RangeResult)
        assert found.records[0].value == b"1"

    async def test_txn_is_one_revision(self, kv: Client, p: bytes) -> None:
        result = await kv.txn(success=[Put(p + b"a", b""), Add(p + b"n", 2), Delete(p + b"zz"), Range(p + b"a")])
        put, add, delete, _ = result.results
        assert isinstance(put, kvstore.PutResult)
        assert isinstance(add, kvstore.AddResult)
        assert isinstance(delete, kvstore.DeleteResult)
        assert add.value == 2
        records = (await kv.range(prefix=p)).records
        assert {record.mod_revision for record in records} == {result.revision}

    async def test_txn_is_refused_whole(self, kv: Client, p: bytes) -> None:
        async with refused("out_of_range", (1,)):
            await kv.txn(success=[Put(p + b"order", b""), Add(p + b"stock", -1, min=0)])
        async with refused("out_of_range", (1, 0)):
            await kv.txn(success=[Put(p + b"order", b""), Txn((), (Add(p + b"stock", -1, min=0),))])
        async with refused("duplicate_key"):
            await kv.txn(success=[Put(p + b"a", b""), Put(p + b"a", b"")])
        assert (await kv.range(prefix=p)).count == 0

    async def test_nested_txn(self, kv: Client, p: bytes) -> None:
        await kv.put(p + b"a", b"7")
        nested = Txn(
            (Compare(p + b"a", Target.NUMBER, Relation.GREATER, 5),), (Put(p + b"big", b""),), (Put(p + b"small", b""),)
        )
        result = await kv.txn([Compare(p + b"a", Target.VALUE, Relation.EQUAL, b"7")], [nested])
        assert result.succeeded
        assert await kv.get(p + b"big") is not None
        assert await kv.get(p + b"small") is None

    async def test_a_txn_that_only_reads(self, kv: Client, p: bytes) -> None:
        await kv.put(p + b"a", b"1")
        before = kv.revision
        result = await kv.txn(
            [Compare(p + b"a", Target.VALUE, Relation.EQUAL, b"1")], [Range(p + b"a"), Range(p + b"b")]
        )
        assert result.succeeded
        first, second = result.results
        assert isinstance(first, kvstore.RangeResult)
        assert isinstance(second, kvstore.RangeResult)
        assert (first.count, second.count) == (1, 0)
        assert kv.revision >= before

    async def test_compares_on_ranges(self, kv: Client, p: bytes) -> None:
        end = kvstore.prefix_end(p)
        await kv.put(p + b"a", b"1")
        revision = (await kv.put(p + b"b", b"1")).revision
        for compare, holds in (
            (Compare(p, Target.COUNT, Relation.EQUAL, 2, end), True),
            (Compare(p, Target.COUNT, Relation.EQUAL, 1, end), False),
            (Compare(p, Target.MOD_REVISION, Relation.LESS, revision + 1, end), True),
            (Compare(p, Target.MOD_REVISION, Relation.LESS, revision, end), False),
            (Compare(p + b"x", Target.MOD_REVISION, Relation.LESS, 1, end), True),
            (Compare(p + b"x", Target.COUNT, Relation.EQUAL, 0, end), True),
        ):
            result = await kv.txn([compare], [Range(p + b"a")])
            assert result.succeeded is holds, compare

    # --- limits -------------------------------------------------------------------------------------------------------

    async def test_limits(self, kv: Client, p: bytes) -> None:
        async with refused("key_empty"):
            await kv.put(b"", b"")
        async with refused("key_too_large"):
            await kv.put(b"k" * (KEY_BYTES_MAX + 1), b"")
        async with refused("value_too_large"):
            await kv.put(p, b"v" * (VALUE_BYTES_MAX + 1))
        async with refused("request_too_large"):
            half = b"v" * (REQUEST_BYTES_MAX // 2)
            await kv.txn(success=[Put(p + b"a", half), Put(p + b"b", half)])
        async with refused("too_many_operations"):
            await kv.txn(success=[Put(p + b"%d" % number, b"") for number in range(TXN_OPERATIONS_MAX + 1)])
        async with refused("invalid_range"):
            await kv.range(p + b"b", p + b"a")
        async with refused("invalid_request"):
            await kv.add(p, INT64_MAX + 1)
        async with refused("invalid_request"):
            await kv.add(p, 0, min=1, max=0)
        async with refused("invalid_request"):
            await kv.add(p, 0, min=INT64_MIN - 1)
        assert (await kv.txn(success=[Put(p + b"%d" % n, b"") for n in range(TXN_OPERATIONS_MAX)])).succeeded
        assert (await kv.range(prefix=p, count_only=True)).count == TXN_OPERATIONS_MAX

    async def test_wrong_types_are_told_before_anything_is_sent(self, kv: Client) -> None:
        for call in (
            lambda: kv.put("text", b""),  # type: ignore[arg-type]
            lambda: kv.put(b"k", "text"),  # type: ignore[arg-type]
            lambda: kv.get(None),  # type: ignore[arg-type]
            lambda: kv.add(b"k", 1.5),  # type: ignore[arg-type]
            lambda: kv.add(b"k", True),
            lambda: kv.range(prefix="p"),  # type: ignore[arg-type]
            lambda: kv.delete(b"k", "end"),  # type: ignore[arg-type]
        ):
            with pytest.raises(TypeError):
                await call()
        for call in (
            lambda: kv.get(b"k", level="newest"),  # type: ignore[arg-type]
            lambda: kv.range(b"a", prefix=b"p"),
            lambda: kv.put(b"k", b"", timeout=0),
            lambda: kv.put(b"k", b"", timeout=float("nan")),
        ):
            with pytest.raises(ValueError):
                await call()

    # --- consistency --------------------------------------------------------------------------------------------------

    async def test_linearizable_reads_see_what_others_wrote(self, kv: Client, kv_factory: KvFactory, p: bytes) -> None:
        other = await kv_factory()
        for number in range(20):
            await kv.put(p + b"a", b"%d" % number)
            record = await other.get(p + b"a")
            assert record is not None
            assert record.value == b"%d" % number

    async def test_local_reads_never_go_back(self, kv: Client, p: bytes) -> None:
        for number in range(50):
            await kv.put(p + b"a", b"%d" % number)
            record = await kv.get(p + b"a", level="local")
            assert record is not None
            assert record.value == b"%d" % number

    async def test_a_thousand_concurrent_puts(self, kv: Client, p: bytes) -> None:
        results = await asyncio.gather(*(kv.put(p + b"%04d" % n, b"%d" % n) for n in range(1000)))
        assert len({result.revision for result in results}) == 1000
        found = {record.key: record.value async for record in kv.scan(prefix=p)}
        assert found == {p + b"%04d" % n: b"%d" % n for n in range(1000)}

    async def test_concurrent_adds_lose_none(self, kv: Client, kv_factory: KvFactory, p: bytes) -> None:
        others = [kv, await kv_factory(), await kv_factory()]
        results = await asyncio.gather(*(others[n % 3].add(p + b"n", 1) for n in range(300)))
        assert sorted(result.value for result in results) == list(range(1, 301))

    async def test_lost_connections_repeat_nothing(self, kv: Client, p: bytes) -> None:
        """Each add is applied once, although many had to be sent several times."""
        calls = [asyncio.ensure_future(kv.add(p + b"n", 1, timeout=20)) for _ in range(400)]
        for _ in range(4):
            await asyncio.sleep(0.005)  # lets some be answered and some be under way; nothing depends on how many
            drop_connections(kv)
        values = [(await call).value for call in calls]
        assert sorted(values) == list(range(1, 401))

    async def test_cancelled_calls_leave_the_client_working(self, kv: Client, p: bytes) -> None:
        calls = [asyncio.ensure_future(kv.add(p + b"n", 1)) for _ in range(200)]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        done = [outcome for outcome in outcomes if isinstance(outcome, kvstore.AddResult)]
        assert len(done) == 100
        record = await kv.get(p + b"n")
        assert record is not None
        assert 100 <= int(record.value) <= 200

    # --- optimistic transactions --------------------------------------------------------------------------------------

    async def test_transaction_reads_and_writes(self, kv: Client, p: bytes) -> None:
        await kv.put(p + b"a", b"1")
        async with kv.transaction() as txn:
            record = await txn.get(p + b"a")
            assert record is not None
            txn.put(p + b"b", record.value + b"!")
            txn.delete(p + b"a")
        assert txn.result is not None
        assert await kv.get(p + b"a") is None
        copied = await kv.get(p + b"b")
        assert copied is not None
        assert copied.mod_revision == txn.result.revision

    async def test_transaction_reads_one_revision(self, kv: Client, p: bytes) -> None:
        await kv.put(p + b"a", b"1")
        await kv.put(p + b"b", b"1")
        async with kv.transaction() as txn:
            first = await txn.get(p + b"a")
            await kv.txn(success=[Put(p + b"a", b"2"), Put(p + b"b", b"2")])
            second = await txn.get(p + b"b")
            assert first is not None
            assert second is not None
            assert (first.value, second.value) == (b"1", b"1")
            assert [record.value for record in (await txn.range(prefix=p)).records] == [b"1", b"1"]

    async def test_transaction_sees_its_own_writes(self, kv: Client, p: bytes) -> None:
        await kv.txn(success=[Put(p + b"a", b"1"), Put(p + b"b", b"2"), Put(p + b"c", b"3"), Put(p + b"n", b"5")])
        async with kv.transaction() as txn:
            txn.put(p + b"b", b"new")
            txn.put(p + b"bb", b"newer")
            txn.delete(p + b"c")
            txn.add(p + b"n", 2)
            txn.add(p + b"n", 3, max=10)
            found = await txn.range(prefix=p)
            values = {record.key.removeprefix(p): record.value for record in found.records}
            assert values == {b"a": b"1", b"b": b"new", b"bb": b"newer", b"n": b"10"}
            assert found.count == 4
            assert await txn.get(p + b"c") is None
            number = await txn.get(p + b"n")
            assert number is not None
            assert number.value == b"10"
            limited = await txn.range(prefix=p, limit=3, reverse=True)
            assert [record.key.removeprefix(p) for record in limited.records] == [b"n", b"bb", b"b"]
            assert limited.more
        stored = {record.key.removeprefix(p): record.value async for record in kv.scan(prefix=p)}
        assert stored == values

    async def test_transaction_with_an_exception_writes_nothing(self, kv: Client, p: bytes) -> None:
        txn = kv.transaction()

        async def fails() -> None:
            async with txn:
                txn.put(p + b"a", b"1")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fails()
        assert await kv.get(p + b"a") is None
        with pytest.raises(ValueError):
            txn.put(p + b"a", b"1")
        with pytest.raises(ValueError):
            await txn.get(p + b"a")

    async def test_lost_update_conflicts(self, kv: Client, p: bytes) -> None:
        await kv.put(p + b"a", b"1")
        async with refused("conflict"), kv.transaction() as txn:
            await txn.get(p + b"a")
            await kv.put(p + b"a", b"2")
            txn.put(p + b"a", b"3")
        assert txn.conflicted
        record = await kv.get(p + b"a")
        assert record is not None
        assert record.value == b"2"

    async def test_a_key_that_appears_or_vanishes_conflicts(self, kv: Client, p: bytes) -> None:
        async with refused("conflict"), kv.transaction() as txn:
            assert await txn.get(p + b"a") is None
            await kv.put(p + b"a", b"")
            txn.put(p + b"b", b"")
        async with refused("conflict"), kv.transaction() as txn:
            assert await txn.get(p + b"a") is not None
            await kv.delete(p + b"a")
            txn.put(p + b"b", b"")
        # Also one that came back just as it was.
        async with refused("conflict"), kv.transaction() as txn:
            await kv.put(p + b"a", b"")
            await txn.get(p + b"a")
            await kv.delete(p + b"a")
            await kv.put(p + b"a", b"")
            txn.put(p + b"b", b"")
        assert await kv.get(p + b"b") is None

    async def test_write_skew_conflicts(self, kv: Client, p: bytes) -> None:
        """Two doctors, each of whom goes off duty because the other one is on."""
        await kv.txn(success=[Put(p + b"alice", b"on"), Put(p + b"bob", b"on")])
        async with refused("conflict"), kv.transaction() as first:
            await first.range(prefix=p)
            async with kv.transaction() as second:
                assert len([r for r in (await second.range(prefix=p)).records if r.value == b"on"]) == 2
                second.put(p + b"bob", b"off")
            first.put(p + b"alice", b"off")
        assert [record.value for record in (await kv.range(prefix=p)).records] == [b"on", b"off"]

    async def test_phantoms_conflict(self, kv: Client, p: bytes) -> None:
        await kv.put(p + b"order/1", b"")
        for change in (lambda: kv.put(p + b"order/2", b""), lambda: kv.delete(p + b"order/1")):
            async with refused("conflict"), kv.transaction() as txn:
                found = await txn.range(prefix=p + b"order/")
                await change()
                txn.put(p + b"total", b"%d" % found.count)
        assert await kv.get(p + b"total") is None

    async def test_a_limited_range_is_checked_as_far_as_it_was_read(self, kv: Client, p: bytes) -> None:
        for letter in b"abcd":
            await kv.put(p + bytes([letter]), b"")
        async with kv.transaction() as txn:
            assert len((await txn.range(prefix=p, limit=2)).records) == 2
            await kv.put(p + b"c", b"changed beyond what was read")
            txn.put(p + b"x", b"")
        async with refused("conflict"), kv.transaction() as txn:
            await txn.range(prefix=p, limit=2)
            await kv.put(p + b"aa", b"inside")
            txn.put(p + b"y", b"")
        async with refused("conflict"), kv.transaction() as txn:
            await txn.range(prefix=p, limit=2, reverse=True)
            await kv.put(p + b"dd", b"inside")
            txn.put(p + b"y", b"")

    async def test_blind_adds_never_conflict(self, kv: Client, p: bytes) -> None:
        async with kv.transaction() as txn:
            await txn.get(p + b"a")
            txn.add(p + b"n", 1)
            await kv.add(p + b"n", 5)
        record = await kv.get(p + b"n")
        assert record is not None
        assert record.value == b"6"
        async with refused("out_of_range"), kv.transaction() as txn:
            txn.add(p + b"n", -7, min=0)
            txn.put(p + b"order", b"")
        assert await kv.get(p + b"order") is None

    async def test_range_deletion_in_a_transaction(self, kv: Client, p: bytes) -> None:
        await kv.txn(success=[Put(p + b"%d" % number, b"") for number in range(5)])
        async with kv.transaction() as txn:
            txn.put(p + b"7", b"own")
            assert await txn.delete_range(prefix=p) == 6
            txn.put(p + b"9", b"kept")
        assert [record.key for record in (await kv.range(prefix=p)).records] == [p + b"9"]

    async def test_read_only_and_empty_transactions_commit(self, kv: Client, p: bytes) -> None:
        await kv.put(p + b"a", b"1")
        async with kv.transaction() as txn:
            await txn.get(p + b"a")
            await kv.put(p + b"a", b"2")
        assert txn.result is None
        async with kv.transaction():
            pass

    async def test_a_transaction_over_the_limit(self, kv: Client, p: bytes) -> None:
        async with refused("too_many_operations"), kv.transaction() as txn:
            for number in range(TXN_OPERATIONS_MAX + 1):
                txn.put(p + b"%d" % number, b"")
        assert (await kv.range(prefix=p)).count == 0

    async def test_run_transaction_retries_until_it_wins(self, kv: Client, kv_factory: KvFactory, p: bytes) -> None:
        async def increment(txn: Transaction) -> int:
            record = await txn.get(p + b"n")
            value = int(record.value) + 1 if record else 1
            txn.put(p + b"n", b"%d" % value)
            return value

        other = await kv_factory()
        clients = [kv, other]
        values = await asyncio.gather(*(clients[n % 2].run_transaction(increment, attempts=200) for n in range(20)))
        assert sorted(values) == list(range(1, 21))
        record = await kv.get(p + b"n")
        assert record is not None
        assert (record.value, record.version) == (b"20", 20)

    async def test_run_transaction_gives_up(self, kv: Client, p: bytes) -> None:
        tries = 0

        async def loses(txn: Transaction) -> None:
            nonlocal tries
            tries += 1
            await txn.get(p + b"a")
            await kv.put(p + b"a", b"other")
            txn.put(p + b"a", b"mine")

        async with refused("conflict"):
            await kv.run_transaction(loses, attempts=3)
        assert tries == 3

    async def test_random_transfers_keep_their_sum(self, kv: Client, kv_factory: KvFactory, p: bytes) -> None:
        """Serializability, by an invariant that any lost update, skew or dirty read would break."""
        accounts = [p + b"account/%d" % number for number in range(4)]
        await kv.txn(success=[Put(account, b"100") for account in accounts])
        clients = [kv, await kv_factory(), await kv_factory()]

        async def worker(client: Client, chance: random.Random) -> None:
            async def transfer(txn: Transaction) -> None:
                source, target = chance.sample(accounts, 2)
                amount = chance.randrange(1, 60)
                found = {record.key: int(record.value) for record in (await txn.range(prefix=p)).records}
                assert sum(found.values()) == 400
                if found[source] >= amount:
                    txn.put(source, b"%d" % (found[source] - amount))
                    txn.put(target, b"%d" % (found[target] + amount))

            for _ in range(8):
                await client.run_transaction(transfer, attempts=500)

        await asyncio.gather(*(worker(client, random.Random(n)) for n, client in enumerate(clients * 2)))
        balances = [int(record.value) for record in (await kv.range(prefix=p)).records]
        assert sum(balances) == 400
        assert min(balances) >= 0

    # --- the cluster --------------------------------------------------------------------------------------------------

    async def test_status(self, kv: Client, p: bytes) -> None:
        written = await kv.put(p + b"a", b"")
        status = await kv.status()
        assert status.name
        assert status.cluster_id
        assert status.revision >= written.revision
