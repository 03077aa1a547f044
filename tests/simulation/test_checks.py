"""A healthy cluster fails no check, and every check can fail: a test for each, on real nodes where something is broken.

What the product's own rules would prevent is done to it by hand here; that the checks notice the rules' absence in
ordinary runs is what the mutants show. Here: leaders, logs, commits and promises; the rest in `test_checks_state.py`.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvstore.errors import StartupError
from kvstore.model import Member
from kvstore.raft.guard import DeliverAck, Guard
from kvstore.raft.members import Configuration
from kvstore.raft.messages import AppendReply, ReadAck, VoteReply
from kvstore.raft.sync import LogSync
from kvstore.raft.wal import Wal
from tests.fake_files import FaultyFile, FaultyFiles, keep_random
from tests.raft_fixtures import Answer, data
from tests.simulation.checked_cluster import (
    CheckedCluster,
    breaks,
    running,
    say,
    violates,
    with_uncommitted,
)
from tests.simulation.ledger import Ledger
from tests.simulation.outcome import Counts
from tests.simulation.watch import Watch

# --- nothing is wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_cluster_under_faults(seed: int) -> None:
    """Crashes that tear what is not synced, cuts, hand-overs, snapshots: no check fails, and everything is counted."""
    cluster = CheckedCluster("abc", seed=seed, thread_s=0.003 * (seed % 2))
    cluster.start("a", "b", "c")
    chance, down = random.Random(seed), []
    for round_number in range(40):
        for number in range(chance.randrange(8)):
            for node in cluster.nodes.values():
                if node.accepting:
                    cluster.propose(node, f"{round_number}/{number}")
                node.read_index(lambda _error: None)
            cluster.time.advance(0.01 * chance.random())
        names = sorted(cluster.nodes)
        draw = chance.random()
        if draw < 0.2 and len(names) > 1:
            down.append(chance.choice(names))
            cluster.crash(down[-1], keep_random(cluster.chance))
        elif draw < 0.4 and down:
            cluster.start(down.pop())
        elif draw < 0.5 and len(names) > 1:
            here, there = chance.sample(names, 2)
            cluster.network.cut(here, there, one_way=chance.random() < 0.5)
        elif draw < 0.7:
            cluster.network.heal()
        elif draw < 0.8 and cluster.leader is not None:
            cluster.leader.transfer("", Answer())
        else:
            for name, node in cluster.nodes.items():
                node.machine.flush()
                cluster.wal(name).drop_before(node.machine.applied_index, 0)
        cluster.time.advance(chance.random())
    cluster.network.heal()
    cluster.start(*down)
    cluster.elect()
    cluster.commit("the end")
    cluster.checks.at_end()
    assert cluster.counts.elections > 1
    assert cluster.counts.entries > 20


def test_a_snapshot_an_install_and_a_membership_change_are_counted() -> None:
    cluster = running()
    cluster.make_lag("c")
    cluster.start("c")
    cluster.commit("after")
    assert cluster.counts.snapshot_installs == 1
    cluster.start("d", members=Configuration(cluster.nodes["a"].members))
    leader, answer = cluster.nodes["a"], Answer()
    leader.add_learner(Member("d", "d:1", "", cluster.nodes["d"].node_id, False), answer)
    cluster.wait(answer)
    cluster.until(lambda: leader.match_index("d") == leader.machine.applied_index)
    leader.promote("d", promoted := Answer())
    cluster.wait(promoted)
    assert (answer.error, promoted.error) == (None, None)
    assert cluster.counts.membership_changes == 2
    assert cluster.counts.hand_overs == (cluster.counts.elections - 1)
    cluster.commit("the end")
    cluster.checks.at_end()


def test_a_process_that_is_seen_late_is_watched_all_the_same() -> None:
    cluster = running()
    cluster.crash("b")
    cluster.checks.watches.pop("b")
    cluster.start("b")
    machine = cluster.machines["b"]
    del cluster.checks.watches["b"]
    cluster.checks.observe(machine)
    assert cluster.checks.watches["b"].alive
    cluster.checks.booted(machine)  # a second time changes nothing


# --- terms, votes, leaders --------------------------------------------------------------------------------------------


def test_two_leaders_in_a_term() -> None:
    cluster = running()
    engine = cluster.nodes["b"]._engine
    engine._o._SyncObj__raftState = 2
    engine.adopt_term(1)
    with violates("election safety", "b (node", "after node", "a leader"):
        cluster.look()


def test_a_leader_without_a_majority() -> None:
    cluster = running()
    cluster.isolate("b")
    engine = cluster.nodes["b"]._engine
    engine.tick(campaign=True)
    engine.deliver("c", {"type": "response_vote", "term": engine.term})
    assert engine.is_leader
    with violates("election safety", "with the votes of ['b']"):
        cluster.look()


def test_a_second_vote_in_a_term() -> None:
    cluster = running()
    wal = cluster.wal("b")
    wal.set_term(wal.term + 1, "a")
    wal.set_term(wal.term, "c")
    with violates("one vote"):
        cluster.look()


def test_a_second_vote_after_a_restart() -> None:
    """The first was told to c, the second to a: the node forgot the first one in between."""
    cluster = running()
    wal = cluster.wal("b")
    wal.set_term(wal.term + 1, "c")
    wal.sync()
    say(cluster, "b", "c", VoteReply(wal.term))
    with violates("one vote", "for c and for a"):
        say(cluster, "b", "a", VoteReply(wal.term))


def test_a_term_goes_back() -> None:
    cluster = running()
    wal = cluster.wal("b")
    wal.set_term(wal.term - 1, None)
    with violates("terms"):
        cluster.look()


def test_a_leader_that_lacks_what_is_committed() -> None:
    cluster = running()
    cluster.isolate("c")
    leader = cluster.nodes["a"]
    cluster.wait(cluster.propose(leader, "c does not have this"))
    engine = cluster.nodes["c"]._engine
    engine.tick(campaign=True)
    cluster.checks.ledger.voted("b", cluster.nodes["b"].node_id, engine.term, "c")
    engine.deliver("b", {"type": "response_vote", "term": engine.term})
    with violates("leader completeness", "c became leader", "committed"):
        cluster.look()


def test_a_commit_that_a_later_leader_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = running()
    cluster.isolate("a")
    cluster.propose(cluster.nodes["a"], "only here")
    cluster.until(lambda: cluster.leader is not None and cluster.leader.config.name != "a")
    monkeypatch.setattr(Watch, "_check_quorum", lambda *_args: None)
    old, core = cluster.nodes["a"], cluster.nodes["a"]._engine._o
    assert old._engine.is_leader
    core._SyncObj__raftCommitIndex = old._wal.last_index
    old._engine.tick()
    with violates("leader completeness", "leader of the later term"):
        cluster.look()


def test_a_vote_for_a_log_that_is_older() -> None:
    cluster = running()
    cluster.isolate("c")
    cluster.wait(cluster.propose(cluster.nodes["a"], "c does not have this"))
    engine, wal = cluster.nodes["c"]._engine, cluster.wal("b")
    engine.tick(campaign=True)
    wal.set_term(engine.term, "c")
    wal.sync()
    with violates("leader completeness", "votes in term"):
        say(cluster, "b", "c", VoteReply(engine.term))


# --- the log ----------------------------------------------------------------------------------------------------------


def test_an_entry_that_differs() -> None:
    cluster = with_uncommitted("four")
    wal = cluster.wal("b")
    _, index, term = wal.entries[-1]
    del wal.entries[-1], wal._positions[-1]  # unheard
    wal.append(data("other"), index, term)
    with violates("log matching", "four", "other"):
        cluster.look()


def test_an_entry_that_no_leader_made() -> None:
    cluster = running()
    wal = cluster.wal("b")
    wal.append(data("other"), wal.last_index + 1, wal.last_term)
    with violates("log matching", "no leader ever made"):
        cluster.look()


def test_an_entry_that_a_leader_makes_twice() -> None:
    cluster = with_uncommitted("four")
    wal = cluster.wal("a")
    payload, index, term = wal.entries[-1]
    del wal.entries[-1], wal._positions[-1]
    wal.append(payload, index, term)
    with violates("log matching", "a second time"):
        cluster.look()


def test_an_entry_of_a_term_that_its_leader_does_not_lead() -> None:
    cluster = running()
    wal = cluster.wal("a")
    wal.append(data("other"), wal.last_index + 1, wal.last_term - 1)
    with violates("log matching", "leads term"):
        cluster.look()


def test_another_prefix() -> None:
    ledger = Ledger(Counts())
    ledger.appended("a", data(1), 2, 3, 1)
    assert ledger.appended("b", data(1), 2, 3, None)
    with breaks("log matching"):
        ledger.appended("b", data(1), 2, 3, 2)


def test_an_entry_that_is_written_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log in memory is right, what its disk holds is not."""
    write = Wal._write

    def writing(self: Wal, kind: int, index: int, term: int, payload: bytes) -> None:
        write(self, kind, index, term, payload.replace(b"four", b"FOUR"))

    cluster = running()
    monkeypatch.setattr(Wal, "_write", writing)
    with violates("log matching", "FOUR"):
        cluster.commit("four")


