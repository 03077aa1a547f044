"""Whole nodes on a fake network and fake disks, in virtual time.

- `PayloadList`: a state machine that keeps what it was given.
- `Cluster`: real `RaftNode`s, each with a disk that loses what was not synced.
- `ScriptedPeer`: a member that says only what the test tells it to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec
import pytest

from kvstore.env import Environment
from kvstore.raft import messages
from kvstore.raft.config import RaftConfig
from kvstore.raft.fsm import Checkpoint, EntryKind
from kvstore.raft.guard import Action
from kvstore.raft.members import Configuration
from kvstore.raft.messages import Message
from kvstore.raft.node import RaftNode
from kvstore.raft.transport import Identity, Transport
from kvstore.raft.wal import Wal
from tests.fake_files import FaultyFiles, Keep, keep_nothing
from tests.fake_network import FakeNetwork, VirtualTime, run
from tests.raft_fixtures import ELECTION_MAX_S, ELECTION_MIN_S, Answer, Lines, configuration

M = TypeVar("M")


class _Image(msgspec.Struct, array_like=True):
    index: int
    term: int
    members: bytes
    payloads: list[tuple[int, bytes]]


class PayloadList:
    """Keeps the data payloads that were applied, with their indexes. On disk: what the last flush wrote."""

    def __init__(self, files: FaultyFiles, path: str) -> None:
        self._files = files
        self._path = path
        self._image = _Image(0, 0, b"", [])
        self.is_flush_due = False
        self.raises_at: Callable[[int, bytes], bool] = lambda _index, _payload: False
        files.make_dirs(path)
        if files.exists(f"{path}/image"):
            self._image = _read(files, path)

    @property
    def applied_index(self) -> int:
        return self._image.index

    @property
    def applied_term(self) -> int:
        return self._image.term

    @property
    def members(self) -> bytes:
        return self._image.members

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, payload in self._image.payloads]

    def apply(self, index: int, term: int, kind: EntryKind, payload: bytes | memoryview) -> Any:
        assert index == self._image.index + 1
        if self.raises_at(index, bytes(payload)):
            raise ValueError("this machine does not like the payload")
        image = self._image
        image.index, image.term = index, term
        if kind == EntryKind.DATA:
            image.payloads.append((index, bytes(payload)))
        elif kind == EntryKind.MEMBERS:
            image.members = bytes(payload)
        return f"applied at {index}"

    def flush_due(self) -> bool:
        return self.is_flush_due

    def flush(self) -> int:
        self.is_flush_due = False
        self._write(self._path)
        return self._image.index

    def checkpoint(self, path: str) -> Checkpoint:
        self._files.make_dirs(path)
        self._write(path)
        return self.inspect(path)

    def inspect(self, path: str) -> Checkpoint:
        image = _read(self._files, path)
        return Checkpoint(image.index, image.term, image.members)

    def restore(self, path: str) -> None:
        self._image = _read(self._files, path)
        self._path = path

    def close(self) -> None:
        return

    def _write(self, path: str) -> None:
        self._files.replace(f"{path}/image", msgspec.msgpack.encode(self._image))


def _read(files: FaultyFiles, path: str) -> _Image:
    return msgspec.msgpack.decode(files.read(f"{path}/image"), type=_Image)


def image_of(index: int, term: int, members: Configuration, payloads: Iterable[tuple[int, bytes]] = ()) -> bytes:
    """What a `PayloadList` that has applied up to `index` has on its disk."""
    return msgspec.msgpack.encode(_Image(index, term, members.encode(), list(payloads)))


# --- whole nodes ------------------------------------------------------------------------------------------------------


class Cluster:
    """Nodes by name on one fake network; `files[name]` is a node's disk. Times are virtual seconds.

    `voters` is the configuration that each begins with, also of members that are only scripted or do not exist.
    """

    def __init__(
        self, voters: Iterable[str] = "abc", *, seed: int = 1, listens: bool = True, thread_s: float = 0.0
    ) -> None:
        self.chance = random.Random(seed)
        self.time = VirtualTime(thread_s=thread_s)
        self.time.advance(1.0)
        self.network = FakeNetwork(self.time)
        self.members = configuration(voters)
        self.files: dict[str, FaultyFiles] = {}
        self.nodes: dict[str, RaftNode] = {}
        self.logs: dict[str, Lines] = {}
        self.listens = listens

    def disk(self, name: str) -> FaultyFiles:
        return self.files.setdefault(name, FaultyFiles(random.Random(self.chance.random())))

    def environment(self, name: str) -> Environment:
        return Environment(self.time, self.chance, self.time, self.network.host(name), self.disk(name))

    def start(self, *names: str, members: Configuration | None = None, called: str = "") -> list[RaftNode]:
        """`called`: the member name of a node whose host has another one, as a replacement's has."""
        for name in names:
            files = self.disk(name)
            config = RaftConfig(
                name=called or name,
                cluster_id="cluster",
                listen_address=f"{name}:1" if self.listens else "",
                members=(members or self.members).members,
                heartbeat_ms=100,
                election_min_ms=int(ELECTION_MIN_S * 1000),
                election_max_ms=int(ELECTION_MAX_S * 1000),
            )
            self.logs[name] = Lines()
            open_machine = self._opener(files)
            self.nodes[name] = node = RaftNode(config, self.environment(name), "/data", open_machine, self.logs[name])
            run(node.start())
        return [self.nodes[name] for name in names]

    @staticmethod
    def _opener(files: FaultyFiles) -> Callable[[str], PayloadList]:
        return lambda path: PayloadList(files, path)

    def machine(self, name: str) -> PayloadList:
        machine = self.nodes[name].machine
        assert isinstance(machine, PayloadList)
        return machine

    def wal(self, name: str) -> Wal:
        return self.nodes[name]._wal

    def crash(self, name: str, keep: Keep = keep_nothing) -> None:
        """Power loss: the process is gone, its connections break, and its disk keeps what it had to keep."""
        node = self.nodes.pop(name)
        node._running = False  # what is still scheduled does nothing
        for stream in [stream for stream in self.network.streams if name in (stream.host, stream.other.host)]:
            stream.lose_soon(ConnectionResetError("the host crashed"))
        node._transport.stop()
        self.files[name].crash(keep)

    def prepare_log(
        self, name: str, entries: Iterable[tuple[bytes, int, int]], *, voted_for: str | None = None
    ) -> None:
        """Write a log for a node that is not started yet, as an earlier run of it could have left it."""
        files = self.disk(name)
        wal = Wal.open(files, "/data/wal", node_id=f"id-{name}")
        for entry in entries:
            wal.append(*entry)
        wal.set_term(wal.last_term, voted_for)
        wal.close()

    def prepare_state(self, name: str, image: bytes) -> None:
        files = self.disk(name)
        files.make_dirs("/data/state/state-0")
        files.replace("/data/state/state-0/image", image)

    @property
    def leader(self) -> RaftNode | None:
        """The node that leads in the highest term."""
        leaders = [node for node in self.nodes.values() if node.is_leader]
        return max(leaders, key=lambda node: node.term) if leaders else None

    def elect(self, within_s: float = 10.0) -> RaftNode:
        """Let time pass until a leader has committed an entry of its term and all nodes know it."""

        def settled() -> bool:
            leader = self.leader
            return leader is not None and all(
                node.leader == leader.config.name and node.machine.applied_term == leader.term
                for node in self.nodes.values()
                if node.failure is None
            )

        self.time.run_until(settled, within_s)
        assert self.leader is not None
        return self.leader

    def lead(self, name: str) -> RaftNode:
        """Make this node the leader."""
        leader = self.elect()
        if leader.config.name != name:
            leader.transfer(name, Answer())
            self.time.run_until(lambda: self.nodes[name].is_leader)
            self.elect()
        return self.nodes[name]

    def followers(self) -> list[RaftNode]:
        return [node for node in self.nodes.values() if not node.is_leader]

    def propose(self, node: RaftNode, text: str | int) -> Answer:
        answer = Answer()
        node.propose(str(text).encode(), answer.with_result)
        return answer

    def commit(self, *texts: str | int) -> None:
        """Have the leader commit these, and wait until all nodes have applied them."""
        leader = self.elect()
        answers = [self.propose(leader, text) for text in texts]
        self.wait(*answers)
        assert [answer.error for answer in answers] == [None] * len(answers)
        self.time.run_until(
            lambda: all(node.machine.applied_index == leader.machine.applied_index for node in self.nodes.values())
        )

    def make_lag(self, name: str) -> None:
        """Crash this node, and let the others go on until their logs begin after what it holds."""
        self.crash(name)
        self.commit(*range(20))
        self.time.advance(0.5)
        for other, node in self.nodes.items():
            node.machine.flush()
            self.wal(other).drop_before(node.machine.applied_index, 0)

    def has_logged(self, name: str, event: str) -> bool:
        return any(line == event for line, _ in self.logs[name].lines)

    def count_turns(self, name: str, monkeypatch: pytest.MonkeyPatch, for_s: float) -> int:
        """How often a node wakes in this time."""
        guard, count = self.nodes[name]._guard, 0
        tick = guard.tick

        def counted(now: float) -> list[Action]:
            nonlocal count
            count += 1
            return tick(now)

        monkeypatch.setattr(guard, "tick", counted)
        self.time.advance(for_s)
        return count

    def isolate(self, name: str) -> None:
        for other in self.nodes:
            if other != name:
                self.network.cut(name, other)

    def wait(self, *answers: Answer) -> None:
        """Let time pass until these are there."""
        self.until(lambda: all(answer.is_done for answer in answers))

    def until(self, condition: Callable[[], object], within_s: float = 10.0) -> float:
        return self.time.run_until(condition, within_s)


