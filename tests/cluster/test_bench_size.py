"""`make scale` and `make join` on a few records: they start, measure, judge and clean up. No figure is judged here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import structlog
from rich.console import Console

from bench import bulk, join, scale
from bench.nodes import Nodes
from bench.uniform import Round
from bench.workloads import Kind
from kvstore.cli.logs import server_log

T = TypeVar("T")
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def written(path: Path, kind: type[T]) -> T:
    return msgspec.json.decode(path.read_bytes(), type=kind, dec_hook=lambda _, text: Path(text))


def test_scale_compares_few_records_with_many(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "POINTS", [point for point in scale.POINTS if point.pipeline == 1])
    options = scale.Options(
        records=3000,
        restart_records=2000,
        small=500,
        kills=0,
        kinds=(Kind.GET,),
        rounds=1,
        window_s=0.1,
        warmup_s=0.0,
        scratch=tmp_path,
        json=tmp_path / "report.json",
    )
    scale.run(options, console)
    told = msgspec.json.decode(
        (tmp_path / "report.json").read_bytes(), type=scale.Report, dec_hook=lambda _, x: Path(x)
    )
    assert told.loaded_records == 3500
    assert {(one.records, one.operations > 0) for one in told.rounds} == {(500, True), (3000, True)}
    assert all(30 < one.most_mb <= one.highest_mb + 1 for one in told.memory)
    assert "3,000 records as a share of 500" in printed(console)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_killed_follower_comes_back_with_what_was_committed(tmp_path: Path) -> None:
    cluster = Nodes()
    try:
        cluster.start(tmp_path)
        bulk.load(",".join(cluster.endpoints), 0, 2500, 100)
        committed = cluster.committed()
        (killed,) = cluster.followers[:1]
        before = cluster.pid(killed)
        assert 0 < cluster.bring_back([killed]) < 30
        assert cluster.pid(killed) != before
        assert cluster.look(killed).applied_index >= committed
        assert cluster.look(killed).revision == 3  # transactions of 1,000 records
    finally:
        cluster.stop()


def test_join_watches_a_node_join_under_load(tmp_path: Path, console: Console) -> None:
    options = join.Options(
        gigabytes=0.001, most_s=0.2, quiet_s=0.3, share=0.1, scratch=tmp_path, json=tmp_path / "report.json"
    )
    join.run(options, console)
    told = written(tmp_path / "report.json", join.Report)
    assert told.quiet is not None
    assert told.joining is not None
    assert 0 < told.voter_s <= told.joined_s
    assert min(told.quiet.writes, told.joining.writes) > 0
    assert "no snapshot was needed" in printed(console)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_snapshot_is_found_in_a_nodes_log(capsys: pytest.CaptureFixture[str]) -> None:
    log = server_log("n4", "json", "info")
    log.info("receiving a snapshot", sender="n1", index=7, size_bytes=1000)
    log.info("installing a snapshot", index=7, term=1, sender="n1")
    log.info("receiving a snapshot", sender="n1", index=9, size_bytes=2000)
    # It is the whole process's, and stderr is this test's alone.
    structlog.reset_defaults()
    (found,) = join.snapshots_in(capsys.readouterr().err + "Traceback\n")
    assert found.size_bytes == 1000
    assert 0 <= found.seconds < 60


def test_bounds_are_judged_by_the_worst() -> None:
    options = scale.Options(records=100, restart_records=50, small=10)
    told = scale.Report(
        machine=None,  # type: ignore[arg-type]
        command="",
        started="",
        options=options,
        restarts=[scale.Restart(who="a follower", records=50, seconds=seconds) for seconds in (1.0, 5.0)],
        memory=[scale.NodeMemory(when="loaded", node=node, most_mb=mb, highest_mb=mb) for node, mb in (("n1", 599.0),)],
        rounds=[
            Round(
                kind=Kind.PUT, connections=256, pipeline=1, records=records, operations=1, per_second=rate,
                p50_ms=1.0, p99_ms=1.0,
            )
            for records, rate in ((10, 100.0), (10, 90.0), (10, 500.0), (100, 70.0), (100, 71.0), (100, 1.0))
        ],
    )  # fmt: skip
    restart, loaded, highest, ratio = scale.judge(options, told)
    assert (restart.value, restart.held) == (5.0, False)
    assert (loaded.value, loaded.held, highest.held) == (599.0, True, True)
    assert (ratio.value, ratio.held) == (0.7, True)
