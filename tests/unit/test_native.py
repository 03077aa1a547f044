"""The native door over a fake network in virtual time: greeting, junk, order, flow control, bounds, closing."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from msgspec import Raw

from kvstore import codec, model
from kvstore.seldom import LOG_EVERY_S
from kvstore.server import native
from kvstore.server.native import NativeDoor
from kvstore.server.ports import Gate, Reply
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


def test_past_its_rate_a_connection_waits_and_nothing_is_refused() -> None:
    setup = Setup()
    setup.door.rate = 100
    caller, other = setup.connect(), setup.connect()
    total = 1000
    for request_id in range(1, total + 1):
        caller.send(write(request_id))
    began_s = setup.world.now_s
    asked: list[int] = []
    while len(asked) < total:
        setup.world.advance(0.05)
        while setup.node.asked:
            asked.append(setup.node.asked[0][0].id)
            setup.node.answer()
        passed_s = setup.world.now_s - began_s
        # What one read of the socket brought may overdraw the second's worth that there is at first.
        assert len(asked) <= 100 + 100 * passed_s + total // 2
        assert passed_s < 12
    assert asked == list(range(1, total + 1))
    assert setup.world.now_s - began_s > 4
    assert setup.door.stats().throttled > 0
    other.send(write(1))
    setup.world.advance(0.05)
    assert len(setup.node.asked) == 1, "the rate is each connection's own"


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
