"""The native door over a fake network in virtual time: greeting, junk, order, flow control, bounds, closing."""

from __future__ import annotations

import asyncio
import itertools
from typing import cast

import pytest
from msgspec import Raw

from kvstore import codec, model
from kvstore.seldom import LOG_EVERY_S
from kvstore.server import native
from kvstore.server.native import NativeDoor
from kvstore.server.ports import Gate, Reply
from kvstore.server.throttle import HELD_BYTES_MAX, HOLD_S
from tests.fake_network import FakeNetwork, run
from tests.unit.server_fakes import RecordingLog, World, virtual_environment

ADDRESS = "127.0.0.1:7421"
PUT = Raw(codec.encode_request(model.Put(b"k", b"v")))
DONE = Raw(codec.encode_result(model.DoneResult(1)))


class Node:
    """Greets like a node, and keeps every other request until the test answers it."""

    def __init__(self) -> None:
        self.asked: list[tuple[codec.ClientFrame, Reply, Gate | None]] = []
        self.left: list[Gate] = []

    def gone(self, gate: Gate) -> None:
        self.left.append(gate)

    def handle(self, frame: codec.ClientFrame, reply: Reply, gate: Gate | None = None) -> None:
        if isinstance(frame, codec.Hello):
            if frame.cluster_id not in ("", "ours"):
                reply(codec.Failure(0, "wrong_cluster", "another cluster"))
            else:
                reply(codec.Welcome(frame.id, 1, "ours", "n1", ADDRESS))
        else:
            self.asked.append((frame, reply, gate))

    def answer(self, position: int = 0, result: Raw = DONE) -> None:
        frame, reply, _ = self.asked.pop(position)
        reply(codec.Answer(frame.id, result))


class Caller(asyncio.Protocol):
    """A client's end of a connection. Counts how often bytes arrived."""

    def __init__(self) -> None:
        self.reader = codec.FrameReader()
        self.frames: list[codec.ServerFrame] = []
        self.arrivals = 0
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.arrivals += 1
        self.frames.extend(codec.decode_server_frame(body) for body in self.reader.feed(data))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def send(self, *frames: codec.ClientFrame) -> None:
        self.transport.write(b"".join(codec.encode_frame(frame) for frame in frames))

    def failure(self) -> codec.Failure:
        frame = self.frames[-1]
        assert isinstance(frame, codec.Failure)
        return frame


class Setup:
    def __init__(self) -> None:
        self.world = World()
        self.network = FakeNetwork(self.world)
        self.log = RecordingLog()
        self.node = Node()
        self.door = NativeDoor(virtual_environment(self.world, self.network.host("n1")), self.node, self.log)
        run(self.door.start(ADDRESS))

    def connect(self, greet: bool = True, host: str = "client") -> Caller:
        caller = Caller()
        self.network.host(host).connect(ADDRESS, lambda: caller, self._failed, 1.0)
        self.world.advance(0.1)
        if greet:
            caller.send(codec.Hello(1, codec.PROTOCOL_VERSION))
            self.world.advance(0.1)
            assert isinstance(caller.frames.pop(), codec.Welcome)
            caller.arrivals = 0
        return caller

    @staticmethod
    def _failed(error: OSError) -> None:
        raise error

    def junk(self) -> dict[str, int]:
        return dict(self.door.stats().junk)


def write(request_id: int, value: bytes = b"v") -> codec.Write:
    return codec.Write(request_id, 1, request_id, 1, Raw(codec.encode_request(model.Put(b"k", value))))


def test_many_requests_are_in_flight_and_answers_come_in_any_order() -> None:
    setup = Setup()
    caller = setup.connect()
    caller.send(write(1), write(2), write(3))
    setup.world.advance(0.1)
    assert [frame.id for frame, _, _ in setup.node.asked] == [1, 2, 3]
    setup.node.answer(2)
    setup.node.answer(0)
    setup.node.answer(0)
    setup.world.advance(0.1)
    assert [frame.id for frame in caller.frames] == [3, 1, 2]
    assert caller.arrivals == 1, "a turn's answers travel in one write"


