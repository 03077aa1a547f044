"""Faults 14, 15 and 20 of pysyncobj 0.3.17: snapshots, and what lags or is left behind. Stock fails, ours holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pysyncobj.journal import FileJournal
from pysyncobj.node import Node

from kvstore.errors import OutcomeUnknown
from kvstore.raft.fsm import Checkpoint
from kvstore.raft.messages import AppendReply
from kvstore.raft.outbox import PEER_TURN_BYTES_MAX
from tests.raft_cluster import Cluster, ScriptedPeer, image_of
from tests.raft_fixtures import NOOP, Answer, Lone, acked, append, configuration, data
from tests.stock import NOOP as STOCK_NOOP
from tests.stock import Stock

MEMBERS = [Node(name) for name in "abc"]

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def dumping(path: Path, index: int, **conf: Any) -> dict[str, Any]:
    """Settings of a stock engine whose dump, wherever it comes from, ends at this index."""

    def load(_path: str) -> Any:
        return (STOCK_NOOP, index, 1), (STOCK_NOOP, index - 1, 1), MEMBERS

    def save(path: str, _data: Any) -> None:
        Path(path).write_bytes(b"x")

    return {
        "fullDumpFile": str(path / "dump"),
        "serializer": save,
        "deserializer": load,
        "serializeChecker": lambda: 0,
    } | conf


def install(stock: Stock, term: int, commit_index: int) -> None:
    """The leader's snapshot arrives, in two pieces."""
    for piece in ((b"x", True, False), (b"", False, True)):
        stock.receive("a", type="append_entries", term=term, commit_index=commit_index, serialized=piece)


# --- 14: loading a dump -----------------------------------------------------------------------------------------------


def test_fault_14_stock_clears_a_longer_log_when_it_starts(tmp_path: Path) -> None:
    journal = FileJournal(str(tmp_path / "journal"))
    for index in range(90, 121):
        journal.add(STOCK_NOOP, index, 1)
    journal._destroy()
    (tmp_path / "dump").write_bytes(b"x")
    stock = Stock("b", "ac", journalFile=str(tmp_path / "journal"), **dumping(tmp_path, 100))
    assert stock.end == 120
    stock.tick()
    assert (stock.log[0][1], stock.end) == (99, 100)
    stock.destroy()


def test_fault_14_ours_keeps_what_it_acknowledged() -> None:
    cluster = Cluster()
    cluster.prepare_log("b", [(data(index), index, 1) for index in range(90, 121)])
    cluster.prepare_state("b", image_of(100, 1, configuration("abc")))
    (node,) = cluster.start("b")
    wal = cluster.wal("b")
    assert (wal.first_index, wal.last_index, node.committed) == (90, 120, 100)
    leader = ScriptedPeer(cluster, "a", "b")
    reply = leader.ask("b", append(1, (120, 1), commit=110), AppendReply)
    assert reply == AppendReply(1, 121, True)
    assert cluster.machine("b").payloads == [str(index).encode() for index in range(101, 111)]


def test_fault_14_stock_swallows_a_damaged_dump_and_acknowledges_its_whole_log(tmp_path: Path) -> None:
    def damaged(_path: str) -> Any:
        raise OSError("bad checksum")

    stock = Stock("b", "ac", **dumping(tmp_path, 100, deserializer=damaged))
    stock.fill(50, 1)  # nobody has verified these
    install(stock, 3, 100)
    assert stock.said("next_node_idx")[-1]["next_node_idx"] == 51
    assert stock.said("next_node_idx")[-1]["success"]


def test_fault_14_ours_does_not_start_on_a_damaged_state() -> None:
    cluster = Cluster()
    cluster.prepare_log("b", [(data(index), index, 1) for index in range(90, 121)])
    cluster.prepare_state("b", b"damaged")
    with pytest.raises(msgspec.DecodeError):
        cluster.start("b")
    assert "b:1" not in cluster.network.listeners


def test_fault_14_ours_acknowledges_nothing_when_an_install_fails() -> None:
    cluster = Cluster()
    cluster.prepare_log("b", [(NOOP, 1, 0), *[(data(index), index, 1) for index in range(2, 51)]])
    (node,) = cluster.start("b")
    leader = ScriptedPeer(cluster, "a", "b")
    ended: list[Any] = []
    # Nothing lies there: what the machine restores from is gone.
    node.snapshot_received("a", Checkpoint(100, 3, b""), "/data/state/state-7", ended.append)
    cluster.time.advance(0.2)
    assert [error.code for error in ended] == ["storage_failed"]
    assert node.failure is not None
    assert leader.heard(AppendReply) == []
    assert cluster.wal("b").last_index == 50


