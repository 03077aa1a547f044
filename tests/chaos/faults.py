"""What a campaign does to its cluster. Each fault is a class: `begin` does it, `end` undoes it, both wait for nothing
but their own steps. `struck_at` is the moment of its first effect.

A fault says what it is by its `kind`, and whom it met by its `note`. Victims follow from who leads and from the
fault's own `chance`; how long it holds is the schedule's.

To add one: write the class, and give it its place in `schedule.ROUND`.
"""

from __future__ import annotations

import asyncio
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from random import Random
from typing import ClassVar

from tests.chaos.cluster import ProxiedCluster
from tests.chaos.proxy import CLIENTS, DROP, HOLD, Rule
from tests.cluster.harness import run_command

# A learner of a store of a few megabytes has caught up within a second or two; a busy machine may need longer.
JOIN_S = 30.0
COMMAND_TIMEOUT_S = 20


class Fault(ABC):
    kind: ClassVar[str]

    def __init__(self, cluster: ProxiedCluster, leader: str, chance: Random, now: Callable[[], float]) -> None:
        self.cluster = cluster
        self.network = cluster.network
        self.leader = leader
        self.chance = chance
        self.now = now
        self.note = ""
        self.struck_at = 0.0
        self.may_end: set[str] = set()
        """Nodes whose processes may end by themselves now; any other that does is a violation."""

    @property
    def nodes(self) -> list[str]:
        return sorted(self.cluster.nodes)

    @property
    def followers(self) -> list[str]:
        return [name for name in self.nodes if name != self.leader]

    def others(self, than: str) -> list[str]:
        return [name for name in self.nodes if name != than]

    def strike(self, note: str) -> None:
        """To be called right before the first effect."""
        self.note = note
        self.struck_at = self.now()

    @abstractmethod
    async def begin(self) -> None: ...

    @abstractmethod
    async def end(self) -> None: ...


# --- processes --------------------------------------------------------------------------------------------------------


class _Kill(Fault):
    """SIGKILL; started again at the end."""

    def victims(self) -> list[str]:
        raise NotImplementedError

    async def begin(self) -> None:
        self.killed = self.victims()
        self.strike(" ".join(self.killed))
        for name in self.killed:
            self.cluster.nodes[name].signal(signal.SIGKILL)
        for name in self.killed:
            self.cluster.nodes[name].reap()

    async def end(self) -> None:
        for name in self.killed:
            self.cluster.start(name)


class KillLeader(_Kill):
    kind = "kill the leader"

    def victims(self) -> list[str]:
        return [self.leader]


class KillFollower(_Kill):
    kind = "kill a follower"

    def victims(self) -> list[str]:
        return [self.chance.choice(self.followers)]


class KillMajority(_Kill):
    kind = "kill the leader and a follower"

    def victims(self) -> list[str]:
        return [self.leader, self.chance.choice(self.followers)]


class KillAll(_Kill):
    kind = "kill all at once"

    def victims(self) -> list[str]:
        return self.nodes


class _Pause(Fault):
    """SIGSTOP; SIGCONT at the end."""

    def victims(self) -> list[str]:
        raise NotImplementedError

    async def begin(self) -> None:
        self.paused = self.victims()
        self.strike(" ".join(self.paused))
        for name in self.paused:
            self.cluster.pause(name)

    async def end(self) -> None:
        for name in self.paused:
            self.cluster.resume(name)


class PauseLeader(_Pause):
    kind = "pause the leader"

    def victims(self) -> list[str]:
        return [self.leader]


class PauseFollower(_Pause):
    kind = "pause a follower"

    def victims(self) -> list[str]:
        return [self.chance.choice(self.followers)]


class PauseAll(_Pause):
    kind = "pause all"

    def victims(self) -> list[str]:
        return self.nodes


class RollingRestart(Fault):
    """SIGTERM to one after the other, each started again and caught up before the next; the leader last."""

    kind = "rolling restart"

    async def begin(self) -> None:
        order = [*self.followers, self.leader]
        self.strike(" ".join(order))
        for name in order:
            self.may_end = {name}
            await self.cluster.terminate(name)
            self.cluster.start(name)
            await self.cluster.whole()
            self.may_end = set()

    async def end(self) -> None:
        """All of it is done."""


