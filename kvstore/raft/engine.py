"""pysyncobj opened at its seams: the one file that may import it or touch its private names.

The engine elects, replicates and commits; it is stock pysyncobj 0.3.17. This wrapper replaces everything around it:

- **transport**: what the engine sends comes out as dicts through `emit`; what peers say goes in through `deliver_*`.
- **journal**: our `Wal`.
- **clock**: injected, and chance taken away (it would draw only deadlines). `pysyncobj.syncobj` looks both up as module
  globals, so each engine executes a private copy of that module; nothing in the process's own pysyncobj is patched,
  and engines share nothing.
- **pickle**: bound to a codec that refuses. No entry of ours is of a type that the engine would decode.
- **commands** are opaque: an entry's first byte is its `EntryKind`, none of which the engine's apply step acts on.
- **members** are given to it by `set_members`; it never changes them by itself.
- **elections**: its own deadline is held at infinity; `tick(campaign=True)` sets it to 0 for one tick.
- **dumps and compaction** are out of its reach: the serializer is replaced by one that has nothing to serialise.

`PRIVATE_NAMES` lists every private name that is touched here; a test fails if the installed version lacks one.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Collection
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any, cast

import pysyncobj.syncobj
from pysyncobj.config import SERIALIZER_STATE, SyncObjConf
from pysyncobj.journal import Journal
from pysyncobj.node import Node
from pysyncobj.transport import Transport
from pysyncobj.version import VERSION

from kvstore.env import Clock
from kvstore.errors import StartupError
from kvstore.raft.fsm import EntryKind
from kvstore.raft.wal import Wal

PYSYNCOBJ_VERSION = "0.3.17"

# Above our largest entry (1.5 MiB and its batch), so that the engine never splits one in the path of its own.
APPEND_BYTES_MAX = 4 * 1024 * 1024

PRIVATE_NAMES = (
    "_SyncObj__commandsQueue",
    "_SyncObj__connectedNodes",
    "_SyncObj__lastResponseTime",
    "_SyncObj__needLoadDumpFile",
    "_SyncObj__newAppendEntriesTime",
    "_SyncObj__onMessageReceived",
    "_SyncObj__otherNodes",
    "_SyncObj__raftCommitIndex",
    "_SyncObj__raftElectionDeadline",
    "_SyncObj__raftLastApplied",
    "_SyncObj__raftLeader",
    "_SyncObj__raftMatchIndex",
    "_SyncObj__raftNextIndex",
    "_SyncObj__raftState",
    "_SyncObj__readonlyNodes",
    "_SyncObj__serializer",
    "_applyCommand",
    "_isLeader",
    "_poller",
)
# Module globals of `pysyncobj.syncobj` that an engine's private copy of it gets anew.
MODULE_NAMES = ("PIPE_NOTIFIER_ENABLED", "createJournal", "createPoller", "monotonicTime", "pickle", "random")

_FOLLOWER, _CANDIDATE, _LEADER = 0, 1, 2


class PickleRefused(Exception):
    """Something asked the engine to pickle or unpickle. Nothing of ours may."""


class _RefusingCodec:
    """Stands where the engine's modules expect pickle."""

    @staticmethod
    def loads(_data: object) -> Any:
        raise PickleRefused("loads")

    @staticmethod
    def dumps(_value: object, _protocol: object = None) -> bytes:
        raise PickleRefused("dumps")


class _NoPoller:
    """The engine polls its sockets once a tick; it has none."""

    def poll(self, _timeout: float) -> None:
        return


class _NoSerializer:
    """The engine's own snapshots, which we never use: there is nothing to send and nothing to compact."""

    def checkSerializing(self) -> tuple[int, None]:  # noqa: N802 (the engine's name)
        return SERIALIZER_STATE.NOT_SERIALIZING, None

    def getTransmissionData(self, _node: Node) -> None:  # noqa: N802
        return None

    def cancelTransmisstion(self, _node: Node) -> None:  # noqa: N802
        return


class _WalJournal(Journal):  # type: ignore[misc]  # pysyncobj has no types
    """The engine's journal interface on our log."""

    def __init__(self, wal: Wal, changed: Callable[[], None]) -> None:
        self._wal = wal
        self._members_changed = changed

    def add(self, command: bytes, idx: int, term: int) -> None:
        self._wal.append(command, idx, term)
        if command[0] == EntryKind.MEMBERS:
            self._members_changed()

    def deleteEntriesFrom(self, entryFrom: int) -> None:  # noqa: N802, N803
        self._wal.truncate_from(self._wal.first_index + entryFrom)
        self._members_changed()

    def deleteEntriesTo(self, entryTo: int) -> None:  # noqa: N802, N803
        raise AssertionError("the log drops its own head; the engine's compaction is out of reach")

    def clear(self) -> None:
        raise AssertionError("only an installed snapshot resets the log, and that is not the engine's affair")

    def __getitem__(self, at: Any) -> Any:
        return self._wal.entries[at]

    def __len__(self) -> int:
        return len(self._wal.entries)

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:  # noqa: N802, N803
        self._wal.set_term(term, votedForNodeId)

    def getCurrentTerm(self) -> int:  # noqa: N802
        return self._wal.term

    def getVotedForNodeId(self) -> str | None:  # noqa: N802
        return self._wal.voted_for

    # The commit index is not written: after a restart it is what the state machine has applied (fault 5).
    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:  # noqa: N802, N803
        return

    def getRaftCommitIndex(self) -> int:  # noqa: N802
        return 1

    def _destroy(self) -> None:
        return


