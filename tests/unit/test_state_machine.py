"""The machine: entries in and results out, and what it does when an entry, a file or a disk is not as it should be."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from kvstore import codec, versions
from kvstore.errors import InternalError, KvError, StartupError
from kvstore.model import Add, Compact, CompactResult, Delete, OpenSession, Put, PutResult, Range, Txn
from kvstore.raft.fsm import Checkpoint, EntryKind, StateMachine
from kvstore.state import layout, machine, mvcc
from kvstore.state.machine import DATA, MEMBERS, NOOP, Machine
from kvstore.state.storage import MemoryDisk, RocksStorage, StorageFailed
from tests.state_model import Call, code_of, decoded, entry

ROOT = Path(__file__).parents[2]


class Node:
    """A machine on a memory disk, and the index it is at."""

    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self.machine = Machine(self.disk.open, "state")

    def apply(self, *calls: Any, at_ms: int = 1000) -> list[Any]:
        return decoded(self.machine.apply(self.machine.applied_index + 1, 1, DATA, entry(at_ms, calls)))

    def read(self, request: Any) -> Any:
        return codec.decode_result(self.machine.read(request))


@pytest.fixture
def node() -> Node:
    return Node()


def test_it_is_what_raft_asks_for(node: Node) -> None:
    as_raft_sees_it: StateMachine = node.machine
    assert as_raft_sees_it.applied_index == 0
    assert (NOOP, DATA, MEMBERS) == (EntryKind.NOOP, EntryKind.DATA, EntryKind.MEMBERS)


def test_position_follows_every_entry(node: Node) -> None:
    assert (node.machine.applied_term, node.machine.previous_term, node.machine.revision) == (0, 0, 0)
    assert node.machine.apply(1, 4, NOOP, b"\x01") == []
    assert node.machine.apply(2, 4, MEMBERS, memoryview(b"three of us")) == []
    node.machine.apply(3, 6, DATA, memoryview(entry(70, [Put(b"a", b"1"), Put(b"b", b"2")])))
    assert node.machine.applied_index == 3
    assert (node.machine.applied_term, node.machine.previous_term) == (6, 4)
    assert node.machine.members == b"three of us"
    assert node.machine.revision == 2
    assert node.machine.log_time_ms == 70


def test_position_is_found_again(node: Node) -> None:
    node.machine.apply(1, 4, MEMBERS, b"three of us")
    node.apply(Put(b"a", b"1"), OpenSession())
    digest = node.machine.digest()
    node.machine.close()
    again = Machine(node.disk.open, "state")
    assert again.digest() == digest
    assert (again.applied_index, again.applied_term, again.previous_term) == (2, 1, 4)
    assert (again.members, again.session_count, again.log_time_ms) == (b"three of us", 1, 1000)


def test_log_time_never_goes_back(node: Node) -> None:
    node.apply(at_ms=500)
    node.apply(at_ms=400)
    assert node.machine.log_time_ms == 500
    node.apply(at_ms=-1)
    assert node.machine.log_time_ms == 500


def test_an_empty_entry_is_an_entry(node: Node) -> None:
    assert node.apply() == []
    assert node.machine.applied_index == 1


def test_results_keep_the_order_of_requests(node: Node) -> None:
    answers = node.apply(Put(b"a", b"1"), Add(b"a", 5), Add(b"a", 1, max=3), Range(b"a"), Put(b"b", b""))
    assert [type(answer).__name__ for answer in answers] == [
        "PutResult",
        "AddResult",
        "ErrorResult",
        "RangeResult",
        "PutResult",
    ]
    assert answers[1].value == 6
    assert answers[3].records[0].value == b"6"
    assert node.machine.revision == 3


def test_answers_to_one_entry_are_bounded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ANSWERS_BYTES_PER_ENTRY_MAX", 3000)
    [session] = [answer.session for answer in node.apply(OpenSession())]
    node.apply(Put(b"big", bytes(1000)))
    ask = [Put(b"big", bytes(1000), prev=True)] * 3
    *_, refused = node.apply(*ask, Call(Add(b"n", 1), session, 1, 1))
    assert refused.code == "overloaded"
    assert node.read(Range(b"n")).count == 0
    assert node.apply(Call(Add(b"n", 1), session, 1, 1))[0].value == 1  # the same request may succeed later


# --- entries that cannot be applied ---------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_gap_in_the_log_stops_it(node: Node, index: int) -> None:
    node.apply(Put(b"a", b"1"))
    with pytest.raises(InternalError, match="cannot be applied after entry 1"):
        node.machine.apply(index, 1, NOOP, b"")


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x93", entry(1, [Put(b"a", b"1")])[:-1], b"\x93\x01\x02\x91\x05"])
def test_an_undecodable_entry_stops_it(node: Node, payload: bytes) -> None:
    with pytest.raises(InternalError, match="entry 1 is damaged"):
        node.machine.apply(1, 1, DATA, payload)
    with pytest.raises(InternalError, match="no entry is applied any more: entry 1 failed"):
        node.machine.apply(1, 1, NOOP, b"")
    assert node.machine.applied_index == 0


def test_an_unknown_kind_stops_it(node: Node) -> None:
    with pytest.raises(InternalError, match="unknown kind 3"):
        node.machine.apply(1, 1, 3, b"")


@pytest.mark.parametrize("items", [[], ["of another form"]])
def test_an_entry_of_a_newer_format_stops_it(node: Node, items: list[Any]) -> None:
    with pytest.raises(StartupError) as caught:
        node.machine.apply(1, 1, DATA, msgspec.msgpack.encode((versions.VERSION + 1, 5, items)))
    assert caught.value.code == "data_format_newer"


# --- disks ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_writes_and_leaves_reads(node: Node) -> None:
    node.apply(Put(b"a", b"1"))
    node.disk.fail("no space left")
    with pytest.raises(StorageFailed) as caught:
        node.apply(Put(b"a", b"2"), Put(b"b", b""))
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value, OSError)
    assert node.machine.applied_index == node.machine.revision == 1
    assert node.read(Range(b"a")).records[0].value == b"1"
    assert node.read(Range(b"a", b"")).count == 1
    node.disk.fail(None)
    with pytest.raises(InternalError, match="no space left"):
        node.apply(Put(b"a", b"2"))
    node.machine.close()
    node.machine = Machine(node.disk.open, "state")
    assert [result.revision for result in node.apply(Put(b"a", b"2"))] == [2]


def test_a_flush_that_fails_says_so(node: Node) -> None:
    node.apply(Put(b"a", b"1"))
    node.disk.fail("no space left")
    with pytest.raises(StorageFailed):
        node.machine.flush()
    with pytest.raises(StorageFailed):
        node.machine.checkpoint("copy")
    node.machine.close()  # the log has what was not flushed
    node.disk.fail(None)
    assert Machine(node.disk.open, "state").applied_index == 0


def test_a_crash_goes_back_to_the_last_flush(node: Node) -> None:
    node.apply(Put(b"a", b"1"))
    assert node.machine.flush() == 1
    node.apply(Put(b"a", b"2"))
    node.disk.crash()
    node.machine = Machine(node.disk.open, "state")
    assert node.machine.applied_index == 1
    assert node.read(Range(b"a")).records[0].value == b"1"


def test_a_full_disk_below_rocksdb(tmp_path: Path) -> None:
    node = Machine(RocksStorage, str(tmp_path / "state"))
    node.apply(1, 1, DATA, entry(1, [Put(b"a", b"1")]))
    node.flush()
    large = entry(1, [Put(b"b", Random(1).randbytes(1_000_000))])
    node.apply(2, 1, DATA, large)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # no file may grow beyond it
    try:
        for attempt in (node.flush, lambda: node.checkpoint(str(tmp_path / "copy"))):
            with pytest.raises(StorageFailed):
                attempt()
        with pytest.raises(StorageFailed):
            node.apply(3, 1, DATA, entry(1, [Put(b"c", b"1")]))
        assert decoded([node.read(Range(b"", b""))])[0].count == 2
        node.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    node = Machine(RocksStorage, str(tmp_path / "state"))
    assert node.applied_index == 1
    node.apply(2, 1, DATA, large)
    node.close()
    node.close()


def test_a_closed_machine_takes_no_entry(node: Node) -> None:
    node.machine.close()
    with pytest.raises(InternalError, match="closed"):
        node.apply(Put(b"a", b"1"))


def test_a_flush_is_due_after_so_many_requests_or_bytes(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "FLUSH_REQUESTS", 3)
    node.apply(Put(b"a", b"1"), Put(b"a", b"2"))
    assert not node.machine.flush_due()
    node.apply(Put(b"a", b"3"))
    assert node.machine.flush_due()
    node.machine.flush()
    assert not node.machine.flush_due()
    monkeypatch.setattr(machine, "FLUSH_BYTES", 100)
    node.apply(Put(b"a", bytes(100)))
    assert node.machine.flush_due()


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_the_whole_state(tmp_path: Path) -> None:
    ours = Machine(RocksStorage, str(tmp_path / "ours"))
    ours.apply(1, 1, MEMBERS, b"three of us")
    ours.apply(2, 3, DATA, entry(50, [Put(b"a", b"1"), OpenSession(), Put(b"a", b"2")]))
    session = 2 << 16 | 1
    kept = ours.apply(3, 3, DATA, entry(60, [Call(Add(b"n", 1), session, 1, 1)]))
    path = str(tmp_path / "copy")
    assert ours.checkpoint(path) == Checkpoint(3, 3, b"three of us")
    digest = ours.digest()
    ours.apply(4, 3, DATA, entry(60, [Put(b"later", b"")]))

    theirs = Machine(RocksStorage, str(tmp_path / "theirs"))
    theirs.apply(1, 1, DATA, entry(1, [Put(b"stale", b"")]))
    assert theirs.inspect(path) == Checkpoint(3, 3, b"three of us")
    theirs.restore(path)
    assert theirs.digest() == digest
    assert (theirs.applied_index, theirs.previous_term, theirs.members) == (3, 3, b"three of us")
    assert decoded([theirs.read(Range(b"a", revision=1))])[0].records[0].value == b"1"
    assert decoded([theirs.read(Range(b"stale"))])[0].count == 0
    # A retried request finds its answer there, and changes nothing.
    assert theirs.apply(4, 3, DATA, entry(60, [Call(Add(b"n", 1), session, 1, 1)])) == kept
    ours.close()
    theirs.close()


def test_a_damaged_checkpoint_is_noticed(tmp_path: Path) -> None:
    node = Machine(RocksStorage, str(tmp_path / "state"))
    node.apply(1, 1, NOOP, b"")
    path = tmp_path / "copy"
    node.checkpoint(str(path))
    (path / "CURRENT").write_bytes(b"junk")
    for attempt in (node.inspect, node.restore):
        with pytest.raises(StartupError) as caught:
            attempt(str(path))
        assert caught.value.code == "state_damaged"
    with pytest.raises(StartupError) as caught:
        node.inspect(str(tmp_path / "nowhere"))
    assert caught.value.code == "state_damaged"


def test_a_directory_without_its_files_is_damaged(tmp_path: Path) -> None:
    node = Machine(RocksStorage, str(tmp_path / "state"))
    node.apply(1, 1, NOOP, b"")
    node.close()
    for pattern in ("*.sst", "MANIFEST-*"):
        for path in (tmp_path / "state").glob(pattern):
            path.unlink()
        with pytest.raises(StartupError) as caught:
            Machine(RocksStorage, str(tmp_path / "state"))
        assert caught.value.code == "state_damaged"


def test_a_directory_in_use_by_another_process_is_refused(tmp_path: Path) -> None:
    holding = "import sys; from kvstore.state.storage import RocksStorage as R; s = R(sys.argv[1]); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        with pytest.raises(StartupError) as caught:
            Machine(RocksStorage, str(tmp_path))
        assert caught.value.code == "data_dir_in_use"
        holder.stdin.write(b"\n")


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    first = Machine(RocksStorage, str(tmp_path))
    with pytest.raises(StartupError) as caught:
        Machine(RocksStorage, str(tmp_path))
    assert caught.value.code == "data_dir_in_use"
    first.close()


# --- what lies in the storage ---------------------------------------------------------------------------------------


def stored(node: Node, key: bytes, value: bytes | None) -> KvError:
    """Overwrite (or delete) one stored thing, and return what opening says to it."""
    node.machine.close()
    storage = node.disk.open("state")
    batch = storage.batch()
    if value is None:
        batch.delete(key)
    else:
        batch.put(key, value)
    storage.write(batch)
    storage.flush()
    storage.close()
    with pytest.raises(StartupError) as caught:
        Machine(node.disk.open, "state")
    return caught.value


SESSION_KEY = layout.SESSION + layout.pack_u64(1 << 16)
OUTCOME_KEY = layout.OUTCOME + layout.pack_u64(1)
POSITION = layout.Position(layout.FORMAT + 1, 1, 1, 0, 0, 0, 0, 1, layout.Epoch(0, 1, 0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (layout.M_FORMAT, b"%d" % (versions.VERSION + 1)),
        (layout.M_POSITION, layout.encode(POSITION)),
        (SESSION_KEY, layout.encode(layout.SessionRecord(layout.FORMAT + 1, 1, 0, 1, {}))),
        (OUTCOME_KEY, layout.encode((layout.FORMAT + 1, 0, [], [], []))),
    ],
)
def test_a_newer_format_is_refused(node: Node, key: bytes, value: bytes) -> None:
    node.apply(OpenSession())
    assert stored(node, key, value).code == "data_format_newer"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (layout.M_FORMAT, b"junk"),
        (layout.M_FORMAT, None),
        (layout.M_POSITION, b"\xc1"),
        (layout.M_POSITION, None),
        (layout.M_EPOCHS, b"\xc1"),
        (SESSION_KEY, b"\xc1"),
        (OUTCOME_KEY, b"\x91\x01"),
    ],
)
def test_damage_is_refused(node: Node, key: bytes, value: bytes | None) -> None:
    node.apply(OpenSession())
    assert stored(node, key, value).code == "state_damaged"


def test_a_record_of_a_newer_format_is_refused(node: Node) -> None:
    node.apply(Put(b"a", b"1"))
    node.machine.close()
    storage = node.disk.open("state")
    batch = storage.batch()
    batch.put(b"ka", layout.pack_header(layout.FORMAT + 1, 1, 1, 1, 0) + b"?")
    storage.write(batch)
    storage.flush()
    storage.close()
    node.machine = Machine(node.disk.open, "state")
    with pytest.raises(StartupError) as caught:
        node.machine.read(Range(b"a"))
    assert caught.value.code == "data_format_newer"


# --- compaction -----------------------------------------------------------------------------------------------------


def test_compaction_refuses_what_is_older(node: Node) -> None:
    node.apply(*[Put(b"a", b"%d" % number) for number in range(1, 6)])
    assert node.apply(Compact(3)) == [CompactResult(3)]
    assert node.machine.compacted_revision == 3
    assert node.machine.revision == 5
    assert [code_of(node.read(Range(b"a", revision=at))) for at in (1, 2, 3, 5, 6)] == [
        "revision_compacted",
        "revision_compacted",
        "",
        "",
        "revision_in_future",
    ]
    assert node.read(Range(b"a", revision=3)).records[0].value == b"3"
    assert [code_of(answer) for answer in node.apply(Compact(3), Compact(2), Compact(6), Compact(5))] == [
        "revision_compacted",
        "revision_compacted",
        "revision_in_future",
        "",
    ]


def test_compaction_counts_within_its_batch(node: Node) -> None:
    answers = node.apply(Put(b"a", b"1"), Put(b"a", b"2"), Compact(2), Range(b"a", revision=1), Range(b"a", revision=2))
    assert code_of(answers[3]) == "revision_compacted"
    assert answers[4].records[0].value == b"2"


def test_compaction_frees_what_nobody_can_read(node: Node) -> None:
    for number in range(50):
        node.apply(Put(b"a", b"%d" % number), Put(b"a", b"%d again" % number), Put(b"gone", b""))
        node.apply(Put(b"b", b"%d" % number))
    node.apply(Put(b"b", b"last"))
    node.apply(Compact(node.machine.revision))
    node.machine.flush()
    storage = node.disk.open("state", True)
    assert list(storage.scan(b"i", b"j")) == []
    assert len(list(storage.scan(b"h", b"i"))) == 1
    assert [key for key, _ in storage.scan(b"k", b"l")] == [b"ka", b"kb", b"kgone"]


def test_automatic_compaction_by_age(node: Node) -> None:
    hour_ms = mvcc.Retention().age_ms
    node.apply(Put(b"a", b"1"), at_ms=hour_ms)
    node.apply(Put(b"a", b"2"), at_ms=hour_ms + hour_ms // 10)
    assert node.machine.compaction_due(0) is None
    node.apply(Put(b"b", b"1"), at_ms=2 * hour_ms)
    assert node.machine.compaction_due(0) is None
    node.apply(at_ms=2 * hour_ms + hour_ms // 5)
    # What ended more than an hour ago goes, and what is newer stays.
    due = node.machine.compaction_due(0)
    assert due == 1
    node.apply(Compact(due))
    assert node.machine.compaction_due(0) is None
    assert node.read(Range(b"a", revision=1)).records[0].value == b"1"


def test_automatic_compaction_by_age_where_nobody_writes_any_more(node: Node) -> None:
    """A quota's alarm would outlive the history that it was raised for."""
    hour_ms = mvcc.Retention().age_ms
    node.apply(Put(b"a", b"1"), at_ms=hour_ms)
    node.apply(Put(b"a", b"2"), at_ms=hour_ms + 1)
    assert node.machine.compaction_due(2 * hour_ms + hour_ms // 16) is None
    due = node.machine.compaction_due(2 * hour_ms + hour_ms // 16 + 1)
    assert due == node.machine.revision
    node.apply(Compact(due), at_ms=3 * hour_ms)
    assert node.machine.compaction_due(9 * hour_ms) is None
    # The next epoch counts from its own first batch, not from the compaction.
    node.apply(Put(b"a", b"3"), at_ms=9 * hour_ms)
    assert node.machine.compaction_due(9 * hour_ms + 1) is None
    assert node.read(Range(b"a")).records[0].value == b"3"


@pytest.mark.parametrize(
    ("retention", "kept"), [(mvcc.Retention(batches=320), 400), (mvcc.Retention(size_bytes=320), 10)]
)
def test_automatic_compaction_by_size(node: Node, retention: mvcc.Retention, kept: int) -> None:
    node.machine.close()
    node.machine = Machine(node.disk.open, "state", retention)
    revision = compactions = 0
    for number in range(1000):
        node.apply(Put(b"a", b"%d" % number))
        due = node.machine.compaction_due(0)
        if due is not None:
            assert due > revision
            revision = due
            compactions += 1
            node.apply(Compact(due))
    assert compactions > 1
    node.machine.flush()
    storage = node.disk.open("state", True)
    assert len(list(storage.scan(b"i", b"j"))) <= kept
    assert node.read(Range(b"a", revision=revision)).records[0].mod_revision == revision


# --- reads ----------------------------------------------------------------------------------------------------------


def test_its_size_is_counted(node: Node) -> None:
    """Keys and packed records, whatever was written within one entry; the same after a restart, and where a state of
    before it was counted is opened."""

    def counted() -> int:
        node.machine.flush()
        return sum(len(key) - 1 + len(packed) for key, packed in node.disk.open("state", True).scan(b"k", b"l"))

    node.apply(Put(b"a", b"1" * 100), Put(b"a", b"2"), Put(b"b", b"3" * 50), Add(b"n", 1))
    node.apply(Put(b"b", b"longer" * 20), Delete(b"a"), Put(b"a", b""), Delete(b"n"), Put(b"gone", b""))
    node.apply(Delete(b"gone"), Delete(b"never"))
    described = node.machine.describe(False)
    assert described["records_bytes"] == counted() == len(b"a") + len(b"b") + 2 * layout.HEADER_BYTES + 120
    assert node.machine.size_bytes == int(described["records_bytes"]) + int(described["history_bytes"])
    assert int(described["history_bytes"]) > 200
    node.machine.close()
    node.machine = Machine(node.disk.open, "state")
    assert node.machine.describe(False) == described
    node.apply(Compact(node.machine.revision))
    assert node.machine.describe(False)["history_bytes"] == 0

    node.machine.close()
    storage = node.disk.open("state")
    stored = storage.get(layout.M_POSITION)
    assert stored is not None
    batch = storage.batch()
    batch.put(layout.M_POSITION, layout.encode(msgspec.to_builtins(layout.decode_position(stored))[:-1]))
    storage.write(batch)
    storage.flush()
    storage.close()
    node.machine = Machine(node.disk.open, "state")
    assert node.machine.describe(False)["records_bytes"] == described["records_bytes"]


def test_a_read_writes_nothing(node: Node) -> None:
    node.apply(Put(b"a", b"1"))
    digest = node.machine.digest()
    for request in (Txn(success=(Put(b"a", b"2"),)), Txn(failure=(Txn(success=(Add(b"a", 1),)),))):
        assert code_of(node.read(request)) == "invalid_request"
    assert node.read(Txn(success=(Range(b"a"),))).results[0].records[0].value == b"1"
    assert node.machine.digest() == digest


def test_a_digest_tells_states_apart() -> None:
    def digest_after(*calls: Any, at_ms: int = 1000) -> str:
        node = Node()
        node.apply(*calls, at_ms=at_ms)
        return node.machine.digest()

    digests = [
        digest_after(),
        digest_after(at_ms=1001),
        digest_after(Put(b"a", b"1")),
        digest_after(Put(b"a", b"2")),
        digest_after(Put(b"a1", b"")),
        digest_after(Put(b"a", b"1"), Put(b"a", b"1")),
        digest_after(Put(b"a", b"1"), Compact(1)),
        digest_after(OpenSession()),
        digest_after(OpenSession(), OpenSession()),
    ]
    assert len(set(digests)) == len(digests)
    assert digest_after(Put(b"a", b"1")) == digests[2]


def test_every_form_of_buffer_is_a_payload(node: Node) -> None:
    payload = entry(1, [Put(b"a", b"1")])
    assert decoded(node.machine.apply(1, 1, EntryKind.DATA, payload)) == [PutResult(1)]
    assert decoded(node.machine.apply(2, 1, EntryKind.DATA, memoryview(b"x" + payload)[1:])) == [PutResult(2)]
