"""Faults 1 to 6 and 16 of pysyncobj 0.3.17: what is on disk, and what a log may lose. Stock fails, ours holds.

The faults' numbers are those of `docs/raft.md`.
"""

from __future__ import annotations

import mmap
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pysyncobj.journal
import pytest
from pysyncobj.journal import FileJournal, MetaStorer

from kvstore.errors import Unavailable
from kvstore.raft.messages import AppendEntries, AppendReply, ReadProbe, RequestVote, TermNotice, VoteReply
from kvstore.raft.outbox import NOTICE_DELAY_S
from kvstore.raft.sync import SLOW_S
from kvstore.raft.wal import Wal
from tests.fake_files import FaultyFile, FaultyFiles, Stopped, keep_random
from tests.raft_cluster import Cluster, ScriptedPeer
from tests.raft_fixtures import NOOP, Lone, acked, append, data
from tests.stock import NOOP as STOCK_NOOP
from tests.stock import Stock

# Stock leaves its metadata file to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


# --- 1: nothing is synced ---------------------------------------------------------------------------------------------


def test_fault_01_stock_acknowledges_and_votes_without_a_sync(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    syncs: list[str] = []

    class Counting(mmap.mmap):
        def flush(self, *args: Any) -> None:
            syncs.append("msync")
            super().flush(*args)

    for name in ("fsync", "fdatasync", "sync"):
        monkeypatch.setattr(os, name, lambda *_args, name=name: syncs.append(name))
    monkeypatch.setattr(pysyncobj.journal, "mmap", SimpleNamespace(mmap=Counting))

    stock = Stock("b", "ac", journalFile=str(tmp_path / "journal"), fullDumpFile=str(tmp_path / "dump"), useFork=False)
    stock.append("a", 1, (1, 0), *[(STOCK_NOOP, index, 1) for index in range(2, 11)], commit_index=10)
    stock.receive("c", type="request_vote", term=2, last_log_index=10, last_log_term=1)
    stock.tick()
    stock.forceLogCompaction()
    stock.tick()
    assert stock.said("next_node_idx")[-1]["next_node_idx"] == 11
    assert stock.said("response_vote") == [{"type": "response_vote", "term": 2}]
    assert (tmp_path / "dump").exists()
    assert syncs == []
    stock.destroy()
    assert syncs == ["msync"]  # a clean stop is the only one


def test_fault_01_ours_says_nothing_that_power_loss_could_take_back() -> None:
    cluster = Cluster()
    cluster.start("b")
    leader = ScriptedPeer(cluster, "a", "b")
    entries = [(1, data(index)) for index in range(2, 11)]
    reply = leader.ask("b", append(1, (1, 0), *entries), AppendReply)
    vote = leader.ask("b", RequestVote(2, 10, 1, transfer=True), VoteReply)
    assert reply == AppendReply(1, 11, True)
    assert vote == VoteReply(2)
    cluster.crash("b")
    wal = Wal.open(cluster.files["b"], "/data/wal", node_id="")
    assert [(payload, term) for payload, _, term in wal.entries[1:]] == [(payload, term) for term, payload in entries]
    assert (wal.term, wal.voted_for) == (2, "a")


def test_fault_01_ours_is_silent_when_the_disk_fails() -> None:
    cluster = Cluster()
    (node,) = cluster.start("b")
    leader = ScriptedPeer(cluster, "a", "b")
    cluster.files["b"].fail_sync()
    leader.say("b", append(1, (1, 0), (1, data(2))))
    leader.say("b", RequestVote(2, 10, 1, transfer=True))
    cluster.time.advance(0.2)
    assert node.failure is not None
    assert node.failure.code == "storage_failed"
    assert leader.heard(AppendReply) == []
    assert leader.heard(VoteReply) == []


# --- 2: acknowledged entries are dropped ------------------------------------------------------------------------------


def test_fault_02_stock_drops_acknowledged_entries() -> None:
    stock = Stock("b", "ac")
    stock.append("a", 1, (1, 0), *[(STOCK_NOOP, index, 1) for index in range(2, 11)])
    assert stock.said("next_node_idx")[-1] == {
        "type": "next_node_idx", "next_node_idx": 11, "reset": False, "success": True,
    }  # fmt: skip
    stock.append("a", 1, (4, 1), (STOCK_NOOP, 5, 1))
    assert stock.end == 5


def test_fault_02_ours_keeps_them() -> None:
    lone = Lone("b")
    assert acked(lone.receive("a", append(1, (1, 0), *[(1, data(index)) for index in range(2, 11)]))) == 10
    assert acked(lone.receive("a", append(1, (4, 1), (1, data(5))))) == 5
    assert lone.wal.last_index == 10
    lone.files.crash()
    assert Wal.open(lone.files, "/wal", node_id="").last_index == 10


def test_fault_02_stock_leader_sends_again_what_is_in_flight() -> None:
    stock = Stock("a", "bc")
    stock.lead(1)
    stock.fill(12, 1)
    stock.peek("sendAppendEntries")()
    stock.acknowledge("b", 6)
    stock.wire.sent.clear()
    stock.peek("sendAppendEntries")()
    (again,) = [message for peer, message in stock.wire.sent if peer == "b"]
    assert [index for _, index, _ in again["entries"]] == list(range(6, 13))


def test_fault_02_ours_does_not() -> None:
    lone = Lone("a")
    lone.lead()
    lone.propose(*[data(index) for index in range(3, 13)])
    lone.sent.clear()
    lone.receive("b", AppendReply(1, 6, True))
    lone.clock.now_s += 0.2
    lone.tick()
    lone.clock.now_s += NOTICE_DELAY_S
    lone.sync()
    (heartbeat,) = lone.heard(AppendEntries, "b")
    assert (heartbeat.prev_index, heartbeat.entries) == (12, ())


# --- 3: acknowledgements without a term -------------------------------------------------------------------------------


def test_fault_03_stock_counts_an_acknowledgement_from_an_earlier_leadership() -> None:
    stock = Stock("a", "bc")
    stock.lead(5)
    stock.fill(10, 5)
    stock.acknowledge("b", 11)  # b said this to the leader of term 3; it carries nothing that tells
    stock.tick()
    assert stock.raftCommitIndex == 10


def test_fault_03_ours_drops_it() -> None:
    lone = Lone("a", entries=[(NOOP, 1, 0), *[(data(index), index, 3) for index in range(2, 10)]])
    lone.lead()
    assert lone.engine.term == 4
    lone.receive("b", AppendReply(3, 11, True))
    lone.engine.tick()
    assert lone.engine.commit_index == 1
    lone.receive("b", AppendReply(4, 11, True))
    lone.engine.tick()
    assert lone.engine.commit_index == 10


def test_fault_03_stock_does_not_tell_a_deposed_leader() -> None:
    stock = Stock("b", "ac")
    stock.poke("raftCurrentTerm", 9)
    stock.append("a", 5, (1, 0))
    assert stock.wire.sent == []


def test_fault_03_ours_tells_it_and_it_steps_down() -> None:
    follower, leader = Lone("b"), Lone("a")
    leader.lead()
    follower.engine.adopt_term(9)
    (told,) = follower.receive("a", append(1, (1, 0)))
    assert told == TermNotice(9)
    leader.receive("b", told)
    assert not leader.engine.is_leader
    assert leader.engine.term == 9


# --- 4: snapshot messages commit what nobody verified -----------------------------------------------------------------


@pytest.mark.parametrize("serialized", [(b"x", True, False), None])
def test_fault_04_stock_commits_unverified_entries(serialized: Any) -> None:
    stock = Stock("b", "ac")
    stock.fill(5, 1)  # of a leader that never committed them
    stock.receive("a", type="append_entries", term=3, commit_index=100, serialized=serialized)
    assert stock.raftCommitIndex == 5


def test_fault_04_ours_commits_only_what_the_message_proved() -> None:
    lone = Lone("b", entries=[(NOOP, 1, 0), *[(data(index), index, 1) for index in range(2, 6)]])
    # All that a leader says to a peer that is receiving a snapshot, and a heartbeat that proves entry 1.
    lone.receive("a", ReadProbe(3, 0))
    lone.receive("a", append(3, (100, 3), commit=100))
    lone.receive("a", append(3, (5, 3), commit=100))
    lone.receive("a", append(3, (1, 0), commit=100))
    lone.engine.tick()
    assert lone.engine.commit_index == 1
    assert lone.wal.last_index == 5


# --- 5: the persisted commit index is ahead of the log ----------------------------------------------------------------


def test_fault_05_stock_applies_what_nobody_committed(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    journal = FileJournal(path)
    for index in range(1, 7):
        journal.add(STOCK_NOOP, index, 1 if index > 1 else 0)
    journal._destroy()  # what came after entry 6 did not reach the disk; the commit index did
    MetaStorer(path + ".meta").storeMeta({"raftCommitIndex": 10, "currentTerm": 1, "votedForNodeId": None})
    stock = Stock("b", "ac", journalFile=path)
    assert (stock.raftCommitIndex, stock.end) == (10, 6)
    stock.append("a", 2, (6, 1), (STOCK_NOOP, 7, 2), (STOCK_NOOP, 8, 2), commit_index=6)
    stock.tick()
    assert stock.raftLastApplied == 8
    stock.destroy()


def test_fault_05_ours_commits_what_the_leader_says() -> None:
    cluster = Cluster()
    cluster.prepare_log("b", [(NOOP, 1, 0), *[(data(index), index, 1) for index in range(2, 7)]])
    (node,) = cluster.start("b")
    leader = ScriptedPeer(cluster, "a", "b")
    assert node.committed == 1
    leader.ask("b", append(2, (6, 1), (2, data(7)), (2, data(8)), commit=6), AppendReply)
    assert (node.committed, node.machine.applied_index) == (6, 6)


def test_fault_05_ours_starts_where_the_state_ends_even_if_the_log_lost_more() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    cluster.commit(*range(10))
    node = cluster.nodes["b"]
    applied = node.machine.applied_index
    node.machine.flush()
    # The log's end is lost, as no disk that keeps its word would lose it; the state is ahead of it.
    cluster.crash("b")
    wal = Wal.open(cluster.files["b"], "/data/wal", node_id="")
    wal.truncate_from(applied - 3)
    wal.close()
    (node,) = cluster.start("b")
    assert node.committed == applied
    assert (cluster.wal("b").first_index, cluster.wal("b").last_index) == (applied, applied)
    cluster.commit("more")
    assert cluster.machine("b").payloads[-2:] == [b"9", b"more"]


# --- 6: compaction rewrites in place ----------------------------------------------------------------------------------


def test_fault_06_stock_loses_the_whole_journal_when_killed_in_a_compaction(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = str(tmp_path / "journal")
    journal = FileJournal(path)
    for index in range(1, 101):
        journal.add(b"\x01" + bytes(50), index, 1)

    class Killed(Exception):
        pass

    def killed(*_args: object) -> None:
        raise Killed

    monkeypatch.setattr(journal, "add", killed)
    with pytest.raises(Killed):
        journal.deleteEntriesTo(10)
    again = FileJournal(path)
    assert len(again) == 0
    again._destroy()
    journal._destroy()


def test_fault_06_ours_loses_nothing_wherever_it_is_stopped() -> None:
    stopped = 0
    for operations in range(100):
        files = FaultyFiles(random.Random(operations))
        wal = Wal.open(files, "/wal", node_id="1", segment_bytes=2000)
        for index in range(1, 101):
            wal.append(data("x" * 100), index, 1)
            wal.sync()
        files.stop_after = files.operation_count + operations
        try:
            wal.drop_before(60, 0)
            wal.sync()
            wal.append(data("after"), 101, 1)
            wal.sync()
        except Stopped:
            stopped += 1
        files.crash(keep_random(files.chance))
        again = Wal.open(files, "/wal", node_id="1", segment_bytes=2000)
        assert again.first_index <= 60
        assert again.last_index >= 100
        assert again.entries[60 - again.first_index] == (data("x" * 100), 60, 1)
        if files.operation_count == 0 or stopped < operations:
            break
    assert stopped > 3


# --- 16: a sole voter answers before its disk -------------------------------------------------------------------------


def test_fault_16_stock_sole_voter_answers_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    stock = Stock("a", "", journalFile=str(path))
    stock.campaign()
    assert stock._isLeader()
    answers: list[Any] = []
    syncs: list[str] = []
    stock.log.flush = lambda: syncs.append("flush")
    stock.store("x", callback=lambda result, error: answers.append((result, error)))
    stock.tick()
    stock.tick()
    assert answers == [("x", 0)]
    assert syncs == []
    stock.destroy()


def test_fault_16_ours_answers_when_it_is_durable() -> None:
    cluster = Cluster("a", listens=False)
    (node,) = cluster.start("a")
    cluster.elect()
    answers = [cluster.propose(node, number) for number in range(5)]
    cluster.until(lambda: any(answer.is_done for answer in answers))
    assert [answer.is_ok for answer in answers] == [True] * 5
    cluster.crash("a")
    cluster.start("a")
    cluster.elect()
    assert cluster.machine("a").payloads == [b"0", b"1", b"2", b"3", b"4"]


def slow_disk(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sync takes ten times what counts as slow: inline the clock moves, in a thread the answer comes late."""
    real = FaultyFile.sync

    def slow(file: FaultyFile) -> None:
        cluster.time.now_s += 10 * SLOW_S
        real(file)

    cluster.time.thread_s = 10 * SLOW_S
    monkeypatch.setattr(FaultyFile, "sync", slow)


def test_fault_16_ours_waits_for_a_slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster("a", listens=False)
    (node,) = cluster.start("a")
    cluster.elect()
    slow_disk(cluster, monkeypatch)
    cluster.propose(node, "makes it slow")
    cluster.time.advance(1.0)
    wal = cluster.wal("a")
    answer = cluster.propose(node, "x")
    cluster.until(lambda: wal.last_index > wal.durable_index)
    assert node._sync.running
    assert not answer.is_done
    assert cluster.machine("a").payloads == [b"makes it slow"]
    cluster.wait(answer)
    assert answer.is_ok
    assert wal.durable_index == wal.last_index


def test_fault_16_ours_takes_proposals_while_a_slow_disk_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits with them; it does not claim to have lost its leadership."""
    cluster = Cluster("a", listens=False)
    (node,) = cluster.start("a")
    cluster.elect()
    slow_disk(cluster, monkeypatch)
    cluster.propose(node, "makes it slow")
    cluster.time.advance(1.0)
    answers = [cluster.propose(node, 0)]
    cluster.until(lambda: node._sync.running)
    answers += [cluster.propose(node, number) for number in range(1, 4)]
    cluster.wait(*answers)
    assert [answer.error for answer in answers] == [None] * 4


def test_fault_16_ours_promises_nothing_once_the_disk_has_failed() -> None:
    cluster = Cluster("a", listens=False)
    (node,) = cluster.start("a")
    cluster.elect()
    cluster.files["a"].fail_sync()
    answer = cluster.propose(node, "x")
    cluster.wait(answer)
    assert answer.error is not None
    assert answer.error.code == "outcome_unknown"
    refused = cluster.propose(node, "y")
    assert isinstance(refused.error, Unavailable)
    assert refused.error.code == "storage_failed"
