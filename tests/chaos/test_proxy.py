"""The proxy's modes, on loopback: what arrives, what does not, and what becomes of the connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any, cast

import pytest

from kvstore.raft.connection import Connection, Identity, Purpose
from tests.chaos.proxy import CLIENTS, DROP, HOLD, PASS, REJECT, Door, Proxy, Rule, dialler_of
from tests.cluster.harness import free_ports, until

# What is to arrive does within milliseconds; what is not to, is looked for this long.
ARRIVES_S, SILENCE_S = 5.0, 0.05


class Target:
    """A server behind the proxy: all that it got, and its connections, to answer on."""

    def __init__(self) -> None:
        self.got = b""
        self.writers: list[asyncio.StreamWriter] = []
        self.ended = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while data := await reader.read(65536):
                self.got += data
        except ConnectionError:
            pass
        finally:
            self.ended += 1
            writer.close()


class World:
    """A proxy with a door for the peers of n2 and one for its clients, and n2's two servers behind it."""

    def __init__(self, proxy: Proxy, peers: Target, clients: Target, peer_port: int, client_port: int) -> None:
        self.proxy = proxy
        self.peers = peers
        self.clients = clients
        self.peer_port = peer_port
        self.client_port = client_port
        self._writers: list[asyncio.StreamWriter] = []

    async def dial(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        self._writers.append(writer)
        return reader, writer

    async def dial_as(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """As the node `name` dials n2."""
        reader, writer = await self.dial(self.peer_port)
        writer.write(handshake(name, "n2"))
        return reader, writer

    def close(self) -> None:
        for writer in (*self._writers, *self.peers.writers, *self.clients.writers):
            writer.close()


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    peers, clients = Target(), Target()
    proxy = Proxy(Random(1))
    servers = [await asyncio.start_server(target.serve, "127.0.0.1", 0) for target in (peers, clients)]
    behind = [server.sockets[0].getsockname()[1] for server in servers]
    peer_port, client_port = free_ports(2)
    await proxy.open(Door("n2", peer_port, behind[0], for_peers=True))
    await proxy.open(Door("n2", client_port, behind[1], for_peers=False))
    made = World(proxy, peers, clients, peer_port, client_port)
    try:
        yield made
    finally:
        made.close()
        await proxy.close()
        for server in servers:
            server.close()
        assert proxy.counts.open_connections == 0


class _Taken:
    """As much of a transport as a handshake needs."""

    def __init__(self) -> None:
        self.data = b""

    def set_write_buffer_limits(self, high: int, low: int) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def writelines(self, parts: list[bytes]) -> None:
        self.data += b"".join(parts)


def handshake(name: str, to: str) -> bytes:
    """What a real node says first."""
    identity = Identity("a cluster", name, "0123456789abcdef", "127.0.0.1:1", "127.0.0.1:2")
    connection = Connection(cast(Any, None), identity, queue_bytes_max=32 * 1024 * 1024, dial=(to, Purpose.MESSAGES))
    taken = _Taken()
    connection.connection_made(cast(Any, taken))
    return taken.data


async def arrived(target: Target, data: bytes) -> None:
    async def got() -> bool:
        return target.got.endswith(data)

    await until(got, ARRIVES_S, f"{data!r} to arrive", poll_s=0.001)


async def stays(look: Callable[[], object], what: str) -> None:
    """For a short while nothing may change. (There is no condition to wait for where nothing is to happen.)"""
    before = look()
    await asyncio.sleep(SILENCE_S)
    assert look() == before, what


def test_the_name_is_read_from_a_real_handshake() -> None:
    assert dialler_of(handshake("n1", "n2")) == "n1"
    with pytest.raises(ValueError, match="no peer's handshake"):
        dialler_of(b"GET / HTTP/1.1\r\n\r\n")


async def test_bytes_pass_both_ways_and_an_end_is_passed_on() -> None:
    async with world() as it:
        reader, writer = await it.dial_as("n1")
        writer.write(b"there")
        await arrived(it.peers, b"there")
        assert it.peers.got == handshake("n1", "n2") + b"there"
        it.peers.writers[0].write(b"back")
        assert await reader.readexactly(4) == b"back"
        writer.close()
        await until(lambda: _true(it.peers.ended == 1), ARRIVES_S, "the end to be passed on")


async def test_many_bytes_arrive_in_order_though_the_reader_is_slow() -> None:
    async with world() as it:
        reader, writer = await it.dial(it.client_port)
        await until(lambda: _true(it.clients.writers), ARRIVES_S, "the connection")
        sent = Random(2).randbytes(8 * 1024 * 1024)
        it.clients.writers[0].write(sent)
        await asyncio.sleep(SILENCE_S)  # all buffers fill
        assert await reader.readexactly(len(sent)) == sent
        writer.close()


async def test_what_is_held_arrives_when_the_cut_heals() -> None:
    async with world() as it:
        _, writer = await it.dial_as("n1")
        await arrived(it.peers, handshake("n1", "n2"))
        it.proxy.set_rule("n1", "n2", HOLD)
        writer.write(b"late")
        await stays(lambda: it.peers.got, "it came through a cut")
        it.proxy.set_rule("n1", "n2", PASS)
        await arrived(it.peers, b"late")
        assert it.peers.ended == 0


async def test_what_is_dropped_never_arrives_and_the_heal_resets_the_connection() -> None:
    async with world() as it:
        reader, writer = await it.dial_as("n1")
        writer.write(b"before")
        await arrived(it.peers, b"before")
        it.proxy.set_rule("n1", "n2", DROP)
        writer.write(b"gone")
        await until(lambda: _true(it.proxy.counts.dropped_bytes >= 4), ARRIVES_S, "the bytes to vanish")
        assert it.peers.ended == 0, "the connection stays"
        it.proxy.heal()
        assert await reader.read() == b""
        await until(lambda: _true(it.peers.ended == 1), ARRIVES_S, "the reset")
        assert it.peers.got.endswith(b"before")


@pytest.mark.parametrize("rule", [HOLD, DROP])
async def test_a_one_way_cut_lets_the_other_way_pass_on_whoever_s_connection(rule: Rule) -> None:
    async with world() as it:
        reader, writer = await it.dial_as("n1")
        writer.write(b"before")
        await arrived(it.peers, b"before")
        it.proxy.set_rule("n2", "n1", rule)
        writer.write(b"passes")
        await arrived(it.peers, b"passes")
        it.peers.writers[0].write(b"does not")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(8), SILENCE_S)


async def test_no_connection_comes_to_be_under_a_cut_of_either_direction() -> None:
    async with world() as it:
        for source, target in (("n1", "n2"), ("n2", "n1")):
            it.proxy.set_rule(source, target, HOLD)
            reader, _ = await it.dial_as("n1")
            await stays(lambda: (len(it.peers.writers), it.peers.got), "it was connected through a cut")
            it.proxy.heal()
            assert await reader.read() == b"", "nor does it come to be afterwards"
        _, writer = await it.dial_as("n1")
        writer.write(b"now")
        await arrived(it.peers, b"now")


@pytest.mark.parametrize("closes", ["who dialled", "who was dialled"])
async def test_an_end_does_not_come_through_a_cut_and_does_when_it_heals(closes: str) -> None:
    async with world() as it:
        reader, writer = await it.dial(it.client_port)
        writer.write(b"before")
        await arrived(it.clients, b"before")
        it.proxy.set_rule(CLIENTS, "n2", HOLD)
        it.proxy.set_rule("n2", CLIENTS, HOLD)
        served = it.clients.writers[0]
        if closes == "who dialled":
            writer.close()
            served.write(b"into nothing")
            await stays(lambda: it.clients.ended, "the end came through a cut")
            it.proxy.heal()
            await until(lambda: _true(it.clients.ended == 1), ARRIVES_S, "the end to be passed on")
        else:
            served.close()
            writer.write(b"into nothing")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), SILENCE_S)
            it.proxy.heal()
            assert await ends(reader)