class HandOver(Fault):
    kind = "hand over leadership"

    async def begin(self) -> None:
        target = self.chance.choice(self.followers)
        self.strike(f"{self.leader} to {target}")
        async with self.cluster.client(COMMAND_TIMEOUT_S) as kv:
            await kv.transfer_leader(target)

    async def end(self) -> None:
        """It needs no undoing."""


# --- network ----------------------------------------------------------------------------------------------------------


class _NetworkFault(Fault):
    async def end(self) -> None:
        await self.network.heal()


class _Isolate(_NetworkFault):
    """One node and the others are parted, both ways. Clients still reach all."""

    rule: ClassVar[Rule]

    def victim(self) -> str:
        return self.leader

    async def begin(self) -> None:
        victim = self.victim()
        self.strike(victim)
        await self.network.cut(self.rule, [victim], self.others(victim))


class IsolateLeader(_Isolate):
    kind = "isolate the leader"
    rule = HOLD


class IsolateLeaderLossy(_Isolate):
    kind = "isolate the leader, connections die"
    rule = DROP


class IsolateFollower(_Isolate):
    kind = "isolate a follower"
    rule = HOLD

    def victim(self) -> str:
        return self.chance.choice(self.followers)


class IsolateAll(_NetworkFault):
    kind = "no node reaches another"

    async def begin(self) -> None:
        self.strike("all")
        await self.network.cut(self.chance.choice((HOLD, DROP)), self.nodes, self.nodes)


class LeaderUnheard(_NetworkFault):
    kind = "one-way: the leader is not heard"

    async def begin(self) -> None:
        self.strike(self.leader)
        await self.network.cut_one_way(HOLD, [self.leader], self.followers)


class LeaderHearsNothing(_NetworkFault):
    kind = "one-way: the leader hears nothing"

    async def begin(self) -> None:
        self.strike(self.leader)
        await self.network.cut_one_way(HOLD, self.followers, [self.leader])


class FollowerOneWay(_NetworkFault):
    kind = "one-way: a follower is not heard, or hears nothing"

    async def begin(self) -> None:
        victim, others = self.chance.choice(self.followers), self.others
        if self.chance.random() < 0.5:
            self.strike(f"{victim} is not heard")
            await self.network.cut_one_way(HOLD, [victim], others(victim))
        else:
            self.strike(f"{victim} hears nothing")
            await self.network.cut_one_way(HOLD, others(victim), [victim])


class HalfOpen(_NetworkFault):
    """The leader's connections go deaf and are not closed; new ones work."""

    kind = "half-open connections of the leader"

    async def begin(self) -> None:
        self.strike(self.leader)
        await self.network.deafen([self.leader], self.followers)


class PartBridge(_NetworkFault):
    """The leader and one follower do not reach each other; the other follower reaches both."""

    kind = "leader and a follower parted, the third sees both"

    async def begin(self) -> None:
        victim = self.chance.choice(self.followers)
        self.strike(f"{self.leader} | {victim}")
        await self.network.cut(HOLD, [self.leader], [victim])


class Delay(_NetworkFault):
    kind = "delay on all links"

    async def begin(self) -> None:
        delay_s = self.chance.uniform(0.01, 0.06)
        self.strike(f"{1000 * delay_s:.0f} ms ± half")
        await self.network.cut(Rule(delay_s=delay_s, jitter_s=delay_s / 2), self.nodes, self.nodes)


class SlowLeader(_NetworkFault):
    kind = "slow links from the leader"

    async def begin(self) -> None:
        bytes_per_s = self.chance.uniform(50_000, 300_000)
        self.strike(f"{bytes_per_s / 1000:.0f} kB/s")
        await self.network.cut_one_way(Rule(bytes_per_s=bytes_per_s, delay_s=0.005), [self.leader], self.followers)


