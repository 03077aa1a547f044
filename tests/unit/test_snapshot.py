"""Snapshots from one node to another: whole, cut, damaged, refused, cancelled."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvstore.errors import KvError, Refused, Unavailable
from kvstore.raft import snapshot_wire as wire
from kvstore.raft.fsm import Checkpoint
from kvstore.raft.snapshot_receiver import SYNC_BYTES, SnapshotReceiver
from kvstore.raft.snapshot_wire import CHUNK_BYTES
from kvstore.raft.state_directory import StateDirectory
from kvstore.raft.transport import Purpose
from tests.fake_files import FaultyFile
from tests.unit.snapshot_world import MIB, Node, World

SIZE_BYTES = 3 * MIB


@pytest.fixture
def world() -> Iterator[World]:
    world = World("n1", "n2")
    yield world
    world.stop()


@pytest.fixture
def pair(world: World) -> tuple[Node, Node]:
    return world.nodes["n1"], world.nodes["n2"]


class Meter:
    """Counts what goes from n1 to n2, and may break the wire or change the bytes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sent_bytes = 0
        self.break_every_bytes = 0
        self.breaks = 0
        self.flip_at = -1
        world.network.corrupt = self.carry

    def carry(self, here: str, there: str, data: bytes) -> bytes:
        if (here, there) != ("n1", "n2"):
            return data
        before, self.sent_bytes = self.sent_bytes, self.sent_bytes + len(data)
        if self.break_every_bytes and self.sent_bytes // self.break_every_bytes > before // self.break_every_bytes:
            self.breaks += 1
            self.world.network.break_streams("n1", "n2")
        if before <= self.flip_at < self.sent_bytes:
            changed = bytearray(data)
            changed[self.flip_at - before] ^= 0x10
            return bytes(changed)
        return data


def assert_installed(sender: Node, receiver: Node) -> None:
    assert receiver.machine.state == sender.machine.state
    assert receiver.machine.applied_index == 100
    assert receiver.directory.current() != "data/state/state-0"
    assert receiver.state_names() == ["CURRENT", receiver.directory.current().rpartition("/")[2]]
    assert sender.state_names() == ["CURRENT", "state-0"]


def assert_nothing_changed(receiver: Node) -> None:
    assert receiver.machine.state == {"old": b"old"}
    assert receiver.directory.current() == "data/state/state-0"
    assert receiver.state_names() == ["CURRENT", "state-0"]