class _EmittingTransport(Transport):  # type: ignore[misc]
    """What the engine sends, handed on. Connections are not its affair."""

    def __init__(self, emit: Callable[[str, dict[str, Any]], None]) -> None:
        super().__init__(None, None, [])
        self._emit = emit

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        self._emit(node.id, message)
        return True


@functools.cache
def _source() -> tuple[ModuleSpec, CodeType]:
    """`pysyncobj.syncobj` under another name, compiled once: a snapshot install builds an engine, and must not wait."""
    spec = importlib.util.spec_from_file_location("pysyncobj.syncobj_of_kvstore", pysyncobj.syncobj.__file__)
    assert spec is not None
    code = cast(InspectLoader, spec.loader).get_code(spec.name)
    assert code is not None
    return spec, code


def _private_copy() -> ModuleType:
    """The engine's module, executed once more: globals of its own to replace."""
    spec, code = _source()
    module = importlib.util.module_from_spec(spec)
    exec(code, vars(module))
    return module


class Engine:
    """One node's consensus engine over its log.

    `emit(peer, message)` is called from inside `tick` and `deliver` with the engine's own message dicts.
    `members_changed()` is called when a configuration entered or left the log.
    """

    def __init__(
        self,
        name: str,
        wal: Wal,
        applied_index: int,
        *,
        clock: Clock,
        heartbeat_s: float,
        quorum_timeout_s: float,
        emit: Callable[[str, dict[str, Any]], None],
        members_changed: Callable[[], None],
    ) -> None:
        """`applied_index`: what the state machine holds; the log must hold that entry (or be new, with 0)."""
        if VERSION != PYSYNCOBJ_VERSION:
            raise StartupError(
                f"pysyncobj {VERSION} is installed, and kvstore is built on the inside of {PYSYNCOBJ_VERSION}: "
                f"install that version",
                code="engine_unsupported",
            )
        assert applied_index == 0 or wal.term_at(applied_index) is not None
        self.name = name
        self.wal = wal
        self._clock = clock
        self._nodes: dict[str, Node] = {}
        module = _private_copy()
        for needed in MODULE_NAMES:
            assert hasattr(module, needed), needed
        vars(module).update(
            createJournal=lambda _file: _WalJournal(wal, members_changed),
            createPoller=lambda _kind: _NoPoller(),
            monotonicTime=clock.monotonic,
            pickle=_RefusingCodec,
            random=SimpleNamespace(random=lambda: 0.0),  # draws only deadlines, all of which are overwritten
            PIPE_NOTIFIER_ENABLED=False,  # it leaks two descriptors an engine (fault 20)
        )
        conf = SyncObjConf(
            autoTick=False,
            appendEntriesUseBatch=False,
            appendEntriesBatchSizeBytes=APPEND_BYTES_MAX,
            appendEntriesPeriod=heartbeat_s,
            leaderFallbackTimeout=quorum_timeout_s,
            commandsWaitLeader=False,
            dynamicMembershipChange=False,
            logCompactionMinEntries=1 << 62,
            logCompactionMinTime=1 << 62,
            # The engine draws its own election deadlines from these; we overwrite each before it can act on it.
            raftMinTimeout=quorum_timeout_s,
            raftMaxTimeout=2 * quorum_timeout_s,
        )
        self._o = o = module.SyncObj(self._node(name), [], conf, transport=_EmittingTransport(emit), nodeClass=Node)
        o._SyncObj__serializer = _NoSerializer()
        o._SyncObj__needLoadDumpFile = False
        o._SyncObj__raftLastApplied = o._SyncObj__raftCommitIndex = max(1, applied_index)
        o._SyncObj__raftElectionDeadline = math.inf

    def _node(self, name: str) -> Node:
        node = self._nodes.get(name)
        if node is None:
            node = self._nodes[name] = Node(name)
        return node

    # --- what the engine believes -----------------------------------------------------------------------------------

    @property
    def term(self) -> int:
        return self._o.raftCurrentTerm  # type: ignore[no-any-return]

    @property
    def is_leader(self) -> bool:
        return self._o._SyncObj__raftState == _LEADER  # type: ignore[no-any-return]

    @property
    def is_candidate(self) -> bool:
        return self._o._SyncObj__raftState == _CANDIDATE  # type: ignore[no-any-return]

    @property
    def leader(self) -> str:
        """Name of the leader of this term as far as the engine knows; empty if it knows none."""
        node = self._o._SyncObj__raftLeader
        return node.id if node is not None else ""

    @property
    def commit_index(self) -> int:
        return self._o._SyncObj__raftCommitIndex  # type: ignore[no-any-return]

    @property
    def next_heartbeat(self) -> float:
        """Monotonic time at which a leader's next append is due."""
        return self._o._SyncObj__newAppendEntriesTime  # type: ignore[no-any-return]

    def match_index(self, peer: str) -> int:
        return self._o._SyncObj__raftMatchIndex.get(self._node(peer), 0)  # type: ignore[no-any-return]

    def next_index(self, peer: str) -> int:
        return self._o._SyncObj__raftNextIndex.get(self._node(peer), 0)  # type: ignore[no-any-return]

    # --- what we tell it ----------------------------------------------------------------------------------------------

    def set_members(self, voters: Collection[str], learners: Collection[str]) -> None:
        """The other members from now on. A learner is the engine's 'readonly node': replicated to, never counted."""
        o = self._o
        voting = {self._node(name) for name in voters if name != self.name}
        learning = {self._node(name) for name in learners if name != self.name}
        known: dict[Node, int] = o._SyncObj__raftNextIndex
        for node in known.keys() - voting - learning:
            known.pop(node, None)
            o._SyncObj__raftMatchIndex.pop(node, None)
        now = self._clock.monotonic()
        for node in voting | learning:
            known.setdefault(node, self.wal.last_index + 1)
            o._SyncObj__raftMatchIndex.setdefault(node, 0)
            # A new voter gets a full timeout to answer before the leader counts it as missing.
            o._SyncObj__lastResponseTime.setdefault(node, now)
        o._SyncObj__otherNodes = voting
        o._SyncObj__readonlyNodes = learning

    def set_connected(self, peer: str, connected: bool) -> None:
        """Whether the engine may send to a peer now."""
        nodes: set[Node] = self._o._SyncObj__connectedNodes
        (nodes.add if connected else nodes.discard)(self._node(peer))

    def heard_from(self, peer: str) -> None:
        """A sign of life that is no acknowledgement (a peer that is receiving a snapshot)."""
        self._o._SyncObj__lastResponseTime[self._node(peer)] = self._clock.monotonic()

    def set_next_index(self, peer: str, index: int) -> None:
        """Send to this peer from `index` on."""
        node = self._node(peer)
        if node in self._o._SyncObj__raftNextIndex:
            self._o._SyncObj__raftNextIndex[node] = index

    def deliver(self, peer: str, message: dict[str, Any]) -> None:
        """Hand the engine a message that the guard let through."""
        self._o._SyncObj__onMessageReceived(self._node(peer), message)

    def deliver_ack(self, peer: str, next_index: int, success: bool, is_news: bool = True) -> None:
        """Hand the leader's engine an acknowledgement (or a refusal, which says where to go on).

        An acknowledgement must not move the next index back while entries are in flight (fault 2: that is what makes
        the stock leader send them again and again). One that is no news is no sign of life.
        """
        before, node = self.next_index(peer), self._node(peer)
        heard_at = self._o._SyncObj__lastResponseTime.get(node)
        message = {"type": "next_node_idx", "next_node_idx": next_index, "reset": not success, "success": success}
        self._o._SyncObj__onMessageReceived(node, message)
        if not is_news and heard_at is not None:
            self._o._SyncObj__lastResponseTime[node] = heard_at
        if success and before > self.next_index(peer):
            self.set_next_index(peer, before)

    def adopt_term(self, term: int) -> None:
        """Step down into a higher term, by a vote request that can only lose: no log is that far behind."""
        message = {"type": "request_vote", "term": term, "last_log_index": 0, "last_log_term": -1}
        self._o._SyncObj__onMessageReceived(self._node(self.name), message)

    def queue_proposal(self, entry: bytes) -> None:
        """The next tick appends `entry` to the log, if this node still leads by then (see `drop_proposals`)."""
        self._o._applyCommand(entry, None)

    def drop_proposals(self) -> None:
        """Forget proposals that the last tick did not take; the engine would forward them to a later leader."""
        queue = self._o._SyncObj__commandsQueue
        while True:  # ends: nothing refills the queue meanwhile
            try:
                queue.get_nowait()
            except pysyncobj.syncobj.Queue.Empty:
                return

    def tick(self, *, campaign: bool = False) -> None:
        """One step: elections if `campaign`, commit, send. Holds the engine's own election deadline at infinity."""
        o = self._o
        o._SyncObj__raftElectionDeadline = 0 if campaign else math.inf
        o.doTick(0)
        o._SyncObj__raftElectionDeadline = math.inf
