"""The state machine against a model that is too simple to be wrong: random requests, reads at every revision, restarts,
crashes back to the last flush, checkpoints and restores. Thresholds are small, so that everything that happens once in
thousands of entries happens here all the time."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvstore import codec, model, versions
from kvstore.model import (
    INT64_MAX,
    INT64_MIN,
    Add,
    CloseSession,
    Compact,
    Compare,
    Delete,
    DescribeLease,
    ExpireLeases,
    ExpireSessions,
    GrantLease,
    KeepLease,
    KeepSession,
    ListLeases,
    OpenSession,
    Put,
    Range,
    Relation,
    RevokeLease,
    SessionResult,
    SortBy,
    Target,
    Txn,
)
from kvstore.state import mvcc, sessions
from kvstore.state.layout import HEADER_BYTES
from kvstore.state.machine import DATA, MEMBERS, NOOP, Machine
from kvstore.state.storage import MemoryDisk, RocksStorage
from tests.state_model import Call, Model, bare, decoded, entry

KEYS = [b"a", b"a\x00", b"a\x00\xff", b"ab", b"b", b"n/1", b"n/2", b"\xff", b"\xff\xff"]
keys = st.sampled_from(KEYS)
values = st.sampled_from([b"", b"0", b"-1", b"7", b"007", b"-0", b"x", b"9223372036854775807", b"\x00\xff"])
numbers = st.sampled_from([-1, 1, -3, 5, 0, INT64_MAX, INT64_MIN])
bounds = st.none() | st.sampled_from([-2, 0, 3, 100])
ends = st.none() | st.just(b"") | keys

LEASES = [1, 2, 3]
leases = st.sampled_from(LEASES)
puts = st.builds(Put, keys, values, st.sampled_from([0, 0, 0, *LEASES]), st.booleans())
adds = st.builds(Add, keys, numbers, bounds, bounds)
deletes = st.builds(Delete, keys, ends, st.booleans())
ranges = st.builds(
    Range,
    keys | st.just(b""),
    st.just(b"") | keys,
    st.sampled_from([0, 0, 1, 2]),
    st.integers(0, 40),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(SortBy),
)
points = st.builds(Range, keys, st.none(), st.just(0), st.integers(0, 40))
compares = st.builds(
    Compare, keys, st.just(Target.VALUE), st.sampled_from(Relation), st.sampled_from([b"", b"7", b"x"]), ends
) | st.builds(
    Compare,
    keys,
    st.sampled_from([target for target in Target if target is not Target.VALUE]),
    st.sampled_from(Relation),
    st.integers(-1, 5),
    ends,
)


def transactions(operations: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    branch = st.lists(operations, max_size=4).map(tuple)
    return st.builds(Txn, st.lists(compares, max_size=2).map(tuple), branch, branch)


single = puts | adds | deletes | ranges | points
operations = single | transactions(single | transactions(single))
lease_requests = (
    st.builds(GrantLease, st.sampled_from([1_000, 30_000, 100_000]), st.sampled_from([0, *LEASES]))
    | st.builds(KeepLease, leases)
    | st.builds(RevokeLease, leases)
    | st.just(ExpireLeases())
)
leasing = transactions(st.builds(Put, keys, values, leases) | deletes)
entry_versions = st.sampled_from([versions.WITH_BUDGETS - 1, versions.VERSION])
steps_ms = st.sampled_from([-1000, 0, 1, 20_000, 61_000])

RETENTION = mvcc.Retention(batches=64)  # an epoch is 4 batches


class Replica(RuleBasedStateMachine):
    """One machine and the model. Every entry is kept, so that what a crash lost can be applied again."""

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = ExitStack()
        for module, name, small in (
            (model, "LEASE_KEYS_MAX", 3),
            (mvcc, "_WALK_MAX", 2),
            (mvcc, "CACHE_GENERATION_BYTES", 500),
            (mvcc, "_PREFETCHED_TOGETHER", 2),
            (mvcc, "_PREFETCHED_BYTES_MAX", 300),
            (sessions, "_UNWRITTEN_ENTRIES_MAX", 3),
            (sessions, "_WRITTEN_PER_ENTRY_MAX", 2),
            (sessions, "_TRIM_ENTRIES", 4),
        ):
            self.cleanup.enter_context(patch.object(module, name, small))
        self.model = Model()
        self.entries: list[tuple[int, bytes, list[bytes], str]] = []  # kind, payload, results, digest afterwards
        self.flushed = 0
        self.paths = 0
        self.path = self.new_path()
        self.machine = Machine(self.open_storage, self.path, RETENTION)
        self.session_ids: list[int] = []

    # What the two storages do differently.

    def open_storage(self, path: str, read_only: bool = False, /) -> Any:
        raise NotImplementedError

    def new_path(self) -> str:
        self.paths += 1
        return f"state-{self.paths}"

    # --- rules ------------------------------------------------------------------------------------------------------

    @initialize(count=st.integers(1, 3))
    def open_sessions(self, count: int) -> None:
        self.enter(0, [OpenSession()] * count)

    def enter(self, step_ms: int, calls: list[Any], version: int = versions.VERSION) -> list[Any]:
        log_time_ms = max(0, self.model.log_time_ms + step_ms)
        payload = entry(log_time_ms, calls, version)
        results = self.machine.apply(self.machine.applied_index + 1, 3, DATA, payload)
        answers = decoded(results)
        expected = self.model.apply(log_time_ms, calls, version)
        assert [bare(answer) for answer in answers] == [bare(answer) for answer in expected]
        self.entries.append((DATA, payload, results, self.machine.digest()))
        for call, answer in zip(calls, answers, strict=True):
            request = call.request if isinstance(call, Call) else call
            if isinstance(request, OpenSession) and isinstance(answer, SessionResult):
                self.session_ids.append(answer.session)
        return answers

    @rule(
        step_ms=steps_ms,
        requests=st.lists(operations, min_size=1, max_size=6),
        version=entry_versions,
        data=st.data(),
    )
    def apply(self, step_ms: int, requests: list[Any], version: int, data: st.DataObject) -> None:
        calls: list[Any] = []
        for request in requests:
            session = data.draw(st.sampled_from([0, *self.session_ids[-3:], 12345]))
            seq = data.draw(st.integers(0, 8))
            calls.append(Call(request, session, seq, data.draw(st.integers(0, max(seq, 1)))))
        self.enter(step_ms, calls, version)

    @rule(
        step_ms=steps_ms,
        requests=st.lists(
            st.sampled_from([OpenSession(), CloseSession(), KeepSession(), ExpireSessions()]), min_size=1, max_size=3
        ),
        data=st.data(),
    )
    def administer(self, step_ms: int, requests: list[Any], data: st.DataObject) -> None:
        calls: list[Any] = []
        for request in requests:
            session = data.draw(st.sampled_from([0, *self.session_ids[-3:]]))
            calls.append(Call(request, session, data.draw(st.integers(1, 8)), data.draw(st.integers(0, 4))))
        self.enter(step_ms, calls)

    @rule(
        step_ms=steps_ms,
        requests=st.lists(lease_requests | puts | deletes | adds | leasing, min_size=1, max_size=8),
        version=entry_versions,
    )
    def change_leases(self, step_ms: int, requests: list[Any], version: int) -> None:
        self.enter(step_ms, requests, version)

    @rule(lease=leases, with_keys=st.booleans(), step_ms=steps_ms)
    def read_a_lease(self, lease: int, with_keys: bool, step_ms: int) -> None:
        request, log_time_ms = DescribeLease(lease, with_keys), max(0, self.model.log_time_ms + step_ms)
        answer = codec.decode_result(self.machine.read(request, log_time_ms))
        assert bare(answer) == bare(self.model.lease_status(request, log_time_ms))

    @rule(back=st.integers(-1, 12), put=st.booleans())
    def compact(self, back: int, put: bool) -> None:
        around = [Put(b"a", b"x"), Put(b"a", b"y")] if put else []
        self.enter(1, [*around, Compact(max(1, self.model.revision - back)), *around])

    @rule()
    def compact_by_itself(self) -> None:
        revision = self.machine.compaction_due(0)
        if revision is not None:
            [answer] = self.enter(1, [Compact(revision)])
            assert answer.revision == revision

    @rule(members=st.none() | st.binary(min_size=1, max_size=4))
    def other_entry(self, members: bytes | None) -> None:
        kind = NOOP if members is None else MEMBERS
        self.machine.apply(self.machine.applied_index + 1, 4, kind, members or b"")
        self.model.apply_members(self.model.members if members is None else members)
        self.entries.append((kind, members or b"", [], self.machine.digest()))

    @rule(requests=st.lists(points | transactions(points) | st.builds(Range, keys), max_size=6))
    def prefetch(self, requests: list[Any]) -> None:
        """In vain, or for whatever comes next."""
        self.machine.prefetch(requests)

    @rule(request=ranges | points | transactions(ranges | points))
    def read(self, request: Any) -> None:
        answer = codec.decode_result(self.machine.read(request))
        assert bare(answer) == bare(self.model.operate(request, write=False))

    @rule(start=keys | st.just(b""), end=st.just(b"") | keys, reverse=st.booleans())
    def read_the_past(self, start: bytes, end: bytes, reverse: bool) -> None:
        for revision in range(max(1, self.model.compacted), self.model.revision + 1):
            for request in (Range(start or b"a", revision=revision), Range(start, end, 0, revision, reverse=reverse)):
                answer = codec.decode_result(self.machine.read(request))
                assert answer == self.model.operate(request, write=False)

    @rule()
    def flush(self) -> None:
        self.flushed = self.machine.flush()
        assert self.flushed == self.machine.applied_index

    @rule()
    def restart(self) -> None:
        self.machine.close()
        self.machine = Machine(self.open_storage, self.path, RETENTION)
        assert self.machine.applied_index == len(self.entries)
        self.flushed = len(self.entries)

    @rule()
    def move_to_a_checkpoint(self) -> None:
        path = self.new_path()
        checkpoint = self.machine.checkpoint(path)
        assert checkpoint == (len(self.entries), self.machine.applied_term, self.model.members)
        self.machine.restore(path)
        self.path = path
        self.flushed = len(self.entries)

    def reapply(self) -> None:
        """Apply what the machine does not have; it must answer as it did the first time."""
        index = self.machine.applied_index
        if index:
            assert self.machine.digest() == self.entries[index - 1][3]
        for kind, payload, results, digest in self.entries[index:]:
            index += 1
            assert self.machine.apply(index, 3, kind, payload) == results
            assert self.machine.digest() == digest

    # --- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def position_is_the_model_s(self) -> None:
        machine, model = self.machine, self.model
        assert machine.applied_index == model.index == len(self.entries)
        assert machine.revision == model.revision
        assert machine.compacted_revision == model.compacted
        assert machine.log_time_ms == model.log_time_ms
        assert machine.members == model.members
        assert machine.session_count == len(model.sessions)
        assert self.entries == [] or machine.digest() == self.entries[-1][3]

    @invariant()
    def every_key_reads_as_in_the_model(self) -> None:
        for key in KEYS:
            answer = codec.decode_result(self.machine.read(Range(key)))
            assert answer == self.model.operate(Range(key), write=False)

    @invariant()
    def its_size_is_that_of_its_records(self) -> None:
        records = codec.decode_result(self.machine.read(Range(b"", b""))).records
        counted = sum(len(record.key) + HEADER_BYTES + len(record.value) for record in records)
        assert self.machine.describe(False)["records_bytes"] == counted

    @invariant()
    def expiry_is_due_when_a_session_s_time_has_passed(self) -> None:
        for at in (self.model.log_time_ms, self.model.log_time_ms + 60_000):
            passed = any(session.last_ms + 60_000 <= at for session in self.model.sessions.values())
            assert self.machine.expiry_due(at) is passed

    @invariant()
    def leases_are_the_model_s(self) -> None:
        answer = codec.decode_result(self.machine.read(ListLeases()))
        assert answer.leases == tuple(sorted(self.model.leases))
        for at in (self.model.log_time_ms, self.model.log_time_ms + 30_000):
            passed = any(lease.deadline_ms <= at for lease in self.model.leases.values())
            assert self.machine.lease_expiry_due(at) is passed

    def teardown(self) -> None:
        self.machine.close()
        self.cleanup.close()


class OnMemory(Replica):
    def __init__(self) -> None:
        self.disk = MemoryDisk()
        super().__init__()

    def open_storage(self, path: str, read_only: bool = False, /) -> Any:
        return self.disk.open(path, read_only)

    @rule()
    def crash(self) -> None:
        self.disk.crash()
        self.machine = Machine(self.open_storage, self.path, RETENTION)
        assert self.machine.applied_index == self.flushed
        self.reapply()

    @precondition(lambda self: self.entries)
    @rule()
    def start_over(self) -> None:
        """Another replica that applies every entry anew reaches the same state."""
        self.machine.close()
        self.path = self.new_path()
        self.machine = Machine(self.open_storage, self.path, RETENTION)
        self.flushed = 0
        self.reapply()


class OnRocks(Replica):
    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="kvstore-state-")
        super().__init__()

    def open_storage(self, path: str, read_only: bool = False, /) -> Any:
        return RocksStorage(path, read_only)

    def new_path(self) -> str:
        return str(Path(self.folder) / super().new_path())

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


def run(replica: type[Replica], examples: int) -> None:
    run_state_machine_as_test(
        replica,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(60)
def test_on_memory_storage() -> None:
    run(OnMemory, 60)


@pytest.mark.timeout(60)
def test_on_rocksdb() -> None:
    run(OnRocks, 12)
