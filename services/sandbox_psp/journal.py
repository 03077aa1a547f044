"""The sandbox's journal: an append-only file, one line for each change, `crc32 json`.

1. `append` takes a line; `synced` returns when every line so far is on the disk. Lines that come while a write is under
   way go out together with the next, so that an fsync serves all who wait for it.
2. A kill in the middle of a write leaves a torn last line. Nobody was answered on the strength of it: it is cut off.
   A bad line before others is damage, and is not started over.
3. After a failed write or fsync nobody knows what is on the disk: every call raises from then on, until a restart has
   read what is there.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

FILE_NAME: Final = "journal.jsonl"


class JournalDamaged(Exception):
    """The file cannot be used; the message says what to do."""


class Journal:
    """Belongs to one event loop, and holds the file for itself alone."""

    def __init__(self, directory: Path, replay: Callable[[bytes], None]) -> None:
        """Gives `replay` each record that is there. Raises `JournalDamaged`, also where another process has the file;
        OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        self._file = os.open(directory / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._read(directory / FILE_NAME, replay)
            _sync_directory(directory)
        except BaseException:
            os.close(self._file)
            raise
        self._waiting: list[bytes] = []
        self._appended = self._synced = 0
        self._failed = False
        self._turn = asyncio.Lock()
        self._syncing: set[asyncio.Task[None]] = set()

    def append(self, record: bytes) -> None:
        """`record` has no line feed in it. Costs no system call."""
        if self._failed:
            raise OSError("an earlier write to the journal failed")
        self._waiting.append(_line(record))
        self._appended += 1

    async def synced(self) -> None:
        """Return when all that was appended before the call is on the disk. Cancelling the caller stops no write."""
        if self._synced >= self._appended and not self._failed:
            return
        task = asyncio.ensure_future(self._sync(self._appended))
        self._syncing.add(task)
        task.add_done_callback(self._syncing.discard)
        await asyncio.shield(task)

    async def close(self) -> None:
        """Raises OSError where the last lines cannot be written; not for a failure before, which was told of."""
        try:
            if not self._failed:
                await self.synced()
        finally:
            os.close(self._file)

    async def _sync(self, position: int) -> None:
        async with self._turn:
            if self._failed:
                raise OSError("an earlier write to the journal failed")
            if self._synced >= position:
                return
            data, until = b"".join(self._waiting), self._appended
            self._waiting.clear()
            try:
                await asyncio.to_thread(self._write, data)
            except OSError:
                self._failed = True
                raise
            self._synced = until

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        os.fdatasync(self._file)

    def _read(self, path: Path, replay: Callable[[bytes], None]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JournalDamaged(f"{path} is in use by another process: choose another --data-dir") from None
        whole_bytes = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):  # only the last one can be without
                    os.ftruncate(self._file, whole_bytes)
                    os.fsync(self._file)
                    return
                record = line[9:-1]
                if line != _line(record):
                    raise JournalDamaged(f"{path}, line {number} is damaged: begin with an empty --data-dir")
                whole_bytes += len(line)
                replay(record)


def _line(record: bytes) -> bytes:
    assert b"\n" not in record
    return b"%08x %b\n" % (zlib.crc32(record), record)


def _sync_directory(directory: Path) -> None:
    """So that the file itself is there after a power failure."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
