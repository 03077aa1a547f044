"""Leases: a record is there as long as its lease surely lives, and gone for good once it does not.

What a client knows of a lease's life: it lives for its whole time from some moment *after* a successful grant or
keep-alive was called. Log time runs at most 1 % faster than real time, so until `LIVES_SHARE` of that time has passed
since the call, the lease is there. When it ends is the leader's affair; that it ends at all is asked at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from tests.checkers.history import Entry
from tests.checkers.verdict import Inconsistent

# A little less than log time may take of it, for the clocks of the machines that count it.
LIVES_SHARE = 1 / 1.03


class Grant(Struct, frozen=True):
    lease: str
    ttl_s: float


class Keep(Struct, frozen=True):
    lease: str


class Attach(Struct, frozen=True):
    lease: str


class Revoke(Struct, frozen=True):
    lease: str


class Look(Struct, frozen=True):
    """Result: whether the record is there."""

    lease: str


class LastLook(Struct, frozen=True):
    """Once nobody keeps it any more, and its time has passed. Result: whether the record is there."""

    lease: str


# What a refused keep-alive says.
GONE = "lease_not_found"


def check_lease(entries: Sequence[Entry]) -> None:
    """All operations on one lease. Raises `Inconsistent`."""
    (grant,) = [entry for entry in entries if isinstance(entry.operation, Grant)]
    lives_s = grant.operation.ttl_s * LIVES_SHARE
    renewals = [
        entry for entry in entries if isinstance(entry.operation, (Grant, Keep)) and entry.is_ok and not _gone(entry)
    ]
    revokes = [entry for entry in entries if isinstance(entry.operation, Revoke) and not entry.is_failed]
    attached = [entry for entry in entries if isinstance(entry.operation, Attach) and entry.is_ok]
    ended: Entry | None = None  # the first to return of those that saw that it is over
    for entry in sorted((entry for entry in entries if entry.is_ok), key=lambda entry: entry.returned):
        is_over = _gone(entry) or _saw_nothing(entry, attached)
        if is_over:
            for renewal in renewals:
                is_alive = entry.returned_at_s < renewal.called_at_s + lives_s
                if renewal.returned < entry.called and is_alive and not _may_be_revoked(revokes, entry):
                    raise Inconsistent("lease_ended_early", f"{entry}, though it was renewed: {renewal}")
        if (is_over or isinstance(entry.operation, Revoke)) and ended is None:
            ended = entry
    if ended is not None:
        for entry in entries:
            is_seen = isinstance(entry.operation, (Look, LastLook)) and entry.is_ok and entry.result
            if entry.called > ended.returned and (is_seen or (entry in renewals and entry is not grant)):
                raise Inconsistent("lease_came_back", f"{entry}, after {ended}")
    for entry in entries:
        if isinstance(entry.operation, LastLook) and entry.is_ok and entry.result:
            raise Inconsistent("lease_outlives_its_time", f"{entry}; nobody keeps it any more")


def _gone(entry: Entry) -> bool:
    return isinstance(entry.operation, (Keep, Attach, Revoke)) and entry.result == GONE


def _saw_nothing(entry: Entry, attached: Sequence[Entry]) -> bool:
    if not isinstance(entry.operation, (Look, LastLook)) or entry.result:
        return False
    return any(attach.returned < entry.called and not _gone(attach) for attach in attached)


def _may_be_revoked(revokes: Sequence[Entry], entry: Entry) -> bool:
    return any(revoke.called < entry.returned for revoke in revokes)
