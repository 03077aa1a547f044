"""The stock engine, driven by hand: what pysyncobj 0.3.17 does where ours does better. Only for tests of its faults.

Names after two underscores are its private ones; `peek` and `poke` read and write them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from pysyncobj import SyncObj, SyncObjConf, replicated
from pysyncobj.node import Node
from pysyncobj.transport import Transport

# It logs exceptions that it swallows; the tests provoke them.
logging.getLogger("pysyncobj").setLevel(logging.CRITICAL + 1)

NOOP = b"\x01"


class Wire(Transport):  # type: ignore[misc]  # pysyncobj has no types
    """Takes what the engine sends, and delivers nothing."""

    def __init__(self) -> None:
        super().__init__(None, None, [])
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        self.sent.append((node.id, message))
        return True


class Stock(SyncObj):  # type: ignore[misc]
    """A stock engine with one replicated command. `stored` is what was applied."""

    def __init__(self, name: str, others: Iterable[str], **conf: Any) -> None:
        self.stored: list[Any] = []
        self.wire = Wire()
        settings: dict[str, Any] = {"autoTick": False, "dynamicMembershipChange": True}
        super().__init__(
            Node(name),
            [Node(other) for other in others],
            conf=SyncObjConf(**(settings | conf)),
            transport=self.wire,
            nodeClass=Node,
        )

    @replicated  # type: ignore[untyped-decorator]
    def store(self, value: Any) -> Any:
        self.stored.append(value)
        return value

    @replicated  # type: ignore[untyped-decorator]
    def explode(self) -> None:
        raise ValueError("a command that raises")

    def peek(self, name: str) -> Any:
        return getattr(self, f"_SyncObj__{name}")

    def poke(self, name: str, value: Any) -> None:
        setattr(self, f"_SyncObj__{name}", value)

    @property
    def log(self) -> Any:
        return self.peek("raftLog")

    @property
    def end(self) -> int:
        last: int = self.log[-1][1]
        return last

    def node(self, name: str) -> Node:
        return next(node for node in self.peek("otherNodes") | self.peek("readonlyNodes") if node.id == name)

    def receive(self, name: str, **message: Any) -> None:
        self.peek("onMessageReceived")(self.node(name), message)

    def append(
        self, name: str, term: int, previous: tuple[int, int], *entries: tuple[bytes, int, int], **more: Any
    ) -> None:
        """Receive an append_entries from `name`."""
        fields = {"commit_index": 1, "prevLogIdx": previous[0], "prevLogTerm": previous[1], "entries": list(entries)}
        self.receive(name, type="append_entries", term=term, **(fields | more))

    def acknowledge(self, name: str, next_index: int, success: bool = True) -> None:
        """Receive an acknowledgement from `name`."""
        self.receive(name, type="next_node_idx", next_node_idx=next_index, reset=not success, success=success)

    def connect(self) -> None:
        for node in self.peek("otherNodes"):
            self.peek("onNodeConnected")(node)

    def lead(self, term: int) -> None:
        self.poke("raftCurrentTerm", term)
        self.connect()
        self.peek("onBecomeLeader")()
        self.wire.sent.clear()

    def campaign(self) -> None:
        """Raise the term and ask for votes."""
        self.connect()
        self.poke("raftElectionDeadline", 0)
        self.tick()

    def fill(self, last_index: int, term: int) -> None:
        """Put empty entries into its log up to an index."""
        for index in range(self.end + 1, last_index + 1):
            self.log.add(NOOP, index, term)

    def tick(self) -> None:
        self._onTick(0)

    def heartbeat(self) -> None:
        """A tick in which a leader's next append is due."""
        self.poke("newAppendEntriesTime", 0)
        self.tick()

    def said(self, kind: str) -> list[dict[str, Any]]:
        return [message for _, message in self.wire.sent if message["type"] == kind]


def membership_change(kind: str, name: str) -> bytes:
    """An entry that adds ("add") or removes ("rem") a member, as the stock engine writes it."""
    import pysyncobj.pickle

    return b"\x02" + bytes(pysyncobj.pickle.dumps([kind, name, Node(name)]))
