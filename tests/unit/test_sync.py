"""When the log is synced inline and when in a thread."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.env import Environment
from kvstore.meters import Meter
from kvstore.raft.sync import SLOW_S, SLOW_WEIGHT, SLOWNESS_MAX, VERY_SLOW_S, LogSync
from kvstore.raft.wal import Wal
from tests.fake_files import FaultyFile, FaultyFiles
from tests.fake_network import FakeNetwork, VirtualTime
from tests.raft_fixtures import SEGMENT_BYTES, data


class Bench:
    """A log on a disk whose syncs take `sync_s`. Work in threads waits until `finish_thread`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 10.0
        self.sync_s = 0.0
        self.files = FaultyFiles()
        self.threads: list[Callable[[], None]] = []
        self.synced = 0
        self.errors: list[BaseException] = []
        network = FakeNetwork(VirtualTime())
        self.wal = Wal.open(self.files, "/wal", node_id="1", segment_bytes=SEGMENT_BYTES)
        env = Environment(self, random.Random(1), self, network.host("a"), self.files)
        self.sync = LogSync(env, self.wal, self._synced, self.errors.append, Meter())
        real_sync = FaultyFile.sync

        def slow_sync(file: FaultyFile) -> None:
            self.now_s += self.sync_s
            real_sync(file)

        monkeypatch.setattr(FaultyFile, "sync", slow_sync)

    def _synced(self) -> None:
        self.synced += 1

    def monotonic(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return 0

    def call_soon(self, callback: Callable[..., object], *args: Any) -> object:
        raise AssertionError("not used")

    def call_later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> Any:
        raise AssertionError("not used")

    def run_in_thread(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        def both() -> None:
            try:
                work()
            except OSError as error:
                done(None, error)
            else:
                done(None, None)

        self.threads.append(both)

    def finish_thread(self) -> None:
        self.threads.pop(0)()

    def append(self) -> None:
        index = self.wal.last_index + 1
        self.wal.append(data(index), index, 1)

    def become_slow(self) -> None:
        self.sync_s = 2 * VERY_SLOW_S
        self.append()
        self.sync.run()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_a_fast_disk_is_synced_inline(bench: Bench) -> None:
    for _ in range(3):
        bench.append()
        bench.sync.run()
        assert bench.wal.durable_index == bench.wal.last_index
    assert bench.threads == []


def test_it_takes_several_slow_syncs_in_a_short_time(bench: Bench) -> None:
    for _ in range(5):
        bench.sync_s = 2 * SLOW_S
        bench.append()
        bench.sync.run()
        bench.sync_s = 0.0
        for _ in range(SLOW_WEIGHT):
            bench.append()
            bench.sync.run()
    assert bench.threads == []
    bench.sync_s = 2 * SLOW_S
    for _ in range(SLOWNESS_MAX // SLOW_WEIGHT):
        bench.append()
        bench.sync.run()
    assert bench.threads == []
    bench.append()
    bench.sync.run()
    assert bench.sync.running


def test_nothing_to_sync_costs_nothing(bench: Bench) -> None:
    bench.append()
    bench.sync.run()
    count = bench.files.sync_count
    bench.sync.run()
    assert bench.files.sync_count == count


def test_after_a_very_slow_sync_the_next_goes_to_a_thread(bench: Bench) -> None:
    bench.become_slow()
    assert bench.threads == []
    bench.append()
    bench.sync.run()
    assert len(bench.threads) == 1
    assert bench.wal.durable_index == 1
    bench.finish_thread()
    assert not bench.sync.running
    assert bench.wal.durable_index == 2
    assert bench.synced == 1


def test_while_one_runs_no_other_begins_and_what_came_meanwhile_is_not_durable(bench: Bench) -> None:
    bench.become_slow()
    bench.append()
    bench.sync.run()
    bench.append()
    bench.sync.run()
    assert len(bench.threads) == 1
    bench.finish_thread()
    assert bench.wal.durable_index == 2
    bench.sync.run()
    bench.finish_thread()
    assert bench.wal.durable_index == 3


def test_a_disk_that_is_fast_again_is_synced_inline_again(bench: Bench) -> None:
    bench.become_slow()
    bench.sync_s = 0.0
    for _ in range(SLOWNESS_MAX):
        bench.append()
        bench.sync.run()
        bench.finish_thread()
    bench.append()
    bench.sync.run()
    assert bench.threads == []
    assert bench.wal.durable_index == bench.wal.last_index


def test_one_slow_sync_among_fast_ones_keeps_the_thread(bench: Bench) -> None:
    bench.become_slow()
    for round_number in range(SLOWNESS_MAX):
        bench.sync_s = 2 * SLOW_S if round_number == SLOWNESS_MAX - 1 else 0.0
        bench.append()
        bench.sync.run()
        bench.finish_thread()
    bench.append()
    bench.sync.run()
    assert bench.sync.running


def test_a_failure_inline_raises(bench: Bench) -> None:
    bench.append()
    bench.files.fail_sync()
    with pytest.raises(OSError):
        bench.sync.run()
    assert bench.wal.durable_index == 0


def test_a_failure_in_the_thread_is_reported_and_makes_nothing_durable(bench: Bench) -> None:
    bench.become_slow()
    bench.append()
    bench.sync.run()
    bench.files.fail_sync()
    bench.finish_thread()
    assert len(bench.errors) == 1
    assert bench.synced == 0
    assert bench.wal.durable_index == 1
    bench.append()
    with pytest.raises(OSError):
        bench.sync.run()


async def test_finish_waits_for_the_thread(bench: Bench) -> None:
    await bench.sync.finish()
    bench.become_slow()
    bench.append()
    bench.sync.run()
    waiting = asyncio.ensure_future(bench.sync.finish())
    asyncio.get_running_loop().call_soon(bench.finish_thread)
    await waiting
    assert bench.wal.durable_index == 2
