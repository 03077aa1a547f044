"""The benchmark's own machinery: the generator against a server that only answers, the figures, the verdicts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from bench import load, machine, report, workloads
from bench.load import Load, Point
from bench.peers import Durations, etcd, open_peers, postgres
from bench.processes import Server, accepts, free_ports, require, wait_until
from bench.results import BenchError, Measurement, merge_rounds, percentile
from bench.workloads import Kind
from kvstore import codec
from kvstore.model import Add, Put, Txn

StartAnswerer = Callable[..., tuple[str, int]]


@pytest.fixture
def answerer(tmp_path: Path) -> Iterator[StartAnswerer]:
    """Starts the answering server; its address and process id."""
    servers: list[Server] = []

    def start(*arguments: str) -> tuple[str, int]:
        (port,) = free_ports(1)
        command = [sys.executable, "-m", "bench.answerer", str(port), *arguments]
        server = Server("answerer", command, tmp_path / "answerer.log", directory=Path(load.__file__).parents[1])
        servers.append(server)
        wait_until("the answering server", lambda: accepts(port) or None, servers)
        return f"127.0.0.1:{port}", server.pid

    yield start
    for server in servers:
        server.stop()


def brief(tmp_path: Path, generators: int = 1) -> Load:
    return Load(keys=50, warmup_s=0.05, window_s=0.2, generators=generators, scratch=tmp_path)


@pytest.mark.parametrize("kind", Kind)
def test_every_workload_is_counted(answerer: StartAnswerer, tmp_path: Path, kind: Kind) -> None:
    address, pid = answerer()
    point = Point(kind=kind, connections=3, pipeline=4)
    measured = load.measure("answerer", address, {"answerer": [pid]}, point, brief(tmp_path), run=0)
    assert measured.operations > 100
    assert measured.per_second == pytest.approx(measured.operations / 0.2)
    assert measured.p50_ms is not None
    assert measured.p99_ms is not None
    assert measured.p999_ms is not None
    assert 0 < measured.p50_ms <= measured.p99_ms <= measured.p999_ms
    assert set(measured.cpu_us_per_op) == {"answerer", "generator"}


def test_several_generators_share_the_connections(answerer: StartAnswerer, tmp_path: Path) -> None:
    address, pid = answerer()
    point = Point(kind=Kind.PUT, connections=5)
    measured = load.measure("answerer", address, {"answerer": [pid]}, point, brief(tmp_path, generators=2), run=0)
    assert measured.operations > 100


def test_a_refused_request_fails_the_run_and_says_which(answerer: StartAnswerer, tmp_path: Path) -> None:
    address, _ = answerer("--refuse", "Txn")
    with pytest.raises(BenchError, match=r"order-hot request was refused.*\[out_of_range\]"):
        load.measure("answerer", address, {}, Point(kind=Kind.ORDER_HOT, connections=2), brief(tmp_path), run=0)


def test_a_server_that_is_not_there_fails_the_run(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with pytest.raises(BenchError, match=r"refused|connect"):
        load.measure("x", f"127.0.0.1:{port}", {}, Point(kind=Kind.PUT, connections=1), brief(tmp_path), run=0)


def test_orders_have_distinct_keys_and_take_from_stock() -> None:
    seen: set[bytes] = set()
    for connection, run in ((0, 0), (1, 0), (0, 1)):
        for encoded in islice(workloads.requests(Kind.ORDER_MANY, 50, connection, run), 1500):
            order = codec.decode_mutation(encoded)
            assert isinstance(order, Txn)
            add, *puts = order.success
            assert isinstance(add, Add)
            assert (add.delta, add.min) == (-1, 0)
            keys = [put.key for put in puts if isinstance(put, Put)]
            assert len(keys) == 3
            assert seen.isdisjoint(keys)
            seen.update(keys)


def test_values_have_the_size_that_the_report_names() -> None:
    assert {len(workloads.value_of(number)) for number in range(100)} == {workloads.VALUE_BYTES}


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match=r"peer etcd is missing.*make bench-deps"):
        open_peers(["etcd"], Durations(10, 1.0, 1.0))
    with pytest.raises(BenchError, match="no such peer: oracle"):
        open_peers(["oracle"], Durations(10, 1.0, 1.0))
    with pytest.raises(BenchError, match="peer x is missing"):
        require("x", "no-such-program")


def test_a_server_that_ends_is_told_with_its_output(tmp_path: Path) -> None:
    server = Server("short", [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"], tmp_path / "log")
    try:
        with pytest.raises(BenchError, match=r"(?s)short ended with code 3.*what went wrong"):
            wait_until("nothing", lambda: None, [server])
    finally:
        server.stop()


def test_the_machine_is_described(tmp_path: Path) -> None:
    described = machine.describe(tmp_path)
    assert described.cores >= 1
    assert described.cpu
    assert described.filesystem != "unknown"
    assert described.fdatasync_512_p50_ms > 0
    assert list(tmp_path.iterdir()) == []
    assert machine.cpu_seconds([os.getpid()]) > 0
    assert machine.busy_seconds() > 0


def test_percentiles() -> None:
    hundred = list(range(1, 101))
    assert [percentile(hundred, share) for share in (0.5, 0.99, 0.999, 1.0)] == [50, 99, 100, 100]
    assert percentile([7], 0.5) == 7


def measured(system: str, workload: str, connections: int, per_second: float, p50_ms: float = 1.0) -> Measurement:
    return Measurement(
        system=system,
        workload=workload,
        connections=connections,
        seconds=1.0,
        operations=int(per_second),
        per_second=per_second,
        p50_ms=p50_ms,
    )


def test_thresholds_use_medians_and_the_faster_transaction() -> None:
    rounds = [
        *(measured(report.OURS, "put", 256, rate) for rate in (1, 15_000, 90_000)),
        *(measured(etcd.SYSTEM, "put", 256, rate) for rate in (9_000, 10_000, 11_000)),
        *(measured(report.OURS, "order-hot", 64, rate) for rate in (6_000, 7_000, 8_000)),
        *(measured(postgres.SYSTEM, "order-hot", 64, rate) for rate in (1_000, 1_000, 1_000)),
        *(measured(postgres.SYSTEM, "order-hot, stock last", 64, rate) for rate in (2_000, 2_000, 2_000)),
    ]
    puts, orders, latency = report.thresholds(rounds)
    assert (puts.ratio, puts.met) == (1.5, True)
    assert (orders.ratio, orders.met) == (3.5, False)
    assert latency.met is None


def test_latency_must_not_be_above_etcds() -> None:
    for ours_ms, met in ((0.9, True), (1.0, True), (1.1, False)):
        rounds = [measured(report.OURS, "put", 1, 1, ours_ms), measured(etcd.SYSTEM, "put", 1, 1, 1.0)]
        assert report.thresholds(rounds)[2].met is met


def test_rounds_are_merged_into_their_median() -> None:
    rounds = [measured("a", "put", 1, rate) for rate in (5.0, 1.0, 3.0)] + [measured("a", "put", 64, 9.0)]
    assert [one.per_second for one in merge_rounds(rounds)] == [3.0, 9.0]
