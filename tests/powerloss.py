"""Real files that a SIGKILL treats as a power loss would: `PowerLossFiles`, an `env.Files` for real processes.

A killed process normally loses nothing that it wrote: the kernel has it. Here, what is written stays in this process's
memory until the program asks for durability, and only then reaches the real file and is really synced. So a SIGKILL
discards exactly what was not synced, and a program that acknowledges too early is caught.

What it models:

- `File.write_at`, `truncate` and `allocate` are held until `File.sync` **returns**: a kill during it leaves a part.
- Creating, renaming and removing a file are held until `sync_dir` of that directory, and take effect in the order they
  were made. What is synced of a file whose creation is still held stays in memory with it.
- Reads, sizes and listings see everything, as a running process does.
- `replace` is durable when it returns.
- With `sync_does_nothing`, syncs are acknowledged and nothing ever reaches the disk: the control that must fail.

What it does not model: sectors surviving in any order (that is `fake_files.FaultyFiles`); directories, which are made,
renamed and removed at once; locks, which are the real ones; files that others write by themselves (RocksDB). Space is
taken only at the sync, so ENOSPC comes from there.

All of it may be called from any thread; one call runs at a time. What is held back is bounded by what the program
writes between syncs; with `sync_does_nothing` by nothing, so such runs must be short.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstore.env import File, SystemFile, SystemFiles

# A file that is being given its name; a kill may leave one behind, and nobody sees it.
_UNNAMED = ".powerloss"


class _Write(NamedTuple):
    offset: int
    content: bytes


class _Truncate(NamedTuple):
    size_bytes: int


class _Allocate(NamedTuple):
    size_bytes: int


class _Inode:
    """One file: what of it is on the disk, and what is held back."""

    __slots__ = ("changes", "path", "synced")

    def __init__(self, path: str | None) -> None:
        self.path = path  # the real file; None while its creation is held back, and once it has no name any more
        self.synced: list[_Write | _Truncate | _Allocate] = []  # becomes real together with the name
        self.changes: list[_Write | _Truncate | _Allocate] = []

    def content(self) -> bytearray:
        """As the running process sees it."""
        data = bytearray()
        if self.path is not None:
            with open(self.path, "rb") as real:
                data += real.read()
        for change in (*self.synced, *self.changes):
            if isinstance(change, _Write):
                data.extend(bytes(max(0, change.offset - len(data))))
                data[change.offset : change.offset + len(change.content)] = change.content
            elif isinstance(change, _Truncate):
                del data[change.size_bytes :]
            else:
                data.extend(bytes(max(0, change.size_bytes - len(data))))
        return data

    def size(self) -> int:
        size = 0 if self.path is None else os.path.getsize(self.path)
        for change in (*self.synced, *self.changes):
            if isinstance(change, _Write):
                size = max(size, change.offset + len(change.content))
            elif isinstance(change, _Truncate):
                size = min(size, change.size_bytes)
            else:
                size = max(size, change.size_bytes)
        return size

    def sync(self) -> None:
        """Let everything that is held back reach the disk."""
        if self.path is None:
            self.synced += self.changes
        elif self.changes:
            _write_really(SystemFile(self.path, create=False), self.changes)
        self.changes.clear()

    def become_real(self, path: str) -> None:
        """Take a name on the disk, with what is synced: whole or not at all, whenever the kill comes."""
        unnamed = path + _UNNAMED
        if os.path.exists(unnamed):
            os.remove(unnamed)
        _write_really(SystemFile(unnamed, create=True), self.synced)
        os.replace(unnamed, path)
        self.path = path
        self.synced.clear()


def _write_really(real: SystemFile, changes: Sequence[_Write | _Truncate | _Allocate]) -> None:
    try:
        for change in changes:
            if isinstance(change, _Write):
                real.write_at(change.offset, [change.content])
            elif isinstance(change, _Truncate):
                real.truncate(change.size_bytes)
            else:
                real.allocate(change.size_bytes)
        real.sync()
    finally:
        real.close()


class PowerLossFile:
    """An `env.File` that holds back what is not synced."""

    def __init__(self, files: PowerLossFiles, inode: _Inode) -> None:
        self._files = files
        self._inode = inode

    def write_at(self, offset: int, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        with self._files.lock_all:
            self._inode.changes.append(_Write(offset, b"".join(buffers)))

    def sync(self) -> None:
        if self._files.sync_does_nothing:
            return
        with self._files.lock_all:
            self._inode.sync()

    def truncate(self, size_bytes: int) -> None:
        with self._files.lock_all:
            self._inode.changes.append(_Truncate(size_bytes))

    def allocate(self, size_bytes: int) -> None:
        with self._files.lock_all:
            self._inode.changes.append(_Allocate(size_bytes))

    def size(self) -> int:
        with self._files.lock_all:
            return self._inode.size()

    def read_at(self, offset: int, size_bytes: int) -> bytes:
        with self._files.lock_all:
            return bytes(self._inode.content()[offset : offset + size_bytes])

    def close(self) -> None:
        """What is not synced stays held back: closing makes nothing durable."""


class _NameChange(NamedTuple):
    """A creation (`old` is None), a rename, or a removal (`new` is None)."""

    inode: _Inode
    old: str | None
    new: str | None
    replaced: _Inode | None  # what had the new name before

    def touches(self, directory: str) -> bool:
        return any(path is not None and os.path.dirname(path) == directory for path in (self.old, self.new))


class PowerLossFiles:
    """An `env.Files`. See the module's docstring."""

    def __init__(self, sync_does_nothing: bool = False) -> None:
        self.sync_does_nothing = sync_does_nothing
        self.lock_all = threading.RLock()
        self._system = SystemFiles()
        self._inodes: dict[str, _Inode | None] = {}  # names as the process sees them, where touched; None: removed
        self._changes: list[_NameChange] = []

    # --- files --------------------------------------------------------------------------------------------------------

    def open(self, path: str, create: bool = False) -> File:
        path = os.path.abspath(path)
        with self.lock_all:
            if create:
                if self.exists(path):
                    raise FileExistsError(errno.EEXIST, "File exists", path)
                if not self.is_dir(os.path.dirname(path)):
                    raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
                self._change(_Inode(None), None, path)
            return PowerLossFile(self, self._inode(path))

    def read(self, path: str) -> bytes:
        path = os.path.abspath(path)
        with self.lock_all:
            return bytes(self._inode(path).content())

    def size(self, path: str) -> int:
        path = os.path.abspath(path)
        with self.lock_all:
            return self._inode(path).size()

    def replace(self, path: str, data: bytes) -> None:
        path = os.path.abspath(path)
        with self.lock_all:
            inode = _Inode(None)
            inode.changes.append(_Write(0, data))
            if not self.sync_does_nothing:
                inode.sync()
            self._change(inode, None, path)
            self.sync_dir(os.path.dirname(path))

    def rename(self, old: str, new: str) -> None:
        old, new = os.path.abspath(old), os.path.abspath(new)
        with self.lock_all:
            if self._system.is_dir(old):
                inside = old + "/"
                held = {path for change in self._changes for path in (change.old, change.new) if path is not None}
                held |= {path for path, inode in self._inodes.items() if inode is not None and inode.changes}
                if any(path.startswith(inside) for path in held):
                    raise OSError(errno.EBUSY, "renaming a directory with unsynced files is not modelled", old)
                self._forget(inside)
                self._system.rename(old, new)
                return
            self._change(self._inode(old), old, new)

    def remove(self, path: str) -> None:
        path = os.path.abspath(path)
        with self.lock_all:
            self._change(self._inode(path), path, None)

    # --- directories --------------------------------------------------------------------------------------------------

    def sync_dir(self, path: str) -> None:
        path = os.path.abspath(path)
        if self.sync_does_nothing:
            return
        with self.lock_all:
            last = max((n for n, change in enumerate(self._changes, 1) if change.touches(path)), default=0)
            for change in self._changes[:last]:
                self._make_durable(change)
            del self._changes[:last]
            held = {path for change in self._changes for path in (change.old, change.new)}
            for name in [name for name, inode in self._inodes.items() if inode is None and name not in held]:
                del self._inodes[name]
            self._system.sync_dir(path)

    def remove_tree(self, path: str) -> None:
        path = os.path.abspath(path)
        with self.lock_all:
            inside = path + "/"
            self._changes = [
                change
                for change in self._changes
                if not any(name and name.startswith(inside) for name in (change.old, change.new))
            ]
            self._forget(inside)
            self._system.remove_tree(path)

    def make_dirs(self, path: str) -> None:
        self._system.make_dirs(path)

    def list_dir(self, path: str) -> list[str]:
        path = os.path.abspath(path)
        with self.lock_all:
            names = {name for name in self._system.list_dir(path) if not name.endswith(_UNNAMED)}
            for touched, inode in self._inodes.items():
                if os.path.dirname(touched) == path:
                    name = touched.rpartition("/")[2]
                    if inode is None:
                        names.discard(name)
                    else:
                        names.add(name)
            return sorted(names)

    def exists(self, path: str) -> bool:
        path = os.path.abspath(path)
        with self.lock_all:
            if path in self._inodes:
                return self._inodes[path] is not None
            return self._system.exists(path)

    def is_dir(self, path: str) -> bool:
        path = os.path.abspath(path)
        return self._system.is_dir(path)

    def lock(self, path: str) -> Callable[[], None] | None:
        return self._system.lock(path)

    # --- names --------------------------------------------------------------------------------------------------------

    def _inode(self, path: str) -> _Inode:
        if path not in self._inodes:
            if self._system.is_dir(path):
                raise IsADirectoryError(errno.EISDIR, "Is a directory", path)
            if self._system.exists(path):
                self._inodes[path] = _Inode(path)
        inode = self._inodes.get(path)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return inode

    def _forget(self, inside: str) -> None:
        for path in [path for path in self._inodes if path.startswith(inside)]:
            del self._inodes[path]

    def _change(self, inode: _Inode, old: str | None, new: str | None) -> None:
        replaced = self._inode(new) if new is not None and self.exists(new) else None
        if old is not None:
            self._inodes[old] = None
        if new is not None:
            self._inodes[new] = inode
        self._changes.append(_NameChange(inode, old, new, replaced))

    def _make_durable(self, change: _NameChange) -> None:
        inode = change.inode
        if change.new is None:
            assert change.old is not None
            os.remove(change.old)
            inode.path = None
        elif change.old is None:
            inode.become_real(change.new)
        else:
            os.replace(change.old, change.new)
            inode.path = change.new
        if change.replaced is not None and change.replaced is not inode:
            change.replaced.path = None
