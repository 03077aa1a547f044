"""Peers: on the fake network in virtual time, where cuts and silences can be made."""

from __future__ import annotations

import asyncio
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from kvstore.env import Environment, SystemFiles
from kvstore.errors import KvError, StartupError
from kvstore.raft import connection as connection_module
from kvstore.raft.connection import Connection, Identity, Purpose
from kvstore.raft.transport import Transport
from tests.fake_network import FakeNetwork, VirtualTime, run

FRAME_BYTES_MAX = 64 * 1024


class Node:
    """A transport, and a handler that writes down what it is told."""

    def __init__(
        self, world: World, name: str, *, cluster_id: str = "c", node_id: str | None = None, address: str | None = None
    ) -> None:
        self.name = name
        self.node_id = node_id or f"id-{name}"
        self.events: list[tuple[str, str]] = []
        self.bodies: list[tuple[str, bytes]] = []
        self.refuse: dict[str, tuple[str, str]] = {}
        self.lines: list[tuple[str, dict[str, object]]] = []
        env = Environment(world.time, random.Random(1), world.time, world.network.host(name), SystemFiles())
        self.transport = Transport(
            env,
            Identity(cluster_id, name, self.node_id),
            address or f"{name}:1",
            self,
            log=self,
            queue_bytes_max=4 * FRAME_BYTES_MAX,
            frame_bytes_max=FRAME_BYTES_MAX,
        )
        run(self.transport.start())

    def warning(self, event: str, /, **fields: object) -> None:
        self.lines.append((event, fields))

    info = error = warning

    def accept(self, identity: Identity) -> tuple[str, str] | None:
        return self.refuse.get(identity.name)

    judge = accept

    def peer_up(self, name: str) -> None:
        self.events.append(("up", name))

    def peer_down(self, name: str) -> None:
        self.events.append(("down", name))

    def peer_drained(self, name: str) -> None:
        self.events.append(("drained", name))

    def received(self, name: str, body: bytes) -> None:
        self.bodies.append((name, body))


class World:
    def __init__(self) -> None:
        self.time = VirtualTime()
        self.network = FakeNetwork(self.time)
        self.nodes: dict[str, Node] = {}

    def add(self, *names: str) -> list[Node]:
        for name in names:
            self.nodes[name] = Node(self, name)
        return [self.nodes[name] for name in names]

    def join_all(self) -> None:
        for node in self.nodes.values():
            node.transport.set_peers({name: f"{name}:1" for name in self.nodes if name != node.name})
        self.time.run_until(self.are_joined)

    def are_joined(self) -> bool:
        return all(
            node.transport.connected(other)
            for node in self.nodes.values()
            for other in self.nodes
            if other != node.name
        )


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for node in world.nodes.values():
        node.transport.stop()
    world.time.advance(5)
    assert not world.network.streams


@pytest.fixture
def pair(world: World) -> tuple[Node, Node]:
    first, second = world.add("n1", "n2")
    world.join_all()
    return first, second


def test_bodies_arrive_in_order_both_ways_and_leave_in_one_write(world: World, pair: tuple[Node, Node]) -> None:
    first, second = pair
    assert first.events == [("up", "n2")]
    assert second.events == [("up", "n1")]
    for number in range(100):
        assert first.transport.send("n2", b"%d" % number)
        assert second.transport.send("n1", b"-%d" % number)
    outgoing = [stream for stream in world.network.streams if stream.host == "n1"]
    assert not any(stream.get_write_buffer_size() for stream in outgoing)
    first.transport.flush()
    assert sum(len(stream._outbox) for stream in outgoing) == 1
    world.time.advance(0.01)  # the second node's leave by themselves
    assert second.bodies == [("n1", b"%d" % number) for number in range(100)]
    assert first.bodies == [("n2", b"-%d" % number) for number in range(100)]


def test_frames_in_any_pieces(world: World, pair: tuple[Node, Node]) -> None:
    _first, second = pair
    bodies = [b"", b"x", b"y" * 300, b"z" * FRAME_BYTES_MAX]
    receiver = next(
        stream.protocol for stream in world.network.streams if stream.host == "n2" and not stream.protocol.dialled
    )
    stream = b"".join(struct.pack(">IB", len(body), 0) + body for body in bodies)
    for size in (1, 2, 3, 7, 64, 4096, len(stream)):
        if size == 1:
            pieces = [stream[at : at + 1] for at in range(1000)] + [stream[1000:]]
        else:
            pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        second.bodies.clear()
        for piece in pieces:
            receiver.data_received(piece)
        assert [body for _, body in second.bodies] == bodies


