"""Requests and results as data. No behaviour lives here beyond what a type means.

All are msgspec structs that travel as msgpack arrays with an integer tag in front, so one C call decodes and type
checks a request (see `codec.py`). A tag or a field's place never changes; new fields go at the end, with a default.
What has more fields than we know is refused, not read in part: two replicas must never read one entry differently.

Keys and values are bytes. A **range** is `[start, end)`; `end=None` means the one key `start`, and `end=b""` means
no upper bound. `prefix_end` gives the end of a prefix.

A **revision** counts the store's changes: every transaction that changes something takes the next one. A **record**'s
`create_revision`, `mod_revision` and `version` have etcd's meanings.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, Union

from msgspec import Struct

# --- limits (design section 5); each is refused with the limit in the message ----------------------------------------

KEY_BYTES_MAX = 4 * 1024
VALUE_BYTES_MAX = 1024 * 1024
REQUEST_BYTES_MAX = 1536 * 1024
RESULT_BYTES_MAX = 1024 * 1024
TXN_OPERATIONS_MAX = 1024
LEASE_TTL_MS_MIN = 1000  # the leader looks once a second for what has expired
LEASE_TTL_MS_MAX = 10 * 365 * 24 * 3600 * 1000  # who needs more needs none
LEASE_KEYS_MAX = 16_384  # they are all deleted in one entry
LEASE_ID_MAX = 2**63 - 1
LEASES_LISTED_MAX = 10_000
# How far a watch's events may run ahead of who reads them: below, no event of the largest kind fits with its `prev`;
# above, one forgotten watch would cost its client too much.
WATCH_WINDOW_BYTES_MIN, WATCH_WINDOW_BYTES_MAX = 64 * 1024, 16 * 1024 * 1024
# What one request walks over in all its ranges and compares together: records, and their bytes (`state/walk.py`). Some
# 0.1 s of a node's time, in which it does nothing else: 1 us a record, 1 to 2 ms a MiB that comes from the disk.
# `apply` decides by this and the following limits, so they may only change with a version of the cluster.
WALK_MAX = 100_000
WALK_BYTES_MAX = 64 * 1024 * 1024
# What one request deletes or replaces: again 0.1 s, at 3 us a record and 2 ms a MiB, and 80 MB of memory, as a record
# lies there as itself, in the batch for the storage, and in the storage's buffer.
REPLACED_MAX = 25_000
REPLACED_BYTES_MAX = 32 * 1024 * 1024
LEASE_BYTES_MAX = REPLACED_BYTES_MAX  # of all records under one lease, with their keys: they go together
# How far beyond its pages a request's `count`s look, together: enough for "more than a thousand", for a millisecond.
COUNT_AHEAD_MAX = 1000
COUNT_AHEAD_BYTES_MAX = 4 * 1024 * 1024
# Where a page of a digest ends at the latest: with the record that makes it so many records, or so many bytes of them.
# A node reads and hashes either in some 10 ms (1 us a record, 2 ms a MiB), and does nothing else meanwhile.
DIGEST_RECORDS_MAX = 10_000
DIGEST_BYTES_MAX = 4 * 1024 * 1024
TXN_DEPTH_MAX = 8  # nested transactions; deeper ones would only hide how many operations there are
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def prefix_end(prefix: bytes) -> bytes:
    """The smallest key above every key that starts with `prefix`; `b""` (no bound) where there is none."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b""


# --- records ---------------------------------------------------------------------------------------------------------


