"""The watch hub and revisions with very many changes: each is decoded once, in slices, and nobody waits for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore import model
from kvstore.model import Compact, Delete, Put, Txn, prefix_end
from kvstore.server import watch as hub_module
from kvstore.server.watch import PROGRESS_S, SLICE_S
from kvstore.state import layout
from kvstore.state.feed import Changed, Place
from kvstore.state.machine import Machine
from tests.unit.watch_hub_setup import WINDOW, Setup


@pytest.fixture
def setup() -> Setup:
    return Setup()


class Work:
    """What the hub has a machine do for watches that are behind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slices: list[int] = []  # changes taken
        self.decodings = 0
        read_changes, decode = Machine.read_changes, layout.decode_batch_record

        def counted(machine: Machine, place: Place) -> Iterator[Changed]:
            self.slices.append(0)
            for changed in read_changes(machine, place):
                self.slices[-1] += 1
                yield changed

        def decoded(encoded: bytes) -> layout.BatchRecord:
            self.decodings += 1
            return decode(encoded)

        monkeypatch.setattr(Machine, "read_changes", counted)
        monkeypatch.setattr(layout, "decode_batch_record", decoded)


def many_keys(count: int, prefix: bytes = b"k") -> list[bytes]:
    return [prefix + b"%05d" % number for number in range(count)]


@pytest.mark.parametrize("begins", ["before", "after"])
def test_a_large_revision_costs_each_change_once(setup: Setup, monkeypatch: pytest.MonkeyPatch, begins: str) -> None:
    """However small the parts are in which a watch takes it; and no turn of the loop does more than a slice."""
    keys = many_keys(5000)
    for key in keys:
        setup.apply(Put(key, bytes(500)))
    revision = setup.machine.revision + 1
    if begins == "before":
        setup.watch(1, b"k", b"l", prev=True)
    work = Work(monkeypatch)
    setup.apply(Delete(b"k", b"l"))
    if begins == "after":
        setup.watch(1, b"k", b"l", first=revision, prev=True)
    assert setup.asker.seen(1) == [], "others get their turn first"
    credits = 0
    while setup.hub.lagging:
        setup.world.turn()
        setup.credit(1, WINDOW // 4)
        credits += 1
    assert setup.asker.seen(1) == [(revision, key) for key in keys]
    assert all(len(event.prev.value) == 500 for event in setup.asker.events(1) if event.prev is not None)
    setup.asker.check_parts(1)
    assert credits > 100
    assert work.decodings == 1
    assert max(work.slices) <= hub_module.SLICE_CHANGES
    # Where it is parked, the change that found no room is looked at again.
    assert sum(work.slices) <= len(keys) + len(work.slices)


def test_watches_that_a_large_revision_does_not_match_stay_live(setup: Setup) -> None:
    keys = many_keys(1000)
    for key in keys:
        setup.apply(Put(key, b""))
    gone = setup.machine.revision + 1
    matching = [(keys[500], None), (b"k0", prefix_end(b"k0")), (b"k00300x", b"k00302"), (b"k009", b"")]
    others = [(b"k", None), (b"kx", prefix_end(b"kx")), (b"k00300x", b"k00301"), (b"l", b"")]
    ranges = dict(enumerate(matching + others, 1))
    for number, (start, end) in ranges.items():
        setup.watch(number, start, end, prev=True)
    after = [b"k", keys[500], b"kx", b"k00300y", b"m"]
    setup.apply(Put(b"k", b""), Delete(b"k0", b"k1"), *(Put(key, b"") for key in after))
    happened = [(gone, b"k"), *((gone + 1, key) for key in keys)]
    happened += [(gone + 2 + number, key) for number, key in enumerate(after)]

    def wanted(number: int) -> list[tuple[int, bytes]]:
        start, end = ranges[number]
        return [
            (revision, key)
            for revision, key in happened
            if (key == start if end is None else start <= key and (not end or key < end))
        ]

    assert setup.hub.lagging == len(matching)
    for number in range(len(matching) + 1, len(ranges) + 1):
        assert setup.asker.seen(number) == wanted(number) != []
    for _ in range(5):
        setup.world.turn()
        for number in ranges:
            setup.credit(number)
    assert setup.hub.lagging == 0
    for number in ranges:
        assert setup.asker.seen(number) == wanted(number) != []
        setup.asker.check_parts(number)
    # What a large revision did to a key is what the next event of that batch says was before.
    before = {event.revision: event.prev for event in setup.asker.events(1)}
    assert before[gone + 1] is not None
    assert before[gone + 3] is None


def test_a_slice_ends_after_its_time(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes that take long, as each has to be looked up."""
    keys = many_keys(600)
    for key in keys:
        setup.apply(Put(key, b""))
    setup.watch(1, b"k", b"l", prev=True, window=model.WATCH_WINDOW_BYTES_MAX)
    work = Work(monkeypatch)
    event = Machine.event

    def slow(machine: Machine, changed: Changed, prev: bool) -> bytes:
        setup.world.now_s += SLICE_S / 10
        return event(machine, changed, prev)

    monkeypatch.setattr(Machine, "event", slow)
    setup.apply(Delete(b"k", b"l"))
    setup.world.advance(PROGRESS_S)
    assert setup.asker.seen(1) == [(601, key) for key in keys]
    assert max(work.slices) <= 11


@pytest.mark.parametrize("end", [b"k00600", b"k00512", b"k00001"])
def test_a_part_is_completed_even_if_no_more_of_it_matches(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, end: bytes
) -> None:
    keys = many_keys(2000)
    for key in keys:
        setup.apply(Put(key, b""))
    setup.watch(1, b"k", end)
    setup.watch(2, b"k", b"l", window=model.WATCH_WINDOW_BYTES_MAX)
    work = Work(monkeypatch)
    setup.apply(Delete(b"k", b"l"))
    setup.world.turn()
    assert setup.hub.lagging == 0
    assert max(work.slices) == hub_module.SLICE_CHANGES
    for number, wanted in ((1, [key for key in keys if key < end]), (2, keys)):
        assert [key for _, key in setup.asker.seen(number)] == wanted
        setup.asker.check_parts(number)
    setup.put(b"k")
    assert setup.asker.seen(1)[-1] == (2002, b"k")


def test_what_the_hub_has_yet_to_hear_of_is_not_read_in_part(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nobody would complete it, if the rest did not match."""
    monkeypatch.setattr(hub_module, "SLICE_CHANGES", 4)
    setup.apply(Txn((), tuple(Put(key, b"") for key in (b"a", b"b", b"k"))))
    setup.watch(1, b"k", prefix_end(b"k"), first=1)
    setup.apply(Txn((), tuple(Put(key, b"") for key in (b"k", b"x", b"y"))), told=False)
    setup.world.turn()
    setup.hub.applied()
    assert setup.asker.seen(1) == [(1, b"k"), (2, b"k")]
    setup.asker.check_parts(1)


def test_a_watch_within_a_large_revision_is_cut_off_when_that_is_compacted(setup: Setup) -> None:
    for key in many_keys(2000):
        setup.apply(Put(key, bytes(100)))
    setup.watch(1, b"k", b"l", prev=True)
    setup.apply(Delete(b"k", b"l"))
    setup.world.turn()
    assert 0 < len(setup.asker.seen(1)) < 2000
    setup.put(b"other")
    setup.apply(Compact(2001))
    setup.credit(1)
    setup.world.turn()
    assert setup.asker.failure() == (1, "revision_compacted")
    assert setup.hub.count == 0
