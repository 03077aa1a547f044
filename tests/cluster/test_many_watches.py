"""Hundreds of watches on real nodes while others write: a slice of `make watches`."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.watches import Options, measure
from tests.cluster.harness import ClusterProcesses

pytestmark = pytest.mark.timeout(60)


async def test_each_watch_is_complete_and_in_order(tmp_path: Path) -> None:
    options = Options(watches=500, connections=10, broad=3, rate=300, seconds=4.0, growth_mb_max=100.0)
    async with ClusterProcesses(tmp_path) as cluster:
        pids = [node.process.pid for node in cluster.nodes.values() if node.process is not None]
        report = await measure(cluster.endpoints, pids, options)
    # How many writes a busy machine takes in a second is not judged here; what becomes of them is.
    assert [wrong for wrong in report.violations if "a second were answered" not in wrong] == []
    assert report.narrow_events == report.written > 0
    assert report.broad_events == 3 * report.written
