"""How the state lies in the storage: the form of every key and value. Pure bytes; no rule of behaviour lives here.

| key | holds |
|---|---|
| `k` + user key | a *packed record*: header (format, revisions, version, lease), then the value. The current record |
| `i` + epoch + escaped user key + mod revision | what was replaced: the revision that ended it, the packed record |
| `h` + first revision | one batch of changes: log time, and its events in order |
| `o` + log index | what the batch at that index did to sessions: requests with their answers, openings, ends |
| `s` + session | a session as it was after some log index |
| `l` + lease | its time to live and its deadline, in log time |
| `a` + lease + user key | nothing: the record of this key is under that lease |
| `m` + name | format, position (applied index, revisions, log time …), members, epochs of `i` |

**Old records are intervals.** When a record is replaced or deleted, the old one goes to `i` with the revision that
ended it. So a read at revision R finds what held then without asking what came later: the newest `i` entry of a key at
or below R counts if it ended after R, and nothing in `i` counts where the current record is old enough itself. A key
that is created and never changed again costs nothing in history.

**A key that one batch writes several times** (a hot counter) gets one `i` entry for all its records inside the batch
but the last: a `WITHIN_BATCH` one, which says "look in the batch". Only for those does `h` hold values.

**Epochs** let compaction forget by range deletes: `i` entries are grouped by when they ended, so everything that ended
before a revision lies together, whatever its key.

Escaping keeps the order of keys and ends each with a terminator that sorts before any continuation, so that one key's
entries never mix with those of a longer key.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec

from kvstore.errors import StartupError
from kvstore.model import Record

FORMAT = 1

CURRENT = b"k"
REPLACED = b"i"
HISTORY = b"h"
OUTCOME = b"o"
SESSION = b"s"
LEASE = b"l"
ATTACHED = b"a"
META = b"m"

M_FORMAT = META + b"format"
M_POSITION = META + b"position"
M_MEMBERS = META + b"members"
M_EPOCHS = META + b"epochs"

# A packed record: format, create_revision, mod_revision, version, lease; then the value.
_HEADER = struct.Struct(">BQQQQ")
HEADER_BYTES = _HEADER.size
pack_header = _HEADER.pack
unpack_header: Callable[[bytes], tuple[int, int, int, int, int]] = _HEADER.unpack_from
MOD_REVISION = slice(9, 17)
RECORD_LEASE = slice(25, 33)
NO_LEASE = bytes(8)

# In front of what an `i` entry holds: format and kind, and the revision that ended it.
_ENDED = struct.Struct(">BBQ")
ENDED_BYTES = _ENDED.size
pack_ended = _ENDED.pack
unpack_ended = _ENDED.unpack_from
WHOLE_RECORD = 0
WITHIN_BATCH = 1

_U64 = struct.Struct(">Q")
_U32 = struct.Struct(">I")
pack_u64 = _U64.pack

TERMINATOR = b"\x00\x01"
AFTER_TERMINATOR = b"\x00\x02"


def check_format(found: int) -> None:
    if found > FORMAT:
        raise StartupError(
            f"the state is of format {found}; this version knows up to {FORMAT}: run a newer one",
            code="data_format_newer",
        )


def record_of(key: bytes, packed: bytes, keys_only: bool = False) -> Record:
    _, create_revision, mod_revision, version, lease = unpack_header(packed)
    return Record(key, b"" if keys_only else packed[HEADER_BYTES:], create_revision, mod_revision, version, lease)


def mod_revision_of(packed: bytes) -> int:
    return int.from_bytes(packed[MOD_REVISION], "big")


def escape(key: bytes) -> bytes:
    return key.replace(b"\x00", b"\x00\xff") if b"\x00" in key else key


def unescape(escaped: bytes) -> bytes:
    return escaped.replace(b"\x00\xff", b"\x00") if b"\x00" in escaped else escaped


def replaced_prefix(epoch: int) -> bytes:
    return REPLACED + _U32.pack(epoch)


def family_end(family: bytes) -> bytes:
    """The bound above every key of a family (`k`, `i`, …)."""
    return bytes((family[0] + 1,))


REPLACED_PREFIX_BYTES = 5
REPLACED_SUFFIX_BYTES = len(TERMINATOR) + 8


# --- what is stored as msgpack --------------------------------------------------------------------------------------


class Epoch(msgspec.Struct, array_like=True, gc=False):
    """A stretch of history: the batches from `first_revision` on, up to the next epoch's. `size_bytes` is what it
    put into `h` and `i`."""

    id: int
    first_revision: int
    started_ms: int
    batches: int = 0
    size_bytes: int = 0


class Position(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Where the state stands; written with every entry. `outcomes_from` is the first log index whose `o` is needed
    to rebuild the sessions. `records_bytes` is what all current records have together, keys and packed records; -1 in
    a state of before it was counted."""

    format: int
    index: int
    term: int
    previous_term: int
    revision: int
    compacted_revision: int
    log_time_ms: int
    outcomes_from: int
    epoch: Epoch
    records_bytes: int = -1


# A batch's events in order, flat to keep encoding cheap: key, revision, content; and so on. Content is False for a
# deletion; None for a put whose record is in `k` or `i`; else its packed record (see WITHIN_BATCH).
Events = list[bytes | int | bool | None]


class BatchRecord(msgspec.Struct, array_like=True, frozen=True):
    format: int
    log_time_ms: int
    events: Events


# A batch's requests in order, flat too: session, seq, acked_below, answer (None where nothing new is to be kept).
Outcomes = list[int | bytes | None]


class OutcomeRecord(msgspec.Struct, array_like=True, frozen=True):
    format: int
    log_time_ms: int
    opened: list[int]
    outcomes: Outcomes
    ended: list[int]


class SessionRecord(msgspec.Struct, array_like=True, frozen=True):
    """`index`: everything up to this log index is in it."""

    format: int
    index: int
    last_ms: int
    acked_below: int
    answers: dict[int, bytes]


class LeaseRecord(msgspec.Struct, array_like=True, frozen=True):
    format: int
    ttl_ms: int
    deadline_ms: int


encode = msgspec.msgpack.Encoder().encode
decode_position = msgspec.msgpack.Decoder(Position).decode
decode_epochs = msgspec.msgpack.Decoder(list[Epoch]).decode
decode_batch_record = msgspec.msgpack.Decoder(BatchRecord).decode
decode_outcome_record = msgspec.msgpack.Decoder(OutcomeRecord).decode
decode_session_record = msgspec.msgpack.Decoder(SessionRecord).decode
decode_lease_record = msgspec.msgpack.Decoder(LeaseRecord).decode
