"""Power loss on every node at once: everything that was acknowledged is there when the power is back.

The nodes' files keep what is written in the process's memory until `fdatasync` returns (`tests/powerloss.py`), so a
SIGKILL discards exactly what was not synced. RocksDB's files are outside of this: its state may be found ahead of the
log, which a node must mend. Rounds go on with the same data, under writers that never stop: what was under way when
the power went is sent again by the real client, under its session, and must not be applied twice.

Two controls run on disks that acknowledge a sync and do nothing. The same check must find losses there.

The nodes have small limits (`small_limits.py`), so state flushes, new segments and dropped heads meet the power loss.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest

import kvstore
from kvstore.model import Member
from kvstore.server.identity import cluster_id
from kvstore.server.node import ServerOptions
from tests.cluster.harness import READY_S, free_ports, until
from tests.cluster.histories import Ledger, everything, write
from tests.cluster.power_loss_node import Disk, Report, StartEmbedded, StartNode, Zygote

pytestmark = pytest.mark.timeout(180)

ROUNDS = 20
CONTROL_ROUNDS = 3
CLIENTS = 3
WRITERS_PER_CLIENT = 4
# The power stays on for at least so many acknowledgements, and then for a random time.
ACKNOWLEDGED_MIN = 30
ON_MAX_S = 0.25
# A fast disk; one where each sync is likely to be cut off; two so slow that nodes sync in a thread, and that the others
# may commit, and a state be flushed, what this disk does not have yet. Each node has its own, another one each time.
SYNCS_S = (0.0, 0.002, 0.008, 0.040)
# A sole voter waits for nobody; several must leave a busy machine time for heartbeats.
ELECTION_MS = {1: 80, 2: 200, 3: 200}
# Longer than a power loss and its recovery take on a busy machine, so that nearly every write is sent again until it is
# acknowledged; shorter than a session's life.
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


class Lost(Exception):
    """What was found contradicts what was acknowledged."""


LOSSES = "is gone|was acknowledged"


def check(number: int, wrong: list[str]) -> None:
    if wrong:
        raise Lost(f"round {number}, {len(wrong)} contradictions, the first of them:\n" + "\n".join(wrong[:10]))


# --- clusters ---------------------------------------------------------------------------------------------------------


def options_of(path: Path, nodes: int) -> list[ServerOptions]:
    ports = free_ports(2 * nodes)
    addresses = [f"127.0.0.1:{port}" for port in ports]
    names = [f"n{number + 1}" for number in range(nodes)]
    members = tuple(Member(*each, "", True) for each in zip(names, addresses[:nodes], addresses[nodes:], strict=True))
    return [
        ServerOptions(
            name=member.name,
            data_dir=str(path / member.name),
            cluster_id=cluster_id(names, "a token for tests"),
            members=members,
            peer_listen=member.peer_address,
            client_listen=member.client_address,
            heartbeat_ms=ELECTION_MS[nodes] // 4,
            election_min_ms=ELECTION_MS[nodes],
            election_max_ms=2 * ELECTION_MS[nodes],
        )
        for member in members
    ]


@asynccontextmanager
async def writing(endpoints: str, ledger: Ledger, seed: str) -> AsyncIterator[None]:
    """Writers that write for as long as the block runs, whatever happens to the nodes."""
    over = False

    async def writer(kv: kvstore.Client, name: bytes) -> None:
        chance, number = Random(f"{seed}/{name!r}"), 0
        while not over:
            await write(kv, ledger, name, number, chance)
            number += 1

    clients = [kvstore.connect(endpoints, timeout_s=TIMEOUT_S) for _ in range(CLIENTS)]
    writers = [
        asyncio.create_task(writer(kv, b"w%d.%d" % (at, number)))
        for at, kv in enumerate(clients)
        for number in range(WRITERS_PER_CLIENT)
    ]
    try:
        yield
        over = True
        await asyncio.gather(*writers)
    finally:
        over = True
        for kv in clients:
            await kv.close()  # ends what is under way
        await asyncio.gather(*writers, return_exceptions=True)


async def lose_power_of_a_cluster(
    zygote: Zygote, path: Path, nodes: int, rounds: int, *, sync_does_nothing: bool = False
) -> Ledger:
    """Raises `Lost`."""
    seed = f"power loss of {nodes}"
    chance, ledger, options = Random(seed), Ledger(), options_of(path, nodes)
    endpoints = ",".join(each.client_listen for each in options)
    pids: list[int] = []

    def power_on() -> None:
        for each in options:
            disk = Disk(sync_s=chance.choice(SYNCS_S), sync_does_nothing=sync_does_nothing)
            pids.append(zygote.start(StartNode(each, disk), path / f"{each.name}.log"))

    def power_off() -> None:
        gone = chance.sample(pids, len(pids))
        pids.clear()
        zygote.kill(gone)

    async def look(number: int) -> None:
        async with kvstore.connect(endpoints, timeout_s=READY_S) as reader:
            floor = ledger.floor()
            check(number, ledger.judge(await everything(reader), floor))

    try:
        async with writing(endpoints, ledger, seed):
            for number in range(rounds):
                power_on()
                await look(number)
                await more_acknowledged(ledger)
                await asyncio.sleep(chance.uniform(0, ON_MAX_S))  # the random moment
                power_off()
            power_on()
        await look(rounds)
        return ledger
    except BaseException:
        if not sync_does_nothing:
            show_logs(path)
        raise
    finally:
        power_off()


async def more_acknowledged(ledger: Ledger) -> None:
    enough = ledger.acknowledged + ACKNOWLEDGED_MIN

    async def acknowledged() -> bool:
        return ledger.acknowledged >= enough

    await until(acknowledged, READY_S, "writes acknowledged after the power came back", poll_s=0.005)


def show_logs(path: Path) -> None:
    for log in sorted(path.glob("*.log")):
        print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-40:], sep="\n")


@pytest.mark.parametrize("nodes", [1, 2, 3])
async def test_a_cluster_keeps_what_it_acknowledged(zygote: Zygote, tmp_path: Path, nodes: int) -> None:
    began = time.monotonic()
    ledger = await lose_power_of_a_cluster(zygote, tmp_path, nodes, ROUNDS)
    say(f"{nodes} nodes", ledger, began)


async def test_a_cluster_on_disks_that_do_not_sync_is_caught(zygote: Zygote, tmp_path: Path) -> None:
    with pytest.raises(Lost, match=LOSSES):
        await lose_power_of_a_cluster(zygote, tmp_path, 1, CONTROL_ROUNDS, sync_does_nothing=True)


# --- an embedded store ------------------------------------------------------------------------------------------------


class EmbeddedRun:
    """One life of an embedded store's process, as it reports it into a pipe."""

    def __init__(self, zygote: Zygote, path: Path, number: int, disk: Disk) -> None:
        self._reading, writing = os.pipe()
        try:
            command = StartEmbedded(str(path / "data"), f"round{number}", disk)
            self.pid = zygote.start(command, path / "embedded.log", writing)
        finally:
            os.close(writing)

    async def follow(self, ledger: Ledger, number: int, serving: asyncio.Event) -> None:
        """Read its reports until it is dead; judge what it holds before it writes."""
        found: dict[bytes, bytes] = {}
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self._reading, "rb")
        )
        try:
            async for line in reader:
                report = Report.parse(line)
                if report.kind == "holds":
                    found[report.key] = report.value
                elif report.kind == "serves":
                    check(number, ledger.judge(found, ledger.floor()))
                    serving.set()
                elif report.kind in ("put", "try_put"):
                    getattr(ledger, report.kind)(report.key, report.value)
                elif report.kind == "try_add":
                    ledger.try_add(report.key)
                else:
                    ledger.add(report.key, report.total)
        finally:
            transport.close()


