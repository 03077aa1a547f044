"""What the state machine costs: one log entry of 256 puts, or of 64 orders, each request under a session of its own.

This is on every node's path, the batch's write to RocksDB included (its own log is off: the Raft log is the WAL).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import pytest
from msgspec import Raw
from pytest_benchmark.fixture import BenchmarkFixture

from bench import workloads
from bench.micro.batches import ORDERS_A_BATCH, PUTS_A_BATCH, Entries
from bench.workloads import Kind
from kvstore import codec
from kvstore.model import Range
from kvstore.state.machine import Machine
from kvstore.state.storage import RocksStorage

KEYS = 2000
# Rounds of each benchmark. 200 x 256 requests are what a node applies between two flushes.
ROUNDS = 200


@pytest.fixture
def entries(tmp_path: Path) -> Iterator[Entries]:
    """A machine that holds what the workloads need."""
    machine = Machine(RocksStorage, str(tmp_path / "state"))
    entries = Entries(machine)
    entries.apply([codec.RawBatchItem(0, 0, 0, Raw(codec.encode_request(one))) for one in workloads.preparation(KEYS)])
    machine.flush()
    yield entries
    machine.close()


@pytest.mark.parametrize(("kind", "batch"), [(Kind.PUT, PUTS_A_BATCH), (Kind.ORDER_HOT, ORDERS_A_BATCH)])
def test_apply(benchmark: BenchmarkFixture, entries: Entries, kind: Kind, batch: int) -> None:
    sessions = entries.open_sessions(batch)
    requests = workloads.requests(kind, KEYS, 1, 1)
    sequences = count(1)

    def next_entry() -> tuple[tuple[int, int, int, bytes], dict[str, object]]:
        sequence = next(sequences)
        items = [
            codec.RawBatchItem(session, sequence, sequence, Raw(request))
            for session, request in zip(sessions, islice(requests, batch), strict=True)
        ]
        return entries.entry(items), {}

    results = benchmark.pedantic(  # type: ignore[no-untyped-call]
        entries.machine.apply, setup=next_entry, rounds=ROUNDS
    )
    assert [workloads.RESULT_TAGS[kind]] * batch == [result[1] for result in results]


def test_machine_read(benchmark: BenchmarkFixture, entries: Entries) -> None:
    """One Range of one key, as a `get` asks for it once it may be served."""
    result = benchmark(entries.machine.read, Range(workloads.key_of(7)))
    assert workloads.value_of(7) in result