def test_send_to_nobody(world: World) -> None:
    (node,) = world.add("n1")
    assert not node.transport.send("n2", b"x")
    assert not node.transport.connected("n2")


def test_a_peer_that_comes_later_is_reached_within_the_longest_pause(world: World) -> None:
    (first,) = world.add("n1")
    first.transport.set_peers({"n2": "n2:1"})
    world.time.advance(30)
    assert not first.transport.connected("n2")
    refusal_lines = [line for line in first.lines if line[0] == "a peer cannot be reached"]
    assert 2 <= len(refusal_lines) <= 4, "one line in ten seconds"
    world.add("n2")
    assert world.time.run_until(lambda: first.transport.connected("n2")) <= 2.1


def test_a_peer_that_restarts_and_calls_us_is_called_back_at_once(world: World, pair: tuple[Node, Node]) -> None:
    first, second = pair
    second.transport.stop()
    world.time.run_until(lambda: ("down", "n2") in first.events)
    world.time.advance(20)
    world.add("n2")
    world.time.advance(0.0)
    if not first.transport.connected("n2"):
        world.nodes["n2"].transport.set_peers({"n1": "n1:1"})
        assert world.time.run_until(lambda: first.transport.connected("n2")) < 0.01


def test_a_peer_that_comes_up_while_it_is_dialled_is_dialled_anew(world: World) -> None:
    """What was sent to a host without power is lost; the attempt would go on for the whole of its time."""
    (first,) = world.add("n1")
    world.network.kill("n2", silently=True)
    first.transport.set_peers({"n2": "n2:1"})
    world.time.advance(0.5)
    world.network.down.discard("n2")
    (second,) = world.add("n2")
    second.transport.set_peers({"n1": "n1:1"})
    assert world.time.run_until(world.are_joined) < 0.1
    world.time.advance(5)
    assert (first.events, second.events) == ([("up", "n2")], [("up", "n1")])


def test_a_lost_connection_is_made_anew(world: World, pair: tuple[Node, Node]) -> None:
    first, second = pair
    assert world.network.break_streams("n1", "n2") == 2
    world.time.run_until(lambda: ("down", "n2") in first.events)
    assert not first.transport.send("n2", b"lost")
    assert world.time.run_until(world.are_joined) < 0.1
    assert first.events == [("up", "n2"), ("down", "n2"), ("up", "n2")]
    first.transport.send("n2", b"again")
    world.time.advance(0.01)
    assert second.bodies == [("n1", b"again")]


@pytest.mark.parametrize("one_way", [False, True])
def test_a_silent_peer_is_noticed(world: World, pair: tuple[Node, Node], one_way: bool) -> None:
    first, second = pair
    world.network.cut("n2", "n1", one_way=one_way)
    took_s = world.time.run_until(lambda: ("down", "n2") in first.events)
    assert 3.0 <= took_s <= 6.0
    assert first.transport.dropped["timeout"] >= 1
    world.network.heal()
    world.time.run_until(world.are_joined)
    first.transport.send("n2", b"after")
    world.time.advance(0.01)
    assert second.bodies == [("n1", b"after")]


def test_idle_connections_stay(world: World, pair: tuple[Node, Node]) -> None:
    world.time.advance(3600)
    assert [node.events for node in pair] == [[("up", "n2")], [("up", "n1")]]


def test_a_process_that_was_stopped_closes_nothing(world: World, pair: tuple[Node, Node]) -> None:
    first, _ = pair
    world.time.now_s += 100  # every timer is late by this much, and fires once
    world.time.advance(2)
    assert first.events == [("up", "n2")]


