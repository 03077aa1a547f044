"""Nodes as processes: losing and stopping the leader, signals, members that come and go, and refusing to start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import kvstore
from kvstore import KvError, OutcomeUnknown
from tests.cluster.harness import ROOT, ClusterProcesses, free_ports, run_command, until

pytestmark = pytest.mark.timeout(120)


async def test_a_killed_leader_is_replaced_and_catches_up_when_it_returns(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path) as cluster, cluster.client(timeout_s=10) as client:
        for number in range(50):
            await client.put(b"before/%d" % number, b"x")
        leader = await cluster.leader()
        cluster.kill(leader)
        began = time.monotonic()
        await client.put(b"after", b"y")
        took_s = time.monotonic() - began
        assert took_s < 3.0, f"the first write after the leader's death took {took_s:.2f} s"
        assert (await client.range(prefix=b"before/", count_only=True)).count == 50
        cluster.start(leader)
        await cluster.converged()
        assert await cluster.leader() != leader


async def test_a_stopping_leader_hands_over_first(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path) as cluster, cluster.client() as client:
        await client.put(b"k", b"v")
        leader = await cluster.leader()
        began = time.monotonic()
        cluster.nodes[leader].signal(signal.SIGTERM)
        assert await cluster.leader(other_than=leader) != leader
        took_s = time.monotonic() - began
        assert cluster.nodes[leader].reap() == 0
        assert took_s < 0.5, f"{took_s:.2f} s: an election by timeout begins after 500 ms, a hand-over needs none"
        record = await client.get(b"k")
        assert record is not None
        assert record.value == b"v"


async def test_a_second_sigterm_ends_it_at_once(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path) as cluster:
        leader = await cluster.leader()
        for name in cluster.nodes:
            if name != leader:
                cluster.pause(name)  # nobody to hand over to: a clean stop takes its time
        node = cluster.nodes[leader]
        node.signal(signal.SIGTERM)
        await until(lambda: _has(node.log(), '"stopping"'), 5, "the node to say that it stops")
        node.signal(signal.SIGTERM)
        assert node.reap(1.0) == 128 + signal.SIGTERM
        for name in cluster.nodes:
            if name != leader:
                cluster.resume(name)


async def test_a_paused_leader_is_replaced_and_serves_no_stale_read_when_it_returns(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path) as cluster, cluster.client(timeout_s=10) as client:
        await client.put(b"k", b"old")
        leader = await cluster.leader()
        cluster.pause(leader)
        await client.put(b"k", b"new")
        cluster.resume(leader)
        async with kvstore.connect(cluster.nodes[leader].client_address) as returned:
            record = await returned.get(b"k")
        assert record is not None
        assert record.value == b"new"
        await cluster.converged()


class _Load:
    """Writers that go on until the test ends them."""

    def __init__(self, client: kvstore.Client, writers: int = 8) -> None:
        self._written: dict[bytes, bytes] = {}
        self._over = False
        self._tasks = [asyncio.create_task(self._write(client, number)) for number in range(writers)]

    async def __aenter__(self) -> _Load:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self, client: kvstore.Client, writer: int) -> None:
        number = 0
        while not self._over:
            key, value = b"w%d/%d" % (writer, number % 100), b"%d" % number
            await client.put(key, value)
            self._written[key] = value
            number += 1

    async def end(self) -> dict[bytes, bytes]:
        """What each key holds, as it was acknowledged. Raises what a writer met."""
        self._over = True
        await asyncio.gather(*self._tasks)
        return self._written


async def test_three_to_four_to_three_members_under_load(tmp_path: Path) -> None:
    async with (
        ClusterProcesses(tmp_path) as cluster,
        cluster.client(timeout_s=10) as client,
        _Load(client) as load,
    ):
        joined = cluster.join("n4")

        async def is_voter() -> bool:
            assert joined.running, joined.log()
            members = (await client.status()).members
            return any(member.name == "n4" and member.voter for member in members)

        await until(is_voter, 20, "n4 to have a vote")
        leader = await cluster.leader()
        code, out, err = await run_command("leave", leader, "--endpoints", cluster.endpoints)
        assert code == 0, err
        assert f"{leader} is out" in out
        members = {member.name for member in (await client.status()).members}
        assert members == {"n1", "n2", "n3", "n4"} - {leader}

        async def gone() -> bool:
            return not cluster.nodes[leader].running

        await until(gone, 10, "the removed node to end by itself")
        assert cluster.nodes[leader].reap() == 0
        written = await load.end()
        await cluster.converged()
        found = {record.key: record.value async for record in client.scan(prefix=b"w")}
        assert found == written
        # The joined node starts again from what its directory knows.
        cluster.stop("n4")
        cluster.start("n4")
        await cluster.converged()


async def test_a_minority_refuses_writes_and_linearizable_reads_and_serves_local_ones(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path) as cluster, cluster.client() as client:
        await client.put(b"k", b"v")
        await cluster.converged()
        leader = await cluster.leader()
        left = next(name for name in cluster.nodes if name != leader)
        for name in cluster.nodes:
            if name != left:
                cluster.kill(name)
        async with kvstore.connect(cluster.nodes[left].client_address, timeout_s=2) as alone:
            record = await alone.get(b"k", level="local")
            assert record is not None
            with pytest.raises(KvError):
                await alone.get(b"k")
            with pytest.raises(KvError) as refused:
                await alone.put(b"k", b"w")
            assert not isinstance(refused.value, OutcomeUnknown), "nobody was there to take it"


# --- refusing to start ------------------------------------------------------------------------------------------------


async def refusal(*arguments: str) -> str:
    """What a node that refuses to start says."""
    code, _, err = await run_command(*arguments)
    assert code == 5, (code, err)
    return err


async def test_what_keeps_a_node_from_starting(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path, nodes=1) as cluster, cluster.client() as client:
        await client.put(b"k", b"v" * 100)
        node = cluster.nodes["n1"]
        arguments = cluster.serve_arguments("n1")
        assert "data_dir_in_use" in await refusal(*arguments)
        elsewhere = ["serve", "--name", "n1", "--data-dir", str(tmp_path / "other"), "--cluster-token", "t"]
        peer, other = (f"127.0.0.1:{port}" for port in free_ports(2))
        taken = await refusal(*elsewhere, "--peers", f"n1={peer}/{node.client_address}")
        assert "address_in_use" in taken
        assert node.client_address in taken
        assert "address_in_use" in await refusal(*elsewhere, "--peers", f"n1={node.peer_address}/{other}")
        open_to_all = ("--listen", "0.0.0.0:1", "--advertise", peer)
        assert "address_not_loopback" in await refusal(*elsewhere, "--peers", f"n1={peer}/{other}", *open_to_all)
        record = await client.get(b"k")
        assert record is not None, "the running node did not notice"
        cluster.stop("n1")
        assert "data_dir_mismatch" in await refusal(*arguments, "--cluster-token", "another")
        of_another = ["--name", "n9", "--data-dir", str(node.data_dir), "--listen", peer, "--client-listen", other]
        assert "data_dir_mismatch" in await refusal("serve", *of_another)
        meta = node.data_dir / "META"
        before = meta.read_bytes()
        meta.write_bytes(before.replace(b'"format":2', b'"format":9'))
        assert "data_format_newer" in await refusal(*arguments)
        meta.write_bytes(before)
        cluster.start("n1")
        await cluster.leader()
        record = await client.get(b"k")
        assert record is not None


async def test_after_a_first_start_that_failed_a_corrected_one_succeeds(tmp_path: Path) -> None:
    cluster = ClusterProcesses(tmp_path, nodes=1)
    node = cluster.nodes["n1"]
    arguments = [*cluster.serve_arguments("n1"), "--cluster-token", "a mistyped token"]
    for address in (node.peer_address, node.client_address):
        with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
            said = await refusal(*arguments)
        assert "address_in_use" in said
        assert address in said
        assert not (node.data_dir / "META").exists()
    async with cluster, cluster.client() as client:
        await client.put(b"k", b"v")
        assert (node.data_dir / "META").exists()
        status = await client.status()
        assert status.cluster_id == cluster.cluster_id


async def test_a_node_whose_log_is_gone_refuses_to_start(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path, nodes=1) as cluster, cluster.client() as client:
        await client.put(b"k", b"v")
        cluster.kill("n1")
        wal = cluster.nodes["n1"].data_dir / "wal"
        wal.rename(tmp_path / "elsewhere")
        said = await refusal(*cluster.serve_arguments("n1"))
        assert "wal_damaged" in said
        assert str(wal) in said
        (tmp_path / "elsewhere").rename(wal)
        cluster.start("n1")
        await cluster.leader()
        record = await client.get(b"k")
        assert record is not None


async def test_a_log_damaged_in_the_middle_refuses_to_start_and_says_where(tmp_path: Path) -> None:
    async with ClusterProcesses(tmp_path, nodes=1) as cluster, cluster.client() as client:
        for number in range(20):
            await client.put(b"k%d" % number, b"v" * 1000)
        cluster.kill("n1")
        segment = max((cluster.nodes["n1"].data_dir / "wal").iterdir(), key=lambda path: path.stat().st_size)
        content = bytearray(segment.read_bytes())
        content[4000] ^= 0xFF
        segment.write_bytes(content)
        said = await refusal(*cluster.serve_arguments("n1"))
        assert "wal_damaged" in said
        assert segment.name in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--name", "n1", "--data-dir", "d"],
        ["serve", "--name", "n1", "--data-dir", "d", "--cluster-token", "t", "--peers", "n1"],
        ["serve", "--name", "n1", "--data-dir", "d", "--cluster-token", "t", "--peers", "n1=x"],
        ["serve", "--name", "n1", "--data-dir", "d", "--cluster-token", "t", "--peers", "n2=127.0.0.1:1/127.0.0.1:2"],
        ["get", "k", "--endpoints", "nonsense"],
        ["txn", "--endpoints", "127.0.0.1:1", "-"],
    ],
)
async def test_wrong_usage_is_exit_code_2(arguments: list[str], tmp_path: Path) -> None:
    code, _, err = await run_command(*[str(tmp_path / a) if a == "d" else a for a in arguments], stdin=b"{nonsense")
    assert code == 2, err
    assert "Traceback" not in err


# --- kvstore dev ------------------------------------------------------------------------------------------------------


async def test_dev_runs_a_cluster_restarts_what_dies_and_stops_all_of_it(tmp_path: Path) -> None:
    base = _free_base(3)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvstore.cli.main", "dev", "--nodes", "3", "--data-dir", str(tmp_path / "data"),
        "--base-port", str(base), "--restart-after", "0.5",
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output: list[str] = []

    async def read() -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            output.append(line.decode())

    reading = asyncio.create_task(read())
    try:
        await until(lambda: _has("".join(output), "export KVSTORE_ENDPOINTS="), 20, "the endpoints to be printed")
        endpoints = next(line.split("=", 1)[1].strip() for line in output if "KVSTORE_ENDPOINTS" in line)
        cluster_json = tmp_path / "data" / "cluster.json"
        document = json.loads(cluster_json.read_text())
        assert document["endpoints"] == endpoints
        async with kvstore.connect(endpoints, timeout_s=10) as client:
            await client.put(b"k", b"v")
            leader = (await client.status()).leader
            victim = next(node for node in document["nodes"] if node["name"] == leader)
            os.kill(victim["pid"], signal.SIGKILL)
            await client.put(b"k", b"w")

            async def restarted() -> bool:
                now = json.loads(cluster_json.read_text())
                node = next(node for node in now["nodes"] if node["name"] == leader)
                return node["pid"] not in (None, victim["pid"]) and node["starts"] == 2

            await until(restarted, 10, "the killed node to be started again")

            async def caught_up() -> bool:
                with suppress(KvError):
                    own = await client.status(victim["client_address"], timeout=1)
                    return own.applied_index >= (await client.status()).commit_index
                return False

            await until(caught_up, 10, "it to catch up")
        pids = [node["pid"] for node in json.loads(cluster_json.read_text())["nodes"]]
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 15) == 0
        assert not any(_is_alive(pid) for pid in pids)
        assert (tmp_path / "data" / "token").stat().st_mode & 0o777 == 0o600
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading
        print("".join(output), file=sys.stderr)


async def test_a_second_dev_leaves_the_first_one_s_directory_and_ports_alone(tmp_path: Path) -> None:
    base = str(_free_base(1))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvstore.cli.main", "dev", "--nodes", "1", "--data-dir", str(tmp_path / "data"),
        "--base-port", base, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        cluster_json = tmp_path / "data" / "cluster.json"
        await until(lambda: _exists(cluster_json), 10, "the node to be started")
        before = cluster_json.read_bytes()
        async with kvstore.connect(json.loads(before)["endpoints"], timeout_s=20) as client:
            await client.put(b"k", b"v")
        # The same directory, on other ports.
        elsewhere = str(_free_base(1))
        code, out, err = await run_command(
            "dev", "--nodes", "1", "--data-dir", str(tmp_path / "data"), "--base-port", elsewhere
        )
        assert (code, out) == (5, "")
        assert "data_dir_in_use" in err
        assert cluster_json.read_bytes() == before
        # The same ports, in another directory: the cluster that answers there is not announced as this one.
        code, out, err = await run_command(
            "dev", "--nodes", "1", "--data-dir", str(tmp_path / "other"), "--base-port", base
        )
        assert code == 5, err
        assert "address_in_use" in out
        assert "leads" not in out
        assert "KVSTORE_ENDPOINTS" not in out
        assert cluster_json.read_bytes() == before
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 15) == 0
        assert not cluster_json.exists()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_nodes_of_a_killed_supervisor_end_with_it(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvstore.cli.main", "dev", "--nodes", "1", "--data-dir", str(tmp_path / "data"),
        "--base-port", str(_free_base(1)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    cluster_json = tmp_path / "data" / "cluster.json"
    await until(lambda: _exists(cluster_json), 10, "the node to be started")
    (pid,) = (node["pid"] for node in json.loads(cluster_json.read_text())["nodes"])
    process.kill()
    await process.wait()

    async def gone() -> bool:
        return not _is_alive(pid)

    await until(gone, 15, "the node to end")


async def _has(text: str, part: str) -> bool:
    return part in text


async def _exists(path: Path) -> bool:
    return path.exists()


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _free_base(nodes: int) -> int:
    """A base port such that peers and clients of that many nodes find theirs free."""
    for base in range(20_000 + os.getpid() % 20_000, 60_000, 20):
        wanted = [base + offset for offset in (*range(nodes), *range(10, 10 + nodes))]
        if all(_can_bind(port) for port in wanted):
            return base
    raise AssertionError("no free ports")


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
