"""What RocksDB costs through the seam: a read that hits, a read that misses, and the write of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import workloads
from kvstore.state.storage import RocksStorage

KEYS = 10_000


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[RocksStorage]:
    """10,000 records of 100 bytes, flushed: reads come from its files, as they do in a store that runs for long."""
    opened = RocksStorage(str(tmp_path / "storage"))
    batch = opened.batch()
    for number in range(KEYS):
        batch.put(b"k" + workloads.key_of(number), workloads.value_of(number))
    opened.write(batch)
    opened.flush()
    yield opened
    opened.close()


def test_storage_get(benchmark: BenchmarkFixture, storage: RocksStorage) -> None:
    keys = cycle([b"k" + workloads.key_of(number * 7919 % KEYS) for number in range(KEYS)])
    assert benchmark(lambda: storage.get(next(keys)))


def test_storage_get_of_what_is_not_there(benchmark: BenchmarkFixture, storage: RocksStorage) -> None:
    keys = cycle([b"k" + workloads.key_of(KEYS + number) for number in range(KEYS)])
    assert benchmark(lambda: storage.get(next(keys))) is None


def test_storage_write_of_256(benchmark: BenchmarkFixture, storage: RocksStorage) -> None:
    """256 records in one atomic batch."""
    records = [(b"k" + workloads.key_of(number), workloads.value_of(number)) for number in range(256)]

    def write() -> None:
        batch = storage.batch()
        for key, value in records:
            batch.put(key, value)
        storage.write(batch)

    benchmark(write)
    assert storage.get(records[0][0]) == records[0][1]
