"""Mutants of the guard's rules about votes, terms, hand-overs and membership changes (G5 to G7, G9)."""

from __future__ import annotations

from kvstore.raft.changes import Changes
from kvstore.raft.elections import Elections
from kvstore.raft.engine import Engine
from kvstore.raft.guard import Guard
from kvstore.raft.members import Configuration
from kvstore.raft.node import RaftNode
from tests.simulation.mutants.mutant import Catalogue, Patches

catalogue = Catalogue()
mutant = catalogue.mutant

# --- G5: votes --------------------------------------------------------------------------------------------------------


@mutant("G5a", nodes=(5,))
def votes_count_as_often_as_they_come(patches: Patches) -> None:
    """A candidate counts a vote again when its message is delivered again."""
    patches.replace(Elections, "first_vote", lambda _self, _term, _voter: True)


@mutant("G5c")
def no_pre_vote(patches: Patches) -> None:
    """A node that hears no leader raises its term at once, without asking whether it could win."""
    patches.rewrite(
        Guard,
        "tick",
        (
            "elections.begin_pre_vote(engine.term + 1, self.name, now)",
            "elections.postpone(now)\n    return [Campaign()]",
        ),
    )


@mutant("G5d")
def no_loyalty(patches: Patches) -> None:
    """A node grants votes and pre-votes although it hears a living leader."""
    patches.replace(Elections, "loyal", lambda _self, _now: False)


@mutant("G5f")
def hand_over_meets_loyalty(patches: Patches) -> None:
    """Voters are loyal to the leader even where it asked for the election itself."""
    patches.rewrite(Guard, "_request_vote", ("if not m.transfer and self._loyal(now):", "if self._loyal(now):"))


# --- G6: leaders that should not lead ---------------------------------------------------------------------------------


@mutant("G6a")
def deaf_leader_stays(patches: Patches) -> None:
    """A leader that hears no quorum any more goes on leading."""
    patches.rewrite(Engine, "__init__", ("leaderFallbackTimeout=quorum_timeout_s", "leaderFallbackTimeout=1e9"))


@mutant("G6b")
def old_leader_is_not_told(patches: Patches) -> None:
    """A leader or candidate of a lower term gets no answer at all."""
    told = "return [Send(peer, TermNotice(engine.term))]"
    patches.rewrite(Guard, "_append_entries", (told, "return []"))
    patches.rewrite(Guard, "_request_vote", (told, "return []"))
    patches.rewrite(Guard, "_read_probe", ("return [Send(peer, TermNotice(self.engine.term))]", "return []"))


@mutant("G6c")
def higher_term_is_not_adopted(patches: Patches) -> None:
    """A node that is told of a higher term stays in its own."""
    patches.replace(Engine, "adopt_term", lambda _self, _term: None)


# --- G7: hand-over ----------------------------------------------------------------------------------------------------


@mutant("G7a")
def proposals_go_on_in_a_hand_over(patches: Patches) -> None:
    """A leader that is handing over takes proposals as before."""
    patches.rewrite(
        RaftNode, "accepting", ("return self.is_leader and not self._changes.handing_over", "return self.is_leader")
    )


@mutant("G7b")
def hand_over_to_one_that_lags(patches: Patches) -> None:
    """The target is told to take over before it holds everything."""
    patches.rewrite(
        Changes,
        "step",
        (
            "elif now >= hand_over.next_tell and self._leader.match_index(hand_over.target) == self._wal.last_index:",
            "elif now >= hand_over.next_tell:",
        ),
    )


@mutant("G7c")
def hand_over_without_an_end(patches: Patches) -> None:
    """A hand-over that comes to nothing is never given up, and holds up proposals for ever."""
    patches.rewrite(Changes, "step", ("if now > hand_over.deadline:", "if False:"))


@mutant("G7d")
def hand_over_is_told_once(patches: Patches) -> None:
    """The target is told once to take over, though it may not know yet who leads, or never hear it."""
    patches.rewrite(Changes, "step", ("elif now >= hand_over.next_tell and", "elif not hand_over.sent and"))


# --- G9: membership ---------------------------------------------------------------------------------------------------


@mutant("G9a")
def two_changes_at_once(patches: Patches) -> None:
    """A membership change is taken while another one is not committed."""
    patches.rewrite(
        Changes,
        "_under_way",
        (
            "    if self._proposed or wal.term_at(committed) != self._leader.term:",
            "    return wal.term_at(committed) != self._leader.term\n    if self._proposed:",
        ),
    )


@mutant("G9b")
def change_before_the_first_commit(patches: Patches) -> None:
    """A leader changes the configuration before it has committed anything in its term."""
    patches.rewrite(
        Changes,
        "_under_way",
        ("if self._proposed or wal.term_at(committed) != self._leader.term:", "if self._proposed:"),
    )


@mutant("G9c")
def change_that_loses_the_quorum(patches: Patches) -> None:
    """A change is taken although too few of the voters that it leaves are alive."""
    patches.replace(Configuration, "_checked", staticmethod(lambda changed, _alive: changed))


@mutant("G9d")
def leader_removes_itself(patches: Patches) -> None:
    """A leader takes its own removal, and leads on without being a voter."""
    patches.rewrite(Changes, "remove", ("if name == self._name:", "if False:"))


@mutant("G9e")
def removed_node_is_not_told(patches: Patches) -> None:
    """A node that was removed asks for pre-votes and is not told that it was removed."""
    patches.rewrite(Guard, "_pre_vote", ("granted, removed))]", "granted, False))]"))
