"""Our own client at a door with a rate, in virtual time: it keeps to the rate, its connection and its leases."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from msgspec import Raw

from kvstore import Client, KvError, codec, model
from kvstore.server.native import NativeDoor
from kvstore.server.ports import Gate, Reply
from tests.fake_network import FakeNetwork, run
from tests.simulation.clients import SimulatedConnector
from tests.simulation.loop import VirtualLoop
from tests.unit.server_fakes import RecordingLog, World, virtual_environment

ADDRESS = "n1:7421"
T = TypeVar("T")


class Leader:
    """Answers everything at once, and notes when."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.writes_s: list[float] = []
        self.reads_s: list[float] = []
        self.signs_s: list[float] = []

    @property
    def served_s(self) -> list[float]:
        return sorted(self.writes_s + self.reads_s)

    def gone(self, gate: Gate) -> None: ...

    def handle(self, frame: codec.ClientFrame, reply: Reply, gate: Gate | None = None) -> None:
        now_s = self.world.now_s
        if isinstance(frame, codec.Hello):
            reply(codec.Welcome(frame.id, 1, "ours", "n1", ADDRESS))
        elif isinstance(frame, codec.StatusRequest):
            self.signs_s.append(now_s)
            status = model.NodeStatus("n1", "ours", "leader", "n1", ADDRESS, 1, 1, 1, 1, 1, 1, (), ())
            reply(codec.StatusAnswer(frame.id, status))
        elif isinstance(frame, codec.Read):
            self.reads_s.append(now_s)
            reply(codec.Answer(frame.id, Raw(codec.encode_result(model.RangeResult(1, (), 0)))))
        else:
            assert isinstance(frame, codec.Write)
            mutation = codec.decode_mutation(frame.request)
            is_sign = isinstance(mutation, (model.KeepLease, model.KeepSession))
            (self.signs_s if is_sign else self.writes_s).append(now_s)
            reply(codec.Answer(frame.id, Raw(codec.encode_result(self._apply(mutation)))))

    @staticmethod
    def _apply(mutation: model.Mutation) -> model.Result:
        if isinstance(mutation, (model.OpenSession, model.CloseSession, model.KeepSession)):
            return model.SessionResult(1, 60_000)
        if isinstance(mutation, model.GrantLease):
            return model.LeaseResult(1, 7, mutation.ttl_ms)
        if isinstance(mutation, model.KeepLease):
            return model.LeaseResult(1, 7, 3000)
        return model.DoneResult(1) if isinstance(mutation, model.RevokeLease) else model.PutResult(1)


class Setup:
    """One node with a rate, and one client, which has opened its session and been idle since."""

    def __init__(self, rate: int, timeout_s: float = 5.0) -> None:
        self.world = World()
        self.network = FakeNetwork(self.world)
        self.leader = Leader(self.world)
        environment = virtual_environment(self.world, self.network.host("n1"))
        self.door = NativeDoor(environment, self.leader, RecordingLog(), rate)
        run(self.door.start(ADDRESS))
        self.failures: list[dict[str, Any]] = []
        self.loop: Any = VirtualLoop(self.world.call_later, self.world.monotonic, self.failures.append)
        around: Any = SimpleNamespace(network=self.network, loop=self.loop)
        connector = SimulatedConnector(around, "client")
        self.client = Client([ADDRESS], timeout_s=timeout_s, connector=connector, chance=Random(1))
        self.wait(self.client.put(b"first", b"", timeout=60.0))
        self.advance(3.0)
        self.began_s = self.world.now_s
        self.leader.writes_s.clear()
        self.leader.signs_s.clear()

    @contextmanager
    def _running(self) -> Iterator[None]:
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(self.loop)
        try:
            yield
        finally:
            asyncio._set_running_loop(outer)

    def advance(self, seconds: float) -> None:
        with self._running():
            self.world.advance(seconds)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        with self._running():
            task: asyncio.Task[T] = self.loop.create_task(coroutine)
            return task

    def wait(self, coroutine: Coroutine[Any, Any, T], within_s: float = 100.0) -> T:
        task = self.start(coroutine)
        with self._running():
            self.world.run_until(task.done, within_s)
        return task.result()

    @property
    def passed_s(self) -> float:
        return self.world.now_s - self.began_s

    def end(self) -> None:
        self.wait(self.client.close())
        assert self.failures == []