def test_frames_may_arrive_byte_by_byte() -> None:
    setup = Setup()
    caller = setup.connect()
    for byte in codec.encode_frame(write(5)):
        caller.transport.write(bytes([byte]))
        setup.world.advance(0.01)
    assert [frame.id for frame, _, _ in setup.node.asked] == [5]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (codec.encode_frame(write(1)), "malformed_frame"),  # before Hello
        (b"\x7f\xff\xff\xff", "frame_too_large"),
        (b"\x00\x00\x00\x03\x92\x63\x01", "unknown_request"),
        (b"\x00\x00\x00\x02\xc1\xc1", "malformed_frame"),
        (b"\x00\x00\x00\x00", "malformed_frame"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "frame_too_large"),
        (codec.encode_frame(codec.Hello(1, 1, "theirs")), "wrong_cluster"),
    ],
)
def test_junk_closes_its_connection_and_no_other(data: bytes, code: str) -> None:
    setup = Setup()
    good, bad = setup.connect(), setup.connect(greet=False)
    bad.transport.write(data)
    setup.world.advance(0.1)
    assert (bad.failure().id, bad.failure().code) == (0, code)
    assert bad.lost
    assert setup.junk() == {code: 1}
    assert setup.node.asked == []
    good.send(write(1))
    setup.world.advance(0.1)
    setup.node.answer()
    setup.world.advance(0.1)
    assert [frame.id for frame in good.frames] == [1]
    assert setup.door.stats().connections == 1


@pytest.mark.parametrize("frame", [codec.Hello(2, 1), write(0), write(-3)])
def test_a_second_hello_and_an_id_that_is_not_positive_are_junk(frame: codec.ClientFrame) -> None:
    setup = Setup()
    caller = setup.connect()
    caller.send(frame)
    setup.world.advance(0.1)
    assert caller.failure().code == "malformed_frame"
    assert caller.lost


def test_what_came_before_the_junk_is_still_handled_and_nothing_after_it() -> None:
    setup = Setup()
    caller = setup.connect()
    caller.transport.write(codec.encode_frame(write(1)) + b"\x00\x00\x00\x02\xc1\xc1" + codec.encode_frame(write(2)))
    setup.world.advance(0.1)
    assert [frame.id for frame, _, _ in setup.node.asked] == [1]
    setup.node.answer()  # nobody is there any more; nothing happens
    setup.world.advance(0.1)
    assert caller.lost


def test_thousands_of_junk_connections_are_counted_and_logged_once_in_a_while() -> None:
    setup = Setup()
    for _ in range(300):
        setup.connect(greet=False).transport.write(b"\x7f\xff\xff\xff")
        setup.world.advance(0.01)
    assert setup.junk() == {"frame_too_large": 300}
    lines = [fields for _, event, fields in setup.log.events if event == "connection_refused"]
    assert len(lines) <= 1 + 300 * 0.11 / LOG_EVERY_S
    last = lines[-1]["suppressed"]
    assert last > 50, "a line says how many it stands for"
    assert lines[0]["code"] == "frame_too_large"


def test_who_never_says_hello_is_closed() -> None:
    setup = Setup()
    caller = setup.connect(greet=False)
    setup.world.advance(native.HELLO_S - 1)
    assert not caller.lost
    setup.world.advance(3)
    assert caller.lost
    assert setup.junk() == {"malformed_frame": 1}


def test_an_idle_connection_is_left_alone() -> None:
    setup = Setup()
    caller = setup.connect()
    setup.world.advance(3600)
    assert not caller.lost


