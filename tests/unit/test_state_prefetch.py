"""Reading ahead: which keys, how many at a time, and that it shows in nothing but what the storage is asked."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore import codec, model
from kvstore.errors import StartupError
from kvstore.model import Add, Compare, Delete, DescribeLease, Digest, OpenSession, Put, Range, Relation, Target, Txn
from kvstore.state import layout, mvcc
from kvstore.state.machine import DATA, Machine
from kvstore.state.prefetch import named_keys
from kvstore.state.storage import MemoryDisk, MemoryStorage
from tests.state_model import decoded, entry


class Counted:
    """A memory storage that writes down what it is asked for."""

    def __init__(self, storage: MemoryStorage) -> None:
        self.storage = storage
        self.single: list[bytes] = []
        self.together: list[list[bytes]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.storage, name)

    def get(self, key: bytes) -> bytes | None:
        self.single.append(key)
        return self.storage.get(key)

    def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        self.together.append(keys)
        return self.storage.get_many(keys)

    def forget(self) -> None:
        self.single.clear()
        self.together.clear()


class Setup:
    """A machine that was opened on the records `a` to `f`: nothing of them is in its cache."""

    def __init__(self, value: bytes = b"1") -> None:
        self.disk = MemoryDisk()
        machine = Machine(self.disk.open, "state")
        machine.apply(1, 1, DATA, entry(1, [Put(bytes([key]), value) for key in b"abcdef"]))
        machine.close()
        self.machine = Machine(self.open_counted, "state")
        self.counted.forget()

    def open_counted(self, path: str, read_only: bool = False, /) -> Any:
        self.counted = Counted(self.disk.open(path, read_only))
        return self.counted

    def apply(self, *requests: Any) -> list[Any]:
        return decoded(self.machine.apply(self.machine.applied_index + 1, 1, DATA, entry(1, list(requests))))

    def read(self, *requests: Any) -> list[Any]:
        self.machine.prefetch(requests)
        return [codec.decode_result(self.machine.read(request)) for request in requests]


def equal(key: bytes, end: bytes | None = None) -> Compare:
    return Compare(key, Target.VERSION, Relation.EQUAL, 0, end)


def test_the_keys_that_requests_name() -> None:
    branch = (Put(b"3", b""), Add(b"4", 1), Delete(b"5"), Range(b"6"), Txn((equal(b"no"),), (Put(b"no", b""),)))
    requests: list[model.Mutation | model.Read] = [
        Put(b"1", b""),
        Add(b"2", 1),
        Txn((equal(b"c"), equal(b"no", b"")), branch, (Put(b"no", b""),)),
        Delete(b"7"),
        Delete(b"no", b""),
        Range(b"8"),
        Range(b"no", b""),
        Range(b"no", revision=1),
        DescribeLease(1),
        Digest(b"", b"", 0, 1, 1),
        OpenSession(),
        Put(b"1", b""),
    ]
    assert named_keys(requests) == [b"1", b"2", b"c", b"3", b"4", b"5", b"6", b"7", b"8", b"1"]


def test_an_entry_reads_together_what_it_names() -> None:
    setup = Setup()
    answers = setup.apply(Put(b"b", b"2"), Add(b"a", 1), Txn((equal(b"x"),), (Put(b"c", b"3"), Put(b"x", b""))))
    assert setup.counted.together == [[b"ka", b"kb", b"kc", b"kx"]]
    assert setup.counted.single == []
    assert answers[1].value == 2
    assert answers[2].succeeded
    [read] = setup.read(Range(b"x"))
    assert read.count == 1


def test_reads_are_read_together_and_what_is_in_the_cache_is_not_read_again() -> None:
    setup = Setup()
    assert [answer.count for answer in setup.read(Range(b"a"), Range(b"y"), Range(b"b"), Range(b"a"))] == [1, 0, 1, 1]
    assert setup.counted.together == [[b"ka", b"kb", b"ky"]]
    assert [answer.count for answer in setup.read(Range(b"b"), Range(b"a"))] == [1, 1]
    assert len(setup.counted.together) == 1
    assert setup.counted.single == []


def test_one_key_is_not_worth_it() -> None:
    setup = Setup()
    assert setup.apply(Put(b"a", b"2"))[0].revision == 7
    assert (setup.counted.together, setup.counted.single) == ([], [b"ka"])


def test_what_was_not_there_is_found_once_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mvcc, "CACHE_GENERATION_BYTES", 300)
    setup = Setup()
    setup.apply(Put(b"x", b"1"), Put(b"y", b"1"))
    # So much that they are no longer in the cache when they are read.
    counts = [codec.decode_result(setup.machine.read(Range(bytes([key])))).count for key in b"abcdefxyz"]  # type: ignore[union-attr]
    assert counts == [1] * 8 + [0]
    assert setup.counted.single[-3:] == [b"kx", b"ky", b"kz"]


def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large records, those that are read together, and no more than fill the bound before."""
    monkeypatch.setattr(mvcc, "_PREFETCHED_TOGETHER", 2)
    monkeypatch.setattr(mvcc, "_PREFETCHED_BYTES_MAX", 3000)
    setup = Setup(value=bytes(1000))
    answers = setup.read(*(Range(bytes([key])) for key in b"abcdef"))
    assert [answer.count for answer in answers] == [1] * 6
    assert setup.counted.together == [[b"ka", b"kb"], [b"kc", b"kd"]]
    assert setup.counted.single == [b"ke", b"kf"]


def test_a_record_of_a_newer_format_is_refused_to_who_reads_it() -> None:
    setup = Setup()
    batch = setup.counted.batch()
    batch.put(b"kb", layout.pack_header(layout.FORMAT + 1, 1, 1, 1, 0) + b"?")
    setup.counted.write(batch)
    setup.machine.prefetch([Range(b"a"), Range(b"b")])
    assert codec.decode_result(setup.machine.read(Range(b"a"))).count == 1  # type: ignore[union-attr]
    with pytest.raises(StartupError) as caught:
        setup.machine.read(Range(b"b"))
    assert caught.value.code == "data_format_newer"
