"""Nodes that do nothing but send and receive snapshots, on the fake network, fake disks and in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

from kvstore.env import Environment, Files
from kvstore.errors import KvError
from kvstore.raft.fsm import Checkpoint, EntryKind
from kvstore.raft.snapshot import Snapshots, StateDirectory
from kvstore.raft.transport import Identity, Transport
from tests.fake_files import FaultyFiles
from tests.fake_network import FakeNetwork, VirtualTime, run

META = "META"
MIB = 1024 * 1024


def some_files(size_bytes: int, seed: int = 1) -> dict[str, bytes]:
    """Files of odd sizes, an empty one and one larger than a piece among them."""
    chance = random.Random(seed)
    return {
        "000001.sst": chance.randbytes(size_bytes // 2 + 1),
        "000002.sst": chance.randbytes(size_bytes // 3),
        "EMPTY": b"",
        "MANIFEST": chance.randbytes(17),
        "000003.sst": chance.randbytes(size_bytes // 6),
    }


class FileMachine:
    """A state machine whose state is a few files in memory; a checkpoint writes them down."""

    def __init__(self, files: Files, state: dict[str, bytes], index: int, term: int = 1) -> None:
        self.files = files
        self.state = state
        self.applied_index = index
        self.applied_term = term
        self.members = b"members"
        self.checkpoints = 0
        self.inspect_error: Exception | None = None

    def apply(self, index: int, term: int, kind: EntryKind, payload: bytes | memoryview) -> Any:
        raise AssertionError("nothing is applied here")

    def flush_due(self) -> bool:
        return False

    def flush(self) -> int:
        return self.applied_index

    def checkpoint(self, path: str) -> Checkpoint:
        self.checkpoints += 1
        checkpoint = Checkpoint(self.applied_index, self.applied_term, self.members)
        self.files.make_dirs(path)
        for name, content in {**self.state, META: msgspec.msgpack.encode(checkpoint)}.items():
            file = self.files.open(f"{path}/{name}", create=True)
            file.write_at(0, [content])
            file.sync()
            file.close()
        self.files.sync_dir(path)
        return checkpoint

    def inspect(self, path: str) -> Checkpoint:
        if self.inspect_error is not None:
            raise self.inspect_error
        return msgspec.msgpack.decode(self.files.read(f"{path}/{META}"), type=Checkpoint)

    def restore(self, path: str) -> None:
        checkpoint = self.inspect(path)
        self.applied_index, self.applied_term, self.members = checkpoint
        self.state = {name: self.files.read(f"{path}/{name}") for name in self.files.list_dir(path) if name != META}

    def close(self) -> None:
        pass


class Node:
    def __init__(self, world: World, name: str, state: dict[str, bytes], index: int, bytes_per_s: int) -> None:
        self.name = name
        self.time = world.time
        self.files = FaultyFiles()
        self.files.make_dirs("data")
        env = Environment(world.time, random.Random(name), world.time, world.network.host(name), self.files)
        self.machine = FileMachine(self.files, state, index)
        self.directory = StateDirectory(self.files, "data/state")
        self.machine.checkpoint(self.directory.current())
        self.machine.checkpoints = 0
        self.offers: list[tuple[str, Checkpoint]] = []
        self.arrived: list[tuple[str, Checkpoint]] = []
        self.bodies: list[tuple[float, bytes]] = []
        self.refuse_offer: KvError | None = None
        self.refuse_install: KvError | None = None
        self.finish_later: list[Callable[[], None]] | None = None
        self.results: dict[str, tuple[KvError | None, Checkpoint | None]] = {}
        self.transport = Transport(env, Identity("c", name, f"id-{name}"), f"{name}:1", self)
        self.snapshots = Snapshots(env, self.machine, self.directory, self.transport, self, bytes_per_s=bytes_per_s)
        run(self.transport.start())

    # --- the transport's handler ---

    def accept(self, identity: Identity) -> tuple[str, str] | None:
        return None

    judge = accept

    def peer_up(self, name: str) -> None:
        pass

    def peer_down(self, name: str) -> None:
        pass

    def peer_drained(self, name: str) -> None:
        pass

    def received(self, name: str, body: bytes) -> None:
        self.bodies.append((self.time.now_s, body))

    # --- the snapshots' handler ---

    def snapshot_offered(self, peer: str, checkpoint: Checkpoint) -> KvError | None:
        self.offers.append((peer, checkpoint))
        return self.refuse_offer

    def snapshot_held(self, checkpoint: Checkpoint) -> bool:
        return self.machine.applied_index >= checkpoint.index

    def snapshot_received(
        self, peer: str, checkpoint: Checkpoint, path: str, finish: Callable[[KvError | None], None]
    ) -> None:
        self.arrived.append((peer, checkpoint))

        def install() -> None:
            if self.refuse_install is None:
                self.machine.restore(path)
                self.directory.switch(path)
            finish(self.refuse_install)

        if self.finish_later is not None:
            self.finish_later.append(install)
        else:
            install()

    # --- what the tests look at ---

    def send(self, peer: str) -> None:
        self.results.pop(peer, None)
        self.snapshots.send(peer, lambda error, checkpoint: self.results.__setitem__(peer, (error, checkpoint)))

    def state_names(self) -> list[str]:
        return self.files.list_dir("data/state")


class World:
    def __init__(self, *names: str, size_bytes: int = 3 * MIB, bytes_per_s: int = 1000 * MIB) -> None:
        self.time = VirtualTime()
        self.network = FakeNetwork(self.time)
        self.nodes = {name: Node(self, name, {"old": b"old"}, index=7, bytes_per_s=bytes_per_s) for name in names}
        sender = self.nodes["n1"].machine
        sender.state, sender.applied_index = some_files(size_bytes), 100
        for node in self.nodes.values():
            node.transport.set_peers({name: f"{name}:1" for name in names if name != node.name})
        self.time.run_until(
            lambda: all(
                node.transport.connected(other) for node in self.nodes.values() for other in names if other != node.name
            )
        )

    def run_until_sent(self, peer: str, within_s: float = 30.0) -> KvError | None:
        """Until n1's snapshot for this peer is done, and what was left over is removed; the error, or None."""
        sender = self.nodes["n1"]
        self.time.run_until(lambda: peer in sender.results, within_s)
        error, checkpoint = sender.results[peer]
        assert (error is None) == (checkpoint is not None)
        assert not sender.snapshots.sending_to(peer)
        self.time.advance(0.1)
        return error

    def stop(self) -> None:
        for node in self.nodes.values():
            node.snapshots.stop()
            node.transport.stop()
        self.time.advance(5)
        assert not self.network.streams
