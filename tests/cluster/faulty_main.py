"""The `kvstore` command on a disk that fills as a test tells: the environment variable KVSTORE_TEST_FAULTS names a
directory, and while the file `full.NAME` is in it, node NAME's disk is full.

(Power loss is `tests/powerloss.py`; what networks do is `tests/chaos/proxy.py`.)
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kvstore.cli import serve as serving
from kvstore.cli.main import main
from kvstore.env import Environment, File, SystemFiles, system_environment


class _FullFile:
    """A file on a disk that may be full."""

    def __init__(self, file: File, is_full: Callable[[], bool]) -> None:
        self._file = file
        self._is_full = is_full
        self.sync, self.truncate = file.sync, file.truncate
        self.size, self.read_at, self.close = file.size, file.read_at, file.close

    def write_at(self, offset: int, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        self._check()
        self._file.write_at(offset, buffers)

    def allocate(self, size_bytes: int) -> None:
        self._check()
        self._file.allocate(size_bytes)

    def _check(self) -> None:
        if self._is_full():
            raise OSError(errno.ENOSPC, "No space left on device")


class FullFiles(SystemFiles):
    """The real files, but `flag` existing makes the disk full."""

    def __init__(self, flag: Path) -> None:
        self._flag = flag

    def open(self, path: str, create: bool = False) -> File:
        return _FullFile(super().open(path, create), self._flag.exists)


def faulty_environment(loop: asyncio.AbstractEventLoop) -> Environment:
    real = system_environment(loop)
    faults, name = Path(os.environ["KVSTORE_TEST_FAULTS"]), sys.argv[sys.argv.index("--name") + 1]
    return Environment(real.clock, real.chance, real.scheduler, real.network, FullFiles(faults / f"full.{name}"))


if __name__ == "__main__":
    serving.serve = functools.partial(serving.serve, environment_factory=faulty_environment)
    main()