def test_a_full_queue_refuses_until_it_is_drained(world: World, pair: tuple[Node, Node]) -> None:
    first, second = pair
    world.network.cut("n1", "n2", one_way=True)
    body = b"x" * FRAME_BYTES_MAX
    sent = 0
    while first.transport.send("n2", body):
        sent += 1
    assert sent == 3
    assert first.transport.connected("n2")
    world.time.advance(1)
    assert ("drained", "n2") not in first.events
    world.network.heal()
    world.time.run_until(lambda: ("drained", "n2") in first.events)
    assert first.transport.send("n2", b"y")
    world.time.advance(0.1)
    assert [len(body) for _, body in second.bodies] == [FRAME_BYTES_MAX] * 3 + [1]


def test_a_peer_that_takes_nothing_is_closed(world: World, pair: tuple[Node, Node]) -> None:
    first, _second = pair
    for stream in world.network.streams:
        if stream.host == "n2" and not stream.protocol.dialled:
            stream.pause_reading()
            stream.protocol._is_reading = False  # so that only the sender's judgement is seen
    world.network.window_bytes = 1
    while first.transport.send("n2", b"x" * FRAME_BYTES_MAX):
        pass
    took_s = world.time.run_until(lambda: ("down", "n2") in first.events, within_s=20)
    assert 9 <= took_s <= 12
    assert first.transport.dropped["overloaded"] == 1


REFUSALS: list[tuple[str, Callable[[World], Node]]] = [
    ("wrong_cluster", lambda world: Node(world, "n2", cluster_id="another")),
    ("member_unknown", lambda world: Node(world, "n3", address="n2:1")),
    ("node_identity_changed", lambda world: Node(world, "n1", address="n2:1")),
]


@pytest.mark.parametrize(("code", "make"), REFUSALS)
def test_a_handshake_that_does_not_fit_is_refused(world: World, code: str, make: Callable[[World], Node]) -> None:
    (first,) = world.add("n1")
    second = make(world)
    first.transport.set_peers({"n2": "n2:1"})
    world.time.run_until(lambda: first.transport.refused and second.transport.refused)
    if code == "node_identity_changed":  # the one that was called first sees that it is called n1, not n2
        code = "member_unknown"
    assert set(first.transport.refused) == set(second.transport.refused) == {code}
    refusal = first.transport.last_refusal("n2")
    assert refusal is not None
    assert refusal.code == code
    assert not first.events
    world.time.advance(25)
    assert (
        sum(event == "a peer connection was refused" for event, _ in second.lines) <= 3 < second.transport.refused[code]
    )
    assert any(fields["suppressed"] for _, fields in second.lines)
    second.transport.stop()


def test_an_identity_that_the_handler_refuses(world: World) -> None:
    first, second = world.add("n1", "n2")
    second.refuse["n1"] = ("node_identity_changed", "n1 came back with another node id")
    first.transport.set_peers({"n2": "n2:1"})
    world.time.run_until(lambda: first.transport.refused["node_identity_changed"])
    refusal = first.transport.last_refusal("n2")
    assert refusal is not None
    assert (refusal.code, refusal.message) == second.refuse["n1"]
    second.refuse.clear()
    world.time.run_until(lambda: first.transport.connected("n2"))
    assert first.transport.last_refusal("n2") is None
    # and the other way round: the one that called does not want what it reached
    first.refuse["n2"] = ("node_identity_changed", "n2 came back with another node id")
    world.network.break_streams("n1", "n2")
    world.time.advance(5)
    assert not first.transport.connected("n2")
    assert first.transport.refused["node_identity_changed"] > 1


def test_another_protocol_version(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = world.add("n1", "n2")
    monkeypatch.setattr(connection_module, "PROTOCOL_VERSION", 2)
    first.transport.set_peers({"n2": "n2:1"})
    accepted = None
    while accepted is None:
        assert world.time._step(5)
        accepted = next((s.protocol for s in world.network.streams if s.host == "n2"), None)
    monkeypatch.setattr(connection_module, "PROTOCOL_VERSION", 1)
    world.time.run_until(lambda: first.transport.refused)
    assert first.transport.refused == second.transport.refused == Counter(version_mismatch=1)
    refusal = first.transport.last_refusal("n2")
    assert refusal is not None
    assert "2 met 1" in refusal.message


class Stranger(asyncio.Protocol):
    """Opens a stream to a node and says what it likes."""

    def __init__(self, world: World, to: str, data: bytes) -> None:
        self.data = data
        self.answer = b""
        self.is_closed = False
        world.network.host("stranger").connect(f"{to}:1", lambda: self, self.failed, 1.0)

    def failed(self, error: OSError) -> None:
        raise AssertionError(error)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.data)

    def data_received(self, data: bytes) -> None:
        self.answer += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed = True