# --- 15: installing a snapshot ----------------------------------------------------------------------------------------


def test_fault_15_stock_clears_acknowledged_entries_behind_the_snapshot(tmp_path: Path) -> None:
    stock = Stock("b", "ac", **dumping(tmp_path, 150))
    stock.append("a", 1, (1, 0), *[(STOCK_NOOP, index, 1) for index in range(2, 201)])
    assert stock.said("next_node_idx")[-1]["next_node_idx"] == 201
    install(stock, 1, 100)
    assert (stock.log[0][1], stock.end) == (149, 150)


def test_fault_15_ours_installs_nothing_that_its_log_holds() -> None:
    cluster = Cluster()
    (node,) = cluster.start("b")
    leader = ScriptedPeer(cluster, "a", "b")
    entries = [(1, data(index)) for index in range(2, 201)]
    assert leader.ask("b", append(1, (1, 0), *entries), AppendReply) == AppendReply(1, 201, True)
    offered = Checkpoint(150, 1, configuration("abc").encode())
    assert node.snapshot_held(offered)
    # It may also have caught up while the snapshot was on its way.
    ended: list[Any] = []
    node.snapshot_received("a", offered, "/data/state/state-7", ended.append)
    assert ended == [None]
    assert cluster.wal("b").last_index == 200
    assert node.machine.applied_index == 1


def test_fault_15_ours_installs_nothing_that_is_behind_what_it_committed() -> None:
    cluster = Cluster()
    (node,) = cluster.start("b")
    leader = ScriptedPeer(cluster, "a", "b")
    leader.ask("b", append(1, (1, 0), *[(1, data(index)) for index in range(2, 21)], commit=20), AppendReply)
    cluster.machine("b").flush()
    cluster.wal("b").drop_before(15, 0)
    assert node.snapshot_held(Checkpoint(10, 1, b""))
    assert not node.snapshot_held(Checkpoint(21, 1, b""))


def test_fault_15_ours_replaces_a_log_that_conflicts() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.lead("a")
    cluster.crash("c")
    cluster.files["c"].remove_tree("/data")
    cluster.prepare_log("c", [(NOOP, 1, 0), *[(data("lost"), index, 1) for index in range(2, 40)]])
    for number in range(60):
        cluster.propose(leader, number)
    cluster.time.advance(0.5)
    leader.machine.flush()
    cluster.wal("a").drop_before(leader.machine.applied_index, 0)
    for member in ("a", "b"):  # nobody knows c by its old disk
        cluster.nodes[member]._members = configuration("abc")
        cluster.nodes[member]._roster.set_members(configuration("abc"), (1, 1))
    cluster.start("c")
    cluster.until(lambda: cluster.machine("c").payloads == cluster.machine("a").payloads)
    assert cluster.wal("c").first_index > 40
    cluster.commit("and on it goes")


# --- 20: what is left behind ------------------------------------------------------------------------------------------


def test_fault_20_stock_forgets_callbacks_below_an_installed_snapshot(tmp_path: Path) -> None:
    stock = Stock("b", "ac", **dumping(tmp_path, 100))
    stock.tick()
    stock.lead(1)
    answers: list[Any] = []
    stock.store("x", callback=lambda result, error: answers.append((result, error)))
    stock.tick()
    install(stock, 2, 100)
    stock.append("a", 2, (100, 1), *[(STOCK_NOOP, index, 2) for index in (101, 102)], commit_index=102)
    for _ in range(5):
        stock.tick()
    assert stock.raftLastApplied == 102
    assert answers == []


def test_fault_20_ours_ends_every_proposal_when_leadership_is_lost() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.lead("a")
    cluster.isolate("a")
    answers = [cluster.propose(leader, number) for number in range(3)]
    cluster.until(lambda: not leader.is_leader)
    assert all(isinstance(answer.error, OutcomeUnknown) for answer in answers)
    late = cluster.propose(leader, "late")
    assert late.error is not None
    assert late.error.code == "not_leader"
    cluster.network.heal()
    cluster.commit("x")
    assert cluster.machine("a").payloads == [b"x"]


def test_fault_20_stock_forwards_later_what_was_queued_at_a_step_down() -> None:
    stock = Stock("a", "bc", commandsWaitLeader=True)
    stock.lead(1)
    stock.store("x")
    stock.receive("b", type="request_vote", term=2, last_log_index=99, last_log_term=1)
    stock.tick()
    stock.append("b", 2, (1, 0))
    stock.tick()
    assert [to for to, message in stock.wire.sent if message["type"] == "apply_command"] == ["b"]


