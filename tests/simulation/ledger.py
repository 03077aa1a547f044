"""What a cluster has done so far, as one omniscient bookkeeper knows it: entries, leaders, votes, commits, results.

Each method is told of one event and judges it against all that was told before; what cannot be true raises `Broken`.
Nothing here asks a node anything, and nothing is forgotten: what was committed once is so in every later state of every
node. The rules are those of the Raft paper (figure 3) and of Ongaro's thesis; where the code says more than they do,
the comment says so.

Each costs O(1), but for configurations (O(members)).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvstore.raft.fsm import EntryKind
from kvstore.raft.members import Configuration
from tests.simulation.outcome import Counts

NOOP = bytes([EntryKind.NOOP])
# Log time may run 1 % ahead of a leader's monotonic clock, and that one itself up to 1 % fast.
LOG_TIME_RATE = 1.02
# An entry is looked at when it is applied, and that may be so much later for the first one than for this one: a leader
# waits for its quorum for a second at most.
LOG_TIME_SLACK_MS = 2000.0


class Broken(Exception):
    """A rule is broken. `at` are the indexes of the entries that it is about."""

    def __init__(self, rule: str, message: str, *at: int) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule
        self.message = message
        self.at = at


class Entry(NamedTuple):
    payload: bytes
    previous_term: int | None  # None: not known, it began a log


class Applied(NamedTuple):
    result: Any
    by: str


class Ledger:
    """`committed[i]` is the term of the committed entry i; its length is one more than the highest of them."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        # Every log begins with an entry that no leader made.
        self.entries: dict[tuple[int, int], Entry] = {(1, 0): Entry(NOOP, None)}
        self.committed: list[int] = [0, 0]
        self.configuration: Configuration | None = None  # the newest committed one
        self.configuration_index = 0
        self._commit_in: dict[int, int] = {}  # term -> up to where its leader has committed
        self.removed: set[str] = set()  # ids of nodes whose removal was committed, once at least
        self.leaders: dict[int, str] = {}  # term -> node id
        self.votes: dict[tuple[str, int], str] = {}  # (node id, term) -> the name voted for
        self.applied: dict[int, Applied] = {}
        self.acknowledged = 0  # the highest index whose result was handed to a door
        self.log_time: tuple[int, int, float] | None = None  # of the first DATA entry: index, its time, when it was
        self.log_time_ms = 0
        self.digests: dict[int, tuple[str, str]] = {}  # index -> (digest, whose)

    @property
    def commit(self) -> int:
        return len(self.committed) - 1

    # --- log matching -------------------------------------------------------------------------------------------------

    def appended(self, who: str, payload: bytes, index: int, term: int, previous_term: int | None) -> bool:
        """An entry stands in a log. False if it was never seen before; it is known from now on."""
        known = self.entries.get((index, term))
        if known is None:
            self.entries[index, term] = Entry(payload, previous_term)
            return False
        if known[0] is not payload and known[0] != payload:
            message = f"{who} holds another entry {index} of term {term}: {text(payload)}, not {text(known[0])}"
            raise Broken("log matching", message, index)
        if known[1] != previous_term:
            if previous_term is not None and known[1] is not None:
                message = (
                    f"before entry {index} of term {term} {who} holds one of term {previous_term}; "
                    f"elsewhere it is of term {known[1]}"
                )
                raise Broken("log matching", message, index - 1, index)
            if known[1] is None:
                self.entries[index, term] = Entry(known[0], previous_term)
        return True

    # --- terms, votes, leaders ----------------------------------------------------------------------------------------

    def voted(self, who: str, node_id: str, term: int, candidate: str) -> None:
        before = self.votes.setdefault((node_id, term), candidate)
        if before != candidate:
            raise Broken("one vote", f"{who} voted for {before} and for {candidate} in term {term}")

    def elected(self, who: str, node_id: str, term: int) -> None:
        before = self.leaders.get(term)
        if before is not None:
            again = "a second time" if before == node_id else f"after node {before}"
            raise Broken("election safety", f"{who} (node {node_id}) became leader of term {term} {again}")
        self.leaders[term] = node_id
        self.counts.elections += 1

    # --- commit -------------------------------------------------------------------------------------------------------

    def is_committed(self, index: int, term: int) -> bool:
        return index < len(self.committed) and self.committed[index] == term

    def committed_before(self, term: int) -> int:
        """Up to where leaders of earlier terms have committed."""
        return max((index for earlier, index in self._commit_in.items() if earlier < term), default=0)

    def commits(self, log: list[tuple[bytes, int, int]], upto: int, term: int) -> None:
        """A leader of this term has committed its log up to here; the caller has seen to it that it may."""
        self._commit_in[term] = upto
        committed = self.committed
        begin = len(committed)
        first = log[0][1]
        for payload, index, term in log[begin - first : upto + 1 - first]:
            assert index == len(committed)
            committed.append(term)
            if payload[0] == EntryKind.MEMBERS:
                self._configuration_committed(index, Configuration.decode(payload[1:]))
        self.counts.entries += len(committed) - begin

    def _configuration_committed(self, index: int, configuration: Configuration) -> None:
        before, self.configuration, self.configuration_index = self.configuration, configuration, index
        # What members say of themselves (node id, addresses) is recorded too, and is no change of who they are.
        if before is not None and _who(before) != _who(configuration):
            self.counts.membership_changes += 1
            self.removed |= {m.node_id for m in before.members} - {m.node_id for m in configuration.members}

    def is_member(self, name: str, node_id: str) -> bool:
        """By the newest committed configuration."""
        if self.configuration is None:
            return True
        member = self.configuration.get(name)
        return member is not None and member.node_id in ("", node_id)

    def check_follower_commit(self, who: str, index: int, term: int | None) -> None:
        """A node takes `index`, where it holds an entry of `term`, for committed."""
        if index >= len(self.committed):
            message = f"{who} takes entry {index} of term {term} for committed; no leader has committed beyond"
            raise Broken("commit safety", f"{message} {self.commit}", index)
        if self.committed[index] != term:
            message = f"{who} takes its entry {index} of term {term} for committed; committed was one of term"
            raise Broken("commit safety", f"{message} {self.committed[index]}", index)

    # --- apply --------------------------------------------------------------------------------------------------------

    def check_applied(self, who: str, index: int, term: int) -> None:
        """A node's state is that after entry `index` of `term`."""
        if index and not self.is_committed(index, term):
            known = f"committed was one of term {self.committed[index]}" if index <= self.commit else "nothing was"
            message = f"the state of {who} holds entry {index} of term {term}, and {known}"
            raise Broken("state machine safety", message, index)

    def has_applied(self, who: str, index: int, result: Any) -> bool:
        """False the first time that an entry was applied anywhere."""
        known = self.applied.get(index)
        if known is None:
            self.applied[index] = Applied(result, who)
            return False
        if known[0] != result:
            message = f"entry {index} gave {shortened(result)} on {who}, and {shortened(known[0])} on {known[1]}"
            raise Broken("replicas equal", message, index)
        return True

    def stamped(self, who: str, index: int, log_time_ms: int, now_s: float) -> None:
        """A DATA entry was applied for the first time, and the state now stands at this log time."""
        if log_time_ms < self.log_time_ms:
            message = f"with entry {index} log time goes back from {self.log_time_ms} to {log_time_ms} ms on {who}"
            raise Broken("log time", message, index)
        self.log_time_ms = log_time_ms
        if self.log_time is None:
            self.log_time = (index, log_time_ms, now_s)
            return
        first, began_ms, began_s = self.log_time
        ahead_ms = log_time_ms - began_ms - (now_s - began_s) * 1000
        if ahead_ms > (now_s - began_s) * 1000 * (LOG_TIME_RATE - 1) + LOG_TIME_SLACK_MS:
            message = (
                f"log time ran {ahead_ms:.0f} ms ahead of real time in the {now_s - began_s:.3f} s from entry {first}"
            )
            raise Broken("log time", f"{message} to {index}, on {who}", index)

    def digested(self, who: str, index: int, digest: str) -> None:
        known = self.digests.setdefault(index, (digest, who))
        if known[0] != digest:
            message = f"after entry {index} the state of {who} has digest {digest}, that of {known[1]} {known[0]}"
            raise Broken("replicas equal", message, index)

    # --- configurations -----------------------------------------------------------------------------------------------