def test_past_the_cap_in_flight_the_socket_is_not_read_until_answers_go_out() -> None:
    setup = Setup()
    caller = setup.connect()
    total = 3 * native.IN_FLIGHT_MAX
    for request_id in range(1, total + 1):
        caller.send(write(request_id))
        if request_id % 64 == 0:
            setup.world.advance(0.01)
    setup.world.advance(1.0)
    asked = len(setup.node.asked)
    assert native.IN_FLIGHT_MAX <= asked < total
    answered = 0
    while setup.node.asked:
        setup.node.answer()
        answered += 1
        if not setup.node.asked:
            setup.world.advance(0.1)
    setup.world.advance(1.0)
    assert answered == total
    assert [frame.id for frame in caller.frames] == list(range(1, total + 1))


class Throttled(Setup):
    """Requests are answered at once; `ids` and `times_s` tell which, and when."""

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.door.rate = rate
        self.ids: list[int] = []
        self.times_s: list[float] = []

    def serve(self, seconds: float) -> None:
        until_s = self.world.now_s + seconds
        while self.world.now_s < until_s:
            self.world.advance(0.01)
            while self.node.asked:
                frame = self.node.asked[0][0]
                self.ids.append(frame.id)
                self.times_s.append(self.world.now_s)
                if isinstance(frame, (codec.WatchCredit, codec.WatchCancel)):
                    self.node.asked.pop(0)
                else:
                    self.node.answer()


def test_past_its_rate_a_connection_waits_and_no_burst_overdraws() -> None:
    setup = Throttled(20)
    caller, other = setup.connect(), setup.connect()
    setup.serve(3.0)  # longer than the second that it may save up for
    caller.send(*(write(request_id) for request_id in range(1, 56)))
    setup.serve(1.9)
    assert setup.ids == list(range(1, len(setup.ids) + 1))
    assert 20 + 36 <= len(setup.ids) + 2 <= 20 + 39
    assert sum(at_s < setup.times_s[0] + 0.02 for at_s in setup.times_s) == 20
    assert max(b - a for a, b in itertools.pairwise(setup.times_s)) < 0.07, "its client is answered all the time"
    assert setup.door.stats().throttled == 1
    other.send(write(1))
    setup.serve(0.1)
    assert setup.ids.count(1) == 2, "the rate is each connection's own"
    setup.serve(1.0)
    assert len(setup.ids) == 56
    assert [frame.id for frame in caller.frames] == list(range(1, 56))
    assert all(isinstance(frame, codec.Answer) for frame in caller.frames)


def test_within_its_rate_nothing_waits() -> None:
    setup = Throttled(20)
    caller = setup.connect()
    for request_id in range(1, 100):
        setup.world.advance(0.051)
        caller.send(write(request_id))
        setup.world.advance(0.001)
        assert [frame.id for frame, _, _ in setup.node.asked] == [request_id]
        setup.node.answer()
    assert setup.door.stats().throttled == 0


def test_connecting_again_gains_nothing() -> None:
    setup = Throttled(20)
    began_s, connections = setup.world.now_s, 20
    for _ in range(connections):
        caller = setup.connect()
        caller.send(*(write(request_id) for request_id in range(1, 301)))
        setup.serve(0.5)
        caller.transport.abort()
    passed_s = setup.world.now_s - began_s
    assert 0.7 * 20 * passed_s < len(setup.ids) <= 20 * passed_s + connections


def test_signs_of_life_overtake_what_waits() -> None:
    setup = Throttled(20)
    caller = setup.connect()
    keep = codec.Write(5002, 1, 9, 1, Raw(codec.encode_request(model.KeepLease(7))))
    caller.send(*(write(request_id) for request_id in range(1, 2001)), codec.StatusRequest(5001), keep)
    setup.serve(0.3)
    assert {5001, 5002} <= set(setup.ids[:4])
    caller.send(codec.StatusRequest(5003, digest=True), codec.StatusRequest(5004))
    setup.serve(0.3)
    assert 5003 not in setup.ids, "a digest costs a node too much to be one"
    assert 5004 in setup.ids
    assert len(setup.ids) <= 3 + 1 + 20 * 0.9