class _Repeated(_NetworkFault):
    """Something that goes on while the fault holds."""

    async def begin(self) -> None:
        self._over = asyncio.Event()
        self.strike(self.leader)
        self._task = asyncio.create_task(self._go_on())

    async def _go_on(self) -> None:
        while not self._over.is_set():
            await self.again()

    async def again(self) -> None:
        raise NotImplementedError

    async def end(self) -> None:
        self._over.set()
        await self._task
        await super().end()


class Flapping(_Repeated):
    kind = "flapping link between leader and a follower"

    async def again(self) -> None:
        victim = self.followers[0]
        await self.network.cut(self.chance.choice((HOLD, DROP)), [self.leader], [victim])
        await asyncio.sleep(self.chance.uniform(0.05, 0.6))
        await self.network.mend([self.leader], [victim])
        await asyncio.sleep(self.chance.uniform(0.05, 0.4))


class ResetClients(_Repeated):
    kind = "connections of clients reset, again and again"

    async def again(self) -> None:
        await self.network.reset([CLIENTS], self.nodes)
        await asyncio.sleep(self.chance.uniform(0.05, 0.4))


class LeaderOutOfClientsReach(_NetworkFault):
    """The other nodes reach it, so it goes on leading; no client can."""

    kind = "no client reaches the leader"

    async def begin(self) -> None:
        self.strike(self.leader)
        await self.network.cut(HOLD, [CLIENTS], [self.leader])


# --- disks ------------------------------------------------------------------------------------------------------------


class _FullDisk(Fault):
    """No file of the node grows; at the end there is room again, and the operator restarts it."""

    def victim(self) -> str:
        raise NotImplementedError

    async def begin(self) -> None:
        self.full = self.victim()
        self.strike(self.full)
        self.cluster.fill_disk(self.full)

    async def end(self) -> None:
        self.cluster.free_disk(self.full)
        self.may_end = {self.full}
        await self.cluster.terminate(self.full)
        self.may_end = set()
        self.cluster.start(self.full)


class LeaderDiskFull(_FullDisk):
    kind = "the leader's disk is full"

    def victim(self) -> str:
        return self.leader


class FollowerDiskFull(_FullDisk):
    kind = "a follower's disk is full"

    def victim(self) -> str:
        return self.chance.choice(self.followers)


# --- members ----------------------------------------------------------------------------------------------------------


class _Membership(Fault):
    async def command(self, *arguments: str) -> None:
        code, _, err = await run_command(
            *arguments, "--endpoints", self.cluster.endpoints, "--timeout", str(COMMAND_TIMEOUT_S)
        )
        assert code == 0, f"kvstore {' '.join(arguments)}: {err}"

    async def end(self) -> None:
        """The new membership stays."""


class JoinAndLeave(_Membership):
    """A new node joins; then one of the old ones leaves, the leader too."""

    kind = "a node joins, another leaves"

    async def begin(self) -> None:
        joins, leaves = self.cluster.fresh_name(), self.chance.choice(self.nodes)
        self.strike(f"{joins} joins, {leaves} leaves")
        await self.cluster.join_through(joins)
        await self.cluster.whole(JOIN_S)
        self.may_end = {leaves}
        await self.command("leave", leaves)
        assert await self.cluster.ended(leaves) == 0, f"{leaves} did not end well after it left"
        self.cluster.forget(leaves)
        self.may_end = set()


class Replace(_Membership):
    """A node dies and its directory is lost: `member remove`, then `join` under the old name or a new one."""

    kind = "a dead node is replaced"

    async def begin(self) -> None:
        dies = self.chance.choice(self.nodes)
        keeps_name = self.chance.random() < 0.5
        joins = dies if keeps_name else self.cluster.fresh_name()
        self.strike(f"{dies} dies, {joins} joins")
        self.cluster.kill(dies)
        await self.command("member", "remove", dies)
        if keeps_name:
            self.cluster.wipe(dies)
        else:
            self.cluster.forget(dies)
        await self.cluster.join_through(joins)
        await self.cluster.whole(JOIN_S)
