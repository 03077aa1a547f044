"""The http door's bounds: how many connections, and how long each may take. On loopback, with a node that is asked
nothing but whether it lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest
import pytest_asyncio

from kvstore.env import system_environment
from kvstore.server import http as http_module
from kvstore.server.http import HttpDoor
from kvstore.server.metrics import Observed

WITHIN_S = 5.0
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n"
OK_BYTES = b"ok\n"

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Door(HttpDoor):
    """With callers, whose ends are closed after the test."""

    def __init__(self) -> None:
        super().__init__(system_environment(asyncio.get_running_loop()), cast(Observed, None))
        self.callers: list[asyncio.StreamWriter] = []

    async def call(self) -> Stream:
        host, _, port = self.address.rpartition(":")
        stream = await asyncio.open_connection(host, int(port))
        self.callers.append(stream[1])
        return stream


@pytest_asyncio.fixture
async def door() -> AsyncIterator[Door]:
    door = Door()
    await door.start("127.0.0.1:0")
    yield door
    await door.stop()
    assert not door._connections
    for writer in door.callers:
        writer.transport.abort()
    await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "registry_of", lambda _node: None)
    monkeypatch.setattr(http_module, "generate_latest", lambda _registry: bytes(1024 * 1024))


async def livez(stream: Stream) -> bool:
    """True if it is answered, False if the connection is closed."""
    reader, writer = stream
    writer.write(LIVEZ)
    try:
        async with asyncio.timeout(WITHIN_S):
            return (await reader.readuntil(OK_BYTES)).startswith(b"HTTP/1.1 200")
    except (asyncio.IncompleteReadError, ConnectionError):
        return False


async def closed(stream: Stream) -> None:
    """Return once the door has closed it."""
    async with asyncio.timeout(WITHIN_S):
        try:
            while await stream[0].read(1024 * 1024):
                pass
        except ConnectionError:
            return


async def test_one_that_asks_nothing_or_slowly_is_closed(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "HEADERS_S", 0.3)
    silent, slow, good = await door.call(), await door.call(), await door.call()
    assert await livez(good)

    async def drip() -> None:
        slow[1].write(b"GET /livez HTTP/1.1\r\n")
        while True:
            slow[1].write(b"X: y\r\n")
            await asyncio.sleep(0.02)

    dripping = asyncio.ensure_future(drip())
    await asyncio.gather(closed(silent), closed(slow))
    dripping.cancel()
    assert await livez(good), "who has asked may wait before it asks again"


async def test_one_that_asks_its_next_question_slowly_is_closed(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "KEEP_ALIVE_S", 0.3)
    idle, slow = await door.call(), await door.call()
    assert await livez(idle)
    assert await livez(slow)
    slow[1].write(b"GET /livez HTTP/1.1\r\n")
    await asyncio.gather(closed(idle), closed(slow))


async def test_past_so_many_the_one_that_was_quiet_for_longest_makes_room(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_module, "CONNECTIONS_MAX", 3)
    streams = [await door.call() for _ in range(3)]
    for stream in streams:
        assert await livez(stream)
    assert await livez(streams[0])
    newest = await door.call()
    assert await livez(newest)
    await closed(streams[1])
    assert len(door._connections) == 3
    for stream in (streams[0], streams[2], newest):
        assert await livez(stream)
    # A flood of them is no more than that, and whoever probes still gets in.
    for _ in range(50):
        await door.call()
    assert await livez(await door.call())
    assert len(door._connections) == 3


async def test_one_that_takes_no_answers_is_closed(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "STUCK_S", 0.3)
    greedy, good = await door.call(), await door.call()
    greedy[1].transport.pause_reading()  # type: ignore[attr-defined]
    greedy[1].write(LIVEZ.replace(b"livez", b"metrics") * 500)
    async with asyncio.timeout(WITHIN_S):
        while len(door._connections) > 1:
            assert await livez(good)
            await asyncio.sleep(0.01)
    assert await livez(good)


async def test_stopping_ends_all_whatever_they_wait_for(door: Door) -> None:
    silent, idle, greedy = await door.call(), await door.call(), await door.call()
    assert await livez(idle)
    greedy[1].transport.pause_reading()  # type: ignore[attr-defined]
    greedy[1].write(LIVEZ.replace(b"livez", b"metrics") * 500)
    async with asyncio.timeout(WITHIN_S):
        while not any(connection.writing_paused for connection in door._connections):
            await asyncio.sleep(0.01)
        await door.stop()
    assert not door._connections
    greedy[1].transport.resume_reading()  # type: ignore[attr-defined]
    for stream in (silent, idle, greedy):
        await closed(stream)
