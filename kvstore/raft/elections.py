"""When to ask for votes, whose votes count, and whom to grant one. Pure: time is handed in.

The engine raises its term whenever its own deadline passes, which lets a node that returns from a partition depose a
healthy leader (fault 12), and it counts votes without looking whose they are (fault 13). So its deadline is held at
infinity, and this decides: a deadline drawn at random, a pre-vote before a term is raised (Ongaro's thesis, 9.6), and
loyalty to a living leader (4.2.3).
"""

from __future__ import annotations

import math

from kvstore.env import Chance


class Elections:
    """One node's view of elections. Times are monotonic seconds."""

    __slots__ = (
        "_chance", "_max_s", "_min_s", "_pre_votes", "_started_at", "_vote_term", "_votes",
        "deadline", "heard_at", "pre_vote_term", "transfer_term",
    )  # fmt: skip

    def __init__(self, chance: Chance, min_s: float, max_s: float, now: float) -> None:
        self._chance = chance
        self._min_s = min_s
        self._max_s = max_s
        self._started_at = now
        self.heard_at = -math.inf
        self.pre_vote_term = 0  # the term that the running pre-vote is for; 0: none runs
        self._pre_votes: set[str] = set()
        self._vote_term = 0
        self._votes: set[str] = set()
        self.transfer_term = 0  # the term of an election that the leader asked us for
        self.deadline = 0.0
        self.postpone(now)

    def postpone(self, now: float) -> None:
        """Wait a full, newly drawn timeout before the next attempt."""
        self.deadline = now + self._min_s + (self._max_s - self._min_s) * self._chance.random()

    def heard_leader(self, now: float) -> None:
        """A living leader of our term spoke."""
        self.heard_at = now
        self.pre_vote_term = 0
        self.postpone(now)

    def lost_leader(self, now: float) -> None:
        """The connection with the leader broke: a process that died is noticed at once, not after a timeout. If it is
        only this node that cannot reach it, the others are loyal still, and grant no pre-vote."""
        self.heard_at = -math.inf
        self.deadline = min(self.deadline, now + self._min_s * (0.1 + 0.4 * self._chance.random()))

    def heard_of_late(self, now: float) -> bool:
        """False for a node that is cut off: it does not know who leads by now."""
        return now - self.heard_at <= self._max_s

    def loyal(self, now: float) -> bool:
        """True while no vote is granted: a leader lives, or may live that this node has not had the time to hear."""
        return now - self.heard_at < self._min_s or now - self._started_at < self._min_s

    def begin_pre_vote(self, next_term: int, own_name: str, now: float) -> None:
        self.pre_vote_term = next_term
        self._pre_votes = {own_name}
        self.postpone(now)

    def count_pre_vote(self, next_term: int, voter: str) -> set[str]:
        """All who granted the running pre-vote, with this one; empty if it is not for it."""
        if next_term != self.pre_vote_term or not self.pre_vote_term:
            return set()
        self._pre_votes.add(voter)
        return self._pre_votes

    def end_pre_vote(self) -> None:
        self.pre_vote_term = 0

    def first_vote(self, term: int, voter: str) -> bool:
        """True the first time that this voter's vote in this term is seen."""
        if term != self._vote_term:
            self._vote_term = term
            self._votes = set()
        if voter in self._votes:
            return False
        self._votes.add(voter)
        return True