def test_a_snapshot_arrives_whole(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    sender.send("n2")
    assert sender.snapshots.sending_to("n2")
    assert world.run_until_sent("n2") is None
    checkpoint = Checkpoint(100, 1, b"members")
    assert sender.results["n2"][1] == checkpoint
    assert receiver.offers == receiver.arrived == [("n1", checkpoint)]
    assert_installed(sender, receiver)
    receiver.files.crash()  # it was all synced before the pointer named it
    receiver.machine.state = {}
    again = StateDirectory(receiver.files, "data/state")
    again.sweep()
    receiver.machine.restore(again.current())
    assert_installed(sender, receiver)


def test_the_sender_goes_on_meanwhile(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    state = dict(sender.machine.state)
    world.network.break_streams("n1", "n2")
    sender.send("n2")
    sender.machine.state["later"] = b"applied after the checkpoint"
    assert world.run_until_sent("n2") is None
    assert receiver.machine.state == state


def test_messages_pass_while_a_snapshot_is_on_its_way() -> None:
    world = World("n1", "n2", bytes_per_s=MIB)
    sender, receiver = world.nodes["n1"], world.nodes["n2"]
    sender.send("n2")
    sent_at: list[float] = []
    while "n2" not in sender.results:
        sent_at.append(world.time.now_s)
        assert sender.transport.send("n2", b"heartbeat")
        world.time.advance(0.1)
    assert len(sent_at) > 15
    arrived_at = [at for at, _ in receiver.bodies]
    assert len(arrived_at) == len(sent_at)
    assert max(came - went for came, went in zip(arrived_at, sent_at, strict=True)) < 0.01
    world.stop()


def test_it_says_how_much_has_arrived() -> None:
    world = World("n1", "n2", bytes_per_s=MIB)
    sender, receiver = world.nodes["n1"], world.nodes["n2"]
    assert receiver.snapshots.receiving_bytes == (0, 0)
    sender.send("n2")
    looks = []
    while "n2" not in sender.results:
        looks.append(receiver.snapshots.receiving_bytes)
        world.time.advance(0.1)
    arrived = [done for done, size in looks if size]
    size = max(size for _, size in looks)
    assert arrived == sorted(arrived)
    assert len(set(arrived)) >= 3, "by chunks"
    assert size >= max(arrived) > size / 2
    assert receiver.snapshots.receiving_bytes == (0, 0)


def test_the_rate_is_bounded_for_all_snapshots_together() -> None:
    world = World("n1", "n2", "n3", bytes_per_s=MIB)
    sender = world.nodes["n1"]
    began_s = world.time.now_s
    sender.send("n2")
    sender.send("n3")
    assert world.run_until_sent("n2") is None
    assert world.run_until_sent("n3") is None
    assert 4.5 <= world.time.now_s - began_s <= 7.0
    assert sender.machine.checkpoints == 1, "both asked while it was being written"
    for name in ("n2", "n3"):
        assert_installed(sender, world.nodes[name])
    world.stop()


def test_a_peer_that_asks_later_gets_a_newer_checkpoint() -> None:
    world = World("n1", "n2", "n3", bytes_per_s=MIB)
    sender = world.nodes["n1"]
    sender.send("n2")
    world.time.advance(0.5)
    sender.machine.applied_index = 101
    sender.send("n3")
    assert world.run_until_sent("n2") is None
    assert world.run_until_sent("n3") is None
    assert [world.nodes[name].machine.applied_index for name in ("n2", "n3")] == [100, 101]
    assert sender.state_names() == ["CURRENT", "state-0"]
    world.stop()


def test_a_snapshot_goes_on_after_cuts_where_it_stood(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    meter = Meter(world)
    meter.break_every_bytes = SIZE_BYTES // 4
    sender.send("n2")
    assert world.run_until_sent("n2") is None
    assert meter.breaks >= 3
    assert meter.sent_bytes < 1.9 * SIZE_BYTES, "what had arrived was not sent again"
    assert len({path for path in receiver.state_names() if path.startswith("state")}) == 1
    assert_installed(sender, receiver)


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_byte_on_the_way_is_found_and_sent_again(world: World, pair: tuple[Node, Node], seed: int) -> None:
    sender, receiver = pair
    meter = Meter(world)
    meter.flip_at = random.Random(seed).randrange(SIZE_BYTES)
    sender.send("n2")
    assert world.run_until_sent("n2") is None
    assert meter.sent_bytes > meter.flip_at
    assert_installed(sender, receiver)


def test_a_file_that_the_disk_damaged_is_fetched_again(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    meter = Meter(world)
    flips = 2
    open_file = receiver.files.open

    def damage(path: str, create: bool = False) -> object:
        """The disk gives back another byte than it was given, the first times that the whole file is there."""
        nonlocal flips
        file = open_file(path, create)
        if path.endswith("000002.sst") and "state-" in path and not create and flips:
            read_at = file.read_at

            def read_damaged(offset: int, size_bytes: int) -> bytes:
                nonlocal flips
                flips -= 1
                data = bytearray(read_at(offset, size_bytes))
                data[len(data) // 2] ^= 1
                return bytes(data)

            wrapped = type("Damaged", (), {})()
            for name in ("write_at", "sync", "truncate", "allocate", "size", "close"):
                setattr(wrapped, name, getattr(file, name))
            wrapped.read_at = read_damaged
            return wrapped
        return file

    receiver.files.open = damage  # type: ignore[method-assign,assignment]
    sender.send("n2")
    assert world.run_until_sent("n2") is None
    assert flips == 0
    assert SIZE_BYTES * 1.2 < meter.sent_bytes < SIZE_BYTES * 2, "only that file was sent again"
    assert_installed(sender, receiver)


def test_what_is_damaged_at_the_sender_is_given_up(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    sender.send("n2")
    # The checkpoint is described, then a byte of it rots before it is read again.
    (checkpoint,) = [name for name in sender.state_names() if name.startswith("checkpoint")]
    file = sender.files.open(f"data/state/{checkpoint}/000002.sst")
    file.write_at(1000, [bytes([file.read_at(1000, 1)[0] ^ 1])])
    error = world.run_until_sent("n2")
    assert error is not None
    assert error.code == "internal"
    assert "damaged" in error.message
    world.time.advance(120)
    assert_nothing_changed(receiver)
    assert sender.state_names() == ["CURRENT", "state-0"]


def test_a_full_disk_at_the_receiver(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    receiver.files.capacity_bytes = SIZE_BYTES // 2
    meter = Meter(world)
    sender.send("n2")
    error = world.run_until_sent("n2")
    assert isinstance(error, Unavailable)
    assert error.code == "storage_failed"
    assert "No space left" in error.message
    assert meter.sent_bytes < 10_000, "it was refused before anything was sent"
    assert_nothing_changed(receiver)
    receiver.files.capacity_bytes = None
    sender.send("n2")
    assert world.run_until_sent("n2") is None
    assert_installed(sender, receiver)


def test_a_disk_that_fails_at_the_receiver(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    receiver.files.fail_sync()
    sender.send("n2")
    error = world.run_until_sent("n2")
    assert error is not None
    assert error.code == "storage_failed"
    assert_nothing_changed(receiver)


def test_a_full_disk_at_the_sender(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    sender.files.capacity_bytes = 1000
    sender.send("n2")
    error = world.run_until_sent("n2")
    assert isinstance(error, Unavailable)
    assert error.code == "storage_failed"
    assert sender.state_names() == ["CURRENT", "state-0"]
    assert not receiver.offers


def test_an_offer_that_the_node_refuses(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    receiver.refuse_offer = Refused("this node leads", code="invalid_request")
    sender.send("n2")
    error = world.run_until_sent("n2")
    assert error is not None
    assert (error.code, error.message) == ("invalid_request", "this node leads")
    assert receiver.state_names() == ["CURRENT", "state-0"]


def test_what_the_node_holds_already_counts_as_installed(world: World, pair: tuple[Node, Node]) -> None:
    """As one does that died inside an install: the sender would wait long after a refusal."""
    sender, receiver = pair
    receiver.refuse_offer = Refused("not now", code="invalid_request")
    receiver.machine.applied_index = sender.machine.applied_index
    sender.send("n2")
    assert world.run_until_sent("n2") is None
    assert_nothing_changed(receiver)


def test_an_install_that_the_node_refuses(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    receiver.refuse_install = Unavailable("not now", code="unavailable")
    sender.send("n2")
    error = world.run_until_sent("n2")
    assert error is not None
    assert error.code == "unavailable"
    assert_nothing_changed(receiver)


def test_a_node_that_is_busy_is_asked_again_and_nothing_is_sent_twice(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    meter = Meter(world)
    receiver.refuse_install = Unavailable("flushing", code="unavailable")
    sender.send("n2")
    world.time.run_until(lambda: len(receiver.arrived) == 5)
    receiver.refuse_install = None
    assert world.run_until_sent("n2") is None
    assert meter.sent_bytes < SIZE_BYTES * 1.1
    assert_installed(sender, receiver)


@pytest.mark.parametrize("how", ["raises", "differs"])
def test_a_snapshot_that_does_not_hold_what_it_says(world: World, pair: tuple[Node, Node], how: str) -> None:
    sender, receiver = pair
    if how == "raises":
        receiver.machine.inspect_error = ValueError("no such state")
    else:
        checkpoint = sender.machine.checkpoint

        def lie(path: str) -> Checkpoint:
            checkpoint(path)
            return Checkpoint(101, 1, b"members")

        sender.machine.checkpoint = lie  # type: ignore[method-assign]
    sender.send("n2")
    error = world.run_until_sent("n2")
    assert error is not None
    assert error.code == "state_damaged"
    assert not receiver.arrived
    assert_nothing_changed(receiver)


def test_a_peer_that_is_gone_is_given_up(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    receiver.transport.stop()
    began_s = world.time.now_s
    sender.send("n2")
    error = world.run_until_sent("n2", within_s=60)
    assert isinstance(error, Unavailable)
    assert 8 < world.time.now_s - began_s < 30
    assert sender.state_names() == ["CURRENT", "state-0"]


def test_a_partial_that_nobody_comes_back_for_is_removed(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    meter = Meter(world)
    sender.send("n2")
    world.time.run_until(lambda: meter.sent_bytes > SIZE_BYTES // 2)
    world.network.cut("n1", "n2")
    error = world.run_until_sent("n2", within_s=120)
    assert error is not None
    assert len(receiver.state_names()) == 3
    world.time.advance(70)
    assert_nothing_changed(receiver)


def test_a_newer_snapshot_replaces_a_partial_one() -> None:
    world = World("n1", "n2", "n3", bytes_per_s=MIB)
    first, receiver, second = (world.nodes[name] for name in ("n1", "n2", "n3"))
    second.machine.state, second.machine.applied_index = {"newer": b"newer"}, 200
    first.send("n2")
    world.time.advance(1)
    second.send("n2")
    world.time.run_until(lambda: "n2" in second.results)
    assert second.results["n2"][0] is None
    assert receiver.machine.state == {"newer": b"newer"}
    assert world.run_until_sent("n2") is None  # it comes back with what is held by now
    assert receiver.machine.state == {"newer": b"newer"}
    assert len(receiver.state_names()) == 2
    world.stop()


def test_another_snapshot_waits_while_one_is_being_installed() -> None:
    world = World("n1", "n2", "n3")
    first, receiver, second = (world.nodes[name] for name in ("n1", "n2", "n3"))
    second.machine.state, second.machine.applied_index = {"newer": b"newer"}, 200
    receiver.finish_later = []
    first.send("n2")
    world.time.run_until(lambda: receiver.finish_later)
    second.send("n2")
    world.time.advance(1)
    assert not second.results
    install, receiver.finish_later = receiver.finish_later[0], None
    install()
    assert world.run_until_sent("n2") is None
    world.time.run_until(lambda: "n2" in second.results)
    assert receiver.machine.state == {"newer": b"newer"}
    assert len(receiver.state_names()) == 2
    world.stop()


def test_an_install_whose_answer_is_lost_is_not_done_twice(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    receiver.finish_later = []
    sender.send("n2")
    world.time.run_until(lambda: receiver.finish_later)
    world.network.break_streams("n1", "n2")
    world.time.advance(0.001)
    receiver.finish_later[0]()
    assert world.run_until_sent("n2") is None
    assert len(receiver.arrived) == 1
    assert_installed(sender, receiver)


@pytest.mark.parametrize("after_s", [0.0, 0.0001, 0.001, 0.002, 0.003, 0.004, 0.005, 0.01, 0.02])
def test_cancel_at_any_moment(after_s: float) -> None:
    world = World("n1", "n2", bytes_per_s=200 * MIB)
    world.time.thread_s = 0.0007
    sender, receiver = world.nodes["n1"], world.nodes["n2"]
    sender.send("n2")
    world.time.advance(after_s)
    was_sending = sender.snapshots.sending_to("n2")
    sender.snapshots.cancel_all()
    assert not sender.snapshots.sending_to("n2")
    world.time.advance(0.1)
    error, _ = sender.results["n2"]
    assert (error is not None and error.code == "closed") is was_sending
    assert sender.state_names() == ["CURRENT", "state-0"]
    sender.send("n2")  # and another one can follow at once
    assert world.run_until_sent("n2") is None
    world.time.advance(70)
    assert_installed(sender, receiver)
    world.stop()


def test_nobody_is_told_after_stop(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    meter = Meter(world)
    sender.send("n2")
    world.time.run_until(lambda: meter.sent_bytes > SIZE_BYTES // 2)
    sender.snapshots.stop()
    receiver.snapshots.stop()
    world.time.advance(120)
    assert not sender.results
    assert not receiver.arrived
    receiver.directory.sweep()
    assert_nothing_changed(receiver)


def test_what_waits_is_bounded_when_the_receivers_disk_is_slow(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    sender.machine.state["large"] = random.Random(3).randbytes(24 * MIB)
    world.time.thread_s = 0.0
    most = 0
    run_in_thread = world.time.run_in_thread

    def slowly(work: Callable[[], object], done: Callable[..., None]) -> None:
        world.time.thread_s = 0.5 if "_write" in repr(work) else 0.0
        run_in_thread(work, done)

    world.time.run_in_thread = slowly  # type: ignore[method-assign]
    sender.send("n2")
    while "n2" not in sender.results:
        world.time.advance(0.01)
        waiting = sum(stream.get_write_buffer_size() + stream._inbox_bytes for stream in world.network.streams)
        partial = receiver.snapshots._receiver._partial
        most = max(most, waiting + (partial.waiting_bytes if partial else 0))
    assert sender.results["n2"][0] is None
    assert most < 16 * MIB


@pytest.mark.parametrize("file_bytes", [3 * SYNC_BYTES, SYNC_BYTES // 5])
def test_what_arrives_is_synced_as_it_comes(
    world: World, pair: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch, file_bytes: int
) -> None:
    sender, receiver = pair
    chance = random.Random(3)
    for number in range(3 * SYNC_BYTES // file_bytes):
        sender.machine.state[f"{number:06}.sst"] = chance.randbytes(file_bytes)
    unsynced: dict[str, int] = {}
    most = 0
    write_at, sync, verify = FaultyFile.write_at, FaultyFile.sync, SnapshotReceiver._verify
    is_verifying = False

    def writing(file: FaultyFile, offset: int, buffers: list[bytes]) -> None:
        nonlocal most
        write_at(file, offset, buffers)
        if file.path.endswith(".sst") and file._files is receiver.files:
            unsynced[file.path] = unsynced.get(file.path, 0) + sum(map(len, buffers))
            most = max(most, sum(unsynced.values()))

    def syncing(file: FaultyFile) -> None:
        sync(file)
        if not is_verifying:
            unsynced.pop(file.path, None)

    def verifying(of: SnapshotReceiver, partial: Any) -> list[int]:
        nonlocal is_verifying
        is_verifying = True
        return verify(of, partial)

    monkeypatch.setattr(FaultyFile, "write_at", writing)
    monkeypatch.setattr(FaultyFile, "sync", syncing)
    monkeypatch.setattr(SnapshotReceiver, "_verify", verifying)
    sender.send("n2")
    assert world.run_until_sent("n2") is None
    assert_installed(sender, receiver)
    assert SYNC_BYTES <= most < SYNC_BYTES + CHUNK_BYTES


def test_wire_round_trip() -> None:
    offer = wire.Offer("id", 5, 2, b"m", (wire.FileInfo("a", 3, 7),))
    for words in (offer, wire.Want((1, 2)), wire.End(), wire.Done(), wire.Done("code", "message")):
        assert wire.decode(wire.encode(words)) == words
    chunk = wire.decode(wire.encode_chunk(3, 2**40, b"data"))
    assert isinstance(chunk, wire.Chunk)
    assert (chunk.file, chunk.offset, chunk.data) == (3, 2**40, b"data")
    assert wire.is_whole(chunk)
    assert not wire.is_whole(chunk._replace(data=b"dbta"))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/etc/x", "a\0b", "x" * 256, "é" * 128])
def test_a_file_name_that_is_no_plain_name(name: str) -> None:
    body = wire.encode(wire.Offer("id", 5, 2, b"m", (wire.FileInfo(name, 3, 7),)))
    with pytest.raises(Refused):
        wire.decode(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0",
        b"\0" * wire.CHUNK_HEADER_BYTES,
        b"\xc1",
        b"\x91\x09",
        b"\x92\x02\x91\xff",
        wire.encode(wire.Offer("", 5, 2, b"m", (wire.FileInfo("a", 3, 7),))),
        wire.encode(wire.Offer("id", 5, 2, b"m", ())),
        wire.encode(wire.Offer("id", 5, 2, b"m", (wire.FileInfo("a", 3, 7),) * 2)),
        wire.encode(wire.Offer("id", -5, 2, b"m", (wire.FileInfo("a", 3, 7),))),
    ],
)
def test_words_that_are_none(body: bytes) -> None:
    with pytest.raises(Refused):
        wire.decode(body)


def test_a_sender_that_talks_nonsense_changes_nothing(world: World, pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    chance = random.Random(11)
    offer = wire.encode(wire.Offer("id", 5, 2, b"m", (wire.FileInfo("a", 3000, 7), wire.FileInfo("b", 10, 7))))
    said = [
        offer,
        wire.encode_chunk(0, 0, b"x" * 3000),
        wire.encode_chunk(0, 5, b"x" * 10),
        wire.encode_chunk(1, 0, b"y" * 11),
        wire.encode_chunk(9, 0, b"y"),
        wire.encode(wire.End()),
        wire.encode(wire.Want((0,))),
        wire.encode(wire.Done()),
        b"\xc1junk",
    ]

    class Nonsense:
        def opened(self, stream: object) -> None:
            for body in [offer] * chance.randrange(2) + chance.choices(said, k=6):
                stream.send(body)  # type: ignore[attr-defined]

        def received(self, peer: str, body: bytes) -> None:
            pass

        def drained(self) -> None:
            pass

        def closed(self, error: KvError) -> None:
            pass

    for _ in range(60):
        sender.transport.open_stream("n2", Purpose.SNAPSHOT, Nonsense())
        world.time.advance(2)
    world.time.advance(70)
    assert not receiver.arrived
    assert_nothing_changed(receiver)
    sender.send("n2")
    assert world.run_until_sent("n2") is None
    assert_installed(sender, receiver)