class ScriptedPeer:
    """A member of a cluster, as far as the wire goes: says what the test says, and lists what it hears."""

    def __init__(self, cluster: Cluster, name: str, *partners: str) -> None:
        self.cluster = cluster
        self.name = name
        self.inbox: list[Message] = []
        env = cluster.environment(name)
        self.transport = Transport(env, Identity("cluster", name, f"id-{name}", f"{name}:1"), f"{name}:1", self)
        run(self.transport.start())
        self.transport.set_peers({partner: f"{partner}:1" for partner in partners})
        cluster.until(lambda: all(self._is_connected(partner) for partner in partners))

    def _is_connected(self, partner: str) -> bool:
        return self.transport.connected(partner) and self.cluster.nodes[partner]._transport.connected(self.name)

    def say(self, to: str, message: Message) -> None:
        assert self.transport.send(to, messages.encode(message))

    def ask(self, to: str, message: Message, reply: type[M]) -> M:
        """Say something and wait for the next answer of this kind."""
        before = len(self.heard(reply))
        self.say(to, message)
        self.cluster.until(lambda: len(self.heard(reply)) > before, within_s=1.0)
        return self.heard(reply)[-1]

    def heard(self, kind: type[M]) -> list[M]:
        return [message for message in self.inbox if isinstance(message, kind)]

    def accept(self, identity: Identity) -> tuple[str, str] | None:
        return None

    judge = accept

    def peer_up(self, name: str) -> None:
        return

    peer_down = peer_drained = peer_up

    def received(self, name: str, body: bytes) -> None:
        self.inbox.append(messages.decode(body))
