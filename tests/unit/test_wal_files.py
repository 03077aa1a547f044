"""The file layers that the log is tested on do what they say: `fake_files.FaultyFiles`, `powerloss.PowerLossFiles`."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.env import Files, SystemFiles
from kvstore.raft.wal import Wal
from tests.fake_files import FaultyFiles, Stopped, keep_everything, keep_prefix, keep_random
from tests.powerloss import PowerLossFiles

# --- all three behave alike while nothing fails -----------------------------------------------------------------------


@pytest.fixture(params=["system", "faulty", "power-loss", "power-loss without sync"])
def files_and_root(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Files, str]:
    root = f"{tmp_path}/root"
    files: dict[str, Files] = {
        "system": SystemFiles(),
        "faulty": FaultyFiles(),
        "power-loss": PowerLossFiles(),
        "power-loss without sync": PowerLossFiles(sync_does_nothing=True),
    }
    files[request.param].make_dirs(root)
    return files[request.param], root


def test_files_read_as_they_were_written(files_and_root: tuple[Files, str]) -> None:
    files, root = files_and_root
    file = files.open(f"{root}/a", create=True)
    file.write_at(0, [b"hello ", bytearray(b"wor"), memoryview(b"ld")])
    assert (file.size(), file.read_at(6, 100), files.read(f"{root}/a")) == (11, b"world", b"hello world")
    file.sync()
    file.write_at(15, [b"!"])
    assert file.read_at(0, 100) == b"hello world\0\0\0\0!"
    file.truncate(5)
    file.allocate(8)
    file.allocate(3)
    assert files.read(f"{root}/a") == b"hello\0\0\0"
    file.sync()
    file.write_at(0, [b"j"])
    file.close()
    assert files.size(f"{root}/a") == 8
    again = files.open(f"{root}/a")
    assert again.read_at(0, 5) == b"jello"
    again.close()


def test_names_are_as_they_were_made(files_and_root: tuple[Files, str]) -> None:
    files, root = files_and_root
    files.make_dirs(f"{root}/sub/deep")
    assert files.is_dir(f"{root}/sub/deep")
    assert not files.is_dir(f"{root}/none")
    for name in ("b", "a", "sub/c"):
        files.open(f"{root}/{name}", create=True).close()
    with pytest.raises(FileExistsError):
        files.open(f"{root}/a", create=True)
    with pytest.raises(FileNotFoundError):
        files.open(f"{root}/none")
    with pytest.raises(FileNotFoundError):
        files.open(f"{root}/none/a", create=True)
    with pytest.raises(FileNotFoundError):
        files.read(f"{root}/none")
    with pytest.raises(FileNotFoundError):
        files.rename(f"{root}/none", f"{root}/a")
    with pytest.raises(FileNotFoundError):
        files.remove(f"{root}/none")
    assert files.list_dir(root) == ["a", "b", "sub"]
    assert files.list_dir(f"{root}/none") == []
    files.sync_dir(root)
    files.rename(f"{root}/a", f"{root}/sub/a")
    files.sync_dir(f"{root}/sub")
    files.replace(f"{root}/b", b"new")
    files.replace(f"{root}/b", b"newer")
    assert files.read(f"{root}/b") == b"newer"
    assert files.list_dir(root) == ["b", "sub"]
    assert files.list_dir(f"{root}/sub") == ["a", "c", "deep"]
    files.remove(f"{root}/sub/c")
    assert not files.exists(f"{root}/sub/c")
    files.open(f"{root}/sub/c", create=True).close()
    assert files.exists(f"{root}/sub/c")
    files.sync_dir(f"{root}/sub")
    files.remove_tree(f"{root}/sub")
    files.remove_tree(f"{root}/sub")
    assert not files.exists(f"{root}/sub")
    assert files.list_dir(root) == ["b"]


def test_a_rename_replaces_what_was_there(files_and_root: tuple[Files, str]) -> None:
    files, root = files_and_root
    for name in ("old", "new"):
        file = files.open(f"{root}/{name}", create=True)
        file.write_at(0, [name.encode()])
        file.sync()
        file.close()
    files.sync_dir(root)
    held = files.open(f"{root}/old")
    files.rename(f"{root}/new", f"{root}/old")
    files.sync_dir(root)
    assert files.read(f"{root}/old") == b"new"
    assert files.list_dir(root) == ["old"]
    held.close()


def test_a_lock_is_held_by_one(files_and_root: tuple[Files, str]) -> None:
    files, root = files_and_root
    release = files.lock(f"{root}/lock")
    assert release is not None
    assert files.lock(f"{root}/lock") is None
    release()
    assert files.lock(f"{root}/lock") is not None


def test_a_log_lives_on_all_of_them(files_and_root: tuple[Files, str]) -> None:
    files, root = files_and_root
    for round_ in range(3):
        wal = Wal.open(files, f"{root}/wal", node_id="n", segment_bytes=500)
        assert wal.last_index == round_ * 20
        for index in range(wal.last_index + 1, wal.last_index + 21):
            wal.append(b"x" * 30, index, 1)
            wal.sync()
        wal.drop_before(wal.last_index - 3, 0)
        wal.close()
    assert len(files.list_dir(f"{root}/wal")) < 5


# --- FaultyFiles ------------------------------------------------------------------------------------------------------


def written(files: FaultyFiles, *, sync: bool) -> None:
    files.make_dirs("d")
    file = files.open("d/a", create=True)
    file.write_at(0, [b"old" * 600])
    file.sync()
    files.sync_dir("d")
    file.write_at(0, [b"new" * 600])
    if sync:
        file.sync()


def test_power_loss_loses_what_was_not_synced() -> None:
    for sync in (False, True):
        files = FaultyFiles()
        written(files, sync=sync)
        files.crash()
        assert files.read("d/a") == (b"new" if sync else b"old") * 600
    files = FaultyFiles()
    written(files, sync=False)
    files.crash(keep_everything)
    assert files.read("d/a") == b"new" * 600


def test_power_loss_may_cut_at_any_byte() -> None:
    for size in range(1801):
        files = FaultyFiles()
        written(files, sync=False)
        files.crash(keep_prefix(size))
        assert files.read("d/a") == (b"new" * 600)[:size] + (b"old" * 600)[size:]


def test_power_loss_may_keep_any_sectors() -> None:
    seen = set()
    for seed in range(100):
        files = FaultyFiles()
        written(files, sync=False)
        files.crash(keep_random(random.Random(seed)))
        data = files.read("d/a")
        seen.add(tuple(data[at : at + 512] == (b"new" * 600)[at : at + 512] for at in range(0, 1800, 512)))
    assert len(seen) == 16


def test_power_loss_loses_names_that_were_not_synced() -> None:
    files = FaultyFiles()
    written(files, sync=True)
    files.rename("d/a", "d/b")
    file = files.open("d/c", create=True)
    file.write_at(0, [b"synced"])
    file.sync()  # its content, not its name
    files.crash()
    assert files.list_dir("d") == ["a"]
    files.rename("d/a", "d/b")
    files.sync_dir("d")
    files.remove("d/b")
    files.crash()
    assert files.read("d/b") == b"new" * 600


def test_names_survive_in_the_order_they_were_made() -> None:
    seen = set()
    for seed in range(50):
        files = FaultyFiles(random.Random(seed))
        files.make_dirs("d")
        for name in "abc":
            files.open(f"d/{name}", create=True)
        files.crash(keep_random(files.chance))
        seen.add("".join(files.list_dir("d")))
    assert seen == {"", "a", "ab", "abc"}


def test_a_truncation_is_undone_by_power_loss() -> None:
    files = FaultyFiles()
    written(files, sync=True)
    file = files.open("d/a")
    file.truncate(100)
    file.allocate(4000)
    assert files.read("d/a") == (b"new" * 600)[:100] + bytes(3900)
    files.crash()
    assert files.read("d/a") == b"new" * 600


def test_files_of_a_dead_process_are_closed() -> None:
    files = FaultyFiles()
    files.make_dirs("d")
    file = files.open("d/a", create=True)
    files.kill()
    assert files.exists("d/a")
    with pytest.raises(OSError, match="file used after") as caught:
        file.write_at(0, [b"x"])
    assert caught.value.errno == errno.EBADF


def test_a_failed_sync_forgets_what_it_did_not_write() -> None:
    outcomes = set()
    for seed in range(20):
        files = FaultyFiles(random.Random(seed))
        written(files, sync=False)
        files.fail_sync()
        file = files.open("d/a")
        with pytest.raises(OSError, match="Input/output error"):
            file.sync()
        assert file.read_at(0, 2000) == b"new" * 600  # the page cache says so
        file.sync()  # and so does the kernel
        if seed % 2:
            file.write_at(0, [b"new" * 600])
            file.sync()
        files.crash(keep_everything)
        data = files.read("d/a")
        outcomes.add((seed % 2, data == b"new" * 600))
    assert outcomes >= {(0, False), (1, True)}
    assert (1, False) not in outcomes


def test_a_full_disk_takes_what_fits() -> None:
    files = FaultyFiles(capacity_bytes=1000)
    files.make_dirs("d")
    file = files.open("d/a", create=True)
    file.allocate(900)
    with pytest.raises(OSError, match="No space left") as caught:
        file.allocate(1001)
    assert caught.value.errno == errno.ENOSPC
    file.write_at(0, [b"x" * 900])  # within what is allocated
    with pytest.raises(OSError, match="No space left"):
        file.write_at(800, [b"y" * 300])
    assert files.read("d/a") == b"x" * 800 + b"y" * 200
    assert files.free_bytes == 0
    files.remove("d/a")
    assert files.free_bytes == 1000


def test_it_stops_at_any_operation() -> None:
    files = FaultyFiles()
    files.stop_after = 2
    files.make_dirs("d")
    file = files.open("d/a", create=True)
    file.write_at(0, [b"x"])
    for _ in range(2):
        with pytest.raises(Stopped):
            file.sync()
    files.crash()
    assert files.stop_after is None


# --- PowerLossFiles: the same directory seen by another process is what a SIGKILL would leave -------------------------


def test_nothing_is_on_the_disk_before_a_sync(tmp_path: Path) -> None:
    files, disk = PowerLossFiles(), SystemFiles()
    root = str(tmp_path)
    file = files.open(f"{root}/a", create=True)
    file.allocate(1000)
    file.write_at(0, [b"one"])
    file.sync()
    assert disk.list_dir(root) == []  # it has no name yet
    file.write_at(0, [b"two"])
    files.sync_dir(root)
    assert disk.read(f"{root}/a") == b"one" + bytes(997)
    file.sync()
    assert disk.read(f"{root}/a") == b"two" + bytes(997)
    file.truncate(10)
    files.rename(f"{root}/a", f"{root}/b")
    assert disk.list_dir(root) == ["a"]
    file.sync()
    assert disk.read(f"{root}/a") == b"two" + bytes(7)
    files.sync_dir(root)
    assert disk.list_dir(root) == ["b"]
    files.remove(f"{root}/b")
    assert (files.list_dir(root), disk.list_dir(root)) == ([], ["b"])
    files.sync_dir(root)
    assert disk.list_dir(root) == []
    files.replace(f"{root}/c", b"three")
    assert disk.read(f"{root}/c") == b"three"


def test_without_sync_nothing_ever_reaches_the_disk(tmp_path: Path) -> None:
    files, disk = PowerLossFiles(sync_does_nothing=True), SystemFiles()
    root = str(tmp_path)
    files.replace(f"{root}/a", b"one")
    file = files.open(f"{root}/b", create=True)
    file.write_at(0, [b"two"])
    file.sync()
    files.sync_dir(root)
    assert files.list_dir(root) == ["a", "b"]
    assert files.read(f"{root}/a") == b"one"
    assert disk.list_dir(root) == []


# Appends and syncs one entry after the other, and says which are acknowledged.
WRITER = """
import sys
from kvstore.raft.wal import Wal
from tests.powerloss import PowerLossFiles

