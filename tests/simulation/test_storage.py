"""`FileStorage` keeps what it promises. That it is the map that RocksDB is: property/test_storage_model.py."""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random

import pytest

from kvstore.errors import StartupError
from kvstore.state.storage import Storage, StorageFailed
from tests.fake_files import FaultyFiles, Stopped, keep_everything, keep_random
from tests.simulation.storage import CHECKPOINT_PARTS, PARTS_MAX, FileStorage


def put(storage: Storage, *keys: bytes, value: bytes = b"value") -> None:
    batch = storage.batch()
    for key in keys:
        batch.put(key, value)
    storage.write(batch)


def contents(storage: Storage) -> dict[bytes, bytes]:
    return dict(storage.scan(b"", b"\xff"))


def test_a_flush_writes_what_changed_and_now_and_then_all() -> None:
    files = FaultyFiles()
    storage = FileStorage(files, "/d/state")
    put(storage, b"big", value=b"x" * 10_000)
    storage.flush()
    for number in range(5 * PARTS_MAX):
        put(storage, b"%d" % number)
        storage.flush()
        parts = [name for name in files.list_dir("/d/state") if name.endswith(".part")]
        assert len(parts) <= PARTS_MAX
    assert sum(len(data) for path, data in files.image().items()) < 2 * 10_000
    files.crash()
    assert len(contents(FileStorage(files, "/d/state"))) == 5 * PARTS_MAX + 1


def test_wherever_a_flush_stops_it_counts_as_a_whole_or_not_at_all() -> None:
    seen = set()
    for seed in range(200):
        files = FaultyFiles(Random(seed))
        storage = FileStorage(files, "/d/state")
        for number in range(seed % 12):
            put(storage, b"%d" % number)
            storage.flush()
        before = contents(storage)
        put(storage, b"new", b"newer")
        files.stop_after = files.operation_count + seed % 9
        returned = False
        try:
            storage.flush()
            returned = True
        except Stopped:
            pass
        if seed % 3:
            files.crash(keep_random(files.chance))
        else:
            files.kill()
        again = FileStorage(files, "/d/state")
        found = contents(again)
        assert found in (
            (before, {**before, b"new": b"value", b"newer": b"value"})
            if not returned
            else ({**before, b"new": b"value", b"newer": b"value"},)
        )
        seen.add((returned, found == before))
        again.flush()
        files.crash()
        assert contents(FileStorage(files, "/d/state")) == found, "what was opened is durable"
        assert not [name for name in files.list_dir("/d/state") if name.endswith(".tmp")]
    assert seen == {(True, False), (False, True), (False, False)}


def test_every_flipped_bit_is_noticed() -> None:
    files = FaultyFiles()
    storage = FileStorage(files, "/d/state")
    for number in range(3):
        put(storage, b"%d" % number)
        storage.flush()
    storage.checkpoint("/d/copy")
    image = {path: data for path, data in files.image().items() if path.endswith(".part")}
    assert len([path for path in image if path.startswith("/d/copy")]) == CHECKPOINT_PARTS >= 3
    for path, data in image.items():
        for offset in range(len(data)):
            damaged = FaultyFiles.of_image(image)
            damaged.flip(path, offset, offset % 8)
            with pytest.raises(StartupError) as caught:
                FileStorage(damaged, path.rpartition("/")[0])
            assert caught.value.code == "state_damaged"


def test_a_missing_file_is_noticed() -> None:
    files = FaultyFiles()
    storage = FileStorage(files, "/d/state")
    for number in range(3):
        put(storage, b"%d" % number)
        storage.flush()
    storage.checkpoint("/d/copy")
    image = {path: data for path, data in files.image().items() if path.endswith(".part")}
    for path in image:
        if path == "/d/state/2.part":
            continue  # nothing follows it: a state as it was before
        damaged = FaultyFiles.of_image({other: data for other, data in image.items() if other != path})
        with pytest.raises(StartupError) as caught:
            FileStorage(damaged, path.rpartition("/")[0], True)
        assert caught.value.code == "state_damaged"


def test_a_checkpoint_is_durable_and_can_be_gone_on_from() -> None:
    files = FaultyFiles()
    storage = FileStorage(files, "/d/state")
    put(storage, b"a", b"b", b"c", b"d")
    storage.checkpoint("/d/copy")
    with pytest.raises(StorageFailed):
        storage.checkpoint("/d/copy")
    files.crash()
    assert len(contents(FileStorage(files, "/d/copy", True))) == 4
    copy = FileStorage(files, "/d/copy")
    put(copy, b"e")
    copy.flush()
    files.crash()
    assert len(contents(FileStorage(files, "/d/copy"))) == 5
    assert contents(FileStorage(files, "/d/state")) == {}


def test_a_disk_that_fails_loses_nothing_that_the_next_flush_does_not_write() -> None:
    files = FaultyFiles()
    storage = FileStorage(files, "/d/state")
    put(storage, b"a")
    files.fail_sync()
    with pytest.raises(StorageFailed) as caught:
        storage.flush()
    assert caught.value.errno == errno.EIO
    put(storage, b"b", value=b"x" * 100)
    files.capacity_bytes = files.used_bytes + 50
    for attempt in (storage.flush, lambda: storage.checkpoint("/d/copy")):
        with pytest.raises(StorageFailed) as caught:
            attempt()
        assert caught.value.errno == errno.ENOSPC
    assert set(contents(storage)) == {b"a", b"b"}
    files.capacity_bytes = None
    storage.flush()
    files.crash()
    assert set(contents(FileStorage(files, "/d/state"))) == {b"a", b"b"}


def test_a_storage_has_one_owner_and_dies_with_its_process() -> None:
    files = FaultyFiles()
    open_storage = FileStorage.opener(files)
    storage = open_storage("/d/state")
    with pytest.raises(StartupError) as caught:
        open_storage("/d/state")
    assert caught.value.code == "data_dir_in_use"
    storage.close()
    storage.close()
    storage = open_storage("/d/state")
    put(storage, b"a")
    files.kill()
    uses: list[Callable[[], object]] = [
        lambda: storage.get(b"a"),
        lambda: storage.scan(b"", b"\xff"),
        lambda: put(storage, b"b"),
        storage.flush,
        lambda: storage.checkpoint("/d/copy"),
    ]
    for use in uses:
        with pytest.raises(StorageFailed) as failed:
            use()
        assert failed.value.errno == errno.EBADF
    again = open_storage("/d/state")
    storage.close()  # the dead one's lock is not its own any more
    with pytest.raises(StartupError):
        open_storage("/d/state")
    assert contents(again) == {}


def test_a_flush_in_a_thread_is_durable_when_the_thread_ends() -> None:
    for commits in (False, True):
        files = FaultyFiles()
        storage = FileStorage(files, "/d/state")
        put(storage, b"a")
        work = files.begin_deferred()
        storage.flush()
        files.end_deferred(work)
        put(storage, b"b")
        if commits:
            files.commit(work)
        files.crash()
        assert set(contents(FileStorage(files, "/d/state"))) == ({b"a"} if commits else set())


def test_a_read_only_open_changes_nothing() -> None:
    files = FaultyFiles()
    storage = FileStorage(files, "/d/state")
    put(storage, b"a")
    storage.flush()
    files.stop_after = files.operation_count + 2
    put(storage, b"b")
    with pytest.raises(Stopped):
        storage.flush()
    files.crash(keep_everything)
    before = files.image()
    assert any(path.endswith(".tmp") for path in before)
    storage = FileStorage(files, "/d/state", True)
    FileStorage(files, "/d/state", True)
    assert contents(storage) == {b"a": b"value"}
    assert files.image() == before
