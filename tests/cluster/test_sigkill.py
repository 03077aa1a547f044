"""Ninety seconds of SIGKILL: a cluster of three loses one node after another, the leader above all, under full load.

What must hold, while it goes on: a linearizable read, through any node, never shows less than what was acknowledged
before it began. And at the end: every acknowledged write is there, nothing was applied twice (see `histories.py`), and
all three nodes hold the same state.

The nodes have small limits (`small_limits.py`), so they flush, drop what the log no longer needs, and send snapshots to
those that were away for longer than the log remembers.

The seed fixes who is killed and when; what the machine makes of it differs. Figures are printed (`pytest -s`): kills,
throughput, and for each killed leader the time until a write that began after the kill was acknowledged.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from random import Random

import pytest
from msgspec import Raw

import kvstore
from kvstore import Client, NodeStatus, OutcomeUnknown, Range, RangeResult, Unavailable, codec
from tests.cluster.harness import ClusterProcesses
from tests.cluster.histories import Ledger, everything, write

pytestmark = pytest.mark.timeout(240)

SEED = 20_261_122
LASTS_S = 90.0
KILLS_MIN = 30
CLIENTS = 8
WRITERS_PER_CLIENT = 4
# Forty kills where the cluster recovers fast; where it does not, the campaign goes on until it has enough of them.
BETWEEN_KILLS_S = (1.4, 2.8)
RESTART_AFTER_S = (0.2, 1.2)
# Longer than any outage here, so that nearly every write is sent again until it is acknowledged; shorter than the
# minute that a session lives.
TIMEOUT_S = 30.0
# A busy machine may need long to start a node or to elect; what takes longer than this is a fault.
OUTAGE_MAX_S = 30.0
# A pause between the reads of one reader: they are to meet every kill, not to be the load.
READ_PAUSE_S = 0.005
REGISTER = b"put/register"


class Register:
    """A key that one writer counts up, and what a read of it must show."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.tried = self.acknowledged = 0

    async def count_up(self, kv: Client) -> None:
        self.tried += 1
        value = b"%d" % self.tried
        self._ledger.try_put(REGISTER, value)
        try:
            await kv.put(REGISTER, value)
        except (OutcomeUnknown, Unavailable):
            return
        self._ledger.put(REGISTER, value)
        self.acknowledged = int(value)

    def check(self, least: int, value: bytes | None, who: str) -> int:
        """A read that began when `least` was acknowledged (or read) has returned this value."""
        got = int(value or b"0")
        assert least <= got <= self.tried, f"{who} read {got}, after {least} had been acknowledged or read"
        return got


