"""Ninety seconds of SIGKILLs under load: nothing acknowledged is lost, nothing is applied twice, all nodes agree."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from kvstore import Client
from tests.cluster.harness import ClusterProcesses, until

WRITERS = 32
RUN_S = 90.0
KILLS_MIN = 30
# Writes that must be acknowledged while a node is down, before it is started again: the cluster went on without it.
PROGRESS = 100
# Above any outage here: an election, or a majority's restart. So no write may end unanswered.
TIMEOUT_S = 30.0


class Writer:
    """Puts to its own keys, adds to its own counter, and reads back what it wrote."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.written: dict[bytes, bytes] = {}
        self.added = 0
        self.count = 0

    @property
    def counter(self) -> bytes:
        return b"counter/%d" % self.number

    async def run(self, client: Client, over: asyncio.Event) -> None:
        while not over.is_set():
            key, value = b"w%d/%d" % (self.number, self.count % 200), b"%d" % self.count
            await client.put(key, value)
            self.written[key] = value
            result = await client.add(self.counter, 1)
            self.added += 1
            assert result.value == self.added, "an add was applied twice, or lost"
            record = await client.get(key)
            assert record is not None, f"{key!r} was acknowledged and is not there"
            assert record.value == value
            self.count += 1


@pytest.mark.timeout(240)
async def test_nothing_acknowledged_is_lost_through_thirty_kills(tmp_path: Path) -> None:
    chance = random.Random(1)
    loop = asyncio.get_running_loop()
    async with ClusterProcesses(tmp_path) as cluster, cluster.client(timeout_s=TIMEOUT_S) as client:
        writers = [Writer(number) for number in range(WRITERS)]
        over = asyncio.Event()
        running = [asyncio.create_task(writer.run(client, over)) for writer in writers]

        def acknowledged() -> int:
            for task in running:
                if task.done():
                    task.result()  # a writer ends only with an error; show it at once
            return sum(writer.count for writer in writers)

        async def progress(count: int) -> None:
            goal = acknowledged() + count

            async def reached() -> bool:
                return acknowledged() >= goal

            await until(reached, TIMEOUT_S, f"{count} more writes being acknowledged")

        async def caught_up(names: list[str]) -> None:
            async def all_caught_up() -> bool:
                leader = await client.status()
                for name in names:
                    status = await cluster.status(name)
                    if status is None or status.applied_index < leader.commit_index - 1000:
                        return False
                return True

            await until(all_caught_up, TIMEOUT_S, f"{names} catching up")

        kills, end = 0, loop.time() + RUN_S
        while loop.time() < end or kills < KILLS_MIN:
            await progress(PROGRESS)
            # Mostly one node, the leader every other time; now and then two at once, which stops the cluster.
            leader = await cluster.leader()
            names = [leader] if chance.random() < 0.5 else [chance.choice(sorted(cluster.nodes))]
            if chance.random() < 0.2:
                names = chance.sample(sorted(cluster.nodes), 2)
            for name in names:
                cluster.kill(name)
                kills += 1
            if len(names) == 1:
                await progress(PROGRESS)
            for name in names:
                cluster.start(name)
            await caught_up(names)
        over.set()
        await asyncio.gather(*running)

        await cluster.converged()
        for writer in writers:
            record = await client.get(writer.counter)
            assert record is not None
            assert int(record.value) == writer.added
            found = {record.key: record.value async for record in client.scan(prefix=b"w%d/" % writer.number)}
            assert found == writer.written
        print(f"{kills} kills, {acknowledged()} rounds of put, add and get")
