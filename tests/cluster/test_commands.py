"""The client commands against a real node."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.cluster.harness import ClusterProcesses, run_command

pytestmark = pytest.mark.timeout(120)

Run = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest_asyncio.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[ClusterProcesses]:
    async with ClusterProcesses(tmp_path, nodes=1) as cluster:
        yield cluster


@pytest.fixture
def kv(cluster: ClusterProcesses) -> Run:
    async def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        return await run_command(*arguments, environment={"KVSTORE_ENDPOINTS": cluster.endpoints}, stdin=stdin)

    return run


async def test_put_get_del_and_range(kv: Run) -> None:
    assert (await kv("put", "a/1", "one"))[:2] == (0, "revision 1\n")
    assert (await kv("put", "a/2", "-", stdin=b"\xff\x00two"))[0] == 0
    assert (await kv("get", "a/2", "--value-only"))[:2] == (0, "\udcff\x00two")
    code, out, _ = await kv("get", "a/2", "--output", "json")
    record = json.loads(out)
    assert (code, record["value"], record["value_encoding"], record["mod_revision"]) == (0, "/wB0d28=", "base64", 2)
    code, out, _ = await kv("range", "a/", "--prefix", "-o", "json")
    document = json.loads(out)
    assert [record["key"] for record in document["records"]] == ["a/1", "a/2"]
    assert (document["count"], document["more"], document["revision"]) == (2, False, 2)
    code, out, _ = await kv("range", "--count-only")
    assert (code, out) == (0, "0 of 2, revision 2\n")
    code, out, _ = await kv("range", "--keys-only", "--reverse")
    assert (code, out) == (0, "a/2\na/1\n")
    code, out, _ = await kv("get", "612f31", "--encoding", "hex")
    assert code == 0
    assert "6f6e65" in out
    assert (await kv("del", "a/", "--prefix"))[:2] == (0, "deleted 2, revision 3\n")
    code, out, err = await kv("get", "a/1")
    assert (code, out) == (6, "")
    assert "no such key" in err
    code, out, _ = await kv("get", "a/1", "--revision", "1", "--level", "local")
    assert code == 0
    assert "one" in out
    assert (await kv("put", "a/1", "-5"))[:2] == (0, "revision 4\n")
    assert (await kv("get", "a/1", "--value-only"))[:2] == (0, "-5")


async def test_txn(kv: Run) -> None:
    await kv("put", "stock", "1")
    order = b"""{"compare": [{"key": "order", "target": "version", "relation": "==", "operand": 0}],
                 "success": [{"add": {"key": "stock", "delta": -1, "min": 0}}, {"put": {"key": "order", "value": "x"}}],
                 "failure": [{"range": {"start": "order"}}]}"""
    code, out, _ = await kv("txn", stdin=order)
    assert (code, out.splitlines()[0]) == (0, "succeeded, revision 2")
    code, out, _ = await kv("txn", "-o", "json", stdin=order)
    document = json.loads(out)["txn"]
    assert (code, document["succeeded"]) == (0, False)
    assert document["results"][0]["range"]["records"][0]["value"] == "x"
    code, out, err = await kv("txn", stdin=order.replace(b'"order"', b'"another"'))
    assert (code, out) == (1, "")
    assert "[out_of_range] (operation 0)" in err


async def test_status_members_and_limits(kv: Run, cluster: ClusterProcesses) -> None:
    code, out, _ = await kv("status", "--digest", "-o", "json")
    (node,) = json.loads(out)
    assert code == 0
    assert (node["status"]["role"], node["status"]["leader"], node["status"]["cluster_id"]) == (
        "leader",
        "n1",
        cluster.cluster_id,
    )
    assert len(node["status"]["digest"]) >= 32
    code, out, _ = await kv("member", "list", "-o", "json")
    (member,) = json.loads(out)
    assert (code, member["name"], member["voter"]) == (0, "n1", True)
    for arguments in (["status"], ["member", "list"]):
        code, out, _ = await kv(*arguments)
        assert code == 0
        assert cluster.nodes["n1"].client_address in out
    code, _, err = await kv("put", "k" * 5000, "v")
    assert (code, "[key_too_large]" in err) == (1, True)
    code, _, err = await kv("leave", "n1")
    assert (code, "[would_lose_quorum]" in err) == (1, True)
    assert (await kv("transfer-leader", "n1"))[:2] == (0, "n1 leads\n")
    code, _, err = await kv("leave", "n7")
    assert (code, "[member_unknown]" in err) == (1, True)


async def test_leases(kv: Run) -> None:
    code, out, _ = await kv("lease", "grant", "60", "--id", "7", "-o", "json")
    assert (code, json.loads(out)) == (0, {"lease": 7, "ttl_ms": 60_000})
    assert (await kv("lease", "grant", "60", "--id", "7"))[0] == 1
    assert (await kv("put", "a", "1", "--lease", "7"))[:2] == (0, "revision 1\n")
    code, out, _ = await kv("lease", "show", "7", "--keys", "-o", "json")
    shown = json.loads(out)
    assert (code, shown["keys"], shown["key_count"]) == (0, ["a"], 1)
    assert 0 < shown["remaining_ms"] <= 60_000
    assert (await kv("lease", "list"))[:2] == (0, "7\n")
    code, out, _ = await kv("lease", "keep-alive", "7", "--once")
    assert code == 0
    assert "lives another 60 s" in out
    assert (await kv("lease", "revoke", "7"))[:2] == (0, "lease 7 ended, deleted 1, revision 2\n")
    code, _, err = await kv("lease", "show", "7")
    assert code == 1
    assert "lease_not_found" in err
    assert (await kv("lease", "grant", "0.5"))[0] == 2