def test_who_waited_too_long_is_told_so_and_its_turn_goes_to_others() -> None:
    setup = Throttled(20)
    caller = setup.connect()
    read = codec.Read(201, 0, 0, Raw(codec.encode_request(model.Range(b"k"))))
    caller.send(*(write(request_id) for request_id in range(1, 201)), read)
    setup.serve(HOLD_S + 0.2)
    served = len(setup.ids)
    assert setup.ids == list(range(1, served + 1))
    assert 38 <= served <= 46
    failures = [frame for frame in caller.frames if isinstance(frame, codec.Failure)]
    assert {frame.id for frame in failures} | set(setup.ids) == set(range(1, 202))
    assert {frame.code for frame in failures} == {"overloaded"}
    assert "20 requests a second" in failures[0].message
    outcomes = {(kind, outcome): count for kind, outcome, count in setup.door.stats().answered}
    assert outcomes["write", "overloaded"] == 200 - served
    assert outcomes["read", "overloaded"] == 1
    caller.send(write(999))
    setup.serve(0.06)
    assert setup.ids[-1] == 999


def test_a_watch_loses_no_credit_to_the_rate_and_its_end_does_not_overtake_it() -> None:
    setup = Throttled(1)
    caller = setup.connect()
    watch = codec.Watch(2, b"k", None, 0, False, True, True, False, 1 << 20)
    caller.send(write(1), watch, codec.WatchCancel(2), codec.WatchCredit(3, 10))
    setup.serve(HOLD_S + 0.2)
    assert setup.ids == [1, 2, 2, 3]
    # Neither has an answer that could refuse it: they are handled when others are refused.
    caller.frames.clear()
    caller.send(*(write(request_id) for request_id in range(10, 20)), watch, codec.WatchCancel(2))
    caller.send(codec.WatchCredit(3, 10))
    setup.serve(HOLD_S + 0.2)
    refused = [frame.id for frame in caller.frames if isinstance(frame, codec.Failure)]
    assert refused[-1] == 2
    assert setup.ids[-2:] == [2, 3]
    assert len(refused) + len(setup.ids) == 4 + 13


def test_what_waits_for_its_turn_is_bounded() -> None:
    setup = Throttled(1)
    caller = setup.connect()
    caller.transport.set_write_buffer_limits(1 << 30)
    for request_id in range(1, 61):
        caller.send(write(request_id, bytes(1_000_000)))
    setup.serve(1.0)
    unread_bytes = caller.transport.get_write_buffer_size()
    assert unread_bytes > 60_000_000 - HELD_BYTES_MAX - 3_000_000
    setup.serve(20 * HOLD_S)
    assert caller.transport.get_write_buffer_size() == 0
    assert {frame.id for frame in caller.frames} == set(range(1, 61))
    assert 10 <= len(setup.ids) <= 20, "meanwhile it had its rate"


def test_what_waits_for_its_turn_is_not_handled_under_pressure_or_past_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "IN_FLIGHT_MAX", 5)
    setup = Throttled(100)
    caller = setup.connect()
    setup.world.advance(1.0)
    caller.send(*(write(request_id) for request_id in range(1, 21)))
    setup.world.advance(0.5)
    assert len(setup.node.asked) == 5
    assert setup.door.stats().throttled == 0, "it is not its rate that holds it up"
    setup.door.press(True)
    for _ in range(5):
        setup.node.answer()
    setup.world.advance(0.5)
    assert setup.node.asked == []
    setup.door.press(False)
    setup.world.advance(0.001)
    assert len(setup.node.asked) == 5, "at once"
    setup.node.answer()
    setup.world.advance(0.001)
    assert [frame.id for frame, _, _ in setup.node.asked] == list(range(7, 12))
    setup.serve(0.1)
    assert [frame.id for frame in caller.frames] == list(range(1, 21))