def test_a_log_that_nobody_wrote() -> None:
    cluster = running()
    cluster.prepare_log("d", [(b"\x01", 1, 0), (data("other"), 2, 9)])
    with violates("log matching", "starts with entry 2"):
        cluster.start("d")


@pytest.mark.parametrize("how", ["truncate", "reset"])
def test_a_leader_removes_entries(how: str) -> None:
    cluster = with_uncommitted("four")
    wal = cluster.wal("a")
    if how == "truncate":
        wal.truncate_from(wal.last_index)
    else:
        wal.reset(wal.last_index + 1, wal.term)
    with violates("leader append-only"):
        cluster.look()


def test_what_the_leader_has_is_removed() -> None:
    cluster = with_uncommitted("four", "five")
    cluster.wal("b").truncate_from(cluster.wal("b").last_index)
    with violates("no needless truncation", "a leader", "five"):
        cluster.look()


def test_what_follows_a_snapshot_is_removed_with_it() -> None:
    cluster = with_uncommitted("four", "five")
    committed, wal = cluster.checks.ledger.commit, cluster.wal("b")
    wal.reset(committed, wal.term_at(committed) or 0)
    with violates("no needless truncation", "drops entries"):
        cluster.look()


# --- commit -----------------------------------------------------------------------------------------------------------


