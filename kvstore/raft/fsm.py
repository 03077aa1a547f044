"""What consensus asks of the state machine above it. The only thing that `raft` and `state` share.

As in hashicorp/raft's FSM, but the machine also keeps what Raft must find again after a restart in the same atomic
batch as its data: the applied index, that entry's term, and the members. So they can never disagree.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Protocol

from kvstore.model import Checkpoint as Checkpoint


class EntryKind(IntEnum):
    """First byte of every log entry. 0, 2 and 3 would mean something to the engine, so we never use them."""

    NOOP = 1  # the engine's own: a leader's first entry, and the first entry of an empty log
    DATA = 16  # a batch of requests; opaque here
    MEMBERS = 17  # a whole configuration of the cluster


class StateMachine(Protocol):
    """Called on the node's loop, one call at a time, but where a method says that it runs in a thread."""

    @property
    def applied_index(self) -> int:
        """Index of the last applied entry; 0 for an empty state."""

    @property
    def applied_term(self) -> int:
        """Term of the last applied entry."""

    @property
    def members(self) -> bytes:
        """The payload of the last applied MEMBERS entry; empty before the first."""

    def apply(self, index: int, term: int, kind: EntryKind, payload: bytes | memoryview) -> Any:
        """Apply the entry after `applied_index`, atomically. What a request did wrong is its result; an exception
        means a bug or a failing disk, and the node stops applying for good."""

    def flush_due(self) -> bool:
        """True when enough was applied since the last flush that one should start."""

    def flush(self) -> int:
        """Make the state durable. Runs in a thread, beside `apply`. Returns an index that is covered for sure."""

    def checkpoint(self, path: str) -> Checkpoint:
        """Flush, then write a consistent, durable copy into the new directory `path`. Runs in a thread, beside
        `apply`."""

    def inspect(self, path: str) -> Checkpoint:
        """What a checkpoint directory holds. Raises if it is damaged. Runs in a thread."""

    def restore(self, path: str) -> None:
        """Replace the whole state by the checkpoint in `path`, which is the machine's own directory from now on."""

    def close(self) -> None:
        """Release everything. Flushes first where that is possible."""
