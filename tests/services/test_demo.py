"""The walk that `make run` shows, twice on the same data, against what `make run` starts."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.demo.cluster import CannotWalk, LocalCluster, _runs_kvstore
from tests.cluster.harness import ROOT, free_ports
from tests.services.processes import ServiceProcess, WorkerProcess

KILL_TO_ORDER_MS_MAX = 3000  # the promise is a median of half of that; one run proves no median


def free_base_port() -> int:
    """A base port for `kvstore dev` of three nodes: peers at 0 to 2 above it, clients at 10 to 12."""
    for base in random.SystemRandom().sample(range(20_000, 30_000, 20), 50):
        sockets = []
        try:
            for offset in (0, 1, 2, 10, 11, 12):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", base + offset))
        except OSError:
            continue
        else:
            return base
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no six free ports in fifty draws")


@asynccontextmanager
async def dev_cluster(path: Path, base_port: int) -> AsyncIterator[str]:
    """`kvstore dev`, stopped with SIGTERM; gives its endpoints."""
    log_path = path / "dev.log"
    with log_path.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "kvstore.cli.main", "dev", "--nodes", "3", "--data-dir", str(path / "data"),
            "--base-port", str(base_port), "--restart-after", "1",
            cwd=ROOT, env=dict(os.environ), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield ",".join(f"127.0.0.1:{base_port + 10 + node}" for node in range(3))
        process.terminate()
        async with asyncio.timeout(20):
            assert await process.wait() == 0, log_path.read_text()[-3000:]
    finally:
        if process.returncode is None:
            print(log_path.read_text()[-5000:], file=sys.stderr)
            process.kill()
            await process.wait()


async def walk(path: Path, endpoints: str, users: str, orders: str, psp: str) -> dict[str, object]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services", "demo", "--json", "--endpoints", endpoints, "--users-url", users,
        "--orders-url", orders, "--psp-url", psp, "--data-dir", str(path / "data"),
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode == 0, out.decode() + err.decode()
    figures: dict[str, object] = json.loads(out)
    return figures


@pytest.mark.timeout(120)
async def test_the_walk_passes_twice_on_the_same_data(tmp_path: Path) -> None:
    base_port = free_base_port()
    (orders_port,) = free_ports(1)
    killed = []
    for _ in range(2):
        async with (
            dev_cluster(tmp_path, base_port) as endpoints,
            ServiceProcess("users", endpoints, tmp_path) as users,
            ServiceProcess(
                "sandbox-psp",
                None,
                tmp_path,
                "--data-dir",
                str(tmp_path / "psp"),
                "--webhook-url",
                f"http://127.0.0.1:{orders_port}/v1/webhooks/sandbox",
            ) as psp,
            ServiceProcess("orders", endpoints, tmp_path, "--psp-url", psp.url, port=orders_port) as orders,
            WorkerProcess(endpoints, tmp_path, "--psp-url", psp.url) as worker,
        ):
            figures = await walk(tmp_path, endpoints, users.url, orders.url, psp.url)
            assert figures["passed"] is True
            killed.append(figures["killed"])
            assert figures["new_leader"] != figures["killed"]
            assert 0 < float(str(figures["kill_to_order_ms"])) < KILL_TO_ORDER_MS_MAX
            assert float(str(figures["kill_to_back_ms"])) > 1000
            steps = figures["steps"]
            assert isinstance(steps, list)
            assert len(steps) == 21
            for process in (worker, orders, psp, users):
                assert await process.stop() == 0
    assert all(killed)


def test_only_a_kvstore_process_is_taken_for_one() -> None:
    assert not _runs_kvstore(None)
    assert not _runs_kvstore(os.getpid())
    assert not _runs_kvstore(1)
    assert not _runs_kvstore(2**22 + 1)  # above any process id


@pytest.mark.parametrize("content", [None, "", "[]", '{"cluster_id":"x"}', '{"cluster_id":"x","nodes":[{"name":1}]}'])
def test_a_cluster_file_that_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "cluster.json").write_text(content)
    with pytest.raises(CannotWalk):
        LocalCluster(None, str(tmp_path)).read()  # type: ignore[arg-type]  # reading the file asks no store
