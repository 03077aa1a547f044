"""Mutants of the seams at which the engine is met (design section 6, numbered): what protects something (S3, S5, S7,
S8). The others replace a part whose rules stand elsewhere; docs/raft.md says which."""

from __future__ import annotations

import pysyncobj.syncobj

from kvstore.raft import engine as engine_module
from kvstore.raft import node as node_module
from kvstore.raft.engine import Engine, _WalJournal
from kvstore.raft.guard import Guard
from kvstore.raft.members import Configuration
from kvstore.raft.node import RaftNode
from kvstore.raft.proposals import Proposals
from tests.simulation.mutants.mutant import Catalogue, Outdated, Patches

catalogue = Catalogue()
mutant = catalogue.mutant

# --- S3: commands and their answers -----------------------------------------------------------------------------------


@mutant("S3a")
def answers_found_by_index_alone(patches: Patches) -> None:
    """A proposal is answered with the result of whatever entry was applied at its index, of whatever term."""
    patches.rewrite(Proposals, "applied", ("if waiting[0] == term:", "if True:"))
    patches.rewrite(Proposals, "end", ("by_index, self._by_index = self._by_index, {}", "by_index = {}"))


@mutant("S3b")
def lost_proposals_count_as_not_taken(patches: Patches) -> None:
    """A leader that loses its leadership says of what is in its log that it surely was not taken."""
    patches.rewrite(
        Proposals,
        "end",
        ("done(None, OutcomeUnknown(why))", 'done(None, Unavailable(why, code="not_leader"))'),
    )


@mutant("S3c")
def refused_proposals_stay_queued(patches: Patches) -> None:
    """What a tick did not take, and its asker was told so, stays in the engine's queue for the next one."""
    patches.replace(Engine, "drop_proposals", lambda _self: None)


# --- S5: where log and state meet at a start --------------------------------------------------------------------------


@mutant("S5a")
def whole_log_is_committed_at_start(patches: Patches) -> None:
    """A node that starts takes all that its log holds for committed (stock pysyncobj may, after a crash)."""
    patches.rewrite(
        Engine,
        "__init__",
        (
            "o._SyncObj__raftCommitIndex = max(1, applied_index)",
            "max(1, applied_index)\n    o._SyncObj__raftCommitIndex = max(1, wal.last_index)",
        ),
    )


@mutant("S5c")
def log_is_left_behind_the_state(patches: Patches) -> None:
    """A log that does not hold the entry at which the state ends is left as it is."""
    patches.rewrite(
        RaftNode,
        "_reconcile",
        ("if applied and wal.term_at(applied) != self.machine.applied_term:", "if False:"),
    )


# --- S7: members ------------------------------------------------------------------------------------------------------


@mutant("S7a")
def configuration_counts_when_applied(patches: Patches) -> None:
    """A configuration is in force only once it is applied, not from its append on."""
    patches.replace(
        node_module,
        "newest_configuration",
        lambda _entries, applied, at, initial: (
            (Configuration.decode(applied), at) if applied else (Configuration.of(initial), (0, 0))
        ),
    )


@mutant("S7b")
def configuration_outlives_its_truncation(patches: Patches) -> None:
    """A configuration that is truncated from the log stays in force."""
    patches.rewrite(_WalJournal, "deleteEntriesFrom", ("self._members_changed()", "pass"))


@mutant("S7c")
def learners_count_for_commits(patches: Patches) -> None:
    """A leader counts what a learner holds as if a voter held it."""
    # The engine keeps that rule itself as long as it is told who learns; it is broken in the engine's private copy.
    counts = "\n                    if self.__raftMatchIndex[node] >= commitIdx:"
    old, new = (f"for node in self.__otherNodes{more}:{counts}" for more in ("", " | self.__readonlyNodes"))
    path = pysyncobj.syncobj.__file__
    with open(path, encoding="utf-8") as file:
        source = file.read()
    if source.count(old) != 1:
        raise Outdated("the engine counts who holds an entry in another way now")
    compiled = engine_module._source()[0], compile(source.replace(old, new), path, "exec")
    patches.replace(engine_module, "_source", lambda: compiled)


@mutant("S7d")
def acknowledgements_of_strangers(patches: Patches) -> None:
    """The engine is given acknowledgements of nodes that are no members (any more)."""
    patches.rewrite(Guard, "_append_reply", ("if self.members.get(peer) is None:", "if False:"))


# --- S8: elections ----------------------------------------------------------------------------------------------------


@mutant("S8")
def engine_holds_elections_by_itself(patches: Patches) -> None:
    """The engine's own election deadline is left to it: it campaigns without pre-vote, as a learner too."""
    patches.rewrite(
        Engine,
        "tick",
        (
            "o._SyncObj__raftElectionDeadline = 0 if campaign else math.inf",
            "if campaign:\n        o._SyncObj__raftElectionDeadline = 0",
        ),
        ("o.doTick(0)\n    o._SyncObj__raftElectionDeadline = math.inf", "o.doTick(0)"),
    )
