"""`fake_files.FaultyFiles`: syncs in threads, bit rot, slow disks. (The rest: unit/test_wal_files.py.)"""

from __future__ import annotations

from random import Random

import pytest

from tests.fake_files import (
    SECTOR_BYTES,
    FaultyFile,
    FaultyFiles,
    Stopped,
    keep_everything,
    keep_nothing,
    keep_random,
)
from tests.fake_inode import HELD_ZEROES_BYTES


def create(files: FaultyFiles, path: str, content: bytes = b"") -> FaultyFile:
    files.make_dirs(path.rpartition("/")[0])
    file = files.open(path, create=True)
    if content:
        file.write_at(0, [content])
    return file


def durable(files: FaultyFiles, path: str, content: bytes) -> FaultyFile:
    file = create(files, path, content)
    file.sync()
    files.sync_dir(path.rpartition("/")[0])
    return file


def test_nothing_handles_a_stop() -> None:
    assert not issubclass(Stopped, Exception)


# --- syncs in threads -------------------------------------------------------------------------------------------------


def test_a_sync_in_a_thread_is_durable_when_the_thread_ends() -> None:
    for commits in (False, True):
        files = FaultyFiles()
        file = durable(files, "d/log", b"old")
        file.write_at(0, [b"new"])
        work = files.begin_deferred()
        file.sync()
        files.end_deferred(work)
        if commits:
            files.commit(work)
        files.crash(keep_nothing)
        assert files.read("d/log") == (b"new" if commits else b"old")


def test_a_sync_in_a_thread_covers_what_was_written_when_it_began() -> None:
    files = FaultyFiles()
    file = durable(files, "d/log", b"0" * 3 * SECTOR_BYTES)
    file.write_at(0, [b"1"])
    file.write_at(SECTOR_BYTES, [b"1"])
    work = files.begin_deferred()
    file.sync()
    files.end_deferred(work)
    file.write_at(SECTOR_BYTES, [b"2"])  # the same sector anew
    file.write_at(2 * SECTOR_BYTES, [b"2"])
    file.write_at(3 * SECTOR_BYTES, [b"2"])
    files.commit(work)
    assert files.read("d/log")[::SECTOR_BYTES] == b"1222"
    assert files.durable_read("d/log", 0, 10_000)[::SECTOR_BYTES] == b"110"
    files.crash(keep_nothing)
    assert files.read("d/log")[::SECTOR_BYTES] == b"110"
    assert len(files.read("d/log")) == 3 * SECTOR_BYTES


def test_a_sync_outside_of_the_thread_covers_what_the_thread_s_does() -> None:
    files = FaultyFiles()
    file = durable(files, "d/log", b"0")
    file.write_at(0, [b"1"])
    work = files.begin_deferred()
    file.sync()
    files.end_deferred(work)
    file.write_at(0, [b"2"])
    file.sync()
    file.write_at(0, [b"3"])
    files.commit(work)
    files.crash(keep_nothing)
    assert files.read("d/log") == b"2"


def test_a_later_thread_may_end_first() -> None:
    files = FaultyFiles()
    file = durable(files, "d/log", b"0")
    works = []
    for content in (b"1", b"2"):
        file.write_at(0, [content])
        works.append(files.begin_deferred())
        file.sync()
        files.end_deferred(works[-1])
    file.write_at(0, [b"3"])
    files.commit(works[1])
    files.commit(works[0])
    files.crash(keep_nothing)
    assert files.read("d/log") == b"2"


def test_names_synced_in_a_thread_are_durable_when_it_ends() -> None:
    for commits in (False, True):
        files = FaultyFiles()
        files.make_dirs("d")
        work = files.begin_deferred()
        create(files, "d/new.tmp", b"x").sync()
        files.rename("d/new.tmp", "d/new")
        files.sync_dir("d")
        files.end_deferred(work)
        files.replace("d/other", b"y")  # its directory sync does not reach into the thread
        if commits:
            files.commit(work)
        create(files, "d/later")
        files.crash(keep_nothing)
        new = {"d/new": b"x"} if commits else {"d/new.tmp": b""}  # which was made before the thread's first sync
        assert files.image() == {**new, "d/other": b"y"}


