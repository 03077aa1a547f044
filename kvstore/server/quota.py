"""How large the store may become: above it, the leader takes no more of what makes it larger.

The size is that of the state machine: all records, and the history that is kept; what its files take is about that or
less. It is an admission rule of the leader's door, not of the log: what a leader let in is applied on every node,
whatever their quotas are.
"""

from __future__ import annotations

from collections.abc import Callable

from kvstore import model
from kvstore.env import Log
from kvstore.errors import Refused
from kvstore.server.ports import Machine

# The alarm ends this much below the quota, so that it does not come and go with every write.
_CLEAR_AT = 0.95

QUOTA = "quota"
"""The alarm's name."""


class Quota:
    """One per node. `look` after every apply; `check` before a write is taken."""

    def __init__(self, quota_bytes: int, machine: Callable[[], Machine], log: Log) -> None:
        """`quota_bytes` 0: no quota."""
        self._quota_bytes = quota_bytes
        self._machine = machine
        self._log = log
        self.exceeded = False

    def look(self) -> None:
        """Judge the size anew. Costs a microsecond."""
        if not self._quota_bytes:
            return
        size_bytes = self._machine().size_bytes
        if self.exceeded:
            if size_bytes < self._quota_bytes * _CLEAR_AT:
                self.exceeded = False
                self._log.info("quota_alarm_over", size_bytes=size_bytes, quota_bytes=self._quota_bytes)
        elif size_bytes >= self._quota_bytes:
            self.exceeded = True
            self._log.error(
                "quota_alarm",
                size_bytes=size_bytes,
                quota_bytes=self._quota_bytes,
                message="only deletes, reads and compaction are taken; delete and compact, or raise --quota",
            )

    def check(self, mutation: model.Mutation) -> None:
        """Raises `Refused(quota_exceeded)` for what may make the store larger, while it is too large."""
        if self.exceeded and _may_grow(mutation):
            raise Refused(
                f"the store has reached its quota of {self._quota_bytes} bytes, and takes only deletes and reads; "
                "delete what is not needed, then `kvstore compact`, or raise --quota on all nodes",
                code="quota_exceeded",
            )


def _may_grow(operation: object) -> bool:
    if isinstance(operation, model.Txn):
        return any(_may_grow(inner) for branch in (operation.success, operation.failure) for inner in branch)
    return isinstance(operation, (model.Put, model.Add, model.GrantLease))


__all__ = ["QUOTA", "Quota"]
