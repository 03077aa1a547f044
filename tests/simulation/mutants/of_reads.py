"""Mutants of linearizable reads: ReadIndex, and what serves reads by it (G10, X6, X9, X12)."""

from __future__ import annotations

from kvstore.client.client import Client
from kvstore.raft.reads import ReadIndex
from kvstore.server.reads import Reads
from tests.simulation.mutants.mutant import Catalogue, Patches

catalogue = Catalogue()
mutant = catalogue.mutant


@mutant("G10b")
def reads_without_a_quorum(patches: Patches) -> None:
    """A leader serves reads without asking anybody whether it still leads."""
    patches.rewrite(
        ReadIndex,
        "_take_ready",
        ("while self._rounds and self.members.has_quorum(self._rounds[0].acks):", "while self._rounds:"),
    )


@mutant("G10c")
def read_joins_a_round_that_was_sent(patches: Patches) -> None:
    """A read is served by a round that was sent before it came."""
    patches.rewrite(
        ReadIndex,
        "step",
        (
            "        if self._waiting and len(self._rounds) < ROUNDS_MAX",
            "        if self._waiting and self._rounds:\n"
            "            self._rounds[-1].waiting.extend(self._waiting)\n"
            "            self._waiting = []\n"
            "        if self._waiting and len(self._rounds) < ROUNDS_MAX",
        ),
    )


@mutant("G10d")
def reads_before_the_first_commit(patches: Patches) -> None:
    """A new leader serves reads by a commit index that may lack what its predecessor committed."""
    patches.rewrite(ReadIndex, "step", (" and commit_term == self._engine.term:", ":"))


@mutant("X6")
def reads_before_they_are_applied(patches: Patches) -> None:
    """A read is served as soon as its index is known, though the replica has not applied that far."""
    patches.rewrite(
        ReadIndex, "_wait_for", ("elif index <= self._applied:", "else:\n        done(None)\n    if False:")
    )


@mutant("X9")
def local_reads_go_back(patches: Patches) -> None:
    """A local read does not say what its client has seen already, and may be served by a replica that lags."""
    patches.rewrite(Client, "_read", ("least = max(self._revision, revision)", "least = revision"))


@mutant("X12")
def read_joins_a_barrier_that_was_asked_for(patches: Patches) -> None:
    """The server lets a read share a barrier that it asked for before the read came."""
    patches.rewrite(
        Reads,
        "_round",
        (
            "        if error is None:\n",
            "        if error is None:\n"
            "            reads.extend(self._collecting)\n"
            "            self._collecting = []\n",
        ),
    )
