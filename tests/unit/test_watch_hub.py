"""The watch hub over a real machine in virtual time: positions, room, history, and every way in which a watch ends."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from kvstore import codec, model
from kvstore.errors import Unavailable
from kvstore.model import Compact, Delete, Put, Txn, prefix_end
from kvstore.server import native
from kvstore.server import watch as hub_module
from kvstore.server.watch import LEADERLESS_S, PROGRESS_S
from kvstore.state import feed
from kvstore.state.feed import Changed, Place
from kvstore.state.machine import Machine
from tests.unit.watch_hub_setup import WINDOW, Asker, Setup, SlowAsker


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_live_watches_by_key_prefix_and_range(setup: Setup) -> None:
    setup.watch(1, b"b", None)
    setup.watch(2, b"b", prefix_end(b"b"))
    setup.watch(3, b"b", b"d")
    setup.watch(4, b"", b"")
    setup.watch(5, b"b1", b"")
    setup.watch(6, b"c", b"c")  # an empty range is allowed, and sees nothing
    setup.put(b"a", b"b", b"b1", b"c", b"d")
    assert [setup.asker.seen(number) for number in range(1, 7)] == [
        [(2, b"b")],
        [(2, b"b"), (3, b"b1")],
        [(2, b"b"), (3, b"b1"), (4, b"c")],
        [(1, b"a"), (2, b"b"), (3, b"b1"), (4, b"c"), (5, b"d")],
        [(3, b"b1"), (4, b"c"), (5, b"d")],
        [],
    ]
    for number in range(1, 7):
        setup.hub.cancel(codec.WatchCancel(number), setup.asker)
    before = len(setup.asker.sent)
    setup.put(b"b")
    assert len(setup.asker.sent) == before
    assert setup.hub.count == 0


def test_a_watch_stands_after_a_barrier_that_all_newcomers_share(setup: Setup) -> None:
    frames = [codec.Watch(number, b"k", None, 0, False, True, True, False, WINDOW) for number in (1, 2, 3)]
    for frame in frames:
        setup.hub.open(frame, setup.asker.sent.append, setup.asker)
    assert len(setup.raft.barriers) == 1
    setup.put(b"k")
    assert setup.asker.sent == []
    setup.raft.barriers.pop(0)(None)
    assert setup.asker.sent == [codec.Watching(1, 2)], "the first barrier was under way when the others came"
    setup.pass_barriers()
    assert setup.asker.sent[1:] == [codec.Watching(2, 2), codec.Watching(3, 2)]
    setup.put(b"k")
    assert [setup.asker.seen(number) for number in (1, 2, 3)] == [[(2, b"k")]] * 3


def test_a_watch_from_a_past_that_is_here_needs_no_barrier(setup: Setup) -> None:
    setup.put(b"k", b"k", b"k")
    setup.watch(1, b"k", None, first=2)
    setup.watch(2, b"k", None, first=4)
    assert setup.raft.barriers == []
    setup.world.turn()
    assert (setup.asker.seen(1), setup.asker.seen(2)) == ([(2, b"k"), (3, b"k")], [])
    setup.put(b"k")
    assert (setup.asker.seen(1)[2:], setup.asker.seen(2)) == ([(4, b"k")], [(4, b"k")])


def test_what_is_refused(setup: Setup) -> None:
    setup.put(b"k", b"k", b"k")
    setup.apply(Compact(2))
    for first, code in ((2, "revision_compacted"), (5, "revision_in_future"), (-1, "invalid_request")):
        setup.watch(1, b"k", None, first=first)
        assert setup.asker.failure() == (1, code)
    for start, end, code in (
        (b"", None, "key_empty"),
        (b"b", b"a", "invalid_range"),
        (b"b", b"b", "invalid_range"),
        (b"k" * 5000, None, "key_too_large"),
    ):
        setup.watch(1, start, end)
        assert setup.asker.failure() == (1, code)
    for window in (0, WINDOW - 1, model.WATCH_WINDOW_BYTES_MAX + 1):
        setup.watch(1, b"k", None, window=window)
        assert setup.asker.failure() == (1, "invalid_request")
    setup.watch(1, b"k", None)
    setup.watch(1, b"k", None)
    assert setup.asker.failure() == (1, "invalid_request")
    assert setup.hub.count == 1


def test_too_many_watches(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "WATCHES_PER_CONNECTION_MAX", 2)
    monkeypatch.setattr(hub_module, "WATCHES_MAX", 3)
    other = Asker()
    for number in (1, 2, 3):
        setup.watch(number, b"k", None)
    assert setup.asker.failure() == (3, "too_many_watches")
    setup.watch(1, b"k", None, asker=other)
    setup.watch(2, b"k", None, asker=other)
    assert other.failure() == (2, "overloaded")
    setup.hub.gone(setup.asker)
    setup.watch(2, b"k", None, asker=other)
    assert other.sent[-1] == codec.Watching(2, 1)


def test_a_future_revision_on_request(setup: Setup) -> None:
    setup.watch(1, b"k", None, first=3, future=True)
    setup.put(b"k", b"k", b"k", b"k")
    assert setup.asker.seen(1) == [(3, b"k"), (4, b"k")]


def test_a_used_up_window_parks_a_watch_and_history_serves_it_later(setup: Setup) -> None:
    big = bytes(WINDOW // 2)
    setup.watch(1, b"k", None)
    setup.watch(2, b"k", None, window=model.WATCH_WINDOW_BYTES_MAX)
    for _ in range(10):
        setup.apply(Put(b"k", big))
    assert [revision for revision, _ in setup.asker.seen(1)] == [1, 2], "what uses the window up still goes out"
    assert len(setup.asker.seen(2)) == 10
    assert setup.hub.lagging == 1
    for _ in range(10):
        setup.credit(1)
        setup.world.turn()
    assert [revision for revision, _ in setup.asker.seen(1)] == list(range(1, 11))
    setup.put(b"k")
    assert setup.asker.seen(1)[-1] == (11, b"k")
    assert setup.hub.lagging == 0


def test_a_congested_connection_parks_its_watches(setup: Setup) -> None:
    other = Asker()
    for number in (1, 2):
        setup.watch(number, b"k", None)
    setup.watch(1, b"k", None, asker=other)
    setup.asker.congested = True
    setup.put(b"k", b"k")
    assert setup.asker.seen(1) == setup.asker.seen(2) == []
    assert other.seen(1) == [(1, b"k"), (2, b"k")], "nobody else notices"
    assert len(setup.asker.postponed) == 1
    setup.asker.relieve()
    setup.world.turn()
    setup.put(b"k")
    assert setup.asker.seen(1) == setup.asker.seen(2) == [(1, b"k"), (2, b"k"), (3, b"k")]


def test_many_watches_of_one_connection_take_turns_with_large_events(setup: Setup) -> None:
    """Each has room in its own window; together they would leave 100 MiB unread."""
    slow, other = SlowAsker(), Asker()
    numbers = range(1, 101)
    for number in numbers:
        setup.watch(number, b"k", None, asker=slow, window=model.WATCH_WINDOW_BYTES_MAX)
    setup.watch(1, b"k", None, asker=other, window=model.WATCH_WINDOW_BYTES_MAX)
    for _ in range(2):
        setup.apply(Put(b"k", bytes(512 * 1024)))
    assert [revision for revision, _ in other.seen(1)] == [1, 2], "nobody else notices"
    assert setup.hub.lagging > 90
    # A quiet connection costs nothing: nobody looks whether there is room.
    setup.world.advance(10 * PROGRESS_S)
    assert sum(len(slow.seen(number)) for number in numbers) <= 4
    rounds = 0
    while setup.hub.lagging:
        slow.read_all()
        setup.world.turn()
        rounds += 1
        assert rounds < 200, "it goes on as it drains"
        setup.put(b"k")
    for number in numbers:
        assert [revision for revision, _ in slow.seen(number)] == list(range(1, setup.machine.revision + 1))
    assert slow.most_unread_bytes < 4 * 1024 * 1024 < native.UNREAD_BYTES_MAX
    assert slow.postponed == []


def test_few_of_those_in_line_look_for_room_at_once(setup: Setup) -> None:
    """Else a connection with thousands of watches costs the square of their number."""
    slow = SlowAsker()
    for number in range(1, 1001):
        setup.watch(number, b"k", None, asker=slow, window=model.WATCH_WINDOW_BYTES_MAX)
    setup.apply(Put(b"k", bytes(512 * 1024)))
    assert setup.hub.lagging == 998
    looked = 0
    while setup.hub.lagging > 900:
        slow.read_all()
        looked += len(setup.hub._behind)
        setup.world.turn()
    assert looked <= 100 / 2 * hub_module.ADMITTED_FIRST
    # Who ends or leaves while it waits is not served.
    for number in range(1, 1001):
        setup.hub.cancel(codec.WatchCancel(number), slow)
    setup.watch(1, b"k", None, asker=slow, window=model.WATCH_WINDOW_BYTES_MAX)
    slow.read_all()
    setup.world.turn()
    setup.put(b"k")
    assert slow.seen(1)[-1] == (2, b"k")
    assert setup.hub.count == 1


def test_those_in_line_for_little_are_served_by_few_reads(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 5001):
        setup.watch(number, b"k", None)
    setup.asker.congested = True
    setup.put(b"k")
    reads = 0
    read_changes = Machine.read_changes

    def counted(machine: Machine, place: Place) -> Iterator[Changed]:
        nonlocal reads
        reads += 1
        return read_changes(machine, place)

    monkeypatch.setattr(Machine, "read_changes", counted)
    setup.asker.relieve()
    setup.world.turn()
    assert setup.hub.lagging == 0
    assert reads < 12
    frames = [frame for frame in setup.asker.sent if isinstance(frame, codec.WatchEvents)]
    assert [frame.id for frame in frames] == list(range(1, 5001)), "first come, first served"


def test_parked_in_the_middle_of_a_transaction(setup: Setup) -> None:
    keys = [b"k%02d" % number for number in range(12)]
    big = bytes(WINDOW // 4)
    setup.watch(1, b"k", b"l")
    setup.put(b"k")
    setup.apply(Txn((), tuple(Put(key, big) for key in keys)), Put(b"k99", b""))
    frames = [frame for frame in setup.asker.sent if isinstance(frame, codec.WatchEvents)]
    assert frames[-1].more
    assert 1 < len(setup.asker.seen(1)) < 8
    for _ in range(10):
        setup.credit(1, 2 * len(big))
        setup.world.turn()
    assert setup.asker.seen(1) == [(1, b"k"), *((2, key) for key in keys), (3, b"k99")]
    frames = [frame for frame in setup.asker.sent if isinstance(frame, codec.WatchEvents)]
    # The last frame with events of a revision is the first that completes it.
    completes = [frame for frame in frames if not frame.more and frame.revision >= 2]
    assert completes[0].events[0].key in (keys[-1], *keys)
    assert all(frame.revision == 2 for frame in frames if frame.more)


def test_a_watch_on_which_nothing_happened_lacks_nothing_that_goes(setup: Setup) -> None:
    """Its first event in long finds no room: history from there on is all that it needs."""
    setup.watch(1, b"k", None)
    setup.put(*(b"other" for _ in range(20)))
    setup.asker.congested = True
    setup.put(b"k", b"k")
    setup.apply(Compact(20))
    setup.world.advance(PROGRESS_S)
    setup.asker.relieve()
    setup.world.turn()
    assert setup.asker.seen(1) == [(21, b"k"), (22, b"k")]


def test_a_lagging_watch_whose_history_goes_is_cut_off(setup: Setup) -> None:
    setup.watch(1, b"k", None)
    setup.watch(2, b"k", None)
    setup.asker.congested = True
    setup.put(b"k", b"k")
    setup.apply(Compact(2))
    setup.asker.congested = False
    setup.world.advance(PROGRESS_S)
    codes = [(frame.id, frame.code) for frame in setup.asker.sent if isinstance(frame, codec.Failure)]
    assert codes == [(1, "revision_compacted"), (2, "revision_compacted")]
    assert setup.hub.count == 0


def test_a_jump_over_what_memory_holds_is_read_from_history(setup: Setup) -> None:
    setup.put(b"k")
    setup.watch(1, b"k", None, prev=True)
    setup.watch(2, b"other", None)
    for _ in range(50):
        setup.put(b"k", told=False)
    setup.apply(Delete(b"k"))
    setup.world.turn()
    assert [revision for revision, _ in setup.asker.seen(1)] == list(range(2, 53))
    values = [(event.prev and event.prev.value, event.record and event.record.value) for event in setup.asker.events(1)]
    assert values[:2] == [(b"1", b"2"), (b"2", b"3")]
    assert values[-1] == (b"51", None)
    setup.put(b"k")
    assert setup.asker.seen(1)[-1] == (53, b"k")
    assert setup.asker.events(1)[-1].prev is None


def test_one_that_begins_while_the_hub_has_yet_to_hear_of_what_was_applied(setup: Setup) -> None:
    """A barrier may pass in the middle of a turn that applies: the machine is ahead of the hub then."""
    setup.watch(9, b"other", None)
    setup.put(b"k")
    for _ in range(20):
        setup.put(b"k", told=False)
    setup.watch(1, b"k", None, first=15)
    setup.watch(2, b"k", None, first=25, future=True)
    setup.hub.applied()
    setup.world.turn()
    assert [revision for revision, _ in setup.asker.seen(1)] == list(range(15, 22))
    for _ in range(5):
        setup.put(b"k")
    assert [revision for revision, _ in setup.asker.seen(1)] == list(range(15, 27))
    assert [revision for revision, _ in setup.asker.seen(2)] == [25, 26]


def test_progress_names_who_is_behind(setup: Setup) -> None:
    setup.watch(1, b"quiet", None)
    setup.watch(2, b"k", None)
    setup.world.advance(PROGRESS_S)
    assert setup.asker.sent[-1] == codec.WatchProgress(0, 0, ()), "a first sign of life"
    told = len(setup.asker.sent)
    setup.world.advance(3 * PROGRESS_S)
    assert len(setup.asker.sent) == told, "nothing is said twice"
    setup.apply(Put(b"k", bytes(2 * WINDOW)))
    setup.put(b"k")
    setup.world.advance(PROGRESS_S)
    assert setup.asker.sent[-1] == codec.WatchProgress(0, 2, (2,))


def test_a_node_without_a_leader_ends_its_watches_and_takes_none(setup: Setup) -> None:
    setup.watch(1, b"k", None)
    setup.raft.leader = ""
    setup.world.advance(LEADERLESS_S / 2)
    assert setup.hub.count == 1
    setup.world.advance(LEADERLESS_S + 2 * PROGRESS_S)
    assert setup.asker.failure() == (1, "no_leader")
    setup.watch(2, b"k", None, first=1)
    assert setup.asker.failure() == (2, "no_leader")
    setup.raft.leader = "n2"
    setup.world.advance(PROGRESS_S)
    setup.watch(3, b"k", None, first=1)
    assert setup.asker.sent[-1] == codec.Watching(3, 1)


def test_who_leaves_before_the_barrier_leaves_nothing(setup: Setup) -> None:
    other = Asker()
    frames = [codec.Watch(number, b"k", None, 0, False, True, True, False, WINDOW) for number in (1, 2, 3, 4)]
    setup.hub.open(frames[0], other.sent.append, other)
    setup.hub.open(frames[1], other.sent.append, other)
    setup.hub.open(frames[2], setup.asker.sent.append, setup.asker)
    setup.hub.open(frames[3], setup.asker.sent.append, setup.asker)
    setup.hub.open(frames[3], setup.asker.sent.append, setup.asker)
    assert setup.asker.failure() == (4, "invalid_request")
    setup.hub.gone(other)
    setup.hub.cancel(codec.WatchCancel(3), setup.asker)
    assert setup.asker.failure() == (3, "closed")
    setup.pass_barriers()
    assert setup.hub.count == 1
    assert other.sent == []


def test_a_failed_barrier_is_told(setup: Setup) -> None:
    setup.hub.open(
        codec.Watch(1, b"k", None, 0, False, True, True, False, WINDOW), setup.asker.sent.append, setup.asker
    )
    setup.pass_barriers(Unavailable("none", code="no_leader"))
    assert setup.asker.failure() == (1, "no_leader")


def test_stopping_ends_all(setup: Setup) -> None:
    setup.watch(1, b"k", None)
    setup.hub.open(
        codec.Watch(2, b"k", None, 0, False, True, True, False, WINDOW), setup.asker.sent.append, setup.asker
    )
    setup.hub.stop()
    assert [(frame.id, frame.code) for frame in setup.asker.sent[1:]] == [(1, "shutting_down"), (2, "shutting_down")]
    setup.watch(3, b"k", None, first=1)
    assert setup.asker.failure() == (3, "shutting_down")


@pytest.mark.parametrize("slice_changes", [1, 2, 7])
def test_any_mix_of_paces_sees_the_same(setup: Setup, monkeypatch: pytest.MonkeyPatch, slice_changes: int) -> None:
    """Twenty watches with windows, congestion, breaks and beginnings of their own, against the plain list."""
    monkeypatch.setattr(hub_module, "SLICE_CHANGES", slice_changes)
    monkeypatch.setattr(hub_module, "FRAME_BYTES", 300)
    monkeypatch.setattr(feed, "_LARGE_BATCH_CHANGES", 5)
    chance = Random(5)
    askers = [Asker() for _ in range(4)]
    watches = {}
    for number in range(1, 21):
        low, high = sorted(chance.sample(range(10), 2))
        start, end = b"%d" % low, chance.choice([b"%d" % high, None, prefix_end(b"%d" % low), b""])
        asker = chance.choice(askers)
        watches[number] = (start, end, asker)
        setup.watch(number, start, end, first=1, asker=asker)
    happened: list[tuple[int, bytes]] = []
    for _ in range(300):
        requests: list[model.Mutation] = []
        for _ in range(chance.randint(1, 4)):
            keys = sorted({b"%d" % chance.randrange(10) for _ in range(chance.randint(1, 3))})
            requests.append(Txn((), tuple(Put(key, bytes(chance.randrange(3000))) for key in keys)))
            revision = setup.machine.revision + len(requests)
            happened += [(revision, key) for key in keys]
        setup.apply(*requests, told=chance.random() < 0.7)
        asker = chance.choice(askers)
        asker.congested = chance.random() < 0.3
        if not asker.congested:
            asker.relieve()
        if chance.random() < 0.5:
            number = chance.randint(1, 20)
            setup.hub.credit(codec.WatchCredit(number, chance.randrange(20_000)), watches[number][2])
        if chance.random() < 0.5:
            setup.world.turn()
    setup.hub.applied()
    for asker in askers:
        asker.relieve()
    for _ in range(100):
        for number, (_, _, asker) in watches.items():
            setup.hub.credit(codec.WatchCredit(number, WINDOW), asker)
        setup.world.turn()
    for number, (start, end, asker) in watches.items():
        wanted = [
            (revision, key)
            for revision, key in happened
            if (key == start if end is None else start <= key and (not end or key < end))
        ]
        assert asker.seen(number) == wanted, (number, start, end)
        asker.check_parts(number)
    assert setup.hub.lagging == 0
