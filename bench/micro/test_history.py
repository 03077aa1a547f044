"""What the past costs who reads the present: a range of keys of which each was written once, and, the same range where
each was written a thousand times and none of that is compacted. Read from the storage, not from the cache of records.

Records that were replaced lie elsewhere (`state/layout.py`), so both should cost the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import Raw
from pytest_benchmark.fixture import BenchmarkFixture

from bench.micro.batches import Entries
from kvstore import codec
from kvstore.model import Put, Range
from kvstore.state.machine import Machine
from kvstore.state.storage import RocksStorage

KEYS = 100
EVERYTHING = Range(b"k/", b"k0")


@pytest.mark.benchmark(group="a range of 100 keys, by how often each was written")
@pytest.mark.parametrize("versions", [1, 1000])
def test_range_of_what_holds_now(benchmark: BenchmarkFixture, tmp_path: Path, versions: int) -> None:
    machine = Machine(RocksStorage, str(tmp_path / "state"))
    entries = Entries(machine)
    for version in range(versions):
        puts = [Put(b"k/%03d" % number, b"%0100d" % version) for number in range(KEYS)]
        entries.apply([codec.RawBatchItem(0, 0, 0, Raw(codec.encode_request(put))) for put in puts])
    machine.flush()
    assert machine.revision == KEYS * versions
    answer = codec.decode_result(benchmark(machine.read, EVERYTHING))
    assert [record.version for record in answer.records] == [versions] * KEYS  # type: ignore[union-attr]
    machine.close()