def test_what_is_committed_is_removed() -> None:
    cluster = running()
    cluster.wal("b").truncate_from(cluster.checks.ledger.commit)
    with violates("commit safety", "removes"):
        cluster.look()


def test_a_follower_commits_what_no_leader_has() -> None:
    cluster = with_uncommitted("four")
    engine = cluster.nodes["b"]._engine
    engine._o._SyncObj__raftCommitIndex = cluster.wal("b").last_index
    engine.tick()
    with violates("commit safety", "no leader has committed"):
        cluster.look()


def test_a_follower_commits_another_entry() -> None:
    ledger = Ledger(Counts())
    ledger.commits([(data(1), 1, 0), (data(2), 2, 5)], 2, 5)
    ledger.check_follower_commit("a", 2, 5)
    with breaks("commit safety"):
        ledger.check_follower_commit("a", 2, 4)


def test_a_commit_index_goes_back() -> None:
    cluster = running()
    engine = cluster.nodes["b"]._engine
    engine._o._SyncObj__raftCommitIndex -= 1
    engine.tick()
    with violates("commit safety", "takes back"):
        cluster.look()


def test_a_snapshot_goes_back() -> None:
    cluster = running()
    committed, wal = cluster.checks.ledger.commit, cluster.wal("b")
    wal.reset(committed - 1, wal.term_at(committed - 1) or 0)
    with violates("commit safety", "by a snapshot"):
        cluster.look()


def test_a_leader_commits_an_old_term_by_counting() -> None:
    """Figure 8 of the Raft paper: that entry may yet be replaced."""
    cluster = with_uncommitted("four")
    cluster.network.heal()
    cluster.isolate("a")
    cluster.lead_without("a")
    leader = cluster.leader
    assert leader is not None
    watch, term = cluster.watch(leader.config.name), leader._wal.term_at(2)
    with breaks("commit safety"):
        watch._check_quorum(2, term)