wal = Wal.open(PowerLossFiles(sync_does_nothing=sys.argv[2] == "control"), sys.argv[1], node_id="n", segment_bytes=3000)
print("opened", wal.last_index, flush=True)
for index in range(wal.last_index + 1, 1_000_000):
    wal.append(b"%d" % index * 20, index, 1)
    wal.sync()
    print(index, flush=True)
    wal.set_term(index, "never synced")
"""


def acknowledged_before_kill(directory: str, mode: str, count: int) -> int:
    """Start the writer, kill it after `count` acknowledgements, and tell the last one that it gave."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, directory, mode],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline().startswith("opened")
        last = [writer.stdout.readline() for _ in range(count)][-1]
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.stdout.read().splitlines(keepends=True)
    return int([line for line in [last, *rest] if line.endswith("\n")][-1])


def test_a_killed_process_loses_just_what_it_had_not_synced(tmp_path: Path) -> None:
    directory = f"{tmp_path}/wal"
    for count in (40, 65):
        acknowledged = acknowledged_before_kill(directory, "power-loss", count)
        wal = Wal.open(SystemFiles(), directory, node_id="n", segment_bytes=3000)
        assert wal.last_index - acknowledged in (0, 1)  # the last answer may not have been read
        assert wal.entries[-1][0] == b"%d" % wal.last_index * 20
        wal.close()


def test_the_control_without_sync_loses_what_was_acknowledged(tmp_path: Path) -> None:
    directory = f"{tmp_path}/wal"
    assert acknowledged_before_kill(directory, "control", 40) >= 40
    assert Wal.open(SystemFiles(), directory, node_id="n", segment_bytes=3000).last_index == 0