def test_junk_behind_what_waits_ends_the_connection() -> None:
    for junk in (codec.encode_frame(codec.Hello(1, 1)), codec.encode_frame(write(-1)), b"\x00\x00\x00\x02\xc1\xc1"):
        setup = Throttled(20)
        caller = setup.connect()
        caller.send(*(write(request_id) for request_id in range(1, 10)))
        setup.serve(0.05)
        caller.transport.write(junk)
        setup.serve(1.0)
        assert caller.failure().code == "malformed_frame"
        assert caller.lost
        assert setup.junk() == {"malformed_frame": 1}
        assert len(setup.ids) <= 9


def test_who_waits_for_its_turn_at_a_door_that_stops_is_told_to_go_elsewhere() -> None:
    setup = Throttled(20)
    caller = setup.connect()
    caller.send(*(write(request_id) for request_id in range(1, 101)))
    setup.serve(0.5)
    setup.door.stop_accepting()
    setup.world.advance(0.1)
    told = [frame for frame in caller.frames if isinstance(frame, codec.Failure)]
    assert {frame.code for frame in told} == {"shutting_down"}
    assert len(told) + len(setup.ids) == 100
    empty: list[bool] = []
    setup.door.close(lambda: empty.append(True))
    setup.world.advance(1.0)
    assert empty == [True]


def test_past_the_cap_of_bytes_in_flight_the_socket_is_not_read() -> None:
    setup = Setup()
    caller = setup.connect()
    for request_id in range(1, 31):
        caller.send(write(request_id, b"x" * 1_000_000))
        setup.world.advance(0.1)
    assert 8 <= len(setup.node.asked) <= 10
    seen: list[int] = []
    for request_id in range(31, 71):
        while setup.node.asked:
            seen.append(setup.node.asked[0][0].id)
            setup.node.answer()
        caller.send(write(request_id))
        setup.world.advance(0.1)
        sizes = [len(frame.request) for frame, _, _ in setup.node.asked if isinstance(frame, codec.Write)]
        assert sum(sizes) <= native.IN_FLIGHT_BYTES_MAX + 2_000_000
    assert seen[:30] == list(range(1, 31))


def test_under_pressure_no_socket_is_read() -> None:
    setup = Setup()
    first, second = setup.connect(), setup.connect()
    setup.door.press(True)
    first.send(write(1))
    second.send(write(2))
    setup.world.advance(1.0)
    assert setup.node.asked == []
    setup.door.press(False)
    setup.world.advance(1.0)
    assert [frame.id for frame, _, _ in setup.node.asked] == [1, 2]


LARGE = Raw(codec.encode_result(model.RangeResult(1, (model.Record(b"k", b"x" * 900_000, 1, 1, 1),), 1)))


def test_a_congested_connection_holds_back_its_reads_until_there_is_room() -> None:
    setup = Setup()
    caller = setup.connect()
    caller.send(*(write(request_id) for request_id in range(1, 5)))
    setup.world.advance(0.1)
    setup.network.cut("n1", "client", one_way=True)
    gate = setup.node.asked[0][2]
    assert gate is not None
    assert not gate.congested
    setup.node.answer(result=LARGE)
    setup.node.answer(result=LARGE)
    assert gate.congested, "also within a turn, before anything was written"
    ran: list[int] = []
    gate.postpone(lambda: ran.append(1))
    setup.world.advance(1.0)
    assert ran == []
    setup.network.heal()
    setup.world.advance(1.0)
    assert ran == [1]
    assert not gate.congested