class NodeReader:
    """Linearizable reads through one certain node (the client would send them to the leader)."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self._host, port = address.split(":")
        self._port = int(port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._id = 1
        self.reads = 0

    async def read(self, key: bytes) -> bytes | None:
        """Raises OSError or EOFError while the node is not there, `Unavailable` while it cannot tell."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
            self._streams[1].write(codec.encode_frame(codec.Hello(1, codec.PROTOCOL_VERSION)))
        reader, writer = self._streams
        self._id += 1
        request = Raw(codec.encode_request(Range(key)))
        writer.write(codec.encode_frame(codec.Read(self._id, codec.ReadLevel.LINEARIZABLE, 0, request)))
        while True:
            size = int.from_bytes(await reader.readexactly(4), "big")
            frame = codec.decode_server_frame(await reader.readexactly(size))
            if isinstance(frame, codec.Failure):
                raise Unavailable(frame.message, code=frame.code)
            if isinstance(frame, codec.Answer) and frame.id == self._id:
                result = codec.decode_result(frame.result)
                assert isinstance(result, RangeResult), result
                self.reads += 1
                return result.records[0].value if result.records else None

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Campaign:
    """Who is killed and started again, and what that costs."""

    def __init__(self, cluster: ClusterProcesses, ledger: Ledger) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._chance = Random(SEED)
        self._restarts: dict[str, asyncio.Task[None]] = {}
        self.kills = self.leader_kills = self.double_kills = 0
        self.outages_s: list[float] = []
        """After the kill of a leader whose two followers were up."""

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + LASTS_S
        try:
            async with self._cluster.client(OUTAGE_MAX_S) as probe:
                while loop.time() < until or self.kills < KILLS_MIN:
                    await self._kill(probe)
                    await asyncio.sleep(self._chance.uniform(*BETWEEN_KILLS_S))
            await asyncio.gather(*self._restarts.values())
        finally:
            for restart in self._restarts.values():
                restart.cancel()

    async def _kill(self, probe: Client) -> None:
        cluster, chance = self._cluster, self._chance
        up = [name for name in cluster.nodes if name not in self._restarts]
        for name in up:
            assert cluster.nodes[name].running, f"{name} ended by itself"
        if not up:
            await asyncio.wait(self._restarts.values(), return_when=asyncio.FIRST_COMPLETED)
            return
        answers = await asyncio.gather(*(cluster.status(name) for name in up))
        leader = leader_of([answer for answer in answers if answer is not None])
        victim = leader if leader and chance.random() < 0.5 else chance.choice(up)
        victims = [victim]
        if len(up) > 1 and chance.random() < 0.2:
            victims.append(chance.choice([name for name in up if name != victim]))
            self.double_kills += 1
        followers_up = len(answers) == 3 and None not in answers and len(victims) == 1
        began = time.monotonic()
        for name in victims:
            cluster.kill(name)
            self._restarts[name] = asyncio.create_task(self._restart(name, chance.uniform(*RESTART_AFTER_S)))
        self.kills += len(victims)
        self.leader_kills += leader in victims
        key, value = b"put/probe", b"%d" % self.kills
        self._ledger.try_put(key, value)
        await probe.put(key, value)
        self._ledger.put(key, value)
        if victim == leader and followers_up:
            self.outages_s.append(time.monotonic() - began)

    async def _restart(self, name: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self._cluster.start(name)
        del self._restarts[name]


def leader_of(statuses: list[NodeStatus]) -> str:
    """Who leads in the newest term that anybody leads in; empty if nobody says so."""
    leaders = [status for status in statuses if status.role == "leader"]
    return max(leaders, key=lambda status: status.term).name if leaders else ""


async def test_nothing_acknowledged_is_lost_to_sigkill(tmp_path: Path) -> None:
    ledger = Ledger()
    register = Register(ledger)
    over = asyncio.Event()

    async def keep_writing(kv: Client, name: bytes) -> None:
        chance, number = Random(f"{SEED}/{name!r}"), 0
        while not over.is_set():
            await write(kv, ledger, name, number, chance)
            number += 1

    async def keep_counting(kv: Client) -> None:
        while not over.is_set():
            await register.count_up(kv)

    async def keep_reading(kv: Client) -> None:
        while not over.is_set():
            least = register.acknowledged
            try:
                record = await kv.get(REGISTER)
            except Unavailable:
                continue  # its own timeout has passed
            register.check(least, record.value if record else None, "a client")
            await asyncio.sleep(READ_PAUSE_S)

    async def keep_reading_through(node: NodeReader) -> None:
        least = 0
        try:
            while not over.is_set():
                least = max(least, register.acknowledged)
                try:
                    async with asyncio.timeout(OUTAGE_MAX_S):
                        value = await node.read(REGISTER)
                    least = register.check(least, value, f"a client of {node.name}")
                except Unavailable:
                    pass
                except TimeoutError:
                    raise AssertionError(f"{node.name} left a read unanswered for {OUTAGE_MAX_S:g} s") from None
                except (OSError, EOFError):
                    node.close()
                await asyncio.sleep(READ_PAUSE_S)
        finally:
            node.close()

    async with ClusterProcesses(tmp_path, main="tests.cluster.small_limits") as cluster:
        clients = [kvstore.connect(cluster.endpoints, timeout_s=TIMEOUT_S) for _ in range(CLIENTS)]
        node_readers = [NodeReader(node.name, node.client_address) for node in cluster.nodes.values()]
        campaign = Campaign(cluster, ledger)
        tasks = [
            *(
                asyncio.create_task(keep_writing(kv, b"w%d.%d" % (at, number)))
                for at, kv in enumerate(clients)
                for number in range(WRITERS_PER_CLIENT)
            ),
            asyncio.create_task(keep_counting(clients[0])),
            asyncio.create_task(keep_reading(clients[1])),
            *(asyncio.create_task(keep_reading_through(node)) for node in node_readers),
        ]
        began = time.monotonic()
        killing = asyncio.create_task(campaign.run())
        try:
            # Whatever ends first before the campaign does has failed.
            await asyncio.wait([killing, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in (killing, *tasks):
                if task.done():
                    task.result()
            took_s = time.monotonic() - began
            over.set()
            await asyncio.gather(*tasks)
            async with cluster.client(OUTAGE_MAX_S) as kv:
                floor = ledger.floor()
                wrong = ledger.judge(await everything(kv), floor)
            assert not wrong, f"{len(wrong)} contradictions:\n" + "\n".join(wrong[:20])
            assert all(node.running for node in cluster.nodes.values())
            await cluster.converged()
        finally:
            over.set()
            killing.cancel()
            for kv in clients:
                await kv.close()
            await asyncio.gather(killing, *tasks, return_exceptions=True)
        outages_s = campaign.outages_s or [float("nan")]
        snapshots = sum(node.log().count("installing a snapshot") for node in cluster.nodes.values())
        reads = ", ".join(f"{node.name}: {node.reads}" for node in node_readers)
        print(
            f"SIGKILL: {campaign.kills} kills in {took_s:.0f} s, {campaign.leader_kills} of a leader, "
            f"{campaign.double_kills} of two nodes at once; {ledger.acknowledged / took_s:.0f} operations/s; "
            f"{snapshots} snapshots installed; reads through {reads}\n"
            f"no write for, after a leader's kill ({len(campaign.outages_s)}): "
            f"median {statistics.median(outages_s):.2f} s, max {max(outages_s):.2f} s"
        )
        assert campaign.kills >= KILLS_MIN
        assert all(node.reads for node in node_readers)
