"""What watches promise to a client: one suite for the embedded store and for a cluster (see `client_suite.py`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvstore import Add, Client, Delete, Event, Put, Unavailable, Watch
from kvstore.client.watch import WINDOW_BYTES
from tests.client_suite import ClientSuite, KvFactory, drop_connections, refused

WITHIN_S = 5.0


async def take(events: AsyncIterator[Event], count: int) -> list[Event]:
    async with asyncio.timeout(WITHIN_S):
        return [await anext(events) for _ in range(count)]


async def take_revision(watch: Watch) -> tuple[Event, ...]:
    async with asyncio.timeout(WITHIN_S):
        async for events in watch.revisions():
            return events
    raise AssertionError("a watch never ends by itself")


def told(event: Event) -> tuple[bytes, bytes | None]:
    return event.key, None if event.record is None else event.record.value


class WatchSuite(ClientSuite):
    async def test_each_event_once_in_order(self, kv: Client, p: bytes) -> None:
        async with kv.watch(prefix=p) as watch:
            for number in range(100):
                await kv.put(p + b"%d" % (number % 7), b"%d" % number)
            await kv.delete(p + b"3")
            await kv.put(b"outside/" + p, b"no")
            await kv.put(p + b"last", b"")
            events = await take(watch, 102)
        assert [told(event)[1] for event in events[:100]] == [b"%d" % number for number in range(100)]
        assert told(events[100]) == (p + b"3", None)
        assert events[100].deleted
        assert events[101].key == p + b"last"
        revisions = [event.revision for event in events]
        assert revisions == sorted(set(revisions))

    async def test_one_key_a_range_and_everything(self, kv: Client, p: bytes) -> None:
        async with (
            kv.watch(p + b"b") as key,
            kv.watch(p + b"b", p + b"d") as between,
            kv.watch(p + b"b", b"") as above,
            kv.watch(prefix=b"") as everything,
        ):
            for name in (b"a", b"b", b"b0", b"c", b"d"):
                await kv.put(p + name, b"")
            await kv.put(p + b"b", b"again")
            expected = {
                key: [b"b", b"b"],
                between: [b"b", b"b0", b"c", b"b"],
                above: [b"b", b"b0", b"c", b"d", b"b"],
                everything: [b"a", b"b", b"b0", b"c", b"d", b"b"],
            }
            for watch, names in expected.items():
                found = [event.key for event in await take(watch, len(names))]
                assert found == [p + name for name in names]

    async def test_a_transaction_comes_together(self, kv: Client, p: bytes) -> None:
        await kv.put(p + b"old", b"0")
        async with kv.watch(prefix=p) as watch:
            await kv.txn(
                success=[Put(p + b"a", b"1"), Add(p + b"n", 5), Delete(p + b"old"), Put(b"elsewhere" + p, b"")]
            )
            await kv.put(p + b"a", b"2")
            together = await take_revision(watch)
            assert [told(event) for event in together] == [(p + b"a", b"1"), (p + b"n", b"5"), (p + b"old", None)]
            assert len({event.revision for event in together}) == 1
            assert [told(event) for event in await take_revision(watch)] == [(p + b"a", b"2")]

    async def test_the_record_before_on_request(self, kv: Client, p: bytes) -> None:
        first = (await kv.put(p + b"a", b"1")).revision
        await kv.put(p + b"a", b"2")
        await kv.delete(p + b"a")
        await kv.put(p + b"a", b"3")
        async with kv.watch(p + b"a", prev=True) as live, kv.watch(p + b"a", from_revision=first, prev=True) as past:
            await asyncio.gather(kv.add(p + b"n", 1), kv.put(p + b"a", b"4"), kv.put(p + b"a", b"5"))
            old = await take(past, 6)
            new = await take(live, 2)
        values = [(event.prev and event.prev.value, event.record and event.record.value) for event in old]
        assert values[:4] == [(None, b"1"), (b"1", b"2"), (b"2", None), (None, b"3")]
        assert old[4:] == new
        assert values[4][0] == b"3"
        assert values[5][0] == values[4][1]

    async def test_filters(self, kv: Client, p: bytes) -> None:
        async with kv.watch(prefix=p, deletes=False) as puts, kv.watch(prefix=p, puts=False) as deletes:
            await kv.put(p + b"a", b"1")
            await kv.delete(p + b"a")
            await kv.put(p + b"b", b"2")
            await kv.delete(p + b"b")
            assert [told(event) for event in await take(puts, 2)] == [(p + b"a", b"1"), (p + b"b", b"2")]
            assert [told(event) for event in await take(deletes, 2)] == [(p + b"a", None), (p + b"b", None)]
        with pytest.raises(ValueError, match="puts, deletes, or both"):
            kv.watch(p, puts=False, deletes=False)

    async def test_from_the_past(self, kv: Client, p: bytes) -> None:
        revisions = [(await kv.put(p + b"k", b"%d" % number)).revision for number in range(30)]
        for first in (0, 17, 29):
            async with kv.watch(p + b"k", from_revision=revisions[first]) as watch:
                events = await take(watch, 30 - first)
            assert [event.revision for event in events] == revisions[first:]
            assert [told(event)[1] for event in events] == [b"%d" % number for number in range(first, 30)]
            assert watch.next_revision == revisions[-1] + 1

    async def test_resumed_where_it_was_left(self, kv: Client, p: bytes) -> None:
        await kv.put(p + b"first", b"")
        first = kv.revision
        for number in range(20):
            await kv.txn(success=[Put(p + b"%d.%d" % (number, part), b"") for part in range(3)])
        seen: list[Event] = []
        next_revision = first
        while len(seen) < 61:
            watch = kv.watch(prefix=p, from_revision=next_revision)
            for _ in range(4):
                seen += await take_revision(watch)
                if len(seen) == 61:
                    break
            next_revision = watch.next_revision
            await watch.close()
        assert len({event.key for event in seen}) == 61
        assert [event.revision for event in seen] == sorted(event.revision for event in seen)

    async def test_in_the_middle_of_a_transaction_it_resumes_at_its_beginning(self, kv: Client, p: bytes) -> None:
        revision = (await kv.txn(success=[Put(p + b"%d" % part, b"") for part in range(3)])).revision
        watch = kv.watch(prefix=p, from_revision=revision)
        await take(watch, 2)
        assert watch.next_revision == revision
        await take(watch, 1)
        assert watch.next_revision == revision + 1
        await watch.close()

    async def test_compacted_and_future_revisions_are_refused(self, kv: Client, p: bytes) -> None:
        for number in range(5):
            await kv.put(p + b"k", b"%d" % number)
        newest = kv.revision
        await kv.compact(newest - 1)
        async with asyncio.timeout(WITHIN_S), refused("revision_compacted"):
            while True:  # a replica that has yet to hear of the compaction still has that history
                await take(kv.watch(p + b"k", from_revision=newest - 1), 1)
        assert (await take(kv.watch(p + b"k", from_revision=newest), 1))[0].revision == newest
        async with refused("revision_in_future"):
            await take(kv.watch(p + b"k", from_revision=newest + 1000), 1)
        with pytest.raises(ValueError, match="either prefix"):
            kv.watch(p, prefix=p)
        for end in (p, p[:-1]):
            async with refused("invalid_range"):
                kv.watch(p, end)

    async def test_a_future_revision_is_waited_for(self, kv: Client, p: bytes) -> None:
        await kv.put(p + b"k", b"")
        wanted = kv.revision + 3
        async with kv.watch(p + b"k", from_revision=wanted, future=True) as watch:
            for number in range(5):
                await kv.put(p + b"k", b"%d" % number)
            assert [event.revision for event in await take(watch, 3)] == [wanted, wanted + 1, wanted + 2]

    async def test_marks_tell_that_nothing_happened(self, kv: Client, p: bytes) -> None:
        async with kv.watch(p + b"quiet", marks=True) as watch:
            revision = (await kv.put(p + b"loud", b"")).revision
            while watch.next_revision <= revision:
                assert await take_revision(watch) == ()
            await kv.put(p + b"quiet", b"no more")
            async with asyncio.timeout(WITHIN_S):
                while not await take_revision(watch):
                    pass

    async def test_a_reader_that_pauses_misses_nothing(self, kv: Client, p: bytes) -> None:
        value = bytes(64 * 1024)
        count = 3 * WINDOW_BYTES // len(value)
        async with kv.watch(prefix=p) as slow, kv.watch(prefix=p) as quick:
            for number in range(count):
                await kv.put(p + b"%04d" % number, value)
            assert len(await take(quick, count)) == count
            assert len(slow._stream.ready) < count, "the window bounds what is read ahead"
            keys = [event.key for event in await take(slow, count)]
            await kv.put(p + b"on", b"")
            assert (await take(slow, 1))[0].key == p + b"on"
        assert keys == [p + b"%04d" % number for number in range(count)]

    async def test_many_watches_of_one_client_see_a_large_event(
        self, kv: Client, kv_factory: KvFactory, p: bytes
    ) -> None:
        """Together they are sent more than a node leaves unread on one connection; it is not closed for that."""
        writer = await kv_factory()
        watches = [kv.watch(p + b"k") for _ in range(60)]
        for watch in watches:
            await watch.standing()
        for size in (1000 * 1000, 1):
            await writer.put(p + b"k", bytes(size))
        served = {id(watch._stream._link and watch._stream._link.channel) for watch in watches}
        async with asyncio.timeout(WITHIN_S):
            for events in await asyncio.gather(*(take(watch, 2) for watch in watches)):
                assert [event.record is not None and len(event.record.value) for event in events] == [1000 * 1000, 1]
        assert {id(watch._stream._link and watch._stream._link.channel) for watch in watches} == served
        for watch in watches:
            await watch.close()

    async def test_a_transaction_larger_than_the_window_comes_whole(self, kv: Client, p: bytes) -> None:
        count, value = 40, bytes(100 * 1024)
        for number in range(count):
            await kv.put(p + b"%02d" % number, value)
        async with kv.watch(prefix=p, prev=True) as watch:
            await kv.delete_prefix(p)
            await kv.put(p + b"after", b"")
            events = await take_revision(watch)
            assert [event.key for event in events] == [p + b"%02d" % number for number in range(count)]
            assert all(event.prev is not None and event.prev.value == value for event in events)
            assert [event.key for event in await take_revision(watch)] == [p + b"after"]

    async def test_a_deletion_of_thousands_comes_whole(self, kv: Client, p: bytes) -> None:
        keys = [p + b"k%04d" % number for number in range(4000)]
        for at in range(0, len(keys), 1000):
            await kv.txn(success=[Put(key, bytes(500)) for key in keys[at : at + 1000]])
        async with (
            kv.watch(prefix=p, prev=True) as everything,
            kv.watch(keys[0], keys[10]) as few,
            kv.watch(p + b"other") as other,
        ):
            revision = (await kv.delete_prefix(p + b"k")).revision
            await kv.put(p + b"other", b"")
            assert (await take(other, 1))[0].revision == revision + 1
            assert [event.key for event in await take_revision(few)] == keys[:10]
            together = await take_revision(everything)
            assert [event.key for event in together] == keys
            assert {event.revision for event in together} == {revision}
            assert {event.prev and event.prev.value for event in together} == {bytes(500)}
            assert [event.key for event in await take_revision(everything)] == [p + b"other"]

    async def test_the_largest_record_replaces_the_largest(self, kv: Client, p: bytes) -> None:
        key = p + b"k" * (4096 - len(p))
        async with kv.watch(key, prev=True) as watch:
            await kv.put(key, b"a" * 1024 * 1024)
            await kv.put(key, b"b" * 1024 * 1024)
            _, second = await take(watch, 2)
        assert second.prev is not None
        assert second.record is not None
        assert (second.prev.value[:1], second.record.value[:1]) == (b"a", b"b")

    async def test_lease_ends_are_seen(self, kv: Client, p: bytes) -> None:
        lease = (await kv.grant_lease(60.0)).lease
        async with kv.watch(prefix=p) as watch:
            await kv.txn(success=[Put(p + b"a", b"", lease=lease), Put(p + b"b", b"", lease=lease)])
            assert len(await take_revision(watch)) == 2
            await kv.revoke_lease(lease)
            assert [event.deleted for event in await take_revision(watch)] == [True, True]

    async def test_a_closed_watch_and_a_closed_client_end_reading(self, kv_factory: KvFactory, p: bytes) -> None:
        kv = await kv_factory()
        watch, other = kv.watch(prefix=p), kv.watch(prefix=p)
        await watch.standing()
        await other.standing()
        for end, watched in ((watch.close, watch), (kv.close, other)):
            reading = asyncio.ensure_future(take(watched, 1))
            await asyncio.sleep(0)
            await end()
            with pytest.raises(Unavailable, match="closed"):
                await reading

    async def test_it_goes_on_over_other_connections(self, kv: Client, kv_factory: KvFactory, p: bytes) -> None:
        writer, seen = await kv_factory(), 0
        async with kv.watch(prefix=p) as watch:
            for number in range(200):
                await writer.put(p + b"%d" % number, b"")
                if number % 20 == 10:
                    drop_connections(kv)
                if number % 7 == 0:
                    for event in await take(watch, number + 1 - seen):
                        assert event.key == p + b"%d" % seen
                        seen += 1
            assert [event.key for event in await take(watch, 200 - seen)] == [p + b"%d" % n for n in range(seen, 200)]
