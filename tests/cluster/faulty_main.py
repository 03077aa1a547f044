"""The `kvstore` command in a world with faults: the same process, but its files and its network do as a test tells.

The environment variable KVSTORE_TEST_FAULTS names a directory, in which files are faults:

- `full.NAME`: while it exists, node NAME's disk is full.
- `cut.NAME`, whose lines are peer addresses: nothing that the node sends to those arrives. As nodes send only on
  connections that they dialled, two nodes that cut each other are parted. What is sent meanwhile arrives after the cut
  is healed, as TCP would have it, if both ends still wait for it. The node notes in `noticed.NAME` what it goes by now.

(Power loss is `tests/powerloss.py`.)
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from kvstore.cli import serve as serving
from kvstore.cli.main import main
from kvstore.env import Environment, File, SystemFiles, TcpNetwork, system_environment

# How soon a node notices that a cut was made or healed.
_LOOK_S = 0.02


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


class CutNetwork(TcpNetwork):
    """The real network, but what is sent to the addresses in the file `cuts` waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop, cuts: Path, noticed: Path) -> None:
        super().__init__(loop)
        self._look_loop = loop
        self._cuts = cuts
        self._noticed = noticed
        self._addresses: frozenset[str] = frozenset()
        self._transports: dict[CutTransport, None] = {}
        self._look()

    def is_cut(self, address: str) -> bool:
        return address in self._addresses

    def connect(
        self,
        address: str,
        factory: Callable[[], asyncio.Protocol],
        failed: Callable[[OSError], None],
        timeout_s: float,
    ) -> None:
        super().connect(address, lambda: _CutProtocol(factory(), self, address), failed, timeout_s)

    def made(self, transport: CutTransport) -> None:
        self._transports[transport] = None

    def lost(self, transport: CutTransport) -> None:
        self._transports.pop(transport, None)

    def _look(self) -> None:
        self._look_loop.call_later(_LOOK_S, self._look)
        addresses = frozenset(self._cuts.read_text().split()) if self._cuts.exists() else frozenset()
        if addresses != self._addresses:
            self._addresses = addresses
            self._noticed.write_text("\n".join(sorted(addresses)))
            for transport in tuple(self._transports):
                transport.release()


class CutTransport(asyncio.Transport):
    """A connection's way out, which may be cut."""

    def __init__(self, real: asyncio.Transport, network: CutNetwork, address: str) -> None:
        super().__init__()
        self._real = real
        self._network = network
        self._address = address
        self._held: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._held or self._network.is_cut(self._address):
            self._held.append(bytes(data))
        else:
            self._real.write(data)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[Any]]) -> None:
        self.write(b"".join(list_of_data))

    def release(self) -> None:
        if self._held and not self._network.is_cut(self._address):
            held, self._held = self._held, []
            self._real.write(b"".join(held))

    def get_write_buffer_size(self) -> int:
        return self._real.get_write_buffer_size() + sum(map(len, self._held))

    def close(self) -> None:
        # What is held is lost with the connection: a cut wire carries no farewell.
        self._real.close()

    def abort(self) -> None:
        self._real.abort()

    def is_closing(self) -> bool:
        return self._real.is_closing()

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._real.get_extra_info(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._real.set_write_buffer_limits(high, low)

    def pause_reading(self) -> None:
        self._real.pause_reading()

    def resume_reading(self) -> None:
        self._real.resume_reading()


class _CutProtocol(asyncio.Protocol):
    def __init__(self, inner: asyncio.Protocol, network: CutNetwork, address: str) -> None:
        self._inner = inner
        self._network = network
        self._address = address
        self._transport: CutTransport | None = None
        self.data_received, self.eof_received = inner.data_received, inner.eof_received  # type: ignore[method-assign]
        self.pause_writing, self.resume_writing = inner.pause_writing, inner.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = CutTransport(cast(asyncio.Transport, transport), self._network, self._address)
        self._network.made(self._transport)
        self._inner.connection_made(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            self._network.lost(self._transport)
        self._inner.connection_lost(exc)


def faulty_environment(loop: asyncio.AbstractEventLoop) -> Environment:
    real = system_environment(loop)
    faults, name = Path(os.environ["KVSTORE_TEST_FAULTS"]), sys.argv[sys.argv.index("--name") + 1]
    files = FullFiles(faults / f"full.{name}")
    network = CutNetwork(loop, faults / f"cut.{name}", faults / f"noticed.{name}")
    return Environment(real.clock, real.chance, real.scheduler, network, files)


if __name__ == "__main__":
    serving.serve = functools.partial(serving.serve, environment_factory=faulty_environment)
    main()
