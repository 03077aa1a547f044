"""etcd: three nodes on loopback, each fsyncing as it does by default, loaded by wrk through the JSON gateway.

The gateway is etcd's HTTP door, and costs it something: over gRPC it is faster. Its figures are therefore always named
"etcd (JSON gateway, wrk)". The load goes to the leader, as ours does.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct, field

from bench import machine, workloads
from bench.peers import Durations
from bench.processes import Server, free_ports, require, run_tool, wait_until
from bench.results import BenchError, Measurement
from bench.wrk import Wrk

SYSTEM = "etcd (JSON gateway, wrk)"
NODES = 3
_SCRIPT = Path(__file__).with_name("etcd.lua")


class _Header(Struct, frozen=True):
    member_id: int


class _Status(Struct, frozen=True):
    header: _Header
    leader: int = 0  # the member id of the leader that this node knows; left out where it knows none


class _Node(Struct, frozen=True):
    """One node as `etcdctl endpoint status` prints it."""

    endpoint: str = field(name="Endpoint")
    status: _Status = field(name="Status")


class Etcd:
    def __init__(self, durations: Durations) -> None:
        self._durations = durations
        self._etcd = require("etcd", "etcd")
        self._etcdctl = require("etcd", "etcdctl")
        self._wrk = Wrk("etcd")
        self._servers: list[Server] = []
        self._leader_url = ""

    def start(self, scratch: Path) -> None:
        ports = free_ports(2 * NODES)
        clients, peers = ports[:NODES], ports[NODES:]
        names = [f"e{turn + 1}" for turn in range(NODES)]
        cluster = ",".join(f"{name}=http://127.0.0.1:{port}" for name, port in zip(names, peers, strict=True))
        # An ETCD_… variable of the caller would configure these nodes too.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        for name, client, peer in zip(names, clients, peers, strict=True):
            command = [self._etcd, "--name", name, "--data-dir", str(scratch / name), "--log-level", "error"]
            command += ["--listen-client-urls", f"http://127.0.0.1:{client}"]
            command += ["--advertise-client-urls", f"http://127.0.0.1:{client}"]
            command += ["--listen-peer-urls", f"http://127.0.0.1:{peer}"]
            command += ["--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"]
            command += ["--initial-cluster", cluster, "--initial-cluster-token", "bench"]
            self._servers.append(Server(f"etcd {name}", command, scratch / f"{name}.log", environment=environment))
        urls = [f"http://127.0.0.1:{port}" for port in clients]
        self._leader_url = wait_until("etcd to elect a leader", lambda: self._find_leader(urls), self._servers)
        self._write_bodies(scratch)
        # The keys must be there before they are read, and the first writes of an empty store are no measure.
        self._load("put", 64, max(1.0, self._durations.warmup_s))

    def stop(self) -> None:
        for server in self._servers:
            server.stop()
        self._servers.clear()

    def measure(self, everything: bool) -> Iterator[Measurement]:
        for workload, connections in (("put", 1), ("put", 256)):
            yield self._measured(workload, connections)
        if everything:
            for workload, connections in (("put", 64), ("get", 1), ("get", 64)):
                yield self._measured(workload, connections)

    def _measured(self, workload: str, connections: int) -> Measurement:
        self._load(workload, connections, self._durations.warmup_s)
        return self._load(workload, connections, self._durations.window_s)

    def _find_leader(self, urls: list[str]) -> str | None:
        """The leader's URL, once all nodes agree on it. A node that is not up yet makes etcdctl fail: not yet."""
        try:
            printed = run_tool(
                [self._etcdctl, "--endpoints", ",".join(urls), "endpoint", "status", "--write-out", "json"],
                environment={**os.environ, "ETCDCTL_API": "3"},
                timeout_s=20.0,
            )
        except BenchError:
            return None
        nodes = msgspec.json.decode(printed, type=list[_Node])
        leaders = {node.status.leader for node in nodes}
        if len(nodes) < NODES or len(leaders) != 1 or 0 in leaders:
            return None
        return next(node.endpoint for node in nodes if node.status.header.member_id in leaders)

    def _write_bodies(self, scratch: Path) -> None:
        """One request body a line: wrk's script reads them, so that it encodes nothing while it loads."""
        puts, gets = [], []
        for number in range(self._durations.keys):
            key = base64.b64encode(workloads.key_of(number)).decode()
            value = base64.b64encode(workloads.value_of(number)).decode()
            puts.append(json.dumps({"key": key, "value": value}))
            gets.append(json.dumps({"key": key}))
        self._bodies = {"put": scratch / "put-bodies", "get": scratch / "get-bodies"}
        self._bodies["put"].write_text("\n".join(puts) + "\n")
        self._bodies["get"].write_text("\n".join(gets) + "\n")

    def _load(self, workload: str, connections: int, duration_s: float) -> Measurement:
        pids = [server.pid for server in self._servers]
        path = {"put": "/v3/kv/put", "get": "/v3/kv/range"}[workload]
        before, busy_before, tool_before = machine.cpu_seconds(pids), machine.busy_seconds(), machine.tools_seconds()
        arguments = [path, str(self._bodies[workload])]
        result = self._wrk.load(f"etcd, {workload}", self._leader_url, _SCRIPT, arguments, connections, duration_s)
        used, busy = machine.cpu_seconds(pids) - before, machine.busy_seconds() - busy_before
        tool = machine.tools_seconds() - tool_before
        for server in self._servers:
            server.check()
        seconds = result.duration_us / 1e6
        return Measurement(
            system=SYSTEM,
            workload=workload,
            connections=connections,
            seconds=seconds,
            operations=result.requests,
            per_second=result.requests / seconds,
            p50_ms=result.p50_us / 1e3,
            p99_ms=result.p99_us / 1e3,
            p999_ms=result.p999_us / 1e3,
            cpu_us_per_op={"nodes": used * 1e6 / result.requests, "generator": tool * 1e6 / result.requests},
            others_cores=max(0.0, busy - used - tool) / seconds,
        )