async def test_a_rule_is_for_its_pair_only() -> None:
    async with world() as it:
        it.proxy.set_rule("n1", "n2", DROP)
        _, other = await it.dial_as("n3")
        other.write(b"of n3")
        await arrived(it.peers, b"of n3")
        _, client = await it.dial(it.client_port)
        client.write(b"of a client")
        await arrived(it.clients, b"of a client")
        it.proxy.set_rule(CLIENTS, "n2", HOLD)
        client.write(b"held")
        await stays(lambda: it.clients.got, "a rule for clients holds for them")
        other.write(b"more of n3")
        await arrived(it.peers, b"more of n3")


async def test_a_rejected_pair_is_reset_and_finds_the_door_closed() -> None:
    async with world() as it:
        reader, writer = await it.dial_as("n1")
        writer.write(b"before")
        await arrived(it.peers, b"before")
        it.proxy.set_rule("n1", "n2", REJECT)
        assert await ends(reader)
        reader, _ = await it.dial_as("n1")
        assert await ends(reader)
        assert it.proxy.counts.refused_connections == 2


async def test_a_delay_keeps_the_order_and_passes_the_end_on_behind_the_bytes() -> None:
    async with world() as it:
        it.proxy.set_rule(CLIENTS, "n2", Rule(delay_s=0.03, jitter_s=0.03))
        _, writer = await it.dial(it.client_port)
        began = time.monotonic()
        for number in range(50):
            writer.write(b"%d " % number)
            await asyncio.sleep(0)
        writer.write(b"end")
        writer.close()
        await arrived(it.clients, b"end")
        assert it.clients.got == b"".join(b"%d " % number for number in range(50)) + b"end"
        it.proxy.set_rule(CLIENTS, "n2", Rule(delay_s=0.1))
        _, writer = await it.dial(it.client_port)
        began = time.monotonic()
        writer.write(b"slow")
        await arrived(it.clients, b"slow")
        assert time.monotonic() - began >= 0.1


