"""Every error that kvstore shows to its users, each with a stable code.

Three families, because a caller can do three different things about them:

- `Refused`: the store understood the request and said no. Nothing changed. Mend the request, or the state it met.
- `Unavailable`: the request did not take effect now and may succeed later. The client retries these by itself until
  its timeout ends.
- `OutcomeUnknown`: the request may or may not have taken effect. Read before you decide.

`StartupError` is the fourth, for operators: a process that refuses to start says why, and what to do.

A code never changes its meaning; messages may. Codes are listed in `CODES`, and `error_for(code, message)` turns
what came over the wire back into the right class.
"""

from __future__ import annotations


class KvError(Exception):
    """Base of all kvstore errors.

    `code` is stable and meant for programs; `message` says what happened and what to do next, for people;
    `operation` is the path to the refusing operation inside a transaction (`(2,)` is its third one, `(2, 0)` the
    first of the nested transaction that stands there), or empty.
    """

    default_code = "internal"

    def __init__(self, message: str, *, code: str | None = None, operation: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.message = message
        self.operation = operation

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class Refused(KvError):
    """The store refuses the request for good; state is as it was."""

    default_code = "invalid_request"


class Unavailable(KvError):
    """The request took no effect; the same request may succeed later."""

    default_code = "unavailable"


class OutcomeUnknown(KvError):
    """The request may have taken effect. It will never take effect twice."""

    default_code = "outcome_unknown"


class StartupError(KvError):
    """A node refuses to start (or to join), and changes nothing."""

    default_code = "startup_failed"


class InternalError(KvError):
    """A bug in kvstore. The node that met it stops rather than diverge."""

    default_code = "internal"


# What a client may be told, by family. A new code goes into the family whose advice fits it.
REFUSED_CODES = frozenset(
    {
        "invalid_request",  # the request is not of its type's form
        "malformed_frame",  # the bytes are no frame of the native protocol
        "unknown_request",  # no such request kind
        "frame_too_large",
        "version_mismatch",  # the peer speaks another protocol version
        "wrong_cluster",  # a cluster id or token that is not ours
        "key_too_large",
        "key_empty",
        "value_too_large",
        "request_too_large",
        "result_too_large",
        "range_too_large",  # more records than one request may walk over, or replace
        "too_many_operations",
        "invalid_range",
        "duplicate_key",  # a key written more than once in one transaction
        "not_a_number",  # Add met a value that is no signed 64-bit decimal
        "out_of_range",  # Add would leave [min, max]
        "overflow",  # Add would leave the signed 64-bit range
        "lease_not_found",  # never granted, revoked, or expired
        "lease_exists",
        "lock_not_held",
        "lease_full",  # too many records under one lease
        "too_many_leases",
        "too_many_watches",  # on one connection
        "revision_compacted",
        "revision_in_future",
        "session_expired",  # unknown or expired session
        "stale_sequence",  # the client has already said that it needs no answer to this one
        "too_many_sessions",
        "session_full",  # too many unacknowledged results in one session
        "conflict",  # an optimistic transaction met other writers until its retries ran out
        "member_exists",
        "member_unknown",
        "node_identity_changed",  # a known name came back with another node id
        "wrong_node",  # at a member's address another node answers
        "would_lose_quorum",
        "not_learner",
        "not_voter",  # a learner cannot lead
        "not_caught_up",
        "cannot_remove_leader",
        "backup_damaged",  # cut, changed, or no backup at all
        "backup_format_newer",
    }
)
UNAVAILABLE_CODES = frozenset(
    {
        "unavailable",
        "not_leader",
        "no_leader",
        "overloaded",
        "storage_failed",  # disk full or failing on this node: writes refused, local reads served
        "shutting_down",
        "membership_busy",  # one membership change at a time
        "transfer_failed",
        "timeout",  # no answer in time, and no definite no
        "closed",
        "lock_held",  # by others, for as long as this one would wait
        "lock_lost",  # its lease ended
        "upgrade_pending",  # a feature that not all members understand yet
    }
)
UNKNOWN_CODES = frozenset({"outcome_unknown"})
STARTUP_CODES = frozenset(
    {
        "startup_failed",
        "data_dir_in_use",
        "data_format_newer",
        "data_dir_not_empty",  # a new node's, and something that is no node's is in it
        "data_dir_mismatch",  # the directory belongs to another node or cluster
        "wal_damaged",
        "state_damaged",
        "address_in_use",
        "address_not_loopback",
        "engine_unsupported",  # another pysyncobj than the one that the seams were written for
        "removed_from_cluster",
    }
)
CODES = REFUSED_CODES | UNAVAILABLE_CODES | UNKNOWN_CODES | STARTUP_CODES | {"internal"}


def error_for(code: str, message: str, operation: tuple[int, ...] = ()) -> KvError:
    """The exception for a code that came over the wire. An unknown code (of a newer server) is `Refused`."""
    if code in UNAVAILABLE_CODES:
        return Unavailable(message, code=code)
    if code in UNKNOWN_CODES:
        return OutcomeUnknown(message, code=code)
    if code in STARTUP_CODES:
        return StartupError(message, code=code)
    if code == "internal":
        return InternalError(message, code=code)
    return Refused(message, code=code, operation=operation)
