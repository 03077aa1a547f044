"""RocksDB and the memory storage are the same map: every step is done to both, and to a dict, and all must agree. A
crash of RocksDB is a copy of its directory as it stands, opened elsewhere: what a killed process leaves behind."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvstore.errors import StartupError
from kvstore.state.storage import MemoryDisk, MemoryStorage, RocksStorage

keys = st.binary(min_size=1, max_size=3).map(lambda key: bytes(byte & 0x83 for byte in key))
values = st.binary(max_size=3)
steps = st.lists(
    st.tuples(st.just("put"), keys, values)
    | st.tuples(st.just("delete"), keys)
    | st.tuples(st.just("delete_range"), keys, keys),
    max_size=6,
)
END = b"\xff\xff\xff\xff"


class Storages(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvstore-storage-"))
        self.disk = MemoryDisk()
        self.number = 0
        self.path = self.new_path()
        self.rocks = RocksStorage(self.path)
        self.memory = self.disk.open(self.path)
        self.expected: dict[bytes, bytes] = {}
        self.flushed: dict[bytes, bytes] = {}

    def new_path(self) -> str:
        self.number += 1
        return str(self.folder / f"storage-{self.number}")

    @rule(steps=steps)
    def write(self, steps: list[Any]) -> None:
        for storage in (self.rocks, self.memory):
            batch: Any = storage.batch()
            for name, *arguments in steps:
                if name != "delete_range" or arguments[0] <= arguments[1]:
                    getattr(batch, name)(*arguments)
            storage.write(batch)
        for name, *arguments in steps:
            if name == "put":
                self.expected[arguments[0]] = arguments[1]
            elif name == "delete":
                self.expected.pop(arguments[0], None)
            else:
                for key in [key for key in self.expected if arguments[0] <= key < arguments[1]]:
                    del self.expected[key]

    @rule(begin=keys | st.just(b""), end=keys | st.just(END), reverse=st.booleans())
    def scan(self, begin: bytes, end: bytes, reverse: bool) -> None:
        expected = sorted((pair for pair in self.expected.items() if begin <= pair[0] < end), reverse=reverse)
        assert list(self.rocks.scan(begin, end, reverse)) == expected
        assert list(self.memory.scan(begin, end, reverse)) == expected

    @rule(steps=steps, reverse=st.booleans())
    def a_scan_sees_the_moment_it_began(self, steps: list[Any], reverse: bool) -> None:
        before = sorted(self.expected.items(), reverse=reverse)
        scans = [storage.scan(b"", END, reverse) for storage in (self.rocks, self.memory)]
        firsts = [next(scan, None) for scan in scans]
        self.write(steps)
        for first, scan in zip(firsts, scans, strict=True):
            assert ([] if first is None else [first, *scan]) == before

    @rule()
    def flush(self) -> None:
        self.rocks.flush()
        self.memory.flush()
        self.flushed = dict(self.expected)

    @rule()
    def crash(self) -> None:
        path = self.new_path()
        shutil.copytree(self.path, path)
        self.rocks.close()
        self.rocks = RocksStorage(path)
        self.disk.crash()
        self.memory = self.disk.open(self.path)
        self.disk.add_copy(path, dict(self.flushed))
        self.memory.close()
        self.memory = self.disk.open(path)
        self.path, self.expected = path, dict(self.flushed)

    @rule()
    def move_to_a_checkpoint(self) -> None:
        path = self.new_path()
        storages: list[RocksStorage | MemoryStorage] = [self.rocks, self.memory]
        for storage in storages:
            storage.checkpoint(path)
            storage.close()
        for storage in (RocksStorage(path, True), self.disk.open(path, True)):
            assert dict(storage.scan(b"", END)) == self.expected
            storage.close()
        self.rocks, self.memory, self.path = RocksStorage(path), self.disk.open(path), path
        self.flushed = dict(self.expected)

    @rule()
    def is_in_use(self) -> None:
        for open_storage in (RocksStorage, self.disk.open):
            with pytest.raises(StartupError) as caught:
                open_storage(self.path)
            assert caught.value.code == "data_dir_in_use"

    @rule()
    def is_not_there(self) -> None:
        for open_storage in (RocksStorage, self.disk.open):
            with pytest.raises(StartupError) as caught:
                open_storage(str(self.folder / "nowhere"), True)
            assert caught.value.code == "state_damaged"

    @invariant()
    def every_key_is_there(self) -> None:
        for key in (b"\x00", b"\x01\x80", b"\x83", *self.expected):
            assert self.rocks.get(key) == self.memory.get(key) == self.expected.get(key)

    def teardown(self) -> None:
        self.rocks.close()
        self.memory.close()
        shutil.rmtree(self.folder)


@pytest.mark.timeout(60)
def test_rocksdb_and_memory_are_the_same_map() -> None:
    run_state_machine_as_test(
        Storages,
        settings=settings(
            max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
