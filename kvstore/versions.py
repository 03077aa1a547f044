"""What a version of kvstore can apply, and how a cluster comes to use what is new: once all its members can.

- A node tells the others its `VERSION` in the handshake. It understands that and everything below.
- A cluster has a version of its own, in its state: 1 at first. Once all members have said that they understand more,
  the leader raises it, by a log entry; it never falls.
- An entry carries the cluster's version of when it was proposed, and a state that of the cluster. Who knows only less
  refuses both (`data_format_newer`), rather than to apply what it does not understand.
- A request that needs more than the cluster's version is refused at the leader's door (`upgrade_pending`).

So members are upgraded one after the other, in any order, and back again, as long as one old member is left.

| version | adds |
|---|---|
| 1 | records, transactions, sessions |
| 2 | leases, and records under them |
| 3 | one budget for all that a request walks over and replaces (`state/walk.py`); a full lease takes its own records |

Add a version: its line here, `VERSION`, and what needs it in `_SINCE`. Where only a decision inside `apply` becomes
another one, no request needs it: an entry is judged by the rules of its own version, on every replica and whenever it
is applied. (A refusal's words are part of the state, too, where its answer is kept for a session.)
"""

from __future__ import annotations

from kvstore import model
from kvstore.errors import Unavailable

VERSION = 3
FIRST = 1
_WITH_LEASES = 2
WITH_BUDGETS = 3
_SINCE: dict[type, int] = {
    model.GrantLease: _WITH_LEASES,
    model.KeepLease: _WITH_LEASES,
    model.RevokeLease: _WITH_LEASES,
    model.ExpireLeases: _WITH_LEASES,
    model.RaiseVersion: _WITH_LEASES,
}
NEWEST_NEED = max(_SINCE.values())
"""At this version of a cluster no request has to be looked at."""


def needed_by(operation: object) -> int:
    """The version that a cluster must have for this request."""
    if isinstance(operation, model.Txn):
        return max(
            (needed_by(inner) for branch in (operation.success, operation.failure) for inner in branch), default=1
        )
    if isinstance(operation, model.Put):
        return _WITH_LEASES if operation.lease else FIRST
    return _SINCE.get(type(operation), FIRST)


def check(mutation: model.Mutation, cluster_version: int) -> None:
    """Raises `Unavailable(upgrade_pending)`."""
    needed = needed_by(mutation)
    if needed > cluster_version:
        raise Unavailable(
            f"this request needs version {needed} on all members, and the cluster is at {cluster_version}; the leader "
            "raises it within a second once the last member is upgraded and can be reached",
            code="upgrade_pending",
        )
