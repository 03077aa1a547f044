"""Which faults come when: everything follows from the seed.

A campaign is rounds; each round has every kind of fault in it, in an order of its own, and so many leader kills that a
campaign of 20 minutes measures well over 30 of them. What the seed does not decide is the machine's: who leads when a
fault strikes, and how long the cluster takes to be whole again before the next may come.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from tests.chaos import faults
from tests.chaos.faults import Fault


class Entry(NamedTuple):
    """A kind of fault in a round: how often, and how long it holds."""

    fault: type[Fault]
    times: int
    holds_s: tuple[float, float]


# Long holds are longer than 4 s, in which a node gives up a silent peer; short ones are shorter than an election.
ROUND = (
    Entry(faults.KillLeader, 8, (0.3, 1.5)),
    Entry(faults.KillFollower, 1, (0.3, 4.0)),
    Entry(faults.KillMajority, 1, (0.2, 2.0)),
    Entry(faults.KillAll, 1, (0.0, 1.0)),
    Entry(faults.PauseLeader, 2, (0.2, 5.0)),
    Entry(faults.PauseFollower, 1, (0.5, 6.0)),
    Entry(faults.PauseAll, 1, (0.5, 3.0)),
    Entry(faults.RollingRestart, 1, (0.0, 0.0)),
    Entry(faults.HandOver, 1, (0.5, 1.0)),
    Entry(faults.IsolateLeader, 1, (1.5, 7.0)),
    Entry(faults.IsolateLeaderLossy, 1, (1.5, 7.0)),
    Entry(faults.IsolateFollower, 1, (1.5, 7.0)),
    Entry(faults.IsolateAll, 1, (0.5, 5.0)),
    Entry(faults.LeaderUnheard, 1, (1.5, 6.0)),
    Entry(faults.LeaderHearsNothing, 1, (1.5, 6.0)),
    Entry(faults.FollowerOneWay, 1, (1.5, 6.0)),
    Entry(faults.HalfOpen, 1, (3.0, 5.0)),
    Entry(faults.PartBridge, 1, (1.5, 6.0)),
    Entry(faults.Delay, 1, (2.0, 5.0)),
    Entry(faults.SlowLeader, 1, (2.0, 5.0)),
    Entry(faults.Flapping, 1, (3.0, 6.0)),
    Entry(faults.ResetClients, 1, (1.0, 3.0)),
    Entry(faults.LeaderOutOfClientsReach, 1, (0.5, 3.0)),
    Entry(faults.LeaderDiskFull, 1, (1.0, 3.0)),
    Entry(faults.FollowerDiskFull, 1, (1.0, 3.0)),
    Entry(faults.JoinAndLeave, 1, (0.0, 0.0)),
    Entry(faults.Replace, 1, (0.0, 0.0)),
)
# After each fault, once the cluster is whole: long enough to see that it works.
CALM_S = (0.4, 1.2)


class Planned(NamedTuple):
    """`chance_seed` is for the fault's own choices, so that one fault's do not move the next one's."""

    number: int
    fault: type[Fault]
    holds_s: float
    calm_s: float
    chance_seed: int

    def __str__(self) -> str:
        return f"#{self.number} {self.fault.kind}, for {self.holds_s:.1f} s"


def plan(*faults: tuple[type[Fault], float]) -> list[Planned]:
    """These faults, each held for so many seconds."""
    return [
        Planned(number, fault, holds_s, CALM_S[0], number) for number, (fault, holds_s) in enumerate(faults, start=1)
    ]


def schedule(seed: int, only: str = "") -> Iterator[Planned]:
    """Endless: the campaign takes as many as its time allows. `only`: kinds with this in their names. Raises
    ValueError if there is none."""
    chance = Random(seed)
    number = 0
    while True:
        entries = [entry for entry in ROUND for _ in range(entry.times) if only in entry.fault.kind]
        if not entries:
            raise ValueError(f"no kind of fault has {only!r} in its name")
        chance.shuffle(entries)
        for entry in entries:
            number += 1
            yield Planned(
                number, entry.fault, chance.uniform(*entry.holds_s), chance.uniform(*CALM_S), chance.getrandbits(32)
            )


def only_leader_kills(seed: int, after: int) -> Iterator[Planned]:
    """For a campaign that has too few of them when its time is up."""
    chance = Random(seed)
    (entry,) = (entry for entry in ROUND if entry.fault is faults.KillLeader)
    number = after
    while True:
        number += 1
        yield Planned(
            number, entry.fault, chance.uniform(*entry.holds_s), chance.uniform(*CALM_S), chance.getrandbits(32)
        )
