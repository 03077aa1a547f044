"""RocksDB, the memory storage and the simulation's file storage are the same map: every step is done to all, and to a
dict, and all must agree. A crash of RocksDB is a copy of its directory as it stands, opened elsewhere: what a killed
process leaves behind. The file storage loses power, also in the middle of a flush or a checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvstore.errors import StartupError
from kvstore.state.storage import MemoryDisk, RocksStorage
from tests.fake_files import FaultyFiles, Stopped, keep_random
from tests.simulation.storage import FileStorage

keys = st.binary(min_size=1, max_size=3).map(lambda key: bytes(byte & 0x83 for byte in key))
values = st.binary(max_size=3)
steps = st.lists(
    st.tuples(st.just("put"), keys, values)
    | st.tuples(st.just("delete"), keys)
    | st.tuples(st.just("delete_range"), keys, keys),
    max_size=6,
)
END = b"\xff\xff\xff\xff"


def copy_of_a_moment(directory: str, path: str) -> None:
    """A copy in which nothing is missing that RocksDB's compaction removed, or renamed, while it was made."""
    while True:
        names = sorted(os.listdir(directory))
        try:
            shutil.copytree(directory, path)
        except shutil.Error:
            assert sorted(os.listdir(directory)) != names  # else it is something else
        else:
            if sorted(os.listdir(directory)) == names:
                return
        shutil.rmtree(path)


class Storages(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kvstore-storage-"))
        self.disk = MemoryDisk()
        self.number = 0
        self.path = self.new_path()
        self.rocks = RocksStorage(self.path)
        self.memory = self.disk.open(self.path)
        self.files = FaultyFiles()
        self.in_files = FileStorage(self.files, self.path)
        self.expected: dict[bytes, bytes] = {}
        self.flushed: dict[bytes, bytes] = {}

    @property
    def storages(self) -> list[Any]:
        return [self.rocks, self.memory, self.in_files]

    @property
    def openers(self) -> list[Any]:
        return [RocksStorage, self.disk.open, FileStorage.opener(self.files)]

    def new_path(self) -> str:
        self.number += 1
        return str(self.folder / f"storage-{self.number}")

    @rule(steps=steps)
    def write(self, steps: list[Any]) -> None:
        for storage in self.storages:
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
        for storage in self.storages:
            assert list(storage.scan(begin, end, reverse)) == expected

    @rule(steps=steps, reverse=st.booleans())
    def a_scan_sees_the_moment_it_began(self, steps: list[Any], reverse: bool) -> None:
        before = sorted(self.expected.items(), reverse=reverse)
        scans = [storage.scan(b"", END, reverse) for storage in self.storages]
        firsts = [next(scan, None) for scan in scans]
        self.write(steps)
        for first, scan in zip(firsts, scans, strict=True):
            assert ([] if first is None else [first, *scan]) == before

    @rule()
    def flush(self) -> None:
        for storage in self.storages:
            storage.flush()
        self.flushed = dict(self.expected)

    @rule(power=st.booleans())
    def crash(self, power: bool) -> None:
        if power:
            self.files.crash(keep_random(self.files.chance))
        else:
            self.files.kill()
        self.crash_the_others()

    @rule(operations=st.integers(0, 8), flushes=st.booleans())
    def crash_within(self, operations: int, flushes: bool) -> None:
        """A flush that was interrupted counts as a whole or not at all; a checkpoint counts for nothing."""
        self.files.stop_after = self.files.operation_count + operations
        work = self.files.begin_deferred()
        try:
            if flushes:
                self.in_files.flush()
            else:
                self.in_files.checkpoint(self.new_path())
        except Stopped:
            pass
        finally:
            self.files.end_deferred(work)
        self.files.crash(keep_random(self.files.chance))
        self.in_files = FileStorage(self.files, self.path)
        found = dict(self.in_files.scan(b"", END))
        assert found == self.flushed or (flushes and found == self.expected)
        self.in_files.close()
        if found == self.expected:
            self.rocks.flush()
            self.flushed = found
        self.crash_the_others()

    def crash_the_others(self) -> None:
        path = self.new_path()
        copy_of_a_moment(self.path, path)
        self.rocks.close()
        self.rocks = RocksStorage(path)
        self.disk.crash()
        self.memory = self.disk.open(self.path)
        self.disk.add_copy(path, dict(self.flushed))
        self.memory.close()
        self.memory = self.disk.open(path)
        self.files.rename(self.path, path)
        self.files.sync_dir(str(self.folder))
        self.in_files = FileStorage(self.files, path)
        self.path, self.expected = path, dict(self.flushed)

    @rule()
    def move_to_a_checkpoint(self) -> None:
        path = self.new_path()
        for storage in self.storages:
            storage.checkpoint(path)
            storage.close()
        for open_storage in self.openers:
            storage = open_storage(path, True)
            assert dict(storage.scan(b"", END)) == self.expected
            storage.close()
        self.rocks, self.memory, self.in_files = [open_storage(path) for open_storage in self.openers]
        self.path, self.flushed = path, dict(self.expected)

    @rule()
    def is_in_use(self) -> None:
        for open_storage in self.openers:
            with pytest.raises(StartupError) as caught:
                open_storage(self.path)
            assert caught.value.code == "data_dir_in_use"

    @rule()
    def is_not_there(self) -> None:
        for open_storage in self.openers:
            with pytest.raises(StartupError) as caught:
                open_storage(str(self.folder / "nowhere"), True)
            assert caught.value.code == "state_damaged"

    @invariant()
    def every_key_is_there(self) -> None:
        for key in (b"\x00", b"\x01\x80", b"\x83", *self.expected):
            assert [storage.get(key) for storage in self.storages] == [self.expected.get(key)] * 3

    @rule(keys=st.lists(keys, max_size=80))
    def get_many(self, keys: list[bytes]) -> None:
        expected = [self.expected.get(key) for key in keys]
        assert [storage.get_many(keys) for storage in self.storages] == [expected] * 3

    def teardown(self) -> None:
        for storage in self.storages:
            storage.close()
        shutil.rmtree(self.folder)


@pytest.mark.timeout(60)
def test_all_storages_are_the_same_map() -> None:
    run_state_machine_as_test(
        Storages,
        settings=settings(
            max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
