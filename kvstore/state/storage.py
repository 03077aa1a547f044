"""The seam to the disk: an ordered map of bytes with atomic batches, explicit flushes and checkpoints.

Rules that both storages keep, and that a property test holds them to:

- A batch is applied whole or not at all, in the order in which it was filled.
- Nothing is durable before `flush` returns. After a crash the storage stands as after some whole batch at or after
  the last flush, never inside one. (There is no write-ahead log here: the Raft log is it.)
- A scan sees the storage as it was when the scan began.
- A failing disk is `StorageFailed`, whatever the layer below called it.

`RocksStorage` is the real one. `MemoryStorage` lives on a `MemoryDisk`, which survives the storage and loses what was
not flushed when it is told to crash; simulations run on it. Neither knows what the bytes mean.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, Protocol

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    Checkpoint,
    DataBlockIndexType,
    DbClosedError,
    DBCompressionType,
    Env,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
    WriteOptions,
)

from kvstore.errors import StartupError


class StorageFailed(OSError):
    """The disk below refused or failed: full, broken, gone. What is in memory still answers reads."""


class Batch(Protocol):
    """Changes that happen together. Filled by one owner, used once."""

    def put(self, key: bytes, value: bytes, /) -> None: ...

    def delete(self, key: bytes, /) -> None: ...

    def delete_range(self, begin: bytes, end: bytes, /) -> None:
        """Delete every key in `[begin, end)` that is there at this place of the batch."""


class Storage(Protocol):
    """Used from one thread, but `flush` and `checkpoint`, which may run in another beside everything but `close`."""

    def get(self, key: bytes, /) -> bytes | None: ...

    def get_many(self, keys: list[bytes], /) -> list[bytes | None]:
        """As `get` of each, in the order of `keys`, all at one moment. All of it is in memory at once."""

    def scan(self, begin: bytes, end: bytes, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """Every pair in `[begin, end)`, in key order or its reverse. Lazy: stop when you have enough, and let go of
        it before `close`."""

    def batch(self) -> Batch: ...

    def write(self, batch: Any) -> None:
        """Apply a batch of this storage's own making. Raises `StorageFailed`."""

    def flush(self) -> None:
        """Make everything written so far durable. Raises `StorageFailed`."""

    def checkpoint(self, path: str) -> None:
        """A durable copy of some moment between call and return, as the new directory `path`."""

    def close(self) -> None:
        """Let go of files and locks; a second time is no error. Does not promise to flush. Raises `StorageFailed`,
        with files and locks let go all the same."""


class OpenStorage(Protocol):
    def __call__(self, path: str, read_only: bool = False, /) -> Storage:
        """Open the storage at `path`; a new one where there is none, unless `read_only`.
        Raises `StartupError`: `data_dir_in_use`, `state_damaged`; or `StorageFailed`."""


# --- RocksDB --------------------------------------------------------------------------------------------------------

# Above the 64 MiB at which the machine flushes by itself, so that RocksDB seldom has to do it on its own.
_WRITE_BUFFER_BYTES = 96 * 1024 * 1024
_WRITE_BUFFERS = 4
_MEMTABLE_BLOOM_RATIO = 0.1
_BLOCK_BYTES = 2048
_INDEX_RESTART_INTERVAL = 16
_BLOCK_CACHE_BYTES = 64 * 1024 * 1024
_BLOOM_BITS_PER_KEY = 10
_OPEN_FILES_MAX = 512
# So many flushed files (some 30 MiB each) are merged together into the level below, which has 256 MiB before anything
# lies deeper: each merge rewrites all of that. Twice RocksDB's number halves how often; a read asks the filters of some
# more files, which could not be measured. Writes are slowed down from 20 on.
_FLUSHED_FILES_MERGED = 8
# Flushes and merges write to the disk as they go, not all at the end: the log, which every answer waits for, lies on
# the same disk. How fast they write is not bounded: at 128 MiB a second, values of 16 KiB that came at 40 MiB a second
# made every replica wait for over a second, at the same entry.
_BYTES_PER_SYNC = 1024 * 1024