class Record(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    """One key as it stands at a revision. `version` counts its changes since it was created, from 1."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


# --- operations: they stand alone or inside a transaction ------------------------------------------------------------


class Put(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=1):
    """Set `key` to `value`. `lease` 0 is none; `prev` asks for the record as it was."""

    key: bytes
    value: bytes
    lease: int = 0
    prev: bool = False


class Delete(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=2):
    """Delete a key or a range. Deleting what is not there changes nothing."""

    start: bytes
    end: bytes | None = None
    prev: bool = False


class SortBy(IntEnum):
    KEY = 0
    VERSION = 1
    CREATE_REVISION = 2
    MOD_REVISION = 3
    VALUE = 4


class Range(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=3):
    """Read a key or a range.

    `limit` 0 is none (the result's size is bounded all the same: `more` says that something was left out, and the
    next page starts after the last key). `revision` 0 is the newest. `count` in the result is the number of records in
    the whole range, and with `more` at least so many: it looks no further than `COUNT_AHEAD_MAX` beyond a page.
    `count_only` counts as far as its request may walk (`WALK_MAX`); with `more`, the one record of the result has the
    last key that it counted.
    """

    start: bytes
    end: bytes | None = None
    limit: int = 0
    revision: int = 0
    keys_only: bool = False
    count_only: bool = False
    reverse: bool = False
    sort: SortBy = SortBy.KEY


class Add(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=4):
    """Add `delta` to a signed 64-bit decimal; an absent key counts as 0. Keeps the record's lease.

    A result outside `[min, max]`, an overflow, or a value that is no number refuses the whole transaction.
    """

    key: bytes
    delta: int
    min: int | None = None
    max: int | None = None


class Target(IntEnum):
    """What a compare looks at. `COUNT` is the number of records in the range; the others hold for each record in it."""

    VALUE = 0
    NUMBER = 1
    VERSION = 2
    CREATE_REVISION = 3
    MOD_REVISION = 4
    LEASE = 5
    COUNT = 6


class Relation(IntEnum):
    EQUAL = 0
    NOT_EQUAL = 1
    LESS = 2
    GREATER = 3


class Compare(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    """One condition on the state before the transaction.

    On a single key (`end=None`) an absent record has version, revisions, lease and count 0, number 0, and no value:
    a compare on VALUE with an absent record is false, whatever the relation. With a range, the condition must hold
    for every record in it (an empty range satisfies all but COUNT). `operand` is bytes for VALUE, int for the others.
    """

    key: bytes
    target: Target
    relation: Relation
    operand: bytes | int
    end: bytes | None = None


class Txn(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, tag=5):
    """If every compare holds, do `success`, else `failure`, in one revision. A key is written at most once in it."""

    compare: tuple[Compare, ...] = ()
    success: tuple[Operation, ...] = ()
    failure: tuple[Operation, ...] = ()


Operation = Union[Put, Delete, Range, Add, Txn]


# --- requests that are no operation ----------------------------------------------------------------------------------


class OpenSession(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=16):
    """Open a session. Its id is never reused."""


class CloseSession(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=17):
    """Close the session that carries this request."""


class KeepSession(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=18):
    """Renew the session that carries this request; nothing else."""


class ExpireSessions(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=19):
    """End every session whose time has passed in log time. Proposed by the leader, never by a client."""


class Compact(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=20):
    """Forget history below `revision`: reads at an older one are refused from then on."""

    revision: int


class GrantLease(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=21):
    """Grant a lease that lives `ttl_ms` of log time after this or its last keep-alive. `lease` is the id that the
    client chose for it; 0 has the store choose one."""

    ttl_ms: int
    lease: int = 0


class RevokeLease(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=22):
    """End a lease and delete its records."""

    lease: int


class KeepLease(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=23):
    """Let a lease live for its whole time to live from now on."""

    lease: int


class ExpireLeases(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=24):
    """End leases whose time has passed in log time. Proposed by the leader, never by a client."""


class RaiseVersion(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=28):
    """From the leader itself: all members understand this version (see `versions.py`), so it may be used."""

    version: int


class DescribeLease(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=25):
    """A read: how long a lease has to live; `keys` asks for those of its records."""

    lease: int
    keys: bool = False


class ListLeases(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=26):
    """A read: the ids of leases above `after`, in order, at most `limit` (0: as many as one result holds)."""

    after: int = 0
    limit: int = 0


class Digest(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=27):
    """A read: a hash over the first page of the records of `[start, end)` at a revision. The page ends with the record
    that makes it `limit` records, or `limit_bytes` with their keys: where, is up to those records alone. (Who knows no
    `limit_bytes` refuses it, rather than to end elsewhere.)"""

    start: bytes
    end: bytes
    revision: int
    limit: int
    limit_bytes: int = DIGEST_BYTES_MAX


Read = Union[Range, Txn, DescribeLease, ListLeases, Digest]
"""What only reads; a Txn must hold nothing but ranges."""

Mutation = Union[
    Put,
    Delete,
    Add,
    Range,
    Txn,
    OpenSession,
    CloseSession,
    KeepSession,
    ExpireSessions,
    Compact,
    GrantLease,
    RevokeLease,
    KeepLease,
    ExpireLeases,
    RaiseVersion,
]
"""What may stand in a log entry. (A Range stands there only inside a transaction that also writes, or when a client
asks for its read to be ordered with its writes.)"""


# --- results ---------------------------------------------------------------------------------------------------------


class PutResult(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=1):
    revision: int
    prev: Record | None = None


class DeleteResult(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=2):
    revision: int
    deleted: int
    prev: tuple[Record, ...] = ()


class RangeResult(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=3):
    """`revision` is the store's when the range was read, also where the range itself was read at an older one."""

    revision: int
    records: tuple[Record, ...]
    count: int
    more: bool = False


class AddResult(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=4):
    revision: int
    value: int


class TxnResult(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, tag=5):
    revision: int
    succeeded: bool
    results: tuple[OperationResult, ...]


class SessionResult(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=16):
    """Answer to OpenSession, CloseSession and KeepSession. `ttl_ms` is how long a session lives without a request."""

    session: int
    ttl_ms: int


class CompactResult(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=20):
    revision: int


class DoneResult(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=21):
    """Answer to a request that has nothing more to say. `count` is how many things it acted on."""

    revision: int
    count: int = 0


class LeaseResult(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=22):
    """Answer to GrantLease and KeepLease."""

    revision: int
    lease: int
    ttl_ms: int


class LeaseStatus(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=23):
    """Answer to DescribeLease. `keys` is empty where they were not asked for; `key_count` is how many there are."""

    lease: int
    ttl_ms: int
    remaining_ms: int
    key_count: int
    keys: tuple[bytes, ...] = ()


class LeaseList(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=24):
    """Answer to ListLeases. `more`: there are others above the last one."""

    leases: tuple[int, ...]
    more: bool = False


class DigestResult(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=25):
    """Answer to Digest. `last` is the last key that is in it, empty where the range ended before the page."""

    revision: int
    digest: bytes
    count: int
    last: bytes = b""


class ErrorResult(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=127):
    """A refusal, as a result: the request changed nothing. `operation` is as in `errors.KvError`."""

    code: str
    message: str
    operation: tuple[int, ...] = ()


OperationResult = Union[PutResult, DeleteResult, RangeResult, AddResult, TxnResult]
Result = Union[
    PutResult,
    DeleteResult,
    RangeResult,
    AddResult,
    TxnResult,
    SessionResult,
    CompactResult,
    DoneResult,
    LeaseResult,
    LeaseStatus,
    LeaseList,
    DigestResult,
    ErrorResult,
]


# --- events ----------------------------------------------------------------------------------------------------------


class Event(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    """What a transaction did to one key: `record` is what it made of it, None if it deleted it. `prev` is the record
    as it was before (None if there was none), where the watch asked for it."""

    key: bytes
    revision: int
    record: Record | None = None
    prev: Record | None = None

    @property
    def deleted(self) -> bool:
        return self.record is None


# --- the cluster, as its users see it --------------------------------------------------------------------------------


class Member(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    """A member of the configuration. `voter` is false for a learner. `node_id` is empty until the node has said it."""

    name: str
    peer_address: str
    client_address: str
    node_id: str
    voter: bool


class PeerStatus(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    """How a leader sees a peer: connected or not, and the last log index it is known to hold."""

    name: str
    connected: bool
    match_index: int


class NodeStatus(Struct, array_like=True, frozen=True):
    """What one node says of itself. `leader` is empty where it knows none. `alarms`: "quota" while the store reached
    its quota. `size_bytes`: records and kept history. `version`: of this node's program; `cluster_version`: see
    `versions.py`. `node_id`: of its log, as `Member.node_id`. Newer nodes may say more, at the end."""

    name: str
    cluster_id: str
    role: str
    leader: str
    leader_client_address: str
    term: int
    commit_index: int
    applied_index: int
    last_index: int
    durable_index: int
    revision: int
    members: tuple[Member, ...]
    peers: tuple[PeerStatus, ...]
    storage_error: str = ""
    version: str = ""
    digest: str = ""
    alarms: tuple[str, ...] = ()
    size_bytes: int = 0
    cluster_version: int = 1
    node_id: str = ""


# --- what consensus and the state machine hand each other, beside bytes -----------------------------------------------


class Checkpoint(NamedTuple):
    """What a checkpoint directory holds: the state after applying `index`, whose entry had `term`. `members` is the
    payload of the last MEMBERS entry by then."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    term: int
    members: bytes
