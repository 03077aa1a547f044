"""What `join`, `leave`, `transfer-leader` and `member` refuse changes nothing; and who answers for a member is that
member."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from kvstore import Refused
from kvstore.env import SystemFiles
from kvstore.server.identity import DataDirectory
from tests.cluster.harness import ClusterProcesses, free_ports, run_command, until

pytestmark = pytest.mark.timeout(120)


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[ClusterProcesses]:
    async with ClusterProcesses(tmp_path) as cluster:
        yield cluster


async def ran(cluster: ClusterProcesses, *arguments: str) -> tuple[int, str, str]:
    return await run_command(*arguments, environment={"KVSTORE_ENDPOINTS": cluster.endpoints})


def free_addresses() -> tuple[str, str]:
    peer, client = free_ports(2)
    return f"127.0.0.1:{peer}", f"127.0.0.1:{client}"


async def test_a_join_that_is_refused_leaves_everything_as_it_was(cluster: ClusterProcesses, tmp_path: Path) -> None:
    peer, client = free_addresses()
    _, port = client.split(":")
    n1 = cluster.nodes["n1"]
    new, filled, other = (tmp_path / name for name in ("new", "filled", "other"))
    (filled / "wal").mkdir(parents=True)
    (filled / "wal" / "notes").touch()
    of_another = DataDirectory(SystemFiles(), str(other))
    of_another.claim("n4", "another-cluster")
    of_another.close()
    here = ("--listen", peer, "--client-listen", client)
    open_to_all = ("--listen", f"0.0.0.0:{port}", "--client-listen", client, "--insecure")
    cases: list[tuple[str, Path, tuple[str, ...], int, str]] = [
        ("n4", filled, here, 5, "data_dir_not_empty"),
        ("n1", new, here, 5, "node_identity_changed"),
        ("n4", other, here, 5, "give the endpoints of the directory's cluster"),
        ("n4", new, (*here, "--advertise", "nonsense"), 2, "--advertise: 'nonsense' is nothing"),
        ("n4", new, (*here, "--client-advertise", "[::1"), 2, "--client-advertise: '[::1' is nothing"),
        ("n4", new, open_to_all, 2, "there is no --advertise: '0.0.0.0:"),
        ("n4", new, ("--listen", "127.0.0.1:0", "--client-listen", client), 2, "a port is a number"),
        ("n4", new, ("--listen", peer, "--client-listen", n1.client_address), 1, "invalid_request"),
        ("../n4", new, here, 1, "invalid_request"),
    ]
    for name, directory, options, expected, text in cases:
        code, _, err = await ran(cluster, "join", "--name", name, "--data-dir", str(directory), *options)
        assert (code, text in " ".join(err.split())) == (expected, True), err
    assert not new.exists(), "a corrected join finds nothing in its way"
    assert [path.name for path in filled.iterdir()] == ["wal"]
    async with cluster.client() as kv:
        assert [member.name for member in (await kv.status()).members] == ["n1", "n2", "n3"]


async def test_a_member_that_is_none_gets_no_vote_and_nobody_answers_for_it(cluster: ClusterProcesses) -> None:
    peer, client = free_addresses()
    n1, n2 = cluster.nodes["n1"], cluster.nodes["n2"]
    async with cluster.client() as kv:
        await kv.put(b"k", b"v")
        for name, peers, clients, node_id in (
            ("../x y\n", peer, client, "1"),
            ("p4", "[::1", client, "1"),
            ("p4", peer, "bogus", "1"),
            ("p4", peer, client, "1" * 100_000),
            ("p4", n1.peer_address, n1.client_address, "1"),
        ):
            with pytest.raises(Refused) as refused:
                await kv.member_add(name, peers, clients, node_id, cluster.cluster_id)
            assert refused.value.code == "invalid_request"
        await kv.member_add("p4", peer, client, "1", cluster.cluster_id)
    leader = await cluster.leader()
    for arguments, refusal in (
        (("member", "promote", "p4"), "not_caught_up"),
        (("transfer-leader", "p4"), "not_voter"),
        (("transfer-leader", "nosuch"), "member_unknown"),
    ):
        code, _, err = await ran(cluster, *arguments)
        assert (code, refusal in err) == (1, True), err
    assert await cluster.leader() == leader

    # Then n2 moves to where p4 is said to be.
    cluster.stop("n2")
    cluster.knowing.add("n2")
    n2.peer_address, n2.client_address = peer, client
    cluster.start("n2")

    async def there() -> bool:
        async with cluster.client() as kv:
            return any((member.name, member.client_address) == ("n2", client) for member in (await kv.status()).members)

    await until(there, 20.0, "n2 is known where it is now")
    code, out, _ = await ran(cluster, "status", "-o", "json")
    errors = {node["member"]["name"]: node["error"] for node in json.loads(out)}
    assert (code, errors["n1"], errors["n2"], errors["n3"]) == (0, None, None, None)
    assert errors["p4"]["code"] == "wrong_node"
    code, out, _ = await ran(cluster, "status")
    assert (code, "another node" in out) == (0, True)
    code, out, _ = await ran(cluster, "verify", "-o", "json")
    assert (code, [replica["status"] for replica in json.loads(out)["replicas"]]) == (
        3,
        ["same"] * 3 + ["another node"],
    )
    code, _, err = await ran(cluster, "member", "promote", "p4")
    assert (code, "not_caught_up" in err) == (1, True), err


async def test_a_leader_that_may_not_leave_goes_on_leading(cluster: ClusterProcesses) -> None:
    leader = await cluster.leader()
    before = await cluster.status(leader)
    assert before is not None
    cluster.kill(next(name for name in cluster.nodes if name != leader))
    code, _, err = await ran(cluster, "leave", leader)
    assert (code, "would_lose_quorum" in err) == (1, True), err
    after = await cluster.status(leader)
    assert after is not None
    assert (after.role, after.term, after.members) == ("leader", before.term, before.members)


async def test_a_new_node_does_not_start_among_files_of_somebody_else(tmp_path: Path) -> None:
    cluster = ClusterProcesses(tmp_path, nodes=1)
    directory = cluster.nodes["n1"].data_dir
    directory.mkdir()
    (directory / "important.txt").touch()
    code, _, err = await run_command(*cluster.serve_arguments("n1"))
    assert (code, "data_dir_not_empty" in err) == (5, True), err
    assert [path.name for path in directory.iterdir()] == ["important.txt"]
    (directory / "important.txt").unlink()
    (directory / "lost+found").mkdir()
    async with cluster:
        assert await cluster.leader() == "n1"
        cluster.nodes["n1"].signal(signal.SIGTERM)
        assert cluster.nodes["n1"].reap() == 0
