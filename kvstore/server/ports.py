"""What the server's parts ask of one another and of the rooms below, as protocols.

The real ones are `raft.node.RaftNode`, `state.machine.Machine`, and the doors in this folder; a test may hand in its
own. Everything here runs on the node's event loop, one call at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from kvstore import codec, model
from kvstore.env import Log
from kvstore.errors import KvError
from kvstore.meters import Meter
from kvstore.state.feed import Changed, LargeRevision, Place

__all__ = ["Done", "Gate", "Log", "Machine", "Proposer", "Raft", "RaftStatus", "Reply"]

Reply = Callable[[codec.ServerFrame], None]
"""Takes the one answer to a frame. Never raises, whatever became of the asker: it is called from inside an apply."""

Done = Callable[[KvError | None], None]


class Gate(Protocol):
    """An asker that reads its answers slowly may have its further reads held back until it has room for them."""

    @property
    def congested(self) -> bool:
        """True while more waits to be sent to the asker than it should."""

    def postpone(self, work: Callable[[], object]) -> None:
        """Run `work` once there is room. Dropped if the asker goes away."""

    def push(self, frame: codec.SentFrame) -> None:
        """Send what answers no single frame: what a watch is told. Calls nobody back before it returns."""


class Proposer(Protocol):
    """The part of `RaftNode` that the batcher needs."""

    @property
    def is_leader(self) -> bool: ...

    @property
    def leader(self) -> str:
        """The leader's name; empty where none is known."""

    @property
    def accepting(self) -> bool:
        """Leader, and able to take proposals now."""

    @property
    def failure(self) -> KvError | None:
        """Why this node takes no part any more (its disk, a bug, its removal); None while it does."""

    def propose(self, payload: bytes, done: Callable[[Any, KvError | None], None]) -> None:
        """`done(results, None)` once applied; `Unavailable` if it was surely not proposed, else `OutcomeUnknown`."""


class RaftStatus(Protocol):
    """What consensus says of itself."""

    @property
    def role(self) -> str: ...
    @property
    def term(self) -> int: ...
    @property
    def commit_index(self) -> int: ...
    @property
    def applied_index(self) -> int: ...
    @property
    def last_index(self) -> int: ...
    @property
    def durable_index(self) -> int: ...
    @property
    def peers(self) -> Sequence[model.PeerStatus]: ...
    @property
    def storage_error(self) -> str: ...
    @property
    def common_version(self) -> int: ...
    @property
    def receiving_bytes(self) -> tuple[int, int]: ...


class Raft(Proposer, Protocol):
    """`RaftNode`, as the server uses it."""

    on_leadership: Callable[[bool], None]
    on_applied: Callable[[], None]
    on_fatal: Callable[[KvError], None]

    @property
    def node_id(self) -> str: ...

    @property
    def machine(self) -> Any:
        """The live state machine; another object after a snapshot was installed."""

    @property
    def term(self) -> int: ...

    @property
    def members(self) -> tuple[model.Member, ...]: ...

    @property
    def apply_times(self) -> Meter: ...

    @property
    def sync_times(self) -> Meter: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def read_index(self, done: Done) -> None:
        """When `done(None)` runs, the machine holds every write that was acknowledged before the call."""

    def status(self) -> RaftStatus: ...

    def add_learner(self, member: model.Member, done: Done, *, version: int = 0) -> None:
        """`version`: what it must not be known to lack."""

    def promote(self, name: str, done: Done, *, version: int = 0) -> None:
        """`version`: what it must understand."""

    def remove(self, name: str, done: Done, *, force: bool = False) -> None: ...

    def transfer(self, name: str, done: Done) -> None: ...


class Machine(Protocol):
    """`state.machine.Machine`, as the server uses it."""

    @property
    def revision(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def version(self) -> int:
        """The cluster's version (see `versions.py`)."""

    @property
    def applied_term(self) -> int: ...

    @property
    def log_time_ms(self) -> int:
        """Log time of the last applied batch; 0 before the first."""

    @property
    def stamped_index(self) -> int: ...

    def prefetch(self, requests: Iterable[model.Read]) -> None:
        """Before several reads: makes them cheaper, and changes no answer. Raises `OSError`."""

    def read(self, request: model.Read, log_time_ms: int = 0) -> bytes:
        """The encoded result of a read at the applied state; `log_time_ms` is log time as it would be now."""

    @property
    def compacted_revision(self) -> int: ...

    def fresh_changes(self, first: int, most: int) -> list[Changed | LargeRevision] | None: ...

    def read_changes(self, place: Place) -> Iterator[Changed]: ...

    def event(self, changed: Changed, prev: bool) -> bytes: ...

    def expiry_due(self, log_time_ms: int) -> bool: ...

    def lease_expiry_due(self, log_time_ms: int) -> bool: ...

    def stamp_due(self, log_time_ms: int) -> bool: ...

    def compaction_due(self, log_time_ms: int) -> int | None: ...

    def digest(self) -> str: ...

    def describe(self, digest: bool) -> dict[str, int | str]: ...
