"""What the write-ahead log costs: an append alone, and an append with its fdatasync, at the sizes of real batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kvstore.env import SystemFiles
from kvstore.raft.wal import Wal


@pytest.fixture
def wal(tmp_path: Path) -> Iterator[Wal]:
    opened = Wal.open(SystemFiles(), str(tmp_path / "wal"), node_id="bench")
    yield opened
    opened.close()


@pytest.mark.parametrize("size_bytes", [200, 4_096, 32_768])
def test_wal_append_and_sync(benchmark: BenchmarkFixture, wal: Wal, size_bytes: int) -> None:
    payload = bytes(size_bytes)
    indexes = count(1)

    def append_and_sync() -> None:
        index = next(indexes)
        wal.append(payload, index, 1)
        wal.sync()
        # As a node does after a flush: or this would hold gigabytes before it is through.
        wal.drop_before(index, 1 << 20)

    benchmark(append_and_sync)
    assert wal.durable_index == wal.last_index


def test_wal_append_of_256(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """256 entries of 200 bytes, without a sync. A log of its own for each round: what is unsynced piles up."""
    payload = bytes(200)
    numbers = count()

    def fresh() -> tuple[tuple[Wal], dict[str, object]]:
        return (Wal.open(SystemFiles(), str(tmp_path / f"wal-{next(numbers)}"), node_id="bench"),), {}

    def append(wal: Wal) -> None:
        for index in range(1, 257):
            wal.append(payload, index, 1)

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        append, setup=fresh, teardown=lambda wal: wal.close(), rounds=50
    )
