"""The simulated clients: the real `Client` on simulated streams, in a loop of workers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from kvstore.client.client import Client
from kvstore.client.connection import CONNECT_TIMEOUT_S, ConnectionEvents
from kvstore.client.protocol import SILENCE_S, ClientProtocol
from kvstore.errors import KvError

if TYPE_CHECKING:
    from tests.simulation.world import World
    from tests.workloads import Workload

# Longer than an election, shorter than most outages: some calls end by their deadline, most are saved by a retry.
CALL_TIMEOUT_S = 2.5
# Frames of the connector itself (signs of life) have ids far above the client's own.
_PROBE_IDS_FROM = 1 << 40


class SimulatedConnector:
    """`client.connection.Connector` over the simulated network, for one client host."""

    def __init__(self, world: World, host: str, opened: Callable[[str, ClientProtocol], None] | None = None) -> None:
        self._world = world
        self._host = host
        self._opened = opened
        self._network = world.network.host(host)
        self._next_id = itertools.count(_PROBE_IDS_FROM).__next__
        self._open: dict[ClientProtocol, None] = {}
        self._is_closed = False

    def connect(self, address: str, events: ConnectionEvents) -> None:
        if self._is_closed:
            return

        def made(protocol: ClientProtocol) -> None:
            self._open[protocol] = None
            if self._opened is not None:
                self._opened(self._host, protocol)
            events.on_open(protocol)

        def lost(protocol: ClientProtocol, reason: str, code: str) -> None:
            self._open.pop(protocol, None)
            events.on_closed(reason, code)

        def failed(error: OSError) -> None:
            if not self._is_closed:
                events.on_failed(f"cannot connect to {address}: {error}")

        def protocol() -> ClientProtocol:
            return ClientProtocol(self._world.loop, self._next_id, made, lost, events.on_silent, SILENCE_S)

        self._network.connect(address, protocol, failed, CONNECT_TIMEOUT_S)

    def die(self) -> None:
        """Its process is gone: it connects no more, whatever of the client's own still believes to run."""
        self._is_closed = True

    async def close(self) -> None:
        self._is_closed = True
        for protocol in list(self._open):
            protocol.close("closed by this client")


class Worker:
    """One client process: a client of its own, and one operation after another."""

    def __init__(self, world: World, number: int, workloads: list[Workload], pause_s: float) -> None:
        self.world = world
        self.number = number
        self.host = f"c{number}"
        self._workloads = workloads
        self._pause_s = pause_s
        self._chance = Random(world.chance.getrandbits(64))
        self._task: asyncio.Task[None]
        self._lives = 0
        self.start()

    def start(self) -> None:
        self._lives += 1
        self._connector = SimulatedConnector(self.world, self.host, self.world.nemesis.opened)
        self.client = self.world.client(self._connector)
        self._task = self.world.loop.create_task(self._work(self.client))

    def crash(self) -> None:
        """The client's process dies: what it had under way may have taken effect, or may yet."""
        self.world.story.tell(self.host, "killed")
        self._task.cancel()
        self._connector.die()
        self.world.network.kill(self.host, silently=False)
        self.world.network.revive(self.host)
        self.start()

    async def ended(self) -> None:
        await asyncio.wait((self._task,))
        if not self._task.cancelled() and self._task.exception() is not None:
            error = self._task.exception()
            self.world.violation("client", f"a call raised {error!r}", error)
        await self.client.close()

    async def _work(self, client: Client) -> None:
        world, chance = self.world, self._chance
        worker = self.number * 1000 + self._lives
        while not world.is_over:
            workload = chance.choice(self._workloads)
            await workload.step(client, worker, chance)
            # Bursts and lulls: what races needs no pause, what grows needs one.
            await asyncio.sleep(self._pause_s * 2.0 * chance.random() ** 2 if chance.random() < 0.8 else 0.0)


