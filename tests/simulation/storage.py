"""A state's storage whose durable form lies in the files of a simulated machine: `FileStorage`.

It is a `kvstore.state.storage.Storage` with the promises that the module there makes, and a property test holds it
equal to the others. All data is in memory; below it, in an `env.Files`:

    LOCK          held by who has it open for writing
    N.part        numbered files of steps, applied in order; one flag says "forget what came before me"
    N.tmp         a file that is being written: synced, then renamed to N.part, then the directory is synced

- A flush writes what changed since the last one as one new file, and every now and then the whole map instead, after
  which older files go. A checkpoint is the whole map in several files, so that sending one can break off in between.
- Every file carries its number, how many more belong to the same copy, and a checksum over all of it. A name ending
  in `.part` is given only to a file that is synced. So what a power loss tears is a `.tmp`, which is removed at the
  next open, and whatever is wrong with a `.part` is damage: `StartupError(state_damaged)`.
- A failed flush keeps its steps for the next one.
- What an open finds is durable when it returns.
- The files belong to a process: once that ended (their `generation` moved on), every call is `StorageFailed(EBADF)`.

It notices damage when it opens, not while it runs: reads come from memory. A read-only open notices only what it
cannot read at all: RocksDB checks a block when somebody reads it, and who looks at a position reads few.
"""

from __future__ import annotations

import errno
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import google_crc32c
import msgspec

from kvstore.errors import StartupError
from kvstore.state.storage import OpenStorage, StorageFailed, _MemoryBatch, _SortedMap
from tests.fake_files import FaultyFiles

# Few enough that opening is quick, and enough that writing the whole map is seldom.
PARTS_MAX = 8
# Of a checkpoint: enough for a stream of them to end in the middle.
CHECKPOINT_PARTS = 3

_MAGIC = b"part"
_CHECKSUM_BYTES = 4
_PART = re.compile(r"(\d{1,15})\.part")


class _Content(msgspec.Struct, array_like=True):
    number: int
    begins: bool  # what earlier files hold is forgotten
    more: int  # how many files after this one belong to the same copy of the map
    steps: list[tuple[Any, ...]]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Content).decode


