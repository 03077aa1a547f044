"""Peers on real loopback sockets: that the stream below behaves as the fake one says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest

from kvstore.env import Environment, LoopScheduler, SystemClock, SystemFiles, TcpNetwork
from kvstore.errors import StartupError
from kvstore.raft.transport import Identity, Transport

WITHIN_S = 10.0


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that other callbacks on this loop bring about."""
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await asyncio.sleep(0.001)


class Node:
    def __init__(self, env: Environment, name: str, address: str = "127.0.0.1:0") -> None:
        self.name = name
        self.ups: list[str] = []
        self.downs: list[str] = []
        self.drains = 0
        self.bodies: list[bytes] = []
        self.transport = Transport(env, Identity("c", name, f"id-{name}"), address, self)

    def accept(self, identity: Identity) -> tuple[str, str] | None:
        return None

    judge = accept

    def peer_up(self, name: str) -> None:
        self.ups.append(name)

    def peer_down(self, name: str) -> None:
        self.downs.append(name)

    def peer_drained(self, name: str) -> None:
        self.drains += 1

    def received(self, name: str, body: bytes) -> None:
        self.bodies.append(body)


@pytest.fixture
async def env() -> AsyncIterator[Environment]:
    loop = asyncio.get_running_loop()
    scheduler = LoopScheduler(loop)
    yield Environment(SystemClock(), random.SystemRandom(), scheduler, TcpNetwork(loop), SystemFiles())
    scheduler.close()


@pytest.fixture
async def pair(env: Environment) -> AsyncIterator[tuple[Node, Node]]:
    first, second = Node(env, "n1"), Node(env, "n2")
    await first.transport.start()
    await second.transport.start()
    first.transport.set_peers({"n2": second.transport.address})
    second.transport.set_peers({"n1": first.transport.address})
    await until(lambda: first.ups and second.ups)
    yield first, second
    first.transport.stop()
    second.transport.stop()
    await until(lambda: not first.transport._connections and not second.transport._connections)


async def test_bodies_of_all_sizes_arrive_in_order(pair: tuple[Node, Node]) -> None:
    first, second = pair
    sizes = [0, 1, 200, 65_536, 8 * 1024 * 1024, 3, 1_600_000, 17]
    sent = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    for body in sent:
        assert first.transport.send("n2", body)
        second.transport.send("n1", b"back")
    await until(lambda: len(second.bodies) == len(sent) and len(first.bodies) == len(sent))
    assert second.bodies == sent


async def test_a_full_queue_refuses_and_drains(pair: tuple[Node, Node]) -> None:
    first, second = pair
    body, taken = b"x" * 1_000_000, 0
    while first.transport.send("n2", body):
        taken += 1
        assert taken <= 16
    await until(lambda: first.drains)
    assert first.transport.send("n2", b"more")
    await until(lambda: len(second.bodies) == taken + 1)


async def test_a_peer_that_stops_and_comes_back_on_its_port(env: Environment, pair: tuple[Node, Node]) -> None:
    first, second = pair
    address = second.transport.address
    second.transport.stop()
    await until(lambda: first.downs == ["n2"])
    assert not first.transport.send("n2", b"x")
    again = Node(env, "n2", address)
    await again.transport.start()
    await until(lambda: first.ups == ["n2", "n2"])
    assert first.transport.send("n2", b"back")
    await until(lambda: again.bodies == [b"back"])
    again.transport.stop()
    await until(lambda: not again.transport._connections)


async def test_junk_from_a_real_client(pair: tuple[Node, Node]) -> None:
    first, _ = pair
    host, port = first.transport.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    assert b"frame_too_large" in await reader.read()
    writer.close()
    await writer.wait_closed()
    assert first.transport.refused == {"frame_too_large": 1}
    assert first.transport.connected("n2")


async def test_addresses_that_cannot_be_listened_on(env: Environment, pair: tuple[Node, Node]) -> None:
    first, _ = pair
    for address, code in (
        (first.transport.address, "address_in_use"),
        ("192.0.2.1:1", "startup_failed"),
        ("nonsense", "startup_failed"),
    ):
        with pytest.raises(StartupError) as caught:
            await Node(env, "n3", address).transport.start()
        assert caught.value.code == code