class Operator:
    """The person who joins and removes nodes, and hands leadership over: through the real client's calls. One thing at
    a time, and each is given up after a while; `World.settle` ends what was left half done."""

    # Twice what a promotion takes when a snapshot has to be sent over a slow link.
    PATIENCE_S = 20.0

    def __init__(self, world: World) -> None:
        self._world = world
        self._chance = Random(world.chance.getrandbits(64))
        self.client = world.client(SimulatedConnector(world, "op"))
        self.task: asyncio.Task[None] | None = None

    @property
    def is_busy(self) -> bool:
        return self.task is not None and not self.task.done()

    def begin(self, what: str, name: str) -> None:
        """`what`: join, leave, replace, hand over."""
        assert not self.is_busy
        self._world.story.tell("operator", what, name=name)
        work = {"join": self.join, "leave": self.leave, "replace": self.replace, "hand over": self.hand_over}[what]
        self.task = self._world.spawn(self._bounded(what, name, work(name)))

    async def _bounded(self, what: str, name: str, work: object) -> None:
        try:
            async with asyncio.timeout(self.PATIENCE_S):
                await work  # type: ignore[misc]
            self._world.story.tell("operator", f"{what}: done", name=name)
        except TimeoutError:
            self._world.story.tell("operator", f"{what}: given up", name=name)
        except KvError as error:
            self._world.story.tell("operator", f"{what}: refused", name=name, code=error.code)

    async def hand_over(self, name: str) -> None:
        await self.client.transfer_leader(name)

    async def leave(self, name: str) -> None:
        """Remove a member, handing leadership over first where it leads. Its machine is retired."""
        while True:
            # What a node's status says may be old; the leader knows.
            try:
                await self.client.member_remove(name)
                break
            except KvError as error:
                if error.code == "member_unknown":
                    break
                self._world.story.tell("operator", "not removed", name=name, code=error.code)
                if error.code == "cannot_remove_leader":
                    await self._quietly(self.client.transfer_leader(""))
                elif error.code == "would_lose_quorum":
                    raise
            await asyncio.sleep(0.2)
        # One that was removed while it was away comes back believing that it is a member: it must disturb nobody.
        machine = self._world.machines.get(name)
        if machine is not None:
            machine.is_removed = True

    async def join(self, name: str) -> None:
        """Take the machine of this name in as a voter; it is booted where it is down."""
        world = self._world
        machine = world.machines[name]
        # A learner may stay one for a while.
        dawdles_until_s = world.time.now_s + (0.0 if world.is_over else self._chance.choice([0.0, 3.0]))
        while True:
            status = await self.client.status()
            if not machine.is_up:
                if machine.is_broken:
                    return
                others = tuple(member for member in status.members if member.name != name)
                machine.boot(others)
            node = machine.node
            member = next((member for member in status.members if member.name == name), None)
            try:
                if node is None:
                    pass
                elif member is None:
                    await self.client.member_add(
                        name, machine.peer_address, machine.client_address, node.raft.node_id, world.cluster_id
                    )
                elif member.voter:
                    return
                elif node.status().applied_index >= status.commit_index and world.time.now_s >= dawdles_until_s:
                    await self.client.member_promote(name)
            except KvError as error:
                world.story.tell("operator", "not yet", name=name, code=error.code)
            await asyncio.sleep(0.1)

    async def replace(self, name: str) -> None:
        """The machine of this name is gone for good: remove it, and join another in its place, now and then under its
        name."""
        await self._replace(name, name if self._chance.random() < 0.5 else "")

    async def replace_under_its_name(self, name: str) -> None:
        await self._replace(name, name)

    async def _replace(self, name: str, new_name: str) -> None:
        world = self._world
        await self.leave(name)
        world.retire(name)
        new = world.add_machine(new_name)
        await self.join(new.name)

    async def _quietly(self, call: object) -> None:
        try:
            await call  # type: ignore[misc]
        except KvError as error:
            self._world.story.tell("operator", "refused", code=error.code)
