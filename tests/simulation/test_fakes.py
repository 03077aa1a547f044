"""The network and the clock that simulations run on keep what they promise.

Disks have their own: `test_fake_disk.py`; and what is stored on them: `test_storage.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from tests.fake_network import FakeNetwork, VirtualTime, run
from tests.virtual_time import CANCELLED_MAX

# --- time -------------------------------------------------------------------------------------------------------------


def test_what_is_due_at_the_same_time_runs_in_the_order_of_scheduling() -> None:
    time = VirtualTime()
    seen: list[str] = []

    def first() -> None:
        seen.append("a")
        time.call_soon(seen.append, "d")
        time.call_at(0.5, seen.append, "e")  # which is past

    def third() -> None:
        seen.append("c")
        time.call_later(0.0, seen.append, "f")

    time.call_later(1.0, first)
    time.call_at(1.0, seen.append, "b")
    time.call_later(1.0, third)
    time.call_soon(seen.append, "soon")
    time.advance(1.0)
    assert seen == ["soon", "a", "b", "c", "d", "e", "f"]
    assert time.now_s == 1.0


def test_cancelled_timers_do_not_pile_up() -> None:
    time = VirtualTime()
    seen: list[object] = []
    kept = time.call_later(50.0, seen.append, "kept")
    for number in range(20 * CANCELLED_MAX):
        time.call_later(10.0 + number % 7, seen.append, number).cancel()
        assert len(time._later) <= 2 * CANCELLED_MAX + 2
    gone = time.call_soon(seen.append, "gone")
    gone.cancel()
    time.advance(60.0)
    kept.cancel()  # too late, and no error
    assert seen == ["kept"]
    assert not time._later
    assert time._cancelled == 0


# --- the network ------------------------------------------------------------------------------------------------------


class End(asyncio.Protocol):
    """One end of a stream that notes what happens to it, and when."""

    def __init__(self, world: World, host: str) -> None:
        self.world, self.host = world, host
        self.transport: Any = None
        self.got = b""
        self.lost: list[BaseException | None] = []
        self.notes: list[tuple[float, Any]] = []
        self.says = b""

    def note(self, what: Any) -> None:
        self.notes.append((round(self.world.time.now_s, 6), what))

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.note("made")
        if self.says:
            transport.write(self.says)

    def data_received(self, data: bytes) -> None:
        self.got += data
        self.note(data)

    def connection_lost(self, error: BaseException | None) -> None:
        self.lost.append(error)
        self.note("lost")

    def pause_writing(self) -> None:
        self.note("pause")

    def resume_writing(self) -> None:
        self.note("resume")


class World:
    """Hosts a and b; b listens."""

    def __init__(self, latency_s: float = 0.001) -> None:
        self.time = VirtualTime()
        self.network = FakeNetwork(self.time, latency_s=latency_s, chance=Random(1))
        self.accepted: list[End] = []
        self.errors: list[OSError] = []
        self.ready = {"a": 0.0, "b": 0.0}
        self.network.ready_at = lambda host: self.ready[host]
        self.listen()

    def listen(self) -> None:
        def accept() -> End:
            self.accepted.append(End(self, "b"))
            return self.accepted[-1]

        run(self.network.host("b").listen("b:1", accept))

    def connect(self, says: bytes = b"") -> End:
        end = End(self, "a")
        end.says = says
        self.network.host("a").connect("b:1", lambda: end, self.errors.append, 1.0)
        return end

    def pair(self) -> tuple[End, End]:
        ours = self.connect()
        self.time.advance(0.01)
        return ours, self.accepted[-1]


@pytest.fixture
def world() -> World:
    return World()


def test_each_direction_of_a_wire_has_its_own_conditions(world: World) -> None:
    ours, theirs = world.pair()
    world.network.set_link("a", "b", latency_s=0.2, bytes_per_s=1000)
    began_s = world.time.now_s
    ours.transport.write(b"x" * 100)
    ours.transport.write(b"y" * 50)
    theirs.transport.write(b"z")
    world.time.advance(1)
    assert [at for at, _ in theirs.notes[1:]] == pytest.approx([began_s + 0.3, began_s + 0.35])
    assert ours.notes[1][0] == pytest.approx(began_s + 0.001)
    world.network.clear_link("a", "b")
    began_s = world.time.now_s
    ours.transport.write(b"x")
    world.time.advance(1)
    assert theirs.notes[-1][0] == pytest.approx(began_s + 0.001)


def test_streams_share_the_speed_of_their_wire(world: World) -> None:
    pairs = [world.pair() for _ in range(3)]
    world.network.set_link("a", "b", bytes_per_s=1000)
    began_s = world.time.now_s
    for ours, _ in pairs:
        ours.transport.write(b"x" * 100)
    world.time.advance(1)
    took = [theirs.notes[-1][0] - began_s for _, theirs in pairs]
    assert took == pytest.approx([0.101, 0.201, 0.301])


def test_jitter_is_drawn_from_the_chance_and_keeps_the_order() -> None:
    arrivals = []
    for _ in range(2):
        world = World()
        ours, theirs = world.pair()
        world.network.set_link("a", "b", jitter_s=0.05)
        for number in range(100):
            ours.transport.write(b"%03d" % number)
            world.time.advance(0.001)
        world.network.heal()  # and it ends with that, too
        world.time.advance(1)
        assert theirs.got == b"".join(b"%03d" % number for number in range(100))
        arrivals.append([at for at, _ in theirs.notes])
        began_s = world.time.now_s
        ours.transport.write(b"now")
        world.time.advance(1)
        assert theirs.notes[-1][0] == pytest.approx(began_s + 0.001)
    assert arrivals[0] == arrivals[1]
    assert len(set(arrivals[0])) > 10


def test_one_wire_is_cut_and_uncut(world: World) -> None:
    ours, theirs = world.pair()
    world.network.cut("a", "b")
    ours.transport.write(b"there")
    theirs.transport.write(b"back")
    world.time.advance(1)
    assert ours.got == theirs.got == b""
    world.network.uncut("b", "a", one_way=True)
    world.time.advance(0.01)
    assert (ours.got, theirs.got) == (b"back", b"")
    world.network.uncut("a", "b")
    world.time.advance(0.01)
    assert theirs.got == b"there"


def test_more_than_a_window_arrives_at_a_reader_that_reads(world: World) -> None:
    ours, theirs = world.pair()
    world.network.window_bytes = 10
    for _ in range(20):
        ours.transport.write(b"x" * 100)
    world.time.advance(1)
    assert len(theirs.got) == 2000
    assert not ours.transport.get_write_buffer_size()


def test_a_reader_that_stands_still_fills_its_window_then_the_outbox_and_goes_on(world: World) -> None:
    ours, theirs = world.pair()
    world.network.window_bytes = 1000
    ours.transport.set_write_buffer_limits(high=500)
    theirs.transport.pause_reading()
    for _ in range(20):
        ours.transport.write(b"x" * 100)
    world.time.advance(1)
    assert theirs.got == b""
    assert ours.transport.get_write_buffer_size() == 1000
    assert ours.notes[-1][1] == "pause"
    ours.transport.write(b"y" * 100)
    ours.transport.close()
    theirs.transport.resume_reading()
    world.time.advance(1)
    assert theirs.got == b"x" * 2000 + b"y" * 100
    assert ours.lost == theirs.lost == [None]
    assert not world.network.streams
    assert not world.network.lingering


def test_a_close_is_heard_after_the_last_bytes_and_past_a_cut_wire(world: World) -> None:
    ours, theirs = world.pair()
    world.network.cut("a", "b")
    ours.transport.write(b"last")
    ours.transport.close()
    world.time.advance(1)
    assert ours.lost == [None]  # its kernel has it
    assert not theirs.lost
    world.network.heal()
    world.time.advance(0.01)
    assert (theirs.got, theirs.lost) == (b"last", [None])
    assert not world.network.lingering


def test_what_is_sent_to_a_closed_stream_is_answered_by_a_reset(world: World) -> None:
    ours, theirs = world.pair()
    world.network.cut("b", "a")
    theirs.transport.abort()  # and the reset is lost
    world.time.advance(0.01)
    world.network.heal()
    world.time.advance(1)
    assert not ours.lost
    ours.transport.write(b"x")
    world.time.advance(0.01)
    assert isinstance(ours.lost[0], ConnectionResetError)
    assert ours.notes[-1][0] - 1.0 > 0


def test_nothing_reaches_a_host_that_is_not_ready(world: World) -> None:
    ours, theirs = world.pair()
    world.ready["b"] = world.time.now_s + 0.5
    until_s = world.ready["b"]
    ours.transport.write(b"x")
    newer = world.connect(says=b"hello")
    world.time.advance(0.4)
    assert newer.transport is not None  # the kernel of b has accepted it
    assert theirs.got == b""
    assert len(world.accepted) == 1
    ours.transport.close()
    world.time.advance(0.2)
    assert theirs.notes[1:] == [(until_s, b"x"), (until_s, "lost")]
    assert [what for _, what in world.accepted[1].notes] == ["made", b"hello"]
    assert world.accepted[1].notes[0][0] == until_s


def test_what_a_host_writes_departs_when_it_is_ready(world: World) -> None:
    ours, theirs = world.pair()
    ours.transport.write(b"before")
    world.ready["a"] = world.time.now_s + 0.5  # a slow fsync, in the same callback
    until_s = world.ready["a"]
    ours.transport.write(b"after")
    world.connect()
    theirs.transport.write(b"reply")
    world.time.advance(0.4)
    assert theirs.got == b"before"
    assert len(world.accepted) == 1
    assert ours.got == b""
    world.time.advance(0.4)
    assert theirs.notes[-1] == (round(until_s + 0.001, 6), b"after")
    assert len(world.accepted) == 2
    assert ours.notes[-1] == (until_s, b"reply")


def test_what_never_departed_dies_with_its_process(world: World) -> None:
    ours, theirs = world.pair()
    ours.transport.write(b"before")
    world.ready["a"] = world.time.now_s + 0.5
    ours.transport.write(b"after")
    ours.transport.close()
    world.time.advance(0.0001)
    world.network.kill("a", silently=False)
    world.ready["a"] = 0.0
    world.time.advance(1)
    assert theirs.got == b"before"
    assert isinstance(theirs.lost[0], ConnectionResetError)
    assert not ours.lost
    assert not world.network.lingering


def test_every_call_into_a_host_s_code_is_entered(world: World) -> None:
    entered: list[tuple[str, str]] = []

    def enter(host: str, callback: Callable[..., object], *args: Any) -> None:
        entered.append((host, getattr(callback, "__name__", "")))
        callback(*args)

    world.network.enter = enter
    ours, theirs = world.pair()
    assert entered == [("b", "_made"), ("a", "_made")]
    entered.clear()
    theirs.transport.pause_reading()
    world.network.window_bytes = 100_000
    ours.transport.write(b"x" * 70_000)
    world.time.advance(0.01)
    theirs.transport.resume_reading()
    world.time.advance(0.01)
    ours.transport.close()
    world.time.advance(0.01)
    world.network.host("a").connect("b:2", lambda: End(world, "a"), world.errors.append, 1.0)
    world.time.advance(0.01)
    assert set(entered) == {
        ("a", "_resume_writing"),
        ("b", "data_received"),
        ("b", "_end"),
        ("b", "connection_lost"),
        ("a", "connection_lost"),
        ("a", "append"),
    }


@pytest.mark.parametrize("silently", [False, True])
def test_a_process_may_die_in_a_call(world: World, silently: bool) -> None:
    ours, theirs = world.pair()
    fourth: list[str] = []

    def enter(host: str, callback: Callable[..., object], *args: Any) -> None:
        if host == "b" and len(theirs.got) >= 3:
            fourth.append(callback.__name__)
            world.network.kill("b", silently=silently)  # and the callback is not called
        else:
            callback(*args)

    world.network.enter = enter
    for _ in range(6):
        ours.transport.write(b"x")
    theirs.transport.write(b"departed")
    world.time.advance(1)
    assert fourth == ["data_received"]
    assert theirs.got == b"xxx"
    assert not theirs.lost
    assert ours.got == b"departed"
    assert len(ours.lost) == (0 if silently else 1)
    assert world.network.listeners == {}


def test_a_killed_process_is_told_of_by_its_kernel(world: World) -> None:
    ours, theirs = world.pair()
    theirs.transport.write(b"last words")
    world.network.kill("b", silently=False)
    began_s = world.time.now_s
    world.time.advance(1)
    assert ours.got == b"last words"
    assert ours.notes[-1] == (round(began_s + 0.001, 6), "lost")
    assert isinstance(ours.lost[0], ConnectionResetError)
    assert not theirs.lost
    world.connect()
    world.time.advance(0.01)
    assert isinstance(world.errors[0], ConnectionRefusedError)
    world.listen()
    world.connect()
    world.time.advance(0.01)
    assert len(world.accepted) == 2


def test_the_news_of_a_killed_process_waits_for_the_wire(world: World) -> None:
    ours, _ = world.pair()
    world.network.cut("b", "a", one_way=True)
    world.network.kill("b", silently=False)
    world.time.advance(5)
    assert not ours.lost
    world.network.heal()
    world.time.advance(0.01)
    assert isinstance(ours.lost[0], ConnectionResetError)
    assert not world.network.lingering


def test_a_power_loss_is_heard_of_only_when_the_machine_is_back(world: World) -> None:
    ours, theirs = world.pair()
    silent, _ = world.pair()
    theirs.transport.write(b"on the wire")
    world.network.kill("b", silently=True)
    world.time.advance(1)
    assert ours.got == b"on the wire"
    ours.transport.write(b"?")
    began_s = world.time.now_s
    world.connect()
    world.time.advance(5)
    assert not ours.lost
    assert isinstance(world.errors[0], TimeoutError)
    world.network.revive("b")
    world.time.advance(0.1)
    assert isinstance(ours.lost[0], ConnectionResetError)
    assert not silent.lost
    silent.transport.write(b"?")
    world.connect()
    world.time.advance(0.1)
    assert isinstance(silent.lost[0], ConnectionResetError)
    assert isinstance(world.errors[1], ConnectionRefusedError)
    assert world.time.now_s > began_s
    assert not world.network.streams
    assert not world.network.lingering


def test_what_waits_for_a_cut_wire_is_lost_with_the_power(world: World) -> None:
    ours, theirs = world.pair()
    world.network.cut("b", "a")
    theirs.transport.write(b"never arrives")
    world.time.advance(1)
    world.network.kill("b", silently=True)
    world.network.heal()
    world.network.revive("b")
    world.time.advance(1)
    assert ours.got == b""
    assert not ours.lost
    assert not world.network.lingering


def test_nobody_calls_back_to_a_process_that_died_while_it_connected(world: World) -> None:
    ours = world.connect()
    world.network.cut("a", "b")
    world.connect()
    world.network.kill("a", silently=False)
    world.network.heal()
    world.time.advance(5)
    assert not ours.notes
    assert not world.errors
    assert not world.accepted


def test_a_connection_attempt_over_a_slow_link_times_out(world: World) -> None:
    world.network.set_link("b", "a", latency_s=2.0)
    ours = world.connect()
    world.time.advance(5)
    assert isinstance(world.errors[0], TimeoutError)
    assert not ours.notes


@pytest.mark.parametrize("seed", range(30))
def test_a_stream_carries_all_in_order_or_is_lost_whatever_happens(seed: int) -> None:
    """Random writes, pauses, cuts, slowness and deaths: what arrives is a prefix of what was written, nobody is called
    after its death, and once all is healed nothing is left behind."""
    chance, world = Random(seed), World()
    dead: set[str] = set()

    def enter(host: str, callback: Callable[..., object], *args: Any) -> None:
        assert host not in dead
        assert world.ready[host] <= world.time.now_s
        callback(*args)

    world.network.enter = enter
    written: dict[End, bytes] = {}
    pairs: list[tuple[End, End]] = []
    for number in range(400):
        what = chance.randrange(14)
        host = chance.choice("ab")
        living = [end for pair in pairs for end in pair if end.host not in dead and not end.transport.is_closing()]
        if what < 6 and living:
            end = chance.choice(living)
            data = b"%d," % number * chance.choice([1, 1, 1, 9000])
            end.transport.write(data)
            written[end] = written.get(end, b"") + data
        elif what == 6 and "b" not in dead and "a" not in dead:
            accepted = len(world.accepted)
            ours = world.connect()
            world.time.advance(0.002)
            if len(world.accepted) > accepted and ours.transport is not None:
                pairs.append((ours, world.accepted[-1]))
        elif what == 7 and living:
            end = chance.choice(living)
            (end.transport.pause_reading if chance.random() < 0.5 else end.transport.resume_reading)()
        elif what == 8:
            world.network.cut("a", "b", one_way=chance.random() < 0.5)
        elif what == 9:
            world.network.uncut(*chance.choice([("a", "b"), ("b", "a")]), one_way=chance.random() < 0.5)
        elif what == 10 and living and chance.random() < 0.3:
            (
                chance.choice(living).transport.close
                if chance.random() < 0.5
                else chance.choice(living).transport.abort
            )()
        elif what == 11:
            world.ready[host] = world.time.now_s + 0.01 * chance.random()
        elif what == 12 and host not in dead and chance.random() < 0.2:
            dead.add(host)
            world.network.kill(host, silently=chance.random() < 0.5)
        elif what == 13 and host in dead:
            dead.discard(host)
            world.network.revive(host)
            if host == "b":
                world.listen()
            pairs = [pair for pair in pairs if host != "b" or pair[1] is None]
            pairs = [] if host == "a" else pairs
        world.time.advance(0.003 * chance.random())
        for ours, theirs in pairs:
            assert written.get(ours, b"").startswith(theirs.got)
            assert written.get(theirs, b"").startswith(ours.got)
    world.network.heal()
    for host in "ab":
        world.network.kill(host, silently=False)
        world.network.revive(host)
    world.time.advance(1)
    assert not world.network.streams
    assert not world.network.lingering
    assert not world.network.waiting