def check_change(who: str, before: Configuration, after: Configuration, index: int) -> None:
    """Two configurations that follow each other in a log: majorities of both share a voter."""
    changed = before.voters ^ after.voters
    if len(changed) > 1:
        message = f"entry {index} on {who} changes {len(changed)} voters at once ({', '.join(sorted(changed))})"
        raise Broken("configuration", message, index)


def _who(configuration: Configuration) -> list[tuple[str, bool]]:
    return [(member.name, member.voter) for member in configuration.members]


def text(payload: bytes) -> str:
    """An entry's payload, readable in a line."""
    if not payload:
        return "nothing"
    try:
        kind = EntryKind(payload[0]).name
    except ValueError:
        kind = f"kind {payload[0]}"
    if kind == "MEMBERS":
        return f"MEMBERS {describe_members(Configuration.decode(payload[1:]))}"
    return f"{kind} of {len(payload)} bytes {payload[1:25]!r}{'…' if len(payload) > 25 else ''}"


def describe_members(configuration: Configuration) -> str:
    return " ".join(
        f"{m.name}{'' if m.voter else '(learner)'}{'' if m.node_id else '?'}" for m in configuration.members
    )


def shortened(value: object) -> str:
    told = repr(value)
    return told if len(told) <= 200 else f"{told[:200]}… ({len(told)} characters)"