def test_fault_20_ours_forwards_nothing() -> None:
    lone = Lone("a")
    lone.lead()
    lone.engine.queue_proposal(data("x"))
    lone.engine.adopt_term(2)
    lone.engine.tick()
    lone.engine.drop_proposals()
    lone.receive("b", append(2, (2, 1), (2, NOOP)))
    lone.tick()
    assert [message for _, message in lone.engine_said if message["type"] == "apply_command"] == []
    assert data("x") not in [payload for payload, _, _ in lone.wal.entries]


def test_fault_20_stock_backs_up_one_entry_per_round_trip() -> None:
    follower = Stock("b", "ac")
    follower.fill(1001, 1)
    previous, round_trips = 1001, 0
    while previous > 990:
        follower.append("a", 3, (previous, 2))
        refusal = follower.said("next_node_idx")[-1]
        assert not refusal["success"]
        previous, round_trips = refusal["next_node_idx"] - 1, round_trips + 1
    assert round_trips == 11


def test_fault_20_ours_needs_one_round_trip() -> None:
    follower = Lone("b", entries=[(NOOP, 1, 0), *[(data(index), index, 1) for index in range(2, 1002)]])
    (refusal,) = follower.receive("a", append(3, (1001, 2)))
    assert refusal == AppendReply(3, 2, False)
    assert acked(follower.receive("a", append(3, (1, 0), *[(2, data("x"))] * 1000))) == 1001


def test_fault_20_stock_queues_the_whole_log_for_a_peer_that_lags() -> None:
    size = 64 * 1024
    stock = Stock("a", "bc", appendEntriesBatchSizeBytes=4 * size)
    stock.lead(1)
    for index in range(stock.end + 1, 403):
        stock.log.add(b"\x00" + bytes(size), index, 1)
    stock.peek("raftNextIndex")[stock.node("b")] = 2
    stock.wire.sent.clear()
    stock.peek("sendAppendEntries")()
    queued = sum(len(entry[0]) for to, message in stock.wire.sent if to == "b" for entry in message["entries"])
    assert queued >= 400 * size  # 25 MiB, and it would be all of 25 GiB


def test_fault_20_ours_takes_a_bounded_part_of_it_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.lead("a")
    cluster.crash("c")
    size = 512 * 1024
    for _ in range(50):
        cluster.wait(cluster.propose(leader, "x" * size))
    sent: list[list[int]] = [[]]
    transport_send, end_turn = leader._transport.send, leader._outbox.end_turn

    def counted(peer: str, body: bytes) -> bool:
        taken = transport_send(peer, body)
        if peer == "c" and taken:
            sent[-1].append(len(body))
        return taken

    def turn_ended() -> None:
        end_turn()
        sent.append([])

    monkeypatch.setattr(leader._transport, "send", counted)
    monkeypatch.setattr(leader._outbox, "end_turn", turn_ended)
    cluster.start("c")
    cluster.until(lambda: cluster.machine("c").applied_index == leader.machine.applied_index)
    assert sum(map(sum, sent)) > 50 * size
    # A turn's last append may take it over the mark.
    assert max(map(sum, sent)) < PEER_TURN_BYTES_MAX + 5 * 1024 * 1024
    assert [message for turn in sent if len(turn) > 4 for message in turn] == []


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_fault_20_stock_leaks_two_descriptors_an_engine() -> None:
    before = descriptors()
    kept = []
    for _ in range(5):
        stock = Stock("a", "bc", appendEntriesUseBatch=False)
        stock.tick()
        stock.destroy()
        kept += [stock.peek("pipeNotifier").__dict__.values()]
    pipes = [fd for values in kept for fd in values if isinstance(fd, int)]
    assert descriptors() >= before + 10
    for fd in pipes:
        os.close(fd)


def test_fault_20_ours_leaks_none() -> None:
    before = descriptors()
    for _ in range(5):
        lone = Lone("a")
        lone.lead()
        lone.propose(data("x"))
    assert descriptors() == before


def test_fault_20_ours_answers_each_proposal_once_across_a_change_of_leaders() -> None:
    """`Answer` itself fails at a second call."""
    cluster = Cluster()
    cluster.start("a", "b", "c")
    answers: list[Answer] = []
    for name in ("a", "b", "c", "a"):
        leader = cluster.lead(name)
        answers += [cluster.propose(leader, number) for number in range(10)]
        leader.transfer("", Answer())
        cluster.time.advance(0.2)
    cluster.wait(*answers)
    assert len(answers) == 40