def test_a_power_loss_finds_a_thread_after_any_of_its_syncs() -> None:
    """A thread that syncs a file before it renames it never leaves a name without the content, nor removes the old
    content before the new is there, wherever the power fails."""
    seen = set()
    for seed in range(300):
        chance = Random(seed)
        files = FaultyFiles(chance)
        old = durable(files, "d/old", b"old" * 1000)
        work = files.begin_deferred()
        create(files, "d/tmp", b"new" * 1000).sync()
        files.rename("d/tmp", "d/new")
        files.sync_dir("d")
        files.remove("d/old")
        old.write_at(0, [b"overwritten"])
        files.sync_dir("d")
        files.end_deferred(work)
        create(files, "d/by the loop", b"z").sync()
        if chance.random() < 0.3:
            files.sync_dir("d")
        if chance.random() < 0.3:
            files.kill()  # and then the power goes
        files.crash(keep_random(chance))
        image = files.image()
        if "d/new" in image:
            assert image["d/new"] == b"new" * 1000
        else:
            assert image["d/old"] == b"old" * 1000
        seen.add(("d/new" in image, "d/old" in image, "d/tmp" in image))
    assert seen == {(False, True, False), (False, True, True), (True, True, False), (True, False, False)}


def test_a_thread_that_dies_with_its_process_makes_nothing_durable_later() -> None:
    files = FaultyFiles()
    file = durable(files, "d/log", b"old")
    file.write_at(0, [b"new"])
    work = files.begin_deferred()
    file.sync()
    files.end_deferred(work)
    files.kill()
    assert files.read("d/log") == b"new"
    files.commit(work)
    files.crash(keep_nothing)
    assert files.read("d/log") == b"old"


def test_a_stop_within_a_thread() -> None:
    files = FaultyFiles()
    file = durable(files, "d/log", b"old")
    file.write_at(0, [b"new"])
    files.stop_after = files.operation_count + 1
    work = files.begin_deferred()
    file.sync()
    with pytest.raises(Stopped):
        file.write_at(0, [b"newer"])
    files.kill()
    files.end_deferred(work)
    files.commit(work)
    files.begin_deferred()  # the next process's


def test_a_failed_sync_in_a_thread_forgets_at_once() -> None:
    forgotten = 0
    for seed in range(40):
        files = FaultyFiles(Random(seed))
        file = durable(files, "d/log", b"old")
        file.write_at(0, [b"new"])
        files.fail_sync()
        work = files.begin_deferred()
        with pytest.raises(OSError):
            file.sync()
        file.sync()
        files.end_deferred(work)
        files.commit(work)
        files.crash(keep_everything)
        forgotten += files.read("d/log") == b"old"
    assert 10 < forgotten < 30


@pytest.mark.parametrize("seed", range(25))
def test_what_is_durable_follows_a_simple_model(seed: int) -> None:
    """Random writes and syncs of one file, some of them in threads that end in any order: with nothing kept, a power
    loss leaves the file as it was when the newest sync that has ended began."""
    chance = Random(seed)
    files = FaultyFiles(chance)
    file = durable(files, "d/log", b"")
    count = newest = 0
    states = {0: b""}  # by the number of the sync that covered it
    works = []
    for _ in range(200):
        what = chance.randrange(8)
        if what < 4:
            file.write_at(chance.randrange(4000), [bytes([chance.randrange(256)]) * chance.randrange(1, 1500)])
        elif what == 4:
            file.truncate(chance.randrange(5000))
        elif what == 5:
            count += 1
            newest, states[count] = count, files.read("d/log")
            file.sync()
        elif what == 6:
            count += 1
            states[count] = files.read("d/log")
            work = files.begin_deferred()
            file.sync()
            files.end_deferred(work)
            works.append((count, work))
        elif works:
            number, work = works.pop(chance.randrange(len(works)))
            files.commit(work)
            newest = max(newest, number)
        assert files.durable_read("d/log", 0, 10_000) == states[newest]
        assert files.used_bytes == len(files.read("d/log"))
    files.crash(keep_nothing)
    assert files.read("d/log") == states[newest]


# --- damage, slowness, space ------------------------------------------------------------------------------------------


def test_bits_rot_on_the_disk() -> None:
    files = FaultyFiles()
    file = durable(files, "d/log", b"\0" * 1000)
    files.flip("d/log", 700, 3)
    assert files.read("d/log")[700] == 8
    file.write_at(0, [b"new"])
    files.flip("d/log", 1, 0)  # only below what waits for a sync
    assert files.read("d/log")[:3] == b"new"
    files.crash(keep_nothing)
    assert files.read("d/log")[:3] == b"\0\1\0"
    assert sum(files.read("d/log")) == 9


