"""Health and metrics over HTTP, of real nodes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import ClientSession
from prometheus_client.parser import text_string_to_metric_families

from kvstore import Refused
from tests.cluster.harness import ClusterProcesses, free_ports, until

pytestmark = pytest.mark.timeout(60)


class HttpCluster(ClusterProcesses):
    """Three nodes with an http door each."""

    def __init__(self, path: Path, arguments: tuple[str, ...] = ()) -> None:
        super().__init__(path, arguments=arguments)
        self.http = dict(zip(self.nodes, free_ports(3), strict=True))

    def serve_arguments(self, name: str) -> list[str]:
        return [*super().serve_arguments(name), "--http-listen", f"127.0.0.1:{self.http[name]}"]

    async def get(self, name: str, path: str, method: str = "GET") -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.http[name]}{path}"
        async with ClientSession() as session, session.request(method, url) as answer:
            return answer.status, await answer.text()

    async def metrics(self, name: str) -> dict[tuple[str, ...], float]:
        status, text = await self.get(name, "/metrics")
        assert status == 200
        return {
            (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


async def test_health_and_metrics(tmp_path: Path) -> None:
    async with HttpCluster(tmp_path) as cluster, cluster.client() as kv:
        leader = await cluster.leader()
        for number in range(50):
            await kv.put(b"%d" % number, b"")
        with pytest.raises(Refused):
            await kv.add(b"n", -1, min=0)
        async with kv.watch(prefix=b"", from_revision=1) as watch:
            await anext(watch)
            looks = [await cluster.metrics(name) for name in cluster.nodes]
            assert sum(look[("kvstore_watches",)] for look in looks) == 1
        found = await cluster.metrics(leader)
        assert found[("kvstore_role", "leader")] == 1
        assert found[("kvstore_requests_total", "write", "ok")] >= 50
        assert found[("kvstore_requests_total", "write", "refused")] == 1
        assert found[("kvstore_revision",)] == 50
        assert found[("kvstore_proposed_requests_total",)] >= 51
        for name in ("commit", "fsync", "apply"):
            assert found[(f"kvstore_{name}_seconds_count",)] > 0
            assert found[(f"kvstore_{name}_seconds_bucket", "+Inf")] == found[(f"kvstore_{name}_seconds_count",)]
            assert found[(f"kvstore_{name}_seconds_sum",)] > 0
        assert {key[1] for key in found if key[0] == "kvstore_peer_lag_entries"} == set(cluster.nodes) - {leader}
        assert found[("kvstore_sessions",)] == 1
        # Junk is counted by its reason.
        host, port = cluster.nodes[leader].client_address.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x00\x00\x00\x02\xc1\xc1")

        async def counted() -> bool:
            return ("kvstore_refused_input_total", "malformed_frame") in await cluster.metrics(leader)

        await until(counted, 5.0, "junk is counted")
        writer.close()

        for path, text in (("/livez", "ok\n"), ("/readyz", "ok\n")):
            assert await cluster.get(leader, path) == (200, text)
        assert json.loads((await cluster.get(leader, "/health"))[1]) == {"health": "true", "reason": ""}
        assert (await cluster.get(leader, "/elsewhere"))[0] == 404
        assert (await cluster.get(leader, "/metrics", "POST"))[0] == 405


async def test_a_full_store_takes_deletes_and_then_writes_again(tmp_path: Path) -> None:
    async with HttpCluster(tmp_path, ("--quota", "1MiB")) as cluster, cluster.client() as kv:
        leader = await cluster.leader()
        value = b"v" * 50_000
        written = 0

        async def fill() -> None:
            nonlocal written
            while written < 100:
                await kv.put(b"%d" % written, value)
                written += 1

        with pytest.raises(Refused, match="kvstore compact") as caught:
            await fill()
        assert caught.value.code == "quota_exceeded"
        assert 15 <= written <= 22

        async def alarm(lasts: bool) -> bool:
            return (await cluster.metrics(leader))[("kvstore_alarm", "quota")] == lasts

        await until(lambda: alarm(True), 5.0, "the alarm is shown")
        assert (await cluster.get(leader, "/readyz"))[0] == 200
        assert await cluster.get(leader, "/health") == (503, '{"health": "false", "reason": "alarm: quota"}')
        status = await cluster.status(leader)
        assert status is not None
        assert status.alarms == ("quota",)
        assert (await kv.get(b"0", level="linearizable")) is not None
        # Deletes alone only move records into history; compaction forgets that.
        deleted = await kv.delete_prefix(b"")
        with pytest.raises(Refused):
            await kv.put(b"still", value)
        await kv.compact(deleted.revision)
        await until(lambda: alarm(False), 5.0, "the alarm ends")
        await kv.put(b"again", value)
        assert (await cluster.get(leader, "/health"))[0] == 200


async def test_a_node_without_a_majority_lives_and_is_not_ready(tmp_path: Path) -> None:
    async with HttpCluster(tmp_path) as cluster:
        left = await cluster.leader()
        for name in cluster.nodes:
            if name != left:
                cluster.kill(name)

        async def not_ready() -> bool:
            return (await cluster.get(left, "/readyz"))[0] == 503

        await until(not_ready, 10.0, "the last node is not ready")
        assert "no leader" in (await cluster.get(left, "/readyz"))[1]
        status, text = await cluster.get(left, "/health")
        assert (status, json.loads(text)["health"]) == (503, "false")
        assert (await cluster.get(left, "/livez"))[0] == 200
        assert (await cluster.metrics(left))[("kvstore_has_leader",)] == 0
