"""Mutants of the guard's rules about replicating the log: stamps, appends, acknowledgements, snapshots, and what is no
message (G1 to G4, G8, G11)."""

from __future__ import annotations

from kvstore.raft import guard as guard_module
from kvstore.raft.engine import Engine
from kvstore.raft.guard import Guard
from kvstore.raft.node import RaftNode
from kvstore.raft.wal import Wal
from tests.simulation.mutants.mutant import Catalogue, Patches

catalogue = Catalogue()
mutant = catalogue.mutant

# --- G1: stamps -------------------------------------------------------------------------------------------------------


@mutant("G1a", nodes=(5,))
def acknowledgements_of_other_terms(patches: Patches) -> None:
    """A leader counts acknowledgements whatever term they were made in."""
    patches.rewrite(
        Guard,
        "_append_reply",
        ("if m.term != engine.term or not engine.is_leader:", "if not engine.is_leader:"),
    )


@mutant("G1c", nodes=(5,))
def acknowledgements_outlive_their_term(patches: Patches) -> None:
    """A leader remembers what each peer acknowledged to it in an earlier term of its own."""
    patches.rewrite(Guard, "term_changed", ("self._acked.clear()", "pass"))


# --- G2: appends ------------------------------------------------------------------------------------------------------


@mutant("G2a")
def resent_prefix_truncates(patches: Patches) -> None:
    """A follower truncates where an append's entries begin, though they match what it holds (stock pysyncobj)."""
    patches.rewrite(
        Guard,
        "_append_entries",
        ("        if log.term_at(previous + matched + 1) != term:\n            break", "        break"),
    )


@mutant("G2c")
def acknowledges_its_whole_log(patches: Patches) -> None:
    """A follower acknowledges up to its log's end, not what the message proved."""
    patches.rewrite(
        Guard,
        "_append_entries",
        (
            "self._heartbeat(peer, m, previous, previous + 1, True)",
            "self._heartbeat(peer, m, previous, log.last_index + 1, True)",
        ),
    )


@mutant("G2d")
def commit_index_is_not_clamped(patches: Patches) -> None:
    """A follower takes the leader's commit index for its own log as it is, proven to match or not."""
    patches.rewrite(Guard, "_heartbeat", ("min(m.commit_index, proven)", "m.commit_index"))


@mutant("G2e")
def refusal_names_the_end_of_the_log(patches: Patches) -> None:
    """A follower whose log conflicts asks the leader to go on behind its own last entry, where nothing can match."""
    patches.rewrite(
        Guard,
        "_append_entries",
        (
            "self._heartbeat(peer, m, commit, commit + 1, False)",
            "self._heartbeat(peer, m, commit, log.last_index + 1, False)",
        ),
    )


@mutant("G2f")
def refusals_lead_to_and_fro(patches: Patches) -> None:
    """A refusal of what lies behind a conflict leads the leader away from the conflict again."""
    patches.rewrite(
        Guard,
        "_append_reply",
        ("if self._refused.get(peer, next_index + 1) <= next_index:", "if self._refused.get(peer) == next_index:"),
    )


# --- G3: acknowledgements ---------------------------------------------------------------------------------------------


@mutant("G3")
def acknowledgement_moves_back(patches: Patches) -> None:
    """An acknowledgement sets the peer's next index back, though later entries are in flight (stock pysyncobj)."""
    patches.rewrite(Engine, "deliver_ack", ("if success and before > self.next_index(peer):", "if False:"))


# --- G4: the leader's own disk ----------------------------------------------------------------------------------------


@mutant("G4a")
def leader_counts_what_it_has_not_synced(patches: Patches) -> None:
    """A leader counts itself for entries that its own disk does not hold yet."""
    patches.rewrite(Guard, "_append_reply", ("min(acked, self.log.durable_index) + 1, True", "acked + 1, True"))


@mutant("G4d", nodes=(1,), without=("delay", "slow link", "reset", "duplicate", "one way", "hand over", "replace"))
def sole_voter_commits_what_it_has_not_synced(patches: Patches) -> None:
    """A sole voter ticks, commits and answers while its disk is still behind."""
    patches.rewrite(RaftNode, "_waits_for_disk", ("return self._sole_voter and", "return False and"))
    patches.rewrite(
        RaftNode,
        "committed",
        ("return min(commit, self._wal.durable_index) if self._sole_voter else commit", "return commit"),
    )


@mutant("G4e", nodes=(5,))
def truncation_leaves_the_durable_index(patches: Patches) -> None:
    """After a truncation the durable index stays where it was, above entries that are new and not synced."""
    patches.rewrite(
        Wal,
        "_truncate",
        ("self.durable_index = min(self.durable_index, last)", "pass"),
        ("self._covered_index = min(self._covered_index, last)", "pass"),
    )


# --- G8: snapshots ----------------------------------------------------------------------------------------------------


@mutant("G8b")
def snapshot_acknowledged_when_offered(patches: Patches) -> None:
    """A follower acknowledges a snapshot when it is offered, not when it is installed."""
    patches.rewrite(
        RaftNode,
        "snapshot_offered",
        (
            "    return None",
            "    reply = AppendReply(self._engine.term, checkpoint.index + 1, True)\n"
            "    self._outbox.add(peer, reply, self._wal.position)\n"
            "    return None",
        ),
    )


@mutant("G8c")
def snapshot_replaces_a_longer_log(patches: Patches) -> None:
    """A snapshot is installed though the log holds its last entry, or is committed past it."""
    patches.replace(RaftNode, "_holds", lambda _self, _checkpoint: False)


# --- G11: what no node of ours says -----------------------------------------------------------------------------------


@mutant("G11b")
def unreadable_message_raises(patches: Patches) -> None:
    """Bytes that are no message raise in the turn that reads them."""
    patches.rewrite(RaftNode, "_receive_all", ('self._guard.dropped["malformed"] += 1', "raise"))


@mutant("G11d")
def malformed_appends_are_taken(patches: Patches) -> None:
    """An append is taken with whatever entries it has: empty, of the engine's own kinds, of terms that cannot be."""
    patches.replace(guard_module, "_well_formed", lambda _message: True)