def check_rate(times_s: list[float], rate: int) -> None:
    """No stretch of time holds more than its share and a second's worth more."""
    for first, last in itertools.combinations(range(len(times_s)), 2):
        assert last - first + 1 <= rate * (times_s[last] - times_s[first] + 1.0) + 1e-6


def succeeded(calls: list[asyncio.Task[Any]]) -> int:
    return sum(call.done() and call.exception() is None for call in calls)


def test_bursts_of_our_client_keep_to_the_rate_and_to_one_connection() -> None:
    setup = Setup(20)

    async def put(number: int) -> None:
        await setup.client.put(b"%d" % number, b"", timeout=60.0)

    async def one_by_one() -> None:
        for number in range(3):
            await put(1000 + number)

    calls = [setup.start(put(number)) for number in range(300)]
    setup.wait(one_by_one())
    calls += [setup.start(put(2000 + number)) for number in range(300)]
    with setup._running():
        setup.world.run_until(lambda: all(call.done() for call in calls), 60.0)
    assert succeeded(calls) == 600
    check_rate(setup.leader.served_s, 20)
    assert len(setup.leader.writes_s) == 603
    assert setup.passed_s < 603 / 20 + 2.0, "and it has all of its rate"
    assert len(setup.leader.signs_s) <= 10 * setup.passed_s
    assert setup.door.stats().accepted == 1, "it never took its node for dead"
    setup.end()


@pytest.mark.parametrize(("what", "count"), [("gets", 2_000), ("gets", 10_000), ("puts", 2_000)])
def test_a_throttled_client_keeps_its_leases(what: str, count: int) -> None:
    setup = Setup(20)
    lost: list[float] = []
    valid_s: list[float] = []

    async def hold() -> None:
        async with setup.client.lease(3.0, on_lost=lambda: lost.append(setup.passed_s)) as lease:
            for _ in range(100):
                await asyncio.sleep(0.1)
                valid_s.append(lease.valid_for_s)

    async def flood() -> None:
        kv = setup.client
        await (kv.get(b"k", level="linearizable") if what == "gets" else kv.put(b"k", b""))

    holder = setup.start(hold())
    setup.advance(0.5)
    calls = [setup.start(flood()) for _ in range(count)]
    setup.advance(9.0)
    assert not lost
    assert min(valid_s) > 1.0
    assert setup.door.stats().accepted == 1
    assert succeeded(calls) < count
    check_rate(setup.leader.served_s, 20)
    setup.advance(20.0)
    assert holder.done()
    for call in calls:
        call.exception()
    setup.end()


def test_a_client_that_asks_for_more_than_its_rate_gets_its_rate() -> None:
    """Not less: what it has given up on takes no turn from what it waits for."""
    setup = Setup(20)
    ends: list[str] = []

    async def put() -> None:
        try:
            await setup.client.put(b"k", b"")
            ends.append("ok")
        except KvError as error:
            ends.append(error.code)

    tasks = []
    for _ in range(1000):
        tasks.append(setup.start(put()))
        setup.advance(1 / 40)
    assert setup.passed_s == pytest.approx(25.0)
    assert ends.count("ok") > 0.75 * 20 * setup.passed_s
    check_rate(setup.leader.served_s, 20)
    setup.advance(6.0)
    assert len(ends) == len(tasks) == 1000
    setup.end()


@pytest.mark.parametrize("rate", [1, 2, 3])
def test_the_smallest_rates_leave_turns_beside_the_signs_of_life(rate: int) -> None:
    setup = Setup(rate)
    lost: list[float] = []

    async def hold() -> None:
        async with setup.client.lease(3.0, on_lost=lambda: lost.append(setup.passed_s)):
            await asyncio.sleep(40.0)

    async def put() -> None:
        await setup.client.put(b"k", b"", timeout=20.0)

    holder = setup.start(hold())
    setup.advance(3.0)
    setup.leader.writes_s.clear()
    calls = [setup.start(put()) for _ in range(200)]
    setup.advance(21.0)
    assert not lost
    assert len(setup.leader.served_s) >= 0.9 * rate * 20.0
    check_rate(setup.leader.served_s, rate)
    assert setup.door.stats().accepted == 1
    setup.advance(30.0)
    assert holder.done()
    assert succeeded(calls) >= 0.8 * rate * 20.0
    setup.end()