def test_bits_rot_somewhere() -> None:
    files = FaultyFiles(Random(3))
    assert files.flip_somewhere() is None
    durable(files, "d/a/one", b"x" * 100)
    durable(files, "d/b/two", b"x" * 300).allocate(1_000_000)
    create(files, "d/b/three", b"x" * 10_000)
    hits = [files.flip_somewhere(prefix="d/") for _ in range(200)]
    assert {hit[0] for hit in hits if hit} == {"d/a/one", "d/b/two"}
    assert max(hit[1] for hit in hits if hit) < 300
    assert {hit[2] for hit in hits if hit} == set(range(8))
    before = files.image()
    hit = files.flip_somewhere(Random(1), "d/a")
    assert hit is not None
    path, offset, bit = hit
    assert path == "d/a/one"
    assert files.image()[path][offset] == before[path][offset] ^ 1 << bit
    assert files.image()["d/b/two"] == before["d/b/two"]


def test_each_sync_may_take_long() -> None:
    files, slow = FaultyFiles(), list[float]()
    durations = iter([0.1, 0.2, 0.3])
    files.sync_takes, files.on_slow = lambda: next(durations), slow.append
    file = durable(files, "d/log", b"x")
    assert slow == [0.1, 0.2]
    files.fail_sync()
    with pytest.raises(OSError):
        file.sync()
    assert slow == [0.1, 0.2, 0.3]
    files.sync_takes = None
    file.sync()
    assert len(slow) == 3


@pytest.mark.parametrize("seed", range(10))
def test_used_space_is_what_the_named_files_take(seed: int) -> None:
    chance = Random(seed)
    files = FaultyFiles(chance)
    files.make_dirs("d/x")
    opened: list[FaultyFile] = []
    for number in range(300):
        names = sorted(files.image())
        what = chance.randrange(10)
        if what == 0:
            opened.append(create(files, f"d/{number}"))
        elif what == 1 and names:
            files.remove(chance.choice(names))
        elif what == 2 and names:
            files.rename(chance.choice(names), chance.choice(["d/0", f"d/x/{number}"]))
        elif what == 3:
            files.remove_tree("d/x")
            files.make_dirs("d/x")
        elif what == 4:
            files.sync_dir("d")
        elif what == 5 and chance.random() < 0.1:
            files.crash(keep_random(chance))
            files.make_dirs("d/x")
            opened.clear()
        elif opened:
            file = chance.choice(opened)
            if what == 6:
                file.allocate(chance.randrange(100_000))
            elif what == 7:
                file.truncate(chance.randrange(2000))
            else:
                file.write_at(chance.randrange(2000), [b"x" * chance.randrange(600)])
        assert files.used_bytes == sum(map(len, files.image().values()))


def test_zeroes_that_are_written_ahead_take_no_room() -> None:
    files = FaultyFiles()
    file = create(files, "d/log")
    file.allocate(64 * 2**20)
    file.write_at(0, [b"header", bytes(2**20)])
    file.sync()
    inode = file._inode
    assert len(inode.data) <= 6 + HELD_ZEROES_BYTES
    assert file.size() == files.size("d/log") == files.used_bytes == 64 * 2**20
    assert file.read_at(0, 8) == b"header\0\0"
    assert file.read_at(2**20, 10) == bytes(10)
    assert file.read_at(64 * 2**20 - 5, 10) == bytes(5)
    file.write_at(100_000, [b"record"])
    assert file.read_at(99_999, 8) == b"\0record\0"
    files.sync_dir("d")
    files.crash(keep_nothing)
    assert files.durable_read("d/log", 99_999, 8) == bytes(8)
    assert files.size("d/log") == 64 * 2**20


def test_zeroes_written_over_something_are_written() -> None:
    files = FaultyFiles()
    file = durable(files, "d/log", b"x" * 100_000)
    file.write_at(50_000, [bytes(100_000)])
    assert files.read("d/log") == b"x" * 50_000 + bytes(100_000)
    files.crash(keep_everything)
    assert files.read("d/log") == b"x" * 50_000 + bytes(100_000)