def test_a_watch_is_sent_more_than_one_frame_and_its_credits_are_not_waited_for() -> None:
    setup = Setup()
    caller = setup.connect()
    caller.send(codec.Watch(1, b"k", None, 0, False, True, True, False, 1 << 20))
    setup.world.advance(0.1)
    _, reply, gate = setup.node.asked.pop()
    assert gate is not None
    reply(codec.Watching(1, 5))
    event = model.Event(b"k", 5, model.Record(b"k", b"v", 5, 5, 1))
    gate.push(codec.RawWatchEvents(1, 5, [Raw(codec.encode_event(event))], 10))
    setup.world.advance(0.1)
    assert caller.frames == [codec.Watching(1, 5), codec.WatchEvents(1, 5, (event,), 10)]
    # More of them than may be in flight: they have no answers, so nothing holds the next request back.
    caller.send(*(codec.WatchCredit(1, 10) for _ in range(2 * native.IN_FLIGHT_MAX)), codec.WatchCancel(1), write(2))
    setup.world.advance(0.1)
    assert setup.node.asked[-1][0].id == 2
    assert setup.node.left == []
    caller.transport.close()
    setup.world.advance(0.1)
    assert setup.node.left == [gate]


def test_who_leaves_too_much_unread_is_closed() -> None:
    setup = Setup()
    caller = setup.connect()
    other = setup.connect(host="other")
    caller.send(*(write(request_id) for request_id in range(1, 61)))
    setup.world.advance(0.1)
    setup.network.cut("n1", "client", one_way=True)
    while setup.node.asked:
        setup.node.answer(result=LARGE)
        setup.world.advance(0.001)
    setup.world.advance(0.1)
    assert setup.door.stats().closed_slow == 1
    assert setup.door.stats().connections == 1
    assert "slow_connection_closed" in setup.log.names()
    assert not other.lost


def test_who_reads_nothing_for_long_is_closed_and_who_reads_slowly_is_not() -> None:
    setup = Setup()
    caller = setup.connect()
    caller.send(write(1), write(2), write(3))
    setup.world.advance(0.1)
    setup.network.cut("n1", "client", one_way=True)
    for _ in range(3):
        setup.node.answer(result=LARGE)
    setup.world.advance(native.STUCK_S - 5)
    assert setup.door.stats().closed_slow == 0
    setup.world.advance(10)
    assert setup.door.stats().closed_slow == 1


def test_a_client_that_goes_away_leaves_nothing_behind() -> None:
    setup = Setup()
    caller = setup.connect()
    caller.send(write(1))
    setup.world.advance(0.1)
    caller.transport.abort()
    setup.world.advance(0.1)
    assert setup.door.stats().connections == 0
    setup.node.answer()
    setup.world.advance(1.0)


def test_connections_past_the_limit_are_told_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CONNECTIONS_MAX", 2)
    setup = Setup()
    setup.connect()
    setup.connect()
    third = setup.connect(greet=False)
    assert third.failure().code == "overloaded"
    assert third.lost
    assert setup.door.stats().refused_full == 1


def test_closing_sends_what_is_answered_and_then_ends_every_connection() -> None:
    setup = Setup()
    caller, idle = setup.connect(), setup.connect()
    caller.send(write(1))
    setup.world.advance(0.1)
    setup.door.stop_accepting()
    caller.send(write(2))
    setup.world.advance(0.1)
    assert len(setup.node.asked) == 1, "nothing more is read"
    setup.node.answer()
    empty: list[bool] = []
    setup.door.close(lambda: empty.append(True))
    setup.world.advance(0.5)
    assert [frame.id for frame in caller.frames] == [1]
    assert caller.lost
    assert idle.lost
    assert empty == [True]


def test_closing_does_not_wait_for_ever_for_who_does_not_read() -> None:
    setup = Setup()
    caller = setup.connect()
    caller.send(write(1), write(2))
    setup.world.advance(0.1)
    setup.network.cut("n1", "client", one_way=True)
    setup.node.answer(result=LARGE)
    setup.node.answer(result=LARGE)
    empty: list[bool] = []
    setup.door.stop_accepting()
    setup.door.close(lambda: empty.append(True))
    setup.world.advance(0.5)
    assert empty == []
    setup.world.advance(1.0)
    assert empty == [True]
