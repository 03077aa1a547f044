"""Snapshots over real sockets, on real files, with real threads."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from kvstore.env import Environment, LoopScheduler, SystemClock, SystemFiles, TcpNetwork
from kvstore.errors import KvError
from kvstore.raft.fsm import Checkpoint
from kvstore.raft.snapshot import Snapshots, StateDirectory
from kvstore.raft.transport import Identity, Transport
from tests.unit.snapshot_world import MIB, FileMachine, some_files

WITHIN_S = 20.0


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that other callbacks on this loop bring about."""
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.001)


class Node:
    def __init__(self, env: Environment, name: str, data: Path, state: dict[str, bytes]) -> None:
        self.name = name
        self.data = data / name
        self.ups: set[str] = set()
        self.machine = FileMachine(env.files, state, index=len(state))
        self.directory = StateDirectory(env.files, str(self.data / "state"))
        self.machine.checkpoint(self.directory.current())
        self.transport = Transport(env, Identity("c", name, f"id-{name}"), "127.0.0.1:0", self)
        self.snapshots = Snapshots(env, self.machine, self.directory, self.transport, self)

    def accept(self, identity: Identity) -> tuple[str, str] | None:
        return None

    judge = accept

    def peer_up(self, name: str) -> None:
        self.ups.add(name)

    def peer_down(self, name: str) -> None:
        pass

    def peer_drained(self, name: str) -> None:
        pass

    def received(self, name: str, body: bytes) -> None:
        pass

    def snapshot_offered(self, peer: str, checkpoint: Checkpoint) -> KvError | None:
        return None

    def snapshot_held(self, checkpoint: Checkpoint) -> bool:
        return False

    def snapshot_received(
        self, peer: str, checkpoint: Checkpoint, path: str, finish: Callable[[KvError | None], None]
    ) -> None:
        self.machine.restore(path)
        self.directory.switch(path)
        finish(None)

    def state_names(self) -> list[str]:
        return sorted(path.name for path in (self.data / "state").iterdir())


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Node, Node]]:
    loop = asyncio.get_running_loop()
    scheduler = LoopScheduler(loop)
    env = Environment(SystemClock(), random.SystemRandom(), scheduler, TcpNetwork(loop), SystemFiles())
    nodes = Node(env, "n1", tmp_path, some_files(20 * MIB)), Node(env, "n2", tmp_path, {"old": b"old"})
    for node in nodes:
        await node.transport.start()
    for node, other in zip(nodes, reversed(nodes), strict=True):
        node.transport.set_peers({other.name: other.transport.address})
    await until(lambda: all(node.ups for node in nodes))
    yield nodes
    for node in nodes:
        await node.snapshots.finish()
        node.transport.stop()
    await until(lambda: not any(node.transport._connections for node in nodes))
    scheduler.close()


async def test_a_snapshot_arrives_whole_though_its_stream_breaks(pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    results: list[tuple[KvError | None, Checkpoint | None]] = []
    sender.snapshots.send("n2", lambda *result: results.append(result))
    for part in (0.2, 0.6):

        def is_far_enough(part: float = part) -> bool:
            partial = receiver.snapshots._receiver._partial
            return partial is not None and sum(partial.positions) > part * 20 * MIB

        await until(is_far_enough)
        for connection in list(receiver.transport._streams):
            connection.abort(KvError("broken for the test"))
    await until(lambda: results)
    assert results == [(None, Checkpoint(5, 1, b"members"))]
    assert receiver.machine.state == sender.machine.state
    await until(lambda: receiver.state_names() == ["CURRENT", "state-1"])
    await until(lambda: sender.state_names() == ["CURRENT", "state-0"])


async def test_finish_waits_for_the_threads(pair: tuple[Node, Node]) -> None:
    sender, receiver = pair
    sender.snapshots.send("n2", lambda error, checkpoint: pytest.fail("nobody is told after stop"))
    await until(lambda: receiver.snapshots._receiver._partial)
    await asyncio.gather(sender.snapshots.finish(), receiver.snapshots.finish())
    assert sender.state_names() == ["CURRENT", "state-0"]
    receiver.directory.sweep()
    assert receiver.state_names() == ["CURRENT", "state-0"]
