"""A file system in memory that fails as disks do: `FaultyFiles`, an `env.Files` for tests and the simulation.

What it models, of a journalling file system on a disk with a volatile cache:

- **Data** written and not synced sits in the page cache. A power loss (`crash`) keeps of it what `keep` says, sector by
  sector: nothing, all, a prefix cut at any byte, or a random choice, in any order. A sector's old content is what was
  last synced. `truncate` and `allocate` (the size, and what reads as zero since) are kept or lost as a whole.
- **Names**: creating, renaming and removing are lost until the directory is synced. A power loss keeps a prefix of
  those that were not, in the order they were made, as a journal does.
- **A killed process** (`kill`) loses nothing that was written, but nothing becomes durable by it either.
- **A sync in a thread** (`begin_deferred`, `end_deferred`, `commit`) covers what was written when the thread began, and
  has done so only when the thread ends. A power loss in between finds the thread after any of its syncs: nothing that
  it did behind that one is on the disk.
- **A failed sync** (`fail_sync`) keeps a random part of the data and forgets, as Linux does, that the rest is not on
  the disk: the next sync succeeds and does not write it. What is written anew is written.
- **A full disk** (`capacity_bytes`): a write or an allocation beyond it raises ENOSPC; a write first writes what fits.
- **A slow disk** (`sync_takes`, `on_slow`): each sync takes some seconds, and whoever minds is told of them.
- **Bit rot** (`flip`, `flip_somewhere`) in what is on the disk.
- **Stopping at any operation** (`stop_after`): the operation with that number raises `Stopped` instead of running.
- **Moments** (`on_renamed`, `on_removed`): called with the path right after a file was renamed or removed.

Sectors are written whole or not at all, but where `keep` cuts one. Files opened before `crash` or `kill` are dead
afterwards: using one raises EBADF. All randomness comes from the `chance` that is given, so a run can be repeated.

Every operation costs what it touches, and no more: zeroes at the end of a file take no room, and a file's size is no
matter where nothing was written. Only renaming and removing directories, and listing them, look at every name.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Sequence

from tests.fake_inode import (
    SECTOR_BYTES,
    Covered,
    Inode,
    Keep,
    RandomBits,
    keep_everything,
    keep_nothing,
    keep_prefix,
    keep_random,
)

__all__ = [
    "SECTOR_BYTES",
    "FaultyFile",
    "FaultyFiles",
    "Keep",
    "RandomBits",
    "Stopped",
    "keep_everything",
    "keep_nothing",
    "keep_prefix",
    "keep_random",
]


class Stopped(BaseException):
    """The machine stopped in the middle of an operation. No caller may handle it, whatever else it handles."""


class FaultyFile:
    """An `env.File` on a `FaultyFiles`."""

    __slots__ = ("_files", "_generation", "_inode", "_open", "path")

    def __init__(self, files: FaultyFiles, inode: Inode, path: str) -> None:
        self._files = files
        self._inode = inode
        self._generation = files.generation
        self._open = True
        self.path = path

    def _check(self) -> None:
        if not self._open or self._generation != self._files.generation:
            raise OSError(errno.EBADF, "file used after it was closed or its process ended", self.path)

    def write_at(self, offset: int, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        self._check()
        files, inode = self._files, self._inode
        files.step("write")
        content = b"".join(buffers)
        missing = offset + len(content) - inode.size_bytes - files.free_bytes
        if missing > 0:
            content = content[: max(0, len(content) - missing)]
        if content:
            end = offset + len(content)
            if inode.links and end > inode.size_bytes:
                files.used_bytes += end - inode.size_bytes
            files.changes_data(inode, offset, end)
            inode.write(offset, content)
        if missing > 0:
            raise OSError(errno.ENOSPC, "No space left on device", self.path)

    def sync(self) -> None:
        self._check()
        self._files.step("sync")
        self._files.sync_count += 1
        self._files.takes_time()
        if self._files.take_sync_failure():
            self._inode.sync_failed(self._files.chance)
            raise OSError(errno.EIO, "Input/output error", self.path)
        self._files.sync_inode(self._inode)

    def truncate(self, size_bytes: int) -> None:
        self._check()
        self._files.step("truncate")
        self._resize(size_bytes)

    def allocate(self, size_bytes: int) -> None:
        self._check()
        self._files.step("allocate")
        grows = size_bytes - self._inode.size_bytes
        if grows > self._files.free_bytes:
            raise OSError(errno.ENOSPC, "No space left on device", self.path)
        if grows > 0:
            self._resize(size_bytes)

    def _resize(self, size_bytes: int) -> None:
        files, inode = self._files, self._inode
        if inode.links:
            files.used_bytes += size_bytes - inode.size_bytes
        files.changes_data(inode, size_bytes, len(inode.data))
        inode.resize(size_bytes)

    def size(self) -> int:
        self._check()
        return self._inode.size_bytes

    def read_at(self, offset: int, size_bytes: int) -> bytes:
        self._check()
        return self._inode.read(offset, size_bytes)

    def close(self) -> None:
        self._open = False


class _Change:
    """A change of names that no directory sync has made durable yet."""

    __slots__ = ("directories", "names", "number", "work", "work_syncs")

    def __init__(
        self, number: int, names: dict[str, Inode | None], directories: set[str], work: DeferredWork | None
    ) -> None:
        self.number = number
        self.names = names
        self.directories = directories
        # It was made in a thread, behind so many of the thread's syncs.
        self.work = work
        self.work_syncs = len(work.syncs) if work is not None else 0

    @property
    def may_be_kept(self) -> bool:
        return self.work is None or self.work_syncs == 0


class DeferredWork:
    """What a thread did: its syncs, in order, and what it wrote behind the first of them."""

    __slots__ = ("late_sectors", "syncs", "writes_late")

    def __init__(self) -> None:
        # Of a file, or of names up to a number that are in a directory.
        self.syncs: list[tuple[Inode, Covered] | tuple[str, int]] = []
        self.late_sectors: dict[Inode, dict[int, int]] = {}  # sector -> behind how many of the syncs
        self.writes_late = False


class FaultyFiles:
    """An `env.Files` in memory. See the module's docstring for what it does to its files, and when."""

    def __init__(self, chance: RandomBits | None = None, capacity_bytes: int | None = None) -> None:
        self.chance = chance or random.Random(0)
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.generation = 0  # of the process that uses it
        self.operation_count = 0
        self.sync_count = 0
        self.stop_after: int | None = None
        self.on_renamed: Callable[[str], None] | None = None
        self.on_removed: Callable[[str], None] | None = None
        self.sync_takes: Callable[[], float] | None = None  # seconds
        self.on_slow: Callable[[float], None] | None = None
        self._names: dict[str, Inode] = {}
        self._durable: dict[str, Inode] = {}
        self._directories = {"", ".", "/"}  # their own durability is not modelled
        self._changes: list[_Change] = []
        self._change_count = 0
        self._sync_failures = 0
        self._locks: set[str] = set()
        self._work: DeferredWork | None = None  # of the thread whose work is being done
        self._unended: list[DeferredWork] = []  # threads that have not ended, oldest first

    # --- faults -------------------------------------------------------------------------------------------------------

    def fail_sync(self, times: int = 1) -> None:
        """The next syncs of files fail with EIO."""
        self._sync_failures = times

    @property
    def sync_failures_due(self) -> int:
        """How many of the next syncs fail."""
        return self._sync_failures

    def take_sync_failure(self) -> bool:
        if self._sync_failures == 0:
            return False
        self._sync_failures -= 1
        return True

    def crash(self, keep: Keep = keep_nothing) -> None:
        """Power loss, then power again. Of what was not synced, `keep` is kept; of names, a random prefix (none with
        `keep_nothing`, all with `keep_everything`). Threads had come as far as one of their syncs, by the same rule."""
        late: dict[Inode, set[int]] = {}
        for work in self._unended:
            ended = self._share(keep, len(work.syncs))
            self._sync_ended(work, ended)
            for inode, sectors in work.late_sectors.items():
                behind = {number for number, syncs in sectors.items() if syncs > ended}
                late.setdefault(inode, set()).update(behind)
        for change in self._changes[: self._share(keep, len(self._changes))]:
            if change.may_be_kept:
                self._make_durable(change)
        self._changes.clear()
        self._unended.clear()
        self._names = dict(self._durable)
        for path, inode in sorted(self._names.items()):
            keep_size = keep is keep_everything or (keep is not keep_nothing and self.chance.random() < 0.5)
            inode.lose(path, keep, keep_size, late.get(inode, set()))
            inode.links = 1
            self.make_dirs(_parent(path))  # it may have been removed, and that lost
        self.used_bytes = sum(inode.size_bytes for inode in self._names.values())
        self.kill()

    def _share(self, keep: Keep, count: int) -> int:
        if keep is keep_nothing:
            return 0
        return count if keep is keep_everything else int(self.chance.random() * (count + 1))

    def kill(self) -> None:
        """The process that used the files dies; the machine goes on. A thread that was at the last of its syncs leaves
        that undone; one that has written since then had come to its end."""
        for work in self._unended:
            if work.writes_late:
                self._sync_ended(work, len(work.syncs))
            self._let_go(work)
        self._unended.clear()
        self._work = None
        self.generation += 1
        self.stop_after = None
        self.on_renamed = self.on_removed = None
        self._locks.clear()

    def step(self, name: str) -> None:
        """Called before each operation that changes something."""
        if self.stop_after is not None and self.operation_count >= self.stop_after:
            raise Stopped(f"stopped before operation {self.operation_count}, a {name}")
        self.operation_count += 1

    @property
    def free_bytes(self) -> int:
        return 2**62 if self.capacity_bytes is None else max(0, self.capacity_bytes - self.used_bytes)

    def takes_time(self) -> None:
        """Called in each sync."""
        if self.sync_takes is not None and self.on_slow is not None:
            self.on_slow(self.sync_takes())

    # --- work in threads ----------------------------------------------------------------------------------------------

    def begin_deferred(self) -> DeferredWork:
        """What is done until `end_deferred` is done in a thread: all of it at once, at the thread's beginning. What it
        makes durable becomes so with `commit`, at the thread's end."""
        assert self._work is None, "one thread's work at a time"
        self._work = DeferredWork()
        self._unended.append(self._work)
        return self._work

    def end_deferred(self, work: DeferredWork) -> None:
        """To be called also where the work raised. What is done from here on is done outside of the thread."""
        if self._work is work:  # else the process ended in it
            self._work = None

    def commit(self, work: DeferredWork) -> None:
        """The thread ends. Nothing happens if its process did before."""
        if work in self._unended:
            assert self._work is not work, "its work is still being done"
            self._unended.remove(work)
            self._sync_ended(work, len(work.syncs))
            self._let_go(work)

    def sync_inode(self, inode: Inode) -> None:
        if self._work is None:
            inode.synced()
        else:
            self._work.syncs.append((inode, inode.cover()))

    def changes_data(self, inode: Inode, start: int, end: int) -> None:
        """Called before each change of a file's content."""
        work = self._work
        if work is not None and work.syncs:
            work.writes_late = True
            sectors = work.late_sectors.setdefault(inode, {})
            for number in range(start // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
                sectors[number] = len(work.syncs)

    def _sync_ended(self, work: DeferredWork, count: int) -> None:
        """The first `count` of a thread's syncs have ended."""
        for sync in work.syncs[:count]:
            if isinstance(sync[0], str):
                self._make_names_durable(sync[1], work)
            else:
                sync[0].sync_ended(sync[1])
        for change in self._changes:
            if change.work is work and change.work_syncs <= count:
                change.work = None

    def _let_go(self, work: DeferredWork) -> None:
        """Nothing tells its changes from others any more."""
        for change in self._changes:
            if change.work is work:
                change.work = None
        for sync in work.syncs:
            if not isinstance(sync[0], str) and sync[1] in sync[0].covered:
                sync[0].covered.remove(sync[1])

    # --- looking at and damaging what is on the disk ------------------------------------------------------------------

    def image(self) -> dict[str, bytes]:
        """All files as they read now."""
        return {path: inode.read(0, inode.size_bytes) for path, inode in self._names.items()}

    def durable_paths(self, prefix: str = "") -> list[str]:
        """The files that a power loss with nothing kept would leave."""
        return sorted(path for path in self._durable if path.startswith(prefix))

    def durable_read(self, path: str, offset: int, size_bytes: int) -> bytes:
        """Up to `size_bytes` of what is on the disk, whatever the page cache says. Costs what it reads."""
        inode = self._durable[path]
        end = min(offset + size_bytes, inode.durable_bytes)
        if end <= offset:
            return b""
        held = inode.data[offset:end].ljust(end - offset, b"\0")
        for differs in (inode.forgotten, inode.old):
            if differs:
                for number in range(offset // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
                    if number in differs:
                        at = number * SECTOR_BYTES
                        begin, until = max(at, offset), min(at + SECTOR_BYTES, end)
                        held[begin - offset : until - offset] = differs[number][begin - at : until - at]
        return bytes(held)

    def flip(self, path: str, offset: int, bit: int) -> None:
        """A bit of what is on the disk becomes the opposite; of what is in the page cache too, unless that was written
        anew and waits for a sync. The file must be there durably, and as large."""
        inode = self._durable[path]
        assert 0 <= offset < inode.durable_bytes, f"{path} has {inode.durable_bytes} bytes, and none at {offset}"
        number, at = divmod(offset, SECTOR_BYTES)
        for differs in (inode.old, inode.forgotten):
            if number in differs:
                content = bytearray(differs[number])
                content[at] ^= 1 << bit
                differs[number] = bytes(content)
                return
        inode.data.extend(bytes(max(0, offset + 1 - len(inode.data))))
        inode.data[offset] ^= 1 << bit

    def flip_somewhere(self, chance: RandomBits | None = None, prefix: str = "") -> tuple[str, int, int] | None:
        """Flip a random bit in the durable content of files whose path begins with `prefix`, each byte as likely as
        another. (path, offset, bit), or None where there is nothing. What was only reserved, the zeroes at the end of
        a file, is left alone, and so is what was written anew and not synced."""
        draw = (chance or self.chance).random
        inodes = [
            (path, inode, min(len(inode.data), inode.durable_bytes))
            for path, inode in sorted(self._durable.items())
            if path.startswith(prefix) and self._names.get(path) is inode
        ]
        at = int(draw() * sum(size for _, _, size in inodes))
        for path, inode, size in inodes:
            if at < size:
                if at // SECTOR_BYTES in inode.old or at // SECTOR_BYTES in inode.forgotten:
                    return None
                bit = int(draw() * 8)
                self.flip(path, at, bit)
                return path, at, bit
            at -= size
        return None

    @classmethod
    def of_image(cls, image: dict[str, bytes], chance: RandomBits | None = None) -> FaultyFiles:
        """A disk on which just these files are, durably."""
        files = cls(chance)
        for path, content in image.items():
            files.make_dirs(_parent(path))
            inode = Inode()
            inode.data[:] = content
            inode.size_bytes = len(content)
            inode.links = 1
            inode.synced()
            files.used_bytes += len(content)
            files._names[path] = files._durable[path] = inode
        return files

    # --- env.Files ----------------------------------------------------------------------------------------------------

    def open(self, path: str, create: bool = False) -> FaultyFile:
        if create:
            if path in self._names or path in self._directories:
                raise FileExistsError(errno.EEXIST, "File exists", path)
            self._need_directory(_parent(path))
            self.step("create")
            self._change({path: Inode()})
        return FaultyFile(self, self._inode(path), path)

    def read(self, path: str) -> bytes:
        inode = self._inode(path)
        return inode.read(0, inode.size_bytes)

    def replace(self, path: str, data: bytes) -> None:
        temporary = path + ".tmp"
        if self.exists(temporary):
            self.remove(temporary)
        file = self.open(temporary, create=True)
        file.write_at(0, [data])
        file.sync()
        file.close()
        self.rename(temporary, path)
        self.sync_dir(_parent(path))

    def rename(self, old: str, new: str) -> None:
        self._need_directory(_parent(new))
        if old in self._directories:
            self.step("rename")
            moved = {path: inode for path, inode in self._names.items() if path.startswith(old + "/")}
            self._directories = {
                new + path[len(old) :] if path == old or path.startswith(old + "/") else path
                for path in self._directories
            }
            names: dict[str, Inode | None] = dict.fromkeys(moved)
            names.update({new + path[len(old) :]: inode for path, inode in moved.items()})
            self._change(names, {_parent(old), _parent(new)})
            return
        inode = self._inode(old)
        self.step("rename")
        self._change({old: None, new: inode})
        if self.on_renamed is not None:
            self.on_renamed(new)

    def remove(self, path: str) -> None:
        self._inode(path)
        self.step("remove")
        self._change({path: None})
        if self.on_removed is not None:
            self.on_removed(path)

    def remove_tree(self, path: str) -> None:
        if path not in self._directories:
            return
        self.step("remove_tree")
        inside = path + "/"
        names: dict[str, Inode | None] = dict.fromkeys(name for name in self._names if name.startswith(inside))
        self._change(names, {_parent(path)})
        self._directories = {name for name in self._directories if name != path and not name.startswith(inside)}

    def make_dirs(self, path: str) -> None:
        if path in self._names:
            raise FileExistsError(errno.EEXIST, "File exists", path)
        while path not in self._directories:
            self._directories.add(path)
            path = _parent(path)

    def list_dir(self, path: str) -> list[str]:
        inside = "" if path in ("", ".") else path.rstrip("/") + "/"
        names = [name[len(inside) :] for name in (*self._names, *self._directories) if name.startswith(inside)]
        return sorted({name.split("/")[0] for name in names} - {"", "."})

    def exists(self, path: str) -> bool:
        return path in self._names or path in self._directories

    def is_dir(self, path: str) -> bool:
        return path in self._directories

    def size(self, path: str) -> int:
        return self._inode(path).size_bytes

    def sync_dir(self, path: str) -> None:
        self._need_directory(path)
        self.step("sync_dir")
        self.takes_time()
        # As a journal does: with a directory's last change, everything before it is written too.
        last = next((change.number for change in reversed(self._changes) if path in change.directories), 0)
        if self._work is not None:
            self._work.syncs.append((path, last))
        else:
            self._make_names_durable(last, None)

    def lock(self, path: str) -> Callable[[], None] | None:
        if path in self._locks:
            return None
        if path not in self._names:
            self.open(path, create=True)
        self._locks.add(path)
        generation = self.generation

        def release() -> None:
            if generation == self.generation:  # else it may be another process's by now
                self._locks.discard(path)

        return release

    # --- names --------------------------------------------------------------------------------------------------------

    def _inode(self, path: str) -> Inode:
        if path in self._directories:
            raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
        if path not in self._names:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return self._names[path]

    def _need_directory(self, path: str) -> None:
        if path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    def _change(self, names: dict[str, Inode | None], directories: set[str] | None = None) -> None:
        for path, inode in names.items():
            before = self._names.pop(path, None)
            if before is not None:
                before.links -= 1
                self.used_bytes -= 0 if before.links else before.size_bytes
            if inode is not None:
                self._names[path] = inode
                inode.links += 1
                self.used_bytes += inode.size_bytes if inode.links == 1 else 0
        if directories is None:
            directories = {_parent(path) for path in names}
        self._change_count += 1
        work = self._work
        if work is not None and work.syncs:
            work.writes_late = True
        self._changes.append(_Change(self._change_count, names, directories, work))

    def _make_names_durable(self, until: int, work: DeferredWork | None) -> None:
        """Changes up to that number; but not what other threads did behind a sync that has not ended."""
        if until == 0:
            return
        left = []
        for at, change in enumerate(self._changes):
            if change.number > until:
                left += self._changes[at:]
                break
            if change.work is work or change.may_be_kept:
                self._make_durable(change)
            else:
                left.append(change)
        self._changes = left

    def _make_durable(self, change: _Change) -> None:
        for path, inode in change.names.items():
            if inode is None:
                self._durable.pop(path, None)
            else:
                self._durable[path] = inode


def _parent(path: str) -> str:
    head, separator, _ = path.rpartition("/")
    return head or ("/" if separator else "")
