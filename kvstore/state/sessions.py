"""Exactly-once: which request was answered with what.

A session's id is (log index << 16) | position in the batch of the request that opened it, so it is never reused. A
mutation carries (session, seq, acked_below):

- seq was answered before: the same answer again, and nothing changes;
- seq is below acked_below, of this or any earlier request: `stale_sequence`;
- the session is unknown or ended: `session_expired`;
- too much is unacknowledged already: `session_full`.

None of these executes. Anything else executes once, in whatever order seqs arrive, and its answer is kept until the
client acknowledges it. A session lives `TTL_MS` of log time after its last request; it ends only when an
`ExpireSessions` (or a `CloseSession`) says so, at the same log index on every replica.

**What is stored.** Sessions live in memory. Each batch writes one `o` record: what its requests did to sessions. Now
and then, a few at a time, the sessions that changed longest ago are written whole (`s`), so that the `o` records before
the oldest unwritten change are no longer needed and go. At open, sessions are read from `s`, then `o` is replayed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvstore.codec import BatchItem
from kvstore.errors import Refused
from kvstore.state import layout
from kvstore.state.deadlines import Deadlines
from kvstore.state.layout import (
    FORMAT,
    OUTCOME,
    SESSION,
    OutcomeRecord,
    SessionRecord,
    check_format,
    family_end,
    pack_u64,
)
from kvstore.state.storage import Batch, Storage
from kvstore.state.txn import refused

TTL_MS = 60_000
SESSIONS_MAX = 100_000
ANSWERS_MAX = 1024
# Judged before a request executes, so one answer (at most about 1 MiB) may stand above it.
ANSWERS_BYTES_MAX = 4 * 1024 * 1024
POSITION_BITS = 16

# One ExpireSessions ends at most so many, so that no entry takes long to apply; the leader proposes the next one.
EXPIRED_PER_ENTRY_MAX = 4096
# A change may wait so many entries before its session is written whole: a busy client's session is then written once
# for thousands of requests, and a restart replays little more than that.
_UNWRITTEN_ENTRIES_MAX = 4096
# … and so many sessions are written with one entry: all 100,000 within about 1,600 entries, for 0.1 ms each.
_WRITTEN_PER_ENTRY_MAX = 64
# … but not many large ones: past so many bytes the rest waits for the next entry.
_WRITTEN_BYTES_PER_ENTRY_MAX = 1024 * 1024
# `o` records that are no longer needed are range-deleted once in so many entries.
_TRIM_ENTRIES = 1024

_EXPIRED = refused(Refused("the session is unknown or has expired; open a new one", code="session_expired"))
_STALE = refused(Refused("this sequence number was acknowledged before", code="stale_sequence"))
_FULL = refused(
    Refused(
        f"the session holds {ANSWERS_MAX} answers or {ANSWERS_BYTES_MAX} bytes that are not acknowledged; "
        "acknowledge some first",
        code="session_full",
    )
)
_BAD_SEQUENCE = refused(Refused("a sequence number in a session must be at least 1", code="invalid_request"))


class Session:
    __slots__ = ("acked_below", "answers", "id", "last_ms", "size_bytes", "unwritten")

    def __init__(self, session_id: int, last_ms: int) -> None:
        self.id = session_id
        self.last_ms = last_ms
        self.acked_below = 1
        self.answers: dict[int, bytes] = {}
        self.size_bytes = 0
        self.unwritten = False

    def acknowledge(self, acked_below: int) -> None:
        """Forget every answer below. Costs O(answers forgotten) for a client that acknowledges step by step."""
        answers = self.answers
        below: Iterable[int] = range(self.acked_below, acked_below)
        if acked_below - self.acked_below > len(answers):
            below = [seq for seq in answers if seq < acked_below]
        for seq in below:
            answer = answers.pop(seq, None)
            if answer is not None:
                self.size_bytes -= len(answer)
        self.acked_below = acked_below


class Sessions:
    """All open sessions, and the batch at work on them (`begin` … `end`)."""

    __slots__ = (
        "_deadlines",
        "_ended",
        "_index",
        "_opened",
        "_outcomes",
        "_unwritten",
        "by_id",
        "now_ms",
        "outcomes_from",
    )

    def __init__(self) -> None:
        self.by_id: dict[int, Session] = {}
        self.outcomes_from = 1  # the first log index whose `o` a rebuild needs; as of the last `end`
        self._deadlines = Deadlines(self._deadline_of)
        self._unwritten: dict[int, int] = {}  # session -> log index of its first change that `s` lacks, oldest first
        self._index = 0
        self.now_ms = 0
        self._opened: list[int] = []
        self._outcomes: layout.Outcomes = []
        self._ended: list[int] = []

    # --- one batch --------------------------------------------------------------------------------------------------

    def begin(self, index: int, now_ms: int) -> None:
        self._index = index
        self.now_ms = now_ms
        self._opened = []
        self._outcomes = []
        self._ended = []

    def admit(self, item: BatchItem) -> Session | bytes:
        """The session in which to execute a request, or the answer to give without executing it."""
        session = self.by_id.get(item.session)
        if session is None:
            return _EXPIRED
        self._touch(session, self.now_ms)
        seq, acked_below = item.seq, item.acked_below
        if acked_below > session.acked_below:
            session.acknowledge(acked_below)
        answer = session.answers.get(seq)
        if answer is None:
            if seq < session.acked_below:
                answer = _STALE if seq > 0 else _BAD_SEQUENCE
            elif len(session.answers) >= ANSWERS_MAX or session.size_bytes >= ANSWERS_BYTES_MAX:
                answer = _FULL
            else:
                return session
        self._outcomes += (item.session, seq, acked_below, None)
        return answer

    def settle(self, session: Session, item: BatchItem, answer: bytes) -> None:
        """An admitted request was executed; keep its answer."""
        seq = item.seq
        session.answers[seq] = answer
        session.size_bytes += len(answer)
        self._outcomes += (session.id, seq, item.acked_below, answer)

    def send_back(self, session: Session, item: BatchItem) -> None:
        """An admitted request was not executed: it may come again."""
        self._outcomes += (session.id, item.seq, item.acked_below, None)

    def open(self, position: int) -> Session | None:
        """A new session; None if there are too many."""
        if len(self.by_id) >= SESSIONS_MAX:
            return None
        session_id = self._index << POSITION_BITS | position
        self._opened.append(session_id)
        return self._add(session_id, self.now_ms)

    def keep(self, item: BatchItem) -> Session | None:
        """Renew, and acknowledge; None if there is no such session. Its seq means nothing."""
        session = self.by_id.get(item.session)
        if session is not None:
            self._touch(session, self.now_ms)
            if item.acked_below > session.acked_below:
                session.acknowledge(item.acked_below)
            self._outcomes += (session.id, 0, item.acked_below, None)
        return session

    def close(self, session_id: int) -> bool:
        if session_id not in self.by_id:
            return False
        self._end(session_id)
        self._ended.append(session_id)
        return True

    def expire(self) -> int:
        """End the sessions whose time has passed, earliest deadline first, at most `EXPIRED_PER_ENTRY_MAX`."""
        count = 0
        while count < EXPIRED_PER_ENTRY_MAX and self.expiry_due(self.now_ms):
            session_id = self._deadlines.take()
            self._end(session_id)
            self._ended.append(session_id)
            count += 1
        return count

    def end(self, batch: Batch) -> None:
        """Put what the batch at work did to sessions into the storage batch."""
        index = self._index
        for session_id in self._ended:
            batch.delete(SESSION + pack_u64(session_id))
        if self._opened or self._outcomes or self._ended:
            record = (FORMAT, self.now_ms, self._opened, self._outcomes, self._ended)
            batch.put(OUTCOME + pack_u64(index), layout.encode(record))
        unwritten = self._unwritten
        written = size_bytes = 0
        while unwritten and written < _WRITTEN_PER_ENTRY_MAX and size_bytes < _WRITTEN_BYTES_PER_ENTRY_MAX:
            session_id = next(iter(unwritten))
            if unwritten[session_id] > index - _UNWRITTEN_ENTRIES_MAX:
                break
            del unwritten[session_id]
            session = self.by_id[session_id]
            session.unwritten = False
            batch.put(
                SESSION + pack_u64(session_id),
                layout.encode(SessionRecord(FORMAT, index, session.last_ms, session.acked_below, session.answers)),
            )
            written += 1
            size_bytes += session.size_bytes
        self.outcomes_from = unwritten[next(iter(unwritten))] if unwritten else index + 1
        if index % _TRIM_ENTRIES == 0:
            batch.delete_range(OUTCOME, OUTCOME + pack_u64(self.outcomes_from))

    # --- expiry -----------------------------------------------------------------------------------------------------

    def expiry_due(self, log_time_ms: int) -> bool:
        """True if some session's time has passed."""
        return self._deadlines.due(log_time_ms) is not None

    def _deadline_of(self, session_id: int) -> int | None:
        session = self.by_id.get(session_id)
        return None if session is None else session.last_ms + TTL_MS

    def observable(self) -> list[tuple[int, int, int, list[tuple[int, bytes]]]]:
        """All that a client could ever learn of the sessions: (id, last_ms, acked_below, answers), in order."""
        return [
            (session.id, session.last_ms, session.acked_below, sorted(session.answers.items()))
            for _, session in sorted(self.by_id.items())
        ]

    # --- opening ----------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, storage: Storage, outcomes_from: int) -> Sessions:
        """Rebuild the sessions as they were after the last stored entry."""
        sessions = cls()
        covered: dict[int, int] = {}
        for key, encoded in storage.scan(SESSION, family_end(SESSION)):
            session_id = int.from_bytes(key[1:], "big")
            record = layout.decode_session_record(encoded)
            check_format(record.format)
            session = Session(session_id, record.last_ms)
            session.acked_below = record.acked_below
            session.answers = dict(record.answers)
            session.size_bytes = sum(map(len, session.answers.values()))
            sessions.by_id[session_id] = session
            covered[session_id] = record.index
        for key, encoded in storage.scan(OUTCOME + pack_u64(outcomes_from), family_end(OUTCOME)):
            sessions._replay(int.from_bytes(key[1:], "big"), layout.decode_outcome_record(encoded), covered)
        known = [(session.last_ms + TTL_MS, session.id) for session in sessions.by_id.values()]
        sessions._deadlines = Deadlines(sessions._deadline_of, known)
        return sessions

    def _replay(self, index: int, record: OutcomeRecord, covered: dict[int, int]) -> None:
        check_format(record.format)
        self._index = index
        now_ms = record.log_time_ms
        outcomes: list[Any] = record.outcomes
        for session_id in record.opened:
            if session_id not in self.by_id:
                self._add(session_id, now_ms)
        for at in range(0, len(outcomes), 4):
            session_id, seq, acked_below, answer = outcomes[at : at + 4]
            session = self.by_id.get(session_id)
            # Missing: it ended later on, and is not in `s` any more. Covered: `s` has this already.
            if session is None or covered.get(session_id, 0) >= index:
                continue
            self._touch(session, now_ms)
            if acked_below > session.acked_below:
                session.acknowledge(acked_below)
            if isinstance(answer, bytes):
                session.answers[seq] = answer
                session.size_bytes += len(answer)
        for session_id in record.ended:
            if session_id in self.by_id:
                self._end(session_id)

    # --- shared -----------------------------------------------------------------------------------------------------

    def _add(self, session_id: int, now_ms: int) -> Session:
        session = self.by_id[session_id] = Session(session_id, now_ms)
        self._touch(session, now_ms)
        self._deadlines.add(now_ms + TTL_MS, session_id)
        return session

    def _touch(self, session: Session, now_ms: int) -> None:
        session.last_ms = now_ms
        if not session.unwritten:
            session.unwritten = True
            self._unwritten[session.id] = self._index

    def _end(self, session_id: int) -> None:
        del self.by_id[session_id]
        self._unwritten.pop(session_id, None)


expired_answer = _EXPIRED