async def test_a_slow_link_takes_the_time_that_its_bytes_need() -> None:
    async with world() as it:
        it.proxy.set_rule(CLIENTS, "n2", Rule(bytes_per_s=1_000_000))
        _, writer = await it.dial(it.client_port)
        began = time.monotonic()
        writer.write(bytes(200_000) + b"end")
        await arrived(it.clients, b"end")
        assert time.monotonic() - began >= 0.2


async def test_deaf_connections_carry_nothing_and_stay_while_new_ones_work() -> None:
    async with world() as it:
        reader, writer = await it.dial_as("n1")
        writer.write(b"before")
        await arrived(it.peers, b"before")
        assert it.proxy.deafen("n1", "n2") == 1
        writer.write(b"gone")
        it.peers.writers[0].write(b"gone, too")
        await stays(lambda: (it.peers.got, it.peers.ended), "a deaf connection carried something")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), SILENCE_S)
        writer.close()
        await stays(lambda: it.peers.ended, "the other end heard of the end")
        _, fresh = await it.dial_as("n1")
        fresh.write(b"new")
        await arrived(it.peers, b"new")
        it.proxy.heal()
        await until(lambda: _true(it.peers.ended == 1), ARRIVES_S, "what was deaf to be reset")


async def test_a_reset_ends_what_exists_and_nothing_else() -> None:
    async with world() as it:
        reader, _ = await it.dial(it.client_port)
        await until(lambda: _true(it.clients.writers), ARRIVES_S, "the connection")
        assert it.proxy.reset(CLIENTS, "n2") == 1
        assert await ends(reader)
        _, writer = await it.dial(it.client_port)
        writer.write(b"again")
        await arrived(it.clients, b"again")


async def test_nobody_behind_the_door_closes_the_connection() -> None:
    proxy = Proxy()
    port, nobody = free_ports(2)
    await proxy.open(Door("n2", port, nobody, for_peers=False))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await ends(reader)
    writer.close()
    await proxy.close()


@pytest.mark.parametrize("junk", [b"\xff" * 64, b"\x00\x00\x00\x04\x02junk"])
async def test_who_gives_no_handshake_at_a_door_for_peers_is_cut_off(junk: bytes) -> None:
    async with world() as it:
        reader, writer = await it.dial(it.peer_port)
        writer.write(junk)
        assert await ends(reader)
        assert not it.peers.writers


async def ends(reader: asyncio.StreamReader) -> bool:
    async with asyncio.timeout(ARRIVES_S):
        try:
            return await reader.read() == b""
        except ConnectionError:
            return True


async def _true(value: object) -> bool:
    return bool(value)