def _options() -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(_WRITE_BUFFER_BYTES)
    options.set_max_write_buffer_number(_WRITE_BUFFERS)
    options.set_allow_concurrent_memtable_write(False)  # there is one writer, and it need not pay for the others
    # A key that is asked for before it is written is seldom in the memory of what is not flushed yet, and searching
    # there costs as much as a read from a file: with a filter of a tenth of its size, reads of a million records took
    # two thirds of the time.
    options.set_memtable_prefix_bloom_ratio(_MEMTABLE_BLOOM_RATIO)
    options.set_memtable_whole_key_filtering(True)
    # Most transactions create a key; asking for one that is not there must not touch the disk.
    table = BlockBasedOptions()
    table.set_bloom_filter(_BLOOM_BITS_PER_KEY, False)
    table.set_block_cache(Cache(_BLOCK_CACHE_BYTES))
    # Among many records what is asked for lies in no cache of ours: a read searches the index of a file and copies a
    # block from the system's. So blocks are small, not compressed, and searched by hash; and the index stores only what
    # tells a block's key from the one before, so that more of it stays in the processor's cache. At 5,000,000 records
    # a read takes two thirds of the time that it took.
    table.set_block_size(_BLOCK_BYTES)
    table.set_data_block_index_type(DataBlockIndexType.binary_and_hash())
    table.set_index_block_restart_interval(_INDEX_RESTART_INTERVAL)
    options.set_block_based_table_factory(table)
    options.set_compression_type(DBCompressionType.none())
    options.set_level_zero_file_num_compaction_trigger(_FLUSHED_FILES_MERGED)
    options.set_max_background_jobs(2)
    options.set_bytes_per_sync(_BYTES_PER_SYNC)
    # Merging takes the processor's idle time: with more nodes than cores, all merging at the same entry of the log,
    # every write waited for a second and more. (It holds for all of a process's RocksDB.)
    Env().lower_thread_pool_cpu_priority()
    options.set_max_open_files(_OPEN_FILES_MAX)
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(4 * 1024 * 1024)
    options.set_stats_dump_period_sec(0)
    return options


def _failed(what: str, error: Exception) -> StorageFailed:
    text = str(error)
    full = "No space left" in text
    return StorageFailed(errno.ENOSPC if full else errno.EIO, f"{what} failed: {text}")