async def lose_power_of_an_embedded_store(
    zygote: Zygote, path: Path, rounds: int, *, sync_does_nothing: bool = False
) -> Ledger:
    """Raises `Lost`. Each round's process judges the rounds before it; one more than `rounds` is started."""
    chance, ledger = Random("power loss of an embedded store"), Ledger()
    for number in range(rounds + 1):
        disk = Disk(sync_s=chance.choice(SYNCS_S), sync_does_nothing=sync_does_nothing)
        run, serving = EmbeddedRun(zygote, path, number, disk), asyncio.Event()
        following = asyncio.create_task(run.follow(ledger, number, serving))
        try:
            await asyncio.wait(
                [following, asyncio.ensure_future(serving.wait())],
                timeout=READY_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            assert serving.is_set() or following.done(), "the store was not opened"
            if not following.done():
                await more_acknowledged(ledger)
                await asyncio.sleep(chance.uniform(0, ON_MAX_S))  # the random moment
        except BaseException:
            show_logs(path)
            raise
        finally:
            zygote.kill([run.pid])
            await asyncio.wait([following])
        following.result()
    return ledger


async def test_an_embedded_store_keeps_what_it_acknowledged(zygote: Zygote, tmp_path: Path) -> None:
    began = time.monotonic()
    ledger = await lose_power_of_an_embedded_store(zygote, tmp_path, ROUNDS)
    say("embedded", ledger, began)


async def test_an_embedded_store_on_a_disk_that_does_not_sync_is_caught(zygote: Zygote, tmp_path: Path) -> None:
    with pytest.raises(Lost, match=LOSSES):
        await lose_power_of_an_embedded_store(zygote, tmp_path, CONTROL_ROUNDS, sync_does_nothing=True)


def say(what: str, ledger: Ledger, began: float) -> None:
    took_s = time.monotonic() - began
    print(f"power loss, {what}: {ROUNDS} rounds in {took_s:.1f} s, {ledger.acknowledged} acknowledgements, none lost")