class FileStorage:
    """See the module's docstring. Made by what `opener` returns."""

    __slots__ = (
        "_files",
        "_first",
        "_generation",
        "_is_open",
        "_map",
        "_next",
        "_path",
        "_read_only",
        "_release",
        "_unflushed",
    )

    def __init__(self, files: FaultyFiles, path: str, read_only: bool = False) -> None:
        self._files = files
        self._path = path
        self._read_only = read_only
        self._generation = files.generation
        self._is_open = True
        self._map = _SortedMap({})
        self._unflushed: list[tuple[Any, ...]] = []
        self._first = self._next = 0  # the number of the first file that counts, and of the next one
        self._release: Callable[[], None] = _nothing
        try:
            if not read_only:
                files.make_dirs(path)
                release = files.lock(f"{path}/LOCK")
                if release is None:
                    raise StartupError(f"{path} is in use by another process", code="data_dir_in_use")
                self._release = release
            self._load()
        except OSError as error:
            self._release()
            raise _failed(f"opening {path}", error) from error
        except StartupError:
            self._release()
            raise

    @staticmethod
    def opener(files: FaultyFiles) -> OpenStorage:
        """What a machine wants as its `open_storage`, on these files."""

        def open_storage(path: str, read_only: bool = False, /) -> FileStorage:
            return FileStorage(files, path, read_only)

        return open_storage

    # --- Storage ------------------------------------------------------------------------------------------------------

    def get(self, key: bytes, /) -> bytes | None:
        if not self._is_open or self._generation != self._files.generation:
            raise _dead("reading")
        return self._map.values.get(key)

    def get_many(self, keys: list[bytes], /) -> list[bytes | None]:
        self._check("reading")
        return [self._map.values.get(key) for key in keys]

    def scan(self, begin: bytes, end: bytes, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        self._check("scanning")
        keys, values = self._map.keys, self._map.values
        chosen = keys[bisect_left(keys, begin) : bisect_left(keys, end)]
        if reverse:
            chosen.reverse()
        return iter([(key, values[key]) for key in chosen])

    def batch(self) -> _MemoryBatch:
        return _MemoryBatch()

    def write(self, batch: _MemoryBatch) -> None:
        self._check("writing")
        assert not self._read_only
        self._map.apply(batch.steps)
        self._unflushed += batch.steps

    def flush(self) -> None:
        self._check("flushing")
        if not self._unflushed:
            return
        steps, self._unflushed = self._unflushed, []
        whole = self._next - self._first >= PARTS_MAX
        try:
            if whole:
                self._write_part(self._path, self._next, True, 0, list(self._map.values.items()))
            else:
                self._write_part(self._path, self._next, False, 0, steps)
            self._files.sync_dir(self._path)
        except OSError as error:
            self._unflushed = steps + self._unflushed
            raise _failed("flushing", error) from error
        self._next += 1
        if whole:
            obsolete, self._first = range(self._first, self._next - 1), self._next - 1
            self._remove([f"{number}.part" for number in obsolete])

    def checkpoint(self, path: str) -> None:
        self._check("writing a checkpoint")
        files = self._files
        try:
            if files.exists(path):
                raise FileExistsError(errno.EEXIST, "File exists", path)
            files.make_dirs(path)
            pairs = list(self._map.values.items())
            share = -(-len(pairs) // CHECKPOINT_PARTS)
            for part in range(CHECKPOINT_PARTS):
                steps = pairs[part * share : (part + 1) * share]
                self._write_part(path, part, part == 0, CHECKPOINT_PARTS - 1 - part, steps)
            files.sync_dir(path)
            files.sync_dir(path.rpartition("/")[0])
        except OSError as error:
            raise _failed(f"writing a checkpoint to {path}", error) from error

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._release()

    # --- files --------------------------------------------------------------------------------------------------------

    def _write_part(self, path: str, number: int, begins: bool, more: int, steps: list[Any]) -> None:
        """Write a file and give it its name. The name is not durable yet. Raises OSError."""
        files = self._files
        name = f"{path}/{number}"
        temporary = f"{name}.tmp"
        if files.exists(temporary):
            files.remove(temporary)  # of a flush that failed
        body = _MAGIC + _encode(_Content(number, begins, more, steps))
        file = files.open(temporary, create=True)
        try:
            file.write_at(0, [google_crc32c.value(body).to_bytes(_CHECKSUM_BYTES, "big"), body])
            file.sync()
        finally:
            file.close()
        files.rename(temporary, f"{name}.part")

    def _load(self) -> None:
        files, path = self._files, self._path
        numbers, others = [], []
        for name in files.list_dir(path):
            match = _PART.fullmatch(name)
            if match is not None:
                numbers.append(int(match[1]))
            elif name != "LOCK":
                others.append(name)
        numbers.sort()
        if self._read_only and not numbers:
            raise _damaged(path, "there is none")
        contents = [self._read_part(number) for number in numbers]
        # A flush that was interrupted before it removed what it replaced leaves that behind.
        begin = max((at for at, content in enumerate(contents) if content.begins), default=0)
        more = 0
        for content, expected in zip(contents[begin:], range(numbers[begin] if numbers else 0, 2**62), strict=False):
            if content.number != expected:
                raise _damaged(path, f"{expected}.part is missing")
            if more and content.more != more - 1:
                raise _damaged(path, f"{expected}.part does not belong to the copy before it")
            more = content.more
            self._map.apply(content.steps)
        if more:
            raise _damaged(path, f"{more} files are missing at the end")
        if numbers and not contents[begin].begins and numbers[begin] != 0:
            raise _damaged(path, "the first files are missing")
        if numbers:
            self._first, self._next = numbers[begin], numbers[-1] + 1
        if not self._read_only:
            if numbers:
                files.sync_dir(path)  # a process may have died between a rename and this; now it counts as flushed
            self._remove(others + [f"{number}.part" for number in numbers[:begin]])

    def _read_part(self, number: int) -> _Content:
        name = f"{self._path}/{number}.part"
        try:
            raw = self._files.read(name)
        except OSError as error:
            raise _failed(f"reading {name}", error) from error
        checksum, body = raw[:_CHECKSUM_BYTES], raw[_CHECKSUM_BYTES:]
        is_right = google_crc32c.value(body).to_bytes(_CHECKSUM_BYTES, "big") == checksum
        if not body.startswith(_MAGIC) or not (is_right or self._read_only):
            raise _damaged(self._path, f"the checksum of {number}.part is wrong")
        try:
            content = _decode(body[len(_MAGIC) :])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _damaged(self._path, f"{number}.part cannot be read: {error}") from None
        if content.number != number:
            raise _damaged(self._path, f"{number}.part is the file of number {content.number}")
        return content

    def _remove(self, names: list[str]) -> None:
        for name in names:
            self._files.remove(f"{self._path}/{name}")

    def _check(self, what: str) -> None:
        if not self._is_open or self._generation != self._files.generation:
            raise _dead(what)


def _nothing() -> None:
    pass


def _dead(what: str) -> StorageFailed:
    return StorageFailed(errno.EBADF, f"{what} failed: the storage is closed, or its process ended")


def _failed(what: str, error: OSError) -> StorageFailed:
    return StorageFailed(error.errno or errno.EIO, f"{what} failed: {error}")


def _damaged(path: str, why: str) -> StartupError:
    return StartupError(f"the state in {path} is damaged: {why}", code="state_damaged")