PREFIX = b"kvpeer" + struct.pack(">H", 1)
JUNK = [
    (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "frame_too_large"),
    (b"\xff" * 100, "frame_too_large"),
    (struct.pack(">IB", 4097, 2), "frame_too_large"),
    (struct.pack(">IB", 5, 2) + b"abcde", "malformed_frame"),
    (struct.pack(">IB", 0, 2), "malformed_frame"),
    (struct.pack(">IB", 3, 0) + b"abc", "malformed_frame"),
    (struct.pack(">IB", 3, 9) + b"abc", "malformed_frame"),
    (struct.pack(">IB", 0, 3), "malformed_frame"),
    (struct.pack(">IB", 9, 2) + PREFIX + b"\xc1", "malformed_frame"),
    (struct.pack(">IB", 308, 2) + PREFIX + b"\x91" * 300, "malformed_frame"),
    (struct.pack(">IB", 1, 4) + b"\x90", "malformed_frame"),
    (struct.pack(">IB", 0, 1), "malformed_frame"),
]


@pytest.mark.parametrize(("junk", "code"), JUNK)
def test_junk_closes_its_own_connection_only(world: World, pair: tuple[Node, Node], junk: bytes, code: str) -> None:
    first, second = pair
    stranger = Stranger(world, "n1", junk)
    world.time.run_until(lambda: stranger.is_closed)
    assert first.transport.refused == Counter({code: 1})
    assert code.encode() in stranger.answer
    second.transport.send("n1", b"still here")
    world.time.advance(0.01)
    assert first.bodies == [("n2", b"still here")]


def test_junk_from_a_known_peer_is_counted_and_mended(world: World, pair: tuple[Node, Node]) -> None:
    first, second = pair
    stream = next(s for s in world.network.streams if s.host == "n1" and s.protocol.dialled)
    stream.write(struct.pack(">IB", FRAME_BYTES_MAX + 1, 0))
    world.time.run_until(lambda: second.transport.refused["frame_too_large"])
    world.time.run_until(lambda: ("down", "n2") in first.events)
    world.time.run_until(world.are_joined)


def test_who_says_nothing_is_closed(world: World) -> None:
    (node,) = world.add("n1")
    stranger = Stranger(world, "n1", b"\0")
    took_s = world.time.run_until(lambda: stranger.is_closed)
    assert 4 <= took_s <= 6
    assert node.transport.refused == Counter(timeout=1)


def test_strangers_are_bounded(world: World, pair: tuple[Node, Node]) -> None:
    first, _ = pair
    strangers = [Stranger(world, "n1", b"\0") for _ in range(100)]
    world.time.advance(1)
    assert sum(stranger.is_closed for stranger in strangers) == 100 - 64
    world.time.advance(10)
    assert all(stranger.is_closed for stranger in strangers)
    late = Stranger(world, "n1", b"\0")
    world.time.advance(1)
    assert not late.is_closed
    assert first.transport.connected("n2")


def test_random_bytes_never_raise(world: World) -> None:
    (node,) = world.add("n1")
    chance = random.Random(7)
    for _ in range(300):
        data = bytearray(struct.pack(">IB", 60, 2) + PREFIX + b"\x93\x93\xa1c\xa2n2\xa1i\xa2n1\x00" + bytes(40))
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        stranger = Stranger(world, "n1", bytes(data))
        world.time.run_until(lambda stranger=stranger: stranger.is_closed, within_s=20)
    assert not node.bodies


def test_a_newer_connection_of_a_peer_replaces_the_older(world: World, pair: tuple[Node, Node]) -> None:
    first, _ = pair
    # n2 vanishes without a word: its host's wires are cut, and it comes back while n1 still holds the old connection.
    world.network.cut("n1", "n2")
    world.time.advance(0.1)
    old = next(s.protocol for s in world.network.streams if s.host == "n1" and not s.protocol.dialled)
    world.network.listeners.pop("n2:1")
    world.network._cuts.clear()
    again = Node(world, "n2")
    again.transport.set_peers({"n1": "n1:1"})
    world.time.run_until(lambda: again.transport.connected("n1"))
    assert not old.is_open
    again.transport.send("n1", b"new")
    world.time.advance(0.01)
    assert first.bodies == [("n2", b"new")]
    again.transport.stop()


