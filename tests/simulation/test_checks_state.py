"""As `test_checks.py`: states, requests, answers, reads, configurations, and the end of a run."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from msgspec import Raw

from kvstore import codec, model
from kvstore.errors import InternalError, KvError, OutcomeUnknown, StartupError, Unavailable
from kvstore.model import Member
from kvstore.raft.changes import Changes
from kvstore.raft.fsm import EntryKind
from kvstore.raft.members import Configuration
from kvstore.raft.node import RaftNode
from kvstore.raft.proposals import Proposals, _refuse
from kvstore.raft.reads import ReadIndex
from kvstore.state.machine import Machine
from kvstore.state.sessions import Sessions
from kvstore.state.storage import MemoryDisk
from tests.raft_cluster import PayloadList
from tests.raft_fixtures import Answer, configuration, data
from tests.simulation.answers import Answers
from tests.simulation.checked_cluster import (
    breaks,
    running,
    violates,
    with_uncommitted,
)
from tests.simulation.checks import DIGEST_ENTRIES
from tests.simulation.ledger import Ledger, check_change
from tests.simulation.outcome import Counts

# --- configurations ---------------------------------------------------------------------------------------------------


def test_configurations_that_only_a_dead_member_holds() -> None:
    """Its disk counts once it starts again, so the nemesis must count it before."""
    cluster = running()
    before = cluster.checks.uncommitted_configurations()
    cluster.network.cut("a", "b")
    cluster.network.cut("a", "c")
    last = cluster.wal("a").last_index
    cluster.nodes["a"].add_learner(Member("d", "d:1", "d:2", "d" * 16, False), Answer())
    cluster.until(lambda: cluster.wal("a").durable_index == last + 1)
    cluster.crash("a")
    assert before == []
    assert ["".join(m.name for m in found.members) for found in cluster.checks.uncommitted_configurations()] == ["abcd"]
    cluster.network.heal()
    cluster.lead("b")
    cluster.commit("another")
    cluster.start("a")
    cluster.until(lambda: cluster.wal("a").last_index == cluster.wal("b").last_index)
    cluster.time.advance(0.1)
    assert cluster.checks.uncommitted_configurations() == []


# --- state ------------------------------------------------------------------------------------------------------------


def test_what_is_applied_is_not_committed() -> None:
    cluster = with_uncommitted("four")
    machine, wal = cluster.nodes["b"].machine, cluster.wal("b")
    payload, index, term = wal.entries[-1]
    machine.apply(index, term, EntryKind.DATA, memoryview(payload)[1:])
    with violates("state machine safety", "nothing was"):
        cluster.look()


def test_what_is_applied_is_not_the_entry() -> None:
    cluster = running()
    committed = cluster.checks.ledger.commit
    with breaks("state machine safety"):
        cluster.watch("b").applying(
            committed, cluster.wal("b").last_term, EntryKind.DATA, memoryview(data("other"))[1:]
        )


def test_an_installed_state_that_is_not_committed() -> None:
    cluster = running()
    machine = cluster.machine("b")
    machine._files.make_dirs("/data/other")
    machine._image.index += 5
    machine._write("/data/other")
    machine.restore("/data/other")
    with violates("state machine safety", "the state of b"):
        cluster.look()


def test_a_state_on_disk_that_is_not_committed() -> None:
    cluster = running()
    ledger = cluster.checks.ledger
    cluster.crash("b")
    del ledger.committed[3:]
    with violates("state machine safety"):
        cluster.nodes["a"].machine.flush()
        cluster.crash("a")
        cluster.start("a")


def test_a_log_that_is_taken_for_committed_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    build = RaftNode._build_engine

    def building(self: RaftNode) -> None:
        build(self)
        self._engine._o._SyncObj__raftCommitIndex = self._wal.last_index

    cluster = with_uncommitted("four")
    cluster.crash("b")
    monkeypatch.setattr(RaftNode, "_build_engine", building)
    with violates("commit safety", "no leader has committed"):
        cluster.start("b")


def test_a_state_beyond_its_log() -> None:
    cluster = running()
    del cluster.wal("b").entries[-1]
    with breaks("state machine safety"):
        cluster.watch("b")._check_state_at_start()


def test_a_result_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = PayloadList.apply

    def applying(self: PayloadList, *args: Any) -> Any:
        return f"{apply(self, *args)} of {id(self)}"

    cluster = running()
    monkeypatch.setattr(PayloadList, "apply", applying)
    with violates("replicas equal"):
        cluster.commit("four")


def test_a_state_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PayloadList, "digest", lambda self: str(len(self.payloads)), raising=False)
    cluster = running()
    cluster.machine("c")._image.payloads.append((0, b"from nowhere"))
    with violates("replicas equal", "digest"):
        for number in range(DIGEST_ENTRIES // 32 + 1):
            cluster.commit(*(f"{number}/{part}" for part in range(32)))


def test_a_checkpoint_that_differs_once_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = PayloadList.restore

    def restoring(self: PayloadList, path: str) -> None:
        restore(self, path)
        self._image.payloads.pop()

    monkeypatch.setattr(PayloadList, "digest", lambda self: str(len(self.payloads)), raising=False)
    monkeypatch.setattr(PayloadList, "restore", restoring)
    cluster = running()
    cluster.make_lag("c")
    with violates("replicas equal", "digest"):
        cluster.start("c")
        cluster.time.advance(5.0)


def test_log_time() -> None:
    ledger = Ledger(Counts())
    ledger.stamped("a", 3, 5_000, 1.0)
    ledger.stamped("a", 4, 5_000, 2.0)
    ledger.stamped("b", 5, 15_200, 11.0)
    with breaks("log time"):
        ledger.stamped("b", 6, 18_300, 12.0)
    with breaks("log time"):
        Ledger.stamped(ledger, "c", 7, 15_199, 13.0)


# --- requests ---------------------------------------------------------------------------------------------------------


class Requests:
    """A real state machine that is given one request an entry, with the check of exactly-once behind it."""

    def __init__(self) -> None:
        self.machine = Machine(MemoryDisk().open, "state")
        self.answers = Answers()
        self.index = 0
        self.now_ms = 1_000

    def apply(self, session: int, seq: int, acked_below: int, request: Any) -> model.Result:
        self.index += 1
        item = codec.RawBatchItem(session, seq, acked_below, Raw(codec.encode_request(request)))
        payload = codec.encode_batch(self.now_ms, [item])
        results = self.machine.apply(self.index, 1, EntryKind.DATA, payload)
        self.answers.applied(self.index, payload, results)
        return codec.decode_result(results[0])

    def open(self) -> int:
        opened = self.apply(0, 0, 0, model.OpenSession())
        assert isinstance(opened, model.SessionResult)
        return opened.session


def test_repeated_acknowledged_and_expired_requests_are_no_violation() -> None:
    requests = Requests()
    session = requests.open()
    put = model.Put(b"key", b"value")
    first = requests.apply(session, 1, 1, put)
    assert requests.apply(session, 1, 1, put) == first
    requests.apply(session, 2, 2, put)
    assert isinstance(stale := requests.apply(session, 1, 1, put), model.ErrorResult)
    assert stale.code == "stale_sequence"
    requests.apply(session, 0, 3, model.KeepSession())
    requests.apply(session, 0, 0, put)
    requests.apply(session, 0, 0, model.CloseSession())
    assert isinstance(gone := requests.apply(session, 3, 1, put), model.ErrorResult)
    assert gone.code == "session_expired"


def test_a_request_executes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sessions, "settle", lambda *_args: None)
    requests = Requests()
    session = requests.open()
    requests.apply(session, 1, 1, model.Put(b"key", b"value"))
    with breaks("exactly once"):
        requests.apply(session, 1, 1, model.Put(b"key", b"value"))


def test_an_acknowledged_request_executes(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests()
    session = requests.open()
    requests.apply(session, 1, 1, model.Put(b"key", b"value"))
    requests.apply(session, 2, 2, model.Put(b"key", b"value"))
    monkeypatch.setattr(Sessions, "admit", lambda self, item: self.by_id[item.session])
    with breaks("exactly once"):
        requests.apply(session, 1, 1, model.Put(b"key", b"value"))


def test_a_new_request_is_refused_as_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests()
    session = requests.open()
    requests.machine._sessions.by_id[session].acked_below = 9
    with breaks("exactly once"):
        requests.apply(session, 1, 1, model.Put(b"key", b"value"))


def test_a_session_comes_back() -> None:
    requests = Requests()
    session = requests.open()
    kept = requests.machine._sessions.by_id[session]
    requests.apply(session, 0, 0, model.CloseSession())
    requests.apply(session, 1, 1, model.Put(b"key", b"value"))
    requests.machine._sessions.by_id[session] = kept
    with breaks("exactly once"):
        requests.apply(session, 1, 1, model.Put(b"key", b"value"))


def test_an_answer_is_missing() -> None:
    payload = codec.encode_batch(1, [codec.RawBatchItem(1, 1, 1, Raw(codec.encode_request(model.Put(b"k", b"v"))))])
    with breaks("exactly once"):
        Answers().applied(2, payload, [])


# --- what doors are told ----------------------------------------------------------------------------------------------


def test_another_entrys_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def applied(self: Proposals, index: int, term: int, result: Any) -> None:
        waiting, self._by_index = self._by_index, {}
        for _, done in waiting.values():
            done(result, None)

    cluster = running()
    monkeypatch.setattr(Proposals, "applied", applied)
    with violates("answers", "another one"):
        cluster.commit("four", "five")


def test_a_refused_entry_that_is_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = running()
    monkeypatch.setattr(Proposals, "appended", lambda self, _entries: _refuse(self._queue))
    cluster.propose(cluster.nodes["a"], "four")
    with violates("answers", "refuses an entry for good"):
        cluster.time.advance(0.1)


def test_a_refused_entry_that_is_made_later() -> None:
    cluster = running()
    leader = cluster.nodes["a"]
    entry = data("four")
    cluster.watch("a").answered(entry, None, Unavailable("no"))
    cluster.watch("a").answered(data("five"), None, OutcomeUnknown("who knows"))
    leader._wal.append(entry, leader._wal.last_index + 1, leader.term)
    with violates("answers", "all the same"):
        cluster.look()


def test_a_read_that_passes_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = running()
    cluster.isolate("b")
    cluster.wait(cluster.propose(cluster.nodes["a"], "four"))
    monkeypatch.setattr(ReadIndex, "request", lambda _self, done: done(None))
    passed: list[KvError | None] = []
    cluster.nodes["b"].read_index(passed.append)
    with violates("linearizable reads"):
        cluster.look()
    assert passed == [None]


# --- the configuration ------------------------------------------------------------------------------------------------


def test_a_node_with_another_configuration_than_its_log() -> None:
    cluster = running()
    cluster.nodes["b"]._members = Configuration(cluster.nodes["b"].members[:2])
    with violates("configuration", "its log says a b c"):
        cluster.look()


def test_an_engine_with_other_voters() -> None:
    cluster = running()
    cluster.nodes["b"]._engine.set_members({"a", "b"}, {"c"})
    with violates("configuration", "the engine of b"):
        cluster.look()


def test_two_changes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = running()
    monkeypatch.setattr(Changes, "_under_way", lambda _self: False)
    cluster.isolate("a")
    for name in ("d", "e"):
        cluster.nodes["a"].add_learner(Member(name, f"{name}:1", "", f"id-{name}", False), Answer())
    with violates("configuration", "is not committed"):
        cluster.time.advance(0.1)


def test_a_change_of_two_voters() -> None:
    check_change("a", configuration("abc"), configuration("abcd"), 5)
    with breaks("configuration"):
        check_change("a", configuration("abc"), configuration("abd"), 5)


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_node_that_stops() -> None:
    cluster = running()
    cluster.nodes["b"]._fail(InternalError("two and two made five"))
    with violates("node stopped", "two and two"):
        cluster.look()


def test_a_node_that_stops_as_expected() -> None:
    cluster = running()
    cluster.machines["b"].expected_failures.add("storage_failed")
    cluster.nodes["b"]._fail_storage(OSError(errno.EIO, "Input/output error"))
    cluster.look()
    with violates("whole at the end", "takes no part"):
        cluster.checks.at_end()


def test_a_member_that_takes_itself_for_removed() -> None:
    cluster = running()
    cluster.nodes["b"]._fail(StartupError("this node was removed", code="removed_from_cluster"))
    with violates("node stopped", "is a member"):
        cluster.look()


def test_a_node_that_was_removed_may_stop() -> None:
    cluster = running()
    cluster.nodes["a"].remove("c", answer := Answer())
    cluster.wait(answer)
    cluster.until(lambda: cluster.nodes["c"].failure is not None)
    cluster.time.advance(0.5)
    cluster.checks.at_end()


def test_a_member_that_is_behind_at_the_end() -> None:
    cluster = running()
    cluster.isolate("c")
    cluster.wait(cluster.propose(cluster.nodes["a"], "four"))
    cluster.time.advance(0.1)
    with violates("whole at the end", "differently far"):
        cluster.checks.at_end()


def test_acknowledged_and_gone_at_the_end() -> None:
    cluster = running()
    cluster.checks.ledger.acknowledged += 1
    with violates("whole at the end", "was acknowledged"):
        cluster.checks.at_end()