class RocksStorage:
    """RocksDB, one column family, its own log off. rocksdict raises bare `Exception` for whatever RocksDB reports."""

    __slots__ = ("_db", "_get", "_path", "_write_options", "_writer")

    _db: Any  # its stub knows nothing of raw mode, in which every key and value is bytes

    def __init__(self, path: str, read_only: bool = False) -> None:
        try:
            if read_only:
                self._db = Rdict(path, Options(raw_mode=True), access_type=AccessType.read_only())
            else:
                options = _options()
                # The family is named, or rocksdict would open one that exists with the options that RocksDB wrote
                # down beside it, and with a block cache of 8 MiB.
                self._db = Rdict(path, options, {"default": options})
        except Exception as error:
            text = str(error)
            if "lock file" in text or "lock hold" in text:
                raise StartupError(f"{path} is in use by another process", code="data_dir_in_use") from error
            missing = "No such file" in text and "mkdir" not in text
            if missing or "Corruption" in text or "Invalid argument" in text:
                raise StartupError(f"the state in {path} is damaged: {text}", code="state_damaged") from error
            raise _failed(f"opening {path}", error) from error
        self._path = path
        # What is asked for by its key, `mvcc.Records` keeps. The block cache is left to scans: to put a block there
        # that nobody asks for again costs a quarter of a read.
        reading = ReadOptions()
        reading.fill_cache(False)  # type: ignore[call-arg]  # its stub lacks the argument
        self._db.set_read_options(reading)
        self._get = self._db.get
        self._writer = self._db.write
        self._write_options = WriteOptions()
        self._write_options.disable_wal = True  # type: ignore[method-assign, assignment]  # a property in truth

    def get(self, key: bytes, /) -> bytes | None:
        try:
            packed: bytes | None = self._get(key)
            return packed
        except Exception as error:
            raise _failed("reading", error) from error

    def get_many(self, keys: list[bytes], /) -> list[bytes | None]:
        try:
            packed: list[bytes | None] = self._get(keys)  # RocksDB's batched MultiGet
            return packed
        except Exception as error:
            raise _failed("reading", error) from error

    def scan(self, begin: bytes, end: bytes, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        # rocksdict 0.3 ignores lower bounds, and seeks inclusively when it goes backwards: so the upper bound is set
        # and the lower one is checked here.
        bounds = ReadOptions()
        bounds.set_iterate_upper_bound(end)
        try:
            if not reverse:
                yield from self._db.items(from_key=begin, read_opt=bounds)
                return
            for pair in self._db.items(backwards=True, from_key=end, read_opt=bounds):
                if pair[0] < begin:
                    return
                yield pair
        except Exception as error:
            raise _failed("scanning", error) from error

    def batch(self) -> WriteBatch:
        return WriteBatch(raw_mode=True)

    def write(self, batch: WriteBatch) -> None:
        try:
            self._writer(batch, self._write_options)
        except Exception as error:
            raise _failed("writing", error) from error

    def flush(self) -> None:
        try:
            self._db.flush(True)
        except Exception as error:
            raise _failed("flushing", error) from error

    def checkpoint(self, path: str) -> None:
        # Right after a flush this takes milliseconds; it holds the interpreter for as long as it has to flush itself.
        try:
            Checkpoint(self._db).create_checkpoint(path)
        except Exception as error:
            raise _failed(f"writing a checkpoint to {path}", error) from error

    def close(self) -> None:
        try:
            self._db.close()
        except DbClosedError:
            return
        except Exception as error:
            raise _failed("closing", error) from error


# --- memory ---------------------------------------------------------------------------------------------------------


class _MemoryBatch:
    __slots__ = ("steps",)

    def __init__(self) -> None:
        # (key, value) puts, (key, None) deletes, (begin, end, True) deletes a range.
        self.steps: list[tuple[Any, ...]] = []

    def put(self, key: bytes, value: bytes, /) -> None:
        self.steps.append((key, value))

    def delete(self, key: bytes, /) -> None:
        self.steps.append((key, None))

    def delete_range(self, begin: bytes, end: bytes, /) -> None:
        self.steps.append((begin, end, True))


class _SortedMap:
    """A dict and its keys in order. A write of a new key and a range delete cost O(n), in C."""

    __slots__ = ("keys", "values")

    def __init__(self, values: dict[bytes, bytes]) -> None:
        self.values = values
        self.keys = sorted(values)

    def apply(self, steps: list[tuple[Any, ...]]) -> None:
        values, keys = self.values, self.keys
        for step in steps:
            if len(step) == 3:
                low, high = bisect_left(keys, step[0]), bisect_left(keys, step[1])
                for key in keys[low:high]:
                    del values[key]
                del keys[low:high]
                continue
            key, value = step
            if value is not None:
                if key not in values:
                    insort(keys, key)
                values[key] = value
            elif key in values:
                del values[key]
                del keys[bisect_left(keys, key)]


class MemoryDisk:
    """The disk below memory storages: what outlives a crash. `open` is what a machine wants as its `open_storage`."""

    __slots__ = ("_durable", "_failure", "_open")

    def __init__(self) -> None:
        self._durable: dict[str, dict[bytes, bytes]] = {}
        self._open: dict[str, MemoryStorage] = {}
        self._failure: str | None = None

    def open(self, path: str, read_only: bool = False, /) -> MemoryStorage:
        if not read_only and path in self._open:
            raise StartupError(f"{path} is in use by another process", code="data_dir_in_use")
        if read_only and path not in self._durable:
            raise StartupError(f"the state in {path} is damaged: there is none", code="state_damaged")
        storage = MemoryStorage(self, path, dict(self._durable.setdefault(path, {})), read_only)
        if not read_only:
            self._open[path] = storage
        return storage

    def crash(self) -> None:
        """Power goes: every open storage is dead, and what was not flushed is gone."""
        for storage in list(self._open.values()):
            storage.dead = True
        self._open.clear()

    def fail(self, why: str | None) -> None:
        """From now on writes, flushes and checkpoints fail (as a full disk does), until told `None`."""
        self._failure = why

    def remove(self, path: str) -> None:
        self._durable.pop(path, None)

    def paths(self) -> list[str]:
        return sorted(self._durable)

    # What follows is for MemoryStorage.

    def check(self, what: str) -> None:
        if self._failure is not None:
            raise StorageFailed(errno.ENOSPC, f"{what} failed: {self._failure}")

    def make_durable(self, path: str, steps: list[tuple[Any, ...]]) -> None:
        durable = self._durable[path]
        for step in steps:
            if len(step) == 3:
                for key in [key for key in durable if step[0] <= key < step[1]]:
                    del durable[key]
            elif step[1] is None:
                durable.pop(step[0], None)
            else:
                durable[step[0]] = step[1]

    def add_copy(self, path: str, values: dict[bytes, bytes]) -> None:
        if path in self._durable:
            raise StorageFailed(errno.EEXIST, f"writing a checkpoint to {path} failed: directory exists")
        self._durable[path] = values

    def closed(self, path: str) -> None:
        self._open.pop(path, None)


class MemoryStorage:
    __slots__ = ("_disk", "_map", "_path", "_read_only", "_unflushed", "dead")

    def __init__(self, disk: MemoryDisk, path: str, values: dict[bytes, bytes], read_only: bool) -> None:
        self._disk = disk
        self._path = path
        self._map = _SortedMap(values)
        self._unflushed: list[tuple[Any, ...]] = []
        self._read_only = read_only
        self.dead = False

    def get(self, key: bytes, /) -> bytes | None:
        self._check_alive("reading")
        return self._map.values.get(key)

    def get_many(self, keys: list[bytes], /) -> list[bytes | None]:
        self._check_alive("reading")
        return [self._map.values.get(key) for key in keys]

    def scan(self, begin: bytes, end: bytes, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        self._check_alive("scanning")
        keys, values = self._map.keys, self._map.values
        chosen = keys[bisect_left(keys, begin) : bisect_left(keys, end)]
        if reverse:
            chosen.reverse()
        return iter([(key, values[key]) for key in chosen])

    def batch(self) -> _MemoryBatch:
        return _MemoryBatch()

    def write(self, batch: _MemoryBatch) -> None:
        self._check_alive("writing")
        self._disk.check("writing")
        self._map.apply(batch.steps)
        self._unflushed += batch.steps

    def flush(self) -> None:
        self._check_alive("flushing")
        self._disk.check("flushing")
        steps, self._unflushed = self._unflushed, []
        self._disk.make_durable(self._path, steps)

    def checkpoint(self, path: str) -> None:
        self._check_alive("writing a checkpoint")
        self._disk.check(f"writing a checkpoint to {path}")
        self._disk.add_copy(path, dict(self._map.values))

    def close(self) -> None:
        if not self.dead:
            self.dead = True
            if not self._read_only:
                self._disk.closed(self._path)

    def _check_alive(self, what: str) -> None:
        if self.dead:
            raise StorageFailed(errno.EBADF, f"{what} failed: the storage is closed")