def test_peers_change(world: World) -> None:
    first, second, third = world.add("n1", "n2", "n3")
    world.join_all()
    first.events.clear()
    second.refuse["n1"] = first.refuse["n2"] = ("member_unknown", "left")
    first.transport.set_peers({"n3": "n3:1"})
    second.transport.set_peers({"n3": "n3:1"})
    assert not first.transport.connected("n2")
    world.time.advance(10)
    assert not first.events
    assert not second.transport.connected("n1")
    assert not [s for s in world.network.streams if {s.host, s.other.host} == {"n1", "n2"}]
    # an address that changes is dialled anew
    moved = Node(world, "n3", address="n3:2")
    third.transport.stop()
    first.transport.set_peers({"n3": "n3:2"})
    assert not first.transport.connected("n3")
    world.time.run_until(lambda: first.transport.connected("n3"))
    assert first.events == [("down", "n3"), ("up", "n3")]
    moved.transport.stop()


def test_no_event_after_stop(world: World, pair: tuple[Node, Node]) -> None:
    first, second = pair
    first.transport.send("n2", b"last words")
    first.transport.stop()
    world.time.advance(10)
    assert first.events == [("up", "n2")]
    assert second.bodies == [("n1", b"last words")]
    assert second.events == [("up", "n1"), ("down", "n1")]
    assert not first.transport.send("n2", b"x")


def test_a_port_in_use(world: World) -> None:
    world.add("n1")
    with pytest.raises(StartupError) as caught:
        Node(world, "n9", address="n1:1")
    assert caught.value.code == "address_in_use"


class StreamEnd:
    def __init__(self) -> None:
        self.stream: Connection | None = None
        self.bodies: list[bytes] = []
        self.drains = 0
        self.error: KvError | None = None

    def opened(self, stream: Connection) -> None:
        self.stream = stream

    def received(self, peer: str, body: bytes) -> None:
        self.bodies.append(body)
        if body == b"stop":
            assert self.stream is not None
            self.stream.pause_reading()

    def drained(self) -> None:
        self.drains += 1

    def closed(self, error: KvError) -> None:
        assert self.error is None
        self.error = error


def test_streams(world: World, pair: tuple[Node, Node]) -> None:
    first, second = pair
    ours, theirs = StreamEnd(), StreamEnd()
    first.transport.open_stream("n2", Purpose.SNAPSHOT, ours)
    world.time.run_until(lambda: ours.error)
    assert ours.error is not None
    assert ours.error.code == "unknown_request"
    second.transport.accept_streams(Purpose.SNAPSHOT, lambda peer: theirs)
    ours = StreamEnd()
    first.transport.open_stream("n2", Purpose.SNAPSHOT, ours)
    world.time.run_until(lambda: ours.stream and theirs.stream)
    assert ours.stream is not None
    assert theirs.stream is not None
    for body in (b"a", b"stop", b"b", b"c"):
        ours.stream.send(body)
    ours.stream.flush()
    theirs.stream.send(b"back")
    theirs.stream.flush()
    world.time.advance(60)  # longer than any silence that is borne, but a paused reader hears nothing by its own will
    assert theirs.bodies == [b"a", b"stop"]
    assert ours.bodies == [b"back"]
    theirs.stream.resume_reading()
    assert theirs.bodies == [b"a", b"stop", b"b", b"c"]
    while ours.stream.send(b"x" * FRAME_BYTES_MAX):
        pass
    assert not ours.stream.has_room
    world.time.run_until(lambda: ours.drains)
    assert ours.stream.has_room
    theirs.stream.close()
    world.time.run_until(lambda: ours.error and theirs.error)
    assert first.events == [("up", "n2")], "a stream is no peer"
    gone = StreamEnd()
    first.transport.open_stream("n7", Purpose.SNAPSHOT, gone)
    assert gone.error is None
    world.time.run_until(lambda: gone.error)
