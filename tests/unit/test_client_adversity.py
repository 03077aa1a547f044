"""Everything at once, seeded: lost answers, closed connections, refusals, elections, expired sessions, cancellations.

Whatever happens, an acknowledged addition was applied once, one that was refused or never sent was not, and one of
unknown outcome at most once.
"""

from __future__ import annotations

import asyncio
import random

import pytest

import kvstore
from kvstore import AddResult, Client, OutcomeUnknown, Unavailable
from tests.fake_server import (
    FakeCluster,
    answer,
    apply_and_close,
    apply_and_fail,
    close,
    fail,
)

ACTIONS = (
    *[answer] * 12,
    apply_and_close,
    close,
    apply_and_fail("outcome_unknown"),
    fail("outcome_unknown"),
    fail("overloaded"),
    fail("unavailable"),
    fail("not_leader"),
    fail("no_leader"),
    fail("shutting_down"),
    fail("storage_failed"),
)


@pytest.mark.parametrize("seed", range(12))
async def test_additions_under_adversity(seed: int) -> None:
    chance = random.Random(seed)
    outcomes: list[object] = []

    async def worker(kv: Client) -> None:
        for _ in range(25):
            call = asyncio.ensure_future(kv.add(b"n", 1, timeout=chance.choice((0.05, 5.0, 5.0, 5.0))))
            if chance.random() < 0.03:
                asyncio.get_running_loop().call_later(0.002, call.cancel)
            await asyncio.wait((call,))
            outcomes.append(asyncio.CancelledError() if call.cancelled() else call.exception() or call.result())

    async def adversary(cluster: FakeCluster, done: asyncio.Event) -> None:
        while not done.is_set():
            await asyncio.sleep(0.005)
            node = chance.choice(cluster.nodes)
            act = chance.random()
            if act < 0.5:
                node.script.extend(chance.choices(ACTIONS, k=8))
            elif act < 0.7:
                cluster.elect(chance.choice([*cluster.nodes, None]))
            elif act < 0.8:
                for connection in tuple(node.connections):
                    connection.close()
            elif act < 0.85:
                cluster.fake.sessions.clear()
            elif act < 0.9:
                await node.stop()
                await node.start()
        cluster.elect(cluster.nodes[0])
        for node in cluster.nodes:
            node.script.clear()

    async with FakeCluster(3) as cluster:
        done = asyncio.Event()
        async with kvstore.connect(cluster.endpoints) as kv:
            trouble = asyncio.ensure_future(adversary(cluster, done))
            await asyncio.gather(*(worker(kv) for _ in range(12)))
            done.set()
            await trouble
            final = (await kv.add(b"n", 0, timeout=20)).value
            assert kv._sessions._unanswered_bytes == 0
            assert not kv._sessions._line
            assert kv._dispatcher._reads == 0

    acknowledged = [outcome.value for outcome in outcomes if isinstance(outcome, AddResult)]
    doubtful = [outcome for outcome in outcomes if isinstance(outcome, (OutcomeUnknown, asyncio.CancelledError))]
    unsent = [outcome for outcome in outcomes if isinstance(outcome, Unavailable)]
    assert len(acknowledged) + len(doubtful) + len(unsent) == len(outcomes) == 300
    assert len(set(acknowledged)) == len(acknowledged), "each acknowledged addition is one of its own"
    assert len(acknowledged) <= final <= len(acknowledged) + len(doubtful)
    assert max(cluster.fake.applied.values()) == 1
    assert len(acknowledged) > 100, "most got through"