def test_a_commit_that_is_on_one_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs do nothing, and only the commit is looked at."""
    cluster = running()
    monkeypatch.setattr(Watch, "promising", lambda *_args: None)
    monkeypatch.setattr(Watch, "matches", lambda *_args: None)
    monkeypatch.setattr(FaultyFile, "sync", lambda _self: None)
    with violates("commit durability", "on the disks of []", "on disk"):
        cluster.commit("four")


def test_a_leader_counts_what_its_own_disk_does_not_hold_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(self: Guard, peer: str, m: AppendReply, now: float) -> list[Any]:
        self._heard_at[peer] = now
        return [DeliverAck(peer, m.next_index, m.success)]

    monkeypatch.setattr(Guard, "_append_reply", counted)
    cluster = running()
    cluster.crash("c")
    run, log = LogSync.run, cluster.wal("a")
    monkeypatch.setattr(LogSync, "run", lambda self: run(self) if self._wal is not log else None)  # it is slow
    cluster.propose(cluster.nodes["a"], "four")
    with violates("commit durability", "on the disks of ['b']"):
        cluster.time.advance(1.0)


# --- what is promised -------------------------------------------------------------------------------------------------


def test_an_acknowledgement_that_is_not_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = running()
    monkeypatch.setattr(FaultyFile, "sync", lambda _self: None)
    with violates("promises are durable", "acknowledges"):
        cluster.commit("four")


def test_a_segment_whose_name_is_not_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FaultyFiles, "sync_dir", lambda _self, _path: None)
    with violates("promises are durable"):
        running()


def test_a_vote_that_is_not_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: Wal, term: int, voted_for: str | None) -> None:
        self.term, self.voted_for = term, voted_for

    monkeypatch.setattr(Wal, "set_term", forgetful)
    with violates("promises are durable", "its vote"):
        running()


def test_a_term_that_is_not_durable() -> None:
    cluster = running()
    with violates("promises are durable", "in term"):
        say(cluster, "b", "a", ReadAck(cluster.nodes["b"].term + 1, 1))


def test_an_acknowledgement_of_what_the_leader_does_not_have() -> None:
    cluster = with_uncommitted("four")
    cluster.crash("c")
    cluster.network.heal()
    cluster.crash("b")
    cluster.propose(cluster.nodes["a"], "five")
    cluster.time.advance(0.2)
    cluster.start("b", "c")
    cluster.isolate("a")
    cluster.lead_without("a")
    leader, old = cluster.leader, cluster.nodes["a"]
    assert leader is not None
    old._engine.adopt_term(leader.term)
    old._wal.sync()
    index = leader._wal.last_index
    assert old._wal.term_at(index) != leader._wal.term_at(index)
    with violates("acknowledged is proven"):
        say(cluster, "a", leader.config.name, AppendReply(leader.term, index + 1, True))


def test_a_leader_believes_too_much_of_a_peer() -> None:
    cluster = with_uncommitted("four")
    leader = cluster.nodes["a"]
    leader._engine.deliver_ack("c", leader._wal.last_index + 1, True)
    with violates("acknowledged is proven", "a believes that c"):
        cluster.look()


def test_a_truncation_that_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the disk is not a log any more: entries follow that do not continue it."""
    monkeypatch.setattr(Wal, "truncate_from", lambda self, index: self._truncate(index - self.first_index))
    cluster = with_uncommitted("four", "five")
    with violates("nothing durable is lost", "cannot be read"):
        cluster.crash("a")
        cluster.crash("b")
        cluster.start("b")
        wal = cluster.wal("b")
        wal.truncate_from(wal.last_index)
        wal.append(data("five"), wal.last_index + 1, wal.last_term)
        wal.sync()
        cluster.crash("b")


@pytest.mark.parametrize("what", ["entries", "vote"])
def test_a_disk_that_forgets(what: str) -> None:
    cluster = running()
    before = {path: bytes(inode.data) for path, inode in cluster.files["b"]._names.items()}
    if what == "entries":
        cluster.commit("four")
    else:
        wal = cluster.wal("b")
        wal.set_term(wal.term + 1, "c")
        wal.sync()
    cluster.crash("b")
    for path, inode in cluster.files["b"]._names.items():
        inode.data[:] = before[path]
    with violates("nothing durable is lost", "b"):
        cluster.start("b")


@pytest.mark.parametrize("last", [False, True])
def test_damage_is_in_doubt_in_the_last_batch_alone(last: bool) -> None:
    """Just there the product cannot tell a flipped bit from a torn tail, and the checks see that it cut it off."""
    cluster = running()
    cluster.commit("four")
    cluster.crash("b")
    files, machine = cluster.files["b"], cluster.machines["b"]
    path = files.durable_paths("/data/wal/")[-1]
    at = files.durable_read(path, 0, 1 << 20).rindex(b"four" if last else b"three")
    assert cluster.checks.is_in_doubt(machine, path, at) == last
    files.flip(path, at, 0)
    if last:
        with violates("nothing durable is lost"):
            cluster.start("b")
    else:
        with pytest.raises(StartupError) as refused:
            cluster.start("b")
        assert refused.value.code == "wal_damaged"


def test_what_was_not_synced_may_be_lost_and_what_conflicts_too() -> None:
    """No false alarm: a follower's log is cut back by a new leader, and it crashes before and after that is durable."""
    cluster = with_uncommitted("four", "five")
    cluster.crash("b")
    cluster.crash("a")
    cluster.network.heal()
    cluster.start("b")
    cluster.nodes["b"]._wal.truncate_from(cluster.wal("b").last_index)
    cluster.crash("b")
    cluster.start("b", "a")
    cluster.elect()
    cluster.commit("six")
    cluster.checks.at_end()
