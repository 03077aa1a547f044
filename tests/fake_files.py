"""A file system in memory that fails as disks do: `FaultyFiles`, an `env.Files` for tests and the simulation.

What it models, of a journalling file system on a disk with a volatile cache:

- **Data** written and not synced sits in the page cache. A power loss (`crash`) keeps of it what `keep` says, sector by
  sector: nothing, all, a prefix cut at any byte, or a random choice, in any order. A sector's old content is what was
  last synced. `truncate` and `allocate` (the size, and what reads as zero since) are kept or lost as a whole.
- **Names**: creating, renaming and removing are lost until the directory is synced. A power loss keeps a prefix of
  those that were not, in the order they were made, as a journal does.
- **A killed process** (`kill`) loses nothing that was written, but nothing becomes durable by it either.
- **A failed sync** (`fail_sync`) keeps a random part of the data and forgets, as Linux does, that the rest is not on
  the disk: the next sync succeeds and does not write it. What is written anew is written.
- **A full disk** (`capacity_bytes`): a write or an allocation beyond it raises ENOSPC; a write first writes what fits.
- **Stopping at any operation** (`stop_after`): the operation with that number raises `Stopped` instead of running.

Sectors are written whole or not at all, but where `keep` cuts one. Files opened before `crash` or `kill` are dead
afterwards: using one raises EBADF. All randomness comes from the `chance` that is given, so a run can be repeated.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Sequence
from typing import Protocol

SECTOR_BYTES = 512


class RandomBits(Protocol):
    def random(self) -> float: ...


class Stopped(Exception):
    """The machine stopped in the middle of an operation. Not an OSError: no caller may handle it."""


# What a power loss leaves of a sector: (path, offset in the file, old content, new content) -> content.
Keep = Callable[[str, int, bytes, bytes], bytes]


def keep_nothing(path: str, offset: int, old: bytes, new: bytes) -> bytes:
    return old


def keep_everything(path: str, offset: int, old: bytes, new: bytes) -> bytes:
    return new


def keep_random(chance: RandomBits) -> Keep:
    """Each sector is kept, lost, or now and then cut somewhere."""

    def keep(path: str, offset: int, old: bytes, new: bytes) -> bytes:
        draw = chance.random()
        if draw < 0.45:
            return new
        if draw < 0.9:
            return old
        cut = int(chance.random() * len(new))
        return new[:cut] + old[cut:]

    return keep


def keep_prefix(size_bytes: int) -> Keep:
    """The first `size_bytes` of the sectors that were not synced, in the order of path and offset."""
    left = size_bytes

    def keep(path: str, offset: int, old: bytes, new: bytes) -> bytes:
        nonlocal left
        cut = min(left, len(new))
        left -= cut
        return new[:cut] + old[cut:]

    return keep


class _Inode:
    """A file's content as the page cache has it, and how to get back to what is on the disk."""

    __slots__ = ("data", "durable_bytes", "forgotten", "old")

    def __init__(self) -> None:
        self.data = bytearray()
        self.durable_bytes = 0  # size on the disk
        self.old: dict[int, bytes] = {}  # sector number -> content on the disk, where it differs
        self.forgotten: dict[int, bytes] = {}  # the same, where the page cache wrongly takes the sector for written

    def remember(self, start: int, end: int) -> None:
        """Called before bytes from `start` to `end` change."""
        for sector in range(start // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
            if sector in self.old:
                continue
            if sector in self.forgotten:
                self.old[sector] = self.forgotten.pop(sector)
            else:
                at = sector * SECTOR_BYTES
                self.old[sector] = bytes(self.data[at : at + SECTOR_BYTES]).ljust(SECTOR_BYTES, b"\0")

    def write(self, offset: int, content: bytes) -> None:
        end = offset + len(content)
        if self.data[offset:end] == content and not self.forgotten:
            return  # as good as lost or kept
        self.remember(offset, end)
        if len(self.data) < offset:
            self.data.extend(bytes(offset - len(self.data)))
        self.data[offset:end] = content

    def resize(self, size_bytes: int) -> None:
        if size_bytes < len(self.data):
            self.remember(size_bytes, len(self.data))
            del self.data[size_bytes:]
        else:
            self.data.extend(bytes(size_bytes - len(self.data)))

    def synced(self) -> None:
        self.old.clear()
        self.durable_bytes = len(self.data)

    def sync_failed(self, chance: RandomBits) -> None:
        for sector, content in self.old.items():
            if chance.random() < 0.5:
                self.forgotten[sector] = content
        self.old.clear()

    def lose(self, path: str, keep: Keep, keep_size: bool) -> None:
        """Become what the disk holds after a power loss."""
        size = len(self.data) if keep_size else self.durable_bytes
        self.data.extend(bytes(max(0, size - len(self.data))))
        for sector, old in sorted((self.old | self.forgotten).items()):
            at = sector * SECTOR_BYTES
            new = bytes(self.data[at : at + SECTOR_BYTES]).ljust(SECTOR_BYTES, b"\0")
            left = keep(path, at, old, new) if sector in self.old else old
            end = min(at + SECTOR_BYTES, len(self.data))
            self.data[at:end] = left[: max(0, end - at)]
        del self.data[size:]
        self.old.clear()
        self.forgotten.clear()
        self.durable_bytes = len(self.data)


class FaultyFile:
    """An `env.File` on a `FaultyFiles`."""

    __slots__ = ("_files", "_generation", "_inode", "_open", "path")

    def __init__(self, files: FaultyFiles, inode: _Inode, path: str) -> None:
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
        self._files.step("write")
        content = b"".join(buffers)
        grows = max(0, offset + len(content) - len(self._inode.data))
        missing = grows - self._files.free_bytes
        if missing > 0:
            self._inode.write(offset, content[: max(0, len(content) - missing)])
            raise OSError(errno.ENOSPC, "No space left on device", self.path)
        self._inode.write(offset, content)

    def sync(self) -> None:
        self._check()
        self._files.step("sync")
        self._files.sync_count += 1
        if self._files.take_sync_failure():
            self._inode.sync_failed(self._files.chance)
            raise OSError(errno.EIO, "Input/output error", self.path)
        self._inode.synced()

    def truncate(self, size_bytes: int) -> None:
        self._check()
        self._files.step("truncate")
        self._inode.resize(size_bytes)

    def allocate(self, size_bytes: int) -> None:
        self._check()
        self._files.step("allocate")
        grows = size_bytes - len(self._inode.data)
        if grows > self._files.free_bytes:
            raise OSError(errno.ENOSPC, "No space left on device", self.path)
        if grows > 0:
            self._inode.resize(size_bytes)

    def size(self) -> int:
        self._check()
        return len(self._inode.data)

    def read_at(self, offset: int, size_bytes: int) -> bytes:
        self._check()
        return bytes(self._inode.data[offset : offset + size_bytes])

    def close(self) -> None:
        self._open = False


class _Change:
    """A change of names that no directory sync has made durable yet."""

    __slots__ = ("directories", "names")

    def __init__(self, names: dict[str, _Inode | None]) -> None:
        self.names = names
        self.directories = {_parent(path) for path in names}


class FaultyFiles:
    """An `env.Files` in memory. See the module's docstring for what it does to its files, and when."""

    def __init__(self, chance: RandomBits | None = None, capacity_bytes: int | None = None) -> None:
        self.chance = chance or random.Random(0)
        self.capacity_bytes = capacity_bytes
        self.generation = 0  # of the process that uses it
        self.operation_count = 0
        self.sync_count = 0
        self.stop_after: int | None = None
        self._names: dict[str, _Inode] = {}
        self._durable: dict[str, _Inode] = {}
        self._directories = {"", ".", "/"}  # their own durability is not modelled
        self._changes: list[_Change] = []
        self._sync_failures = 0
        self._locks: set[str] = set()

    # --- faults -------------------------------------------------------------------------------------------------------

    def fail_sync(self, times: int = 1) -> None:
        """The next syncs of files fail with EIO."""
        self._sync_failures = times

    def take_sync_failure(self) -> bool:
        if self._sync_failures == 0:
            return False
        self._sync_failures -= 1
        return True

    def crash(self, keep: Keep = keep_nothing) -> None:
        """Power loss, then power again. Of what was not synced, `keep` is kept; of names, a random prefix (none with
        `keep_nothing`, all with `keep_everything`)."""
        random_kept = 0 if keep is keep_nothing else int(self.chance.random() * (len(self._changes) + 1))
        for change in self._changes if keep is keep_everything else self._changes[:random_kept]:
            self._make_durable(change)
        self._changes.clear()
        self._names = dict(self._durable)
        for path, inode in sorted(self._names.items()):
            keep_size = keep is keep_everything or (keep is not keep_nothing and self.chance.random() < 0.5)
            inode.lose(path, keep, keep_size)
            self.make_dirs(_parent(path))  # it may have been removed, and that lost
        self.kill()

    def kill(self) -> None:
        """The process that used the files dies; the machine goes on."""
        self.generation += 1
        self.stop_after = None
        self._locks.clear()

    def step(self, name: str) -> None:
        """Called before each operation that changes something."""
        if self.stop_after is not None and self.operation_count >= self.stop_after:
            raise Stopped(f"stopped before operation {self.operation_count}, a {name}")
        self.operation_count += 1

    @property
    def free_bytes(self) -> int:
        if self.capacity_bytes is None:
            return 2**62
        return max(0, self.capacity_bytes - sum(len(inode.data) for inode in set(self._names.values())))

    # --- looking at and damaging what is on the disk ------------------------------------------------------------------

    def image(self) -> dict[str, bytes]:
        """All files as they read now."""
        return {path: bytes(inode.data) for path, inode in self._names.items()}

    @classmethod
    def of_image(cls, image: dict[str, bytes], chance: RandomBits | None = None) -> FaultyFiles:
        """A disk on which just these files are, durably."""
        files = cls(chance)
        for path, content in image.items():
            files.make_dirs(_parent(path))
            inode = _Inode()
            inode.data[:] = content
            inode.synced()
            files._names[path] = files._durable[path] = inode
        return files

    # --- env.Files ----------------------------------------------------------------------------------------------------

    def open(self, path: str, create: bool = False) -> FaultyFile:
        if create:
            if path in self._names or path in self._directories:
                raise FileExistsError(errno.EEXIST, "File exists", path)
            self._need_directory(_parent(path))
            self.step("create")
            self._change({path: _Inode()})
        return FaultyFile(self, self._inode(path), path)

    def read(self, path: str) -> bytes:
        return bytes(self._inode(path).data)

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
            names: dict[str, _Inode | None] = dict.fromkeys(moved)
            names.update({new + path[len(old) :]: inode for path, inode in moved.items()})
            self._change(names, {_parent(old), _parent(new)})
            return
        inode = self._inode(old)
        self.step("rename")
        self._change({old: None, new: inode})

    def remove(self, path: str) -> None:
        self._inode(path)
        self.step("remove")
        self._change({path: None})

    def remove_tree(self, path: str) -> None:
        if path not in self._directories:
            return
        self.step("remove_tree")
        inside = path + "/"
        names: dict[str, _Inode | None] = dict.fromkeys(name for name in self._names if name.startswith(inside))
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
        return len(self._inode(path).data)

    def sync_dir(self, path: str) -> None:
        self._need_directory(path)
        self.step("sync_dir")
        # As a journal does: with a directory's last change, everything before it is written too.
        last = max((n for n, change in enumerate(self._changes, 1) if path in change.directories), default=0)
        for change in self._changes[:last]:
            self._make_durable(change)
        del self._changes[:last]

    def lock(self, path: str) -> Callable[[], None] | None:
        if path in self._locks:
            return None
        if path not in self._names:
            self.open(path, create=True)
        self._locks.add(path)
        return lambda: self._locks.discard(path)

    # --- names --------------------------------------------------------------------------------------------------------

    def _inode(self, path: str) -> _Inode:
        if path in self._directories:
            raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
        if path not in self._names:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return self._names[path]

    def _need_directory(self, path: str) -> None:
        if path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    def _change(self, names: dict[str, _Inode | None], directories: set[str] | None = None) -> None:
        _apply(self._names, names)
        change = _Change(names)
        if directories is not None:
            change.directories = directories
        self._changes.append(change)

    def _make_durable(self, change: _Change) -> None:
        _apply(self._durable, change.names)


def _apply(names: dict[str, _Inode], change: dict[str, _Inode | None]) -> None:
    for path, inode in change.items():
        if inode is None:
            names.pop(path, None)
        else:
            names[path] = inode


def _parent(path: str) -> str:
    head, separator, _ = path.rpartition("/")
    return head or ("/" if separator else "")
