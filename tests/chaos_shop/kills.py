"""Which processes are killed when: everything follows from the seed, but who leads at that moment.

Two lanes go on beside each other, one of store nodes and one of services, so that a service may meet a cluster without
a leader just when it has started. In each lane the next kill comes when the one before is over, after a pause.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from random import Random
from typing import NamedTuple


class Target(StrEnum):
    LEADER = "the leader"
    FOLLOWER = "a follower"
    MAJORITY = "two nodes"
    ORDERS = "an order service"
    ALL_ORDERS = "both order services"
    USERS = "the user service"
    WORKER = "a worker"
    ALL_WORKERS = "both workers"
    PROVIDER = "the provider"


# How many of each are in a round.
STORE_ROUND = {Target.LEADER: 4, Target.FOLLOWER: 2, Target.MAJORITY: 1}
SERVICE_ROUND = {
    Target.ORDERS: 4, Target.ALL_ORDERS: 1, Target.USERS: 2, Target.WORKER: 4, Target.ALL_WORKERS: 1,
    Target.PROVIDER: 3,
}  # fmt: skip
# A worker's claims end 10 s after it; what comes back sooner meets its own claims, what comes later another's.
DOWN_S = (0.0, 4.0)


class Kill(NamedTuple):
    """`chance` chooses among several that could be meant."""

    target: Target
    pause_s: float
    down_s: float
    chance: Random


def lane(seed: int, rounds: dict[Target, int], pause_s: float) -> Iterator[Kill]:
    """Endless; pauses between kills are about `pause_s`."""
    chance = Random(f"{seed} {' '.join(rounds)}")
    while True:
        targets = [target for target, times in rounds.items() for _ in range(times)]
        chance.shuffle(targets)
        for target in targets:
            down_s, calm_s = chance.uniform(*DOWN_S), chance.uniform(0.5, 1.5) * pause_s
            yield Kill(target, calm_s, down_s, Random(chance.getrandbits(32)))


def victims(target: Target, leader: str, nodes: list[str], chance: Random) -> list[str]:
    """Names of processes, as `Shop` has them."""
    followers = [name for name in nodes if name != leader]
    match target:
        case Target.LEADER:
            return [leader]
        case Target.FOLLOWER:
            return [chance.choice(followers)]
        case Target.MAJORITY:
            return [leader, chance.choice(followers)]
        case Target.ORDERS:
            return [chance.choice(("orders 1", "orders 2"))]
        case Target.ALL_ORDERS:
            return ["orders 1", "orders 2"]
        case Target.USERS:
            return ["users"]
        case Target.WORKER:
            return [chance.choice(("worker 1", "worker 2"))]
        case Target.ALL_WORKERS:
            return ["worker 1", "worker 2"]
        case Target.PROVIDER:
            return ["psp"]
