"""The outside world, as `raft` and `server` see it: clock, chance, files, sockets, threads.

Each is a protocol here, handed in from outside, and the real one stands below it. So a test runs the same code in
virtual time on disks that lose what was not synced. A test forbids `time`, `random`, `os`, `socket`, `threading` and
the like anywhere else in `kvstore/raft` and `kvstore/server`.

Nothing here is thread safe but where it says so: a node lives on one event loop.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds since some fixed moment; never goes back."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970 as this machine believes; may jump."""


class Chance(Protocol):
    def random(self) -> float:
        """A float in [0, 1)."""

    def getrandbits(self, bits: int, /) -> int:
        """An integer of that many random bits; unpredictable in the real one."""


class Timer(Protocol):
    def cancel(self) -> None: ...


class Scheduler(Protocol):
    """The event loop, cut down to what a node needs. Callbacks run one at a time."""

    def call_soon(self, callback: Callable[..., object], *args: Any) -> object: ...

    def call_later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> Timer: ...

    def run_in_thread(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """Run `work` beside the loop; `done(result, error)` is called on the loop afterwards."""


class Listener(Protocol):
    @property
    def address(self) -> str:
        """`host:port` as bound; the port that was chosen where 0 was asked for."""

    def close(self) -> None: ...


class Network(Protocol):
    """Byte streams between nodes, as asyncio protocols and transports."""

    async def listen(self, address: str, factory: Callable[[], asyncio.Protocol]) -> Listener:
        """Accept streams on `host:port`. Raises OSError (EADDRINUSE where the port is taken)."""

    def connect(
        self,
        address: str,
        factory: Callable[[], asyncio.Protocol],
        failed: Callable[[OSError], None],
        timeout_s: float,
    ) -> None:
        """Open a stream: `factory`'s protocol gets `connection_made`, or `failed` is called on the loop."""


class File(Protocol):
    """An open file that is written by one owner. Offsets and sizes in bytes."""

    def write_at(self, offset: int, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """Write all buffers one after another from `offset` on; returns when the system has them all.
        Raises OSError (ENOSPC, EIO)."""

    def sync(self) -> None:
        """fdatasync: on return everything written is on the disk. May be called from a thread."""

    def truncate(self, size_bytes: int) -> None: ...

    def allocate(self, size_bytes: int) -> None:
        """Reserve space up to `size_bytes` (the file grows to it, reading as zeroes). Raises OSError (ENOSPC)."""

    def size(self) -> int: ...

    def read_at(self, offset: int, size_bytes: int) -> bytes:
        """Up to `size_bytes`, fewer only at the end of the file."""

    def close(self) -> None: ...


class Files(Protocol):
    """The file system below a node's data directory. Paths are strings; all errors are OSError."""

    def open(self, path: str, create: bool = False) -> File:
        """Open for reading and writing. `create` makes a new file and fails if one is there."""

    def read(self, path: str) -> bytes: ...

    def replace(self, path: str, data: bytes) -> None:
        """Write a small file durably and atomically: temporary file, sync, rename, directory sync."""

    def rename(self, old: str, new: str) -> None: ...

    def remove(self, path: str) -> None: ...

    def remove_tree(self, path: str) -> None:
        """Remove a directory and all in it; nothing happens if it is not there."""

    def make_dirs(self, path: str) -> None: ...

    def list_dir(self, path: str) -> list[str]:
        """Names in a directory, sorted; empty if it is not there."""

    def exists(self, path: str) -> bool: ...

    def is_dir(self, path: str) -> bool: ...

    def size(self, path: str) -> int: ...

    def sync_dir(self, path: str) -> None:
        """Make creations, renames and removals in a directory durable."""

    def lock(self, path: str) -> Callable[[], None] | None:
        """Take an exclusive lock on a file, for as long as this process lives; None if another holds it. Call what
        is returned to release it."""


class Log(Protocol):
    """Structured log: an event, and fields."""

    def info(self, event: str, /, **fields: Any) -> Any: ...

    def warning(self, event: str, /, **fields: Any) -> Any: ...

    def error(self, event: str, /, **fields: Any) -> Any: ...


class Environment:
    """Everything from outside that one node uses."""

    __slots__ = ("chance", "clock", "files", "network", "scheduler")

    def __init__(self, clock: Clock, chance: Chance, scheduler: Scheduler, network: Network, files: Files) -> None:
        self.clock = clock
        self.chance = chance
        self.scheduler = scheduler
        self.network = network
        self.files = files


def split_address(address: str) -> tuple[str, int]:
    """`host:port` -> (host, port); an IPv6 host stands in brackets. Raises ValueError."""
    host, separator, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not separator or not bare or set(bare) & set("[]") or not port.isascii() or not port.isdigit():
        raise ValueError(f"{address!r} is no host:port")
    if int(port) > 65535:
        raise ValueError(f"{address!r} has no port that there is; the largest is 65535")
    return bare, int(port)


# --- the real ones ---------------------------------------------------------------------------------------------------


class SystemClock:
    monotonic = staticmethod(time.monotonic)

    @staticmethod
    def wall_ms() -> int:
        return time.time_ns() // 1_000_000


class LoopScheduler:
    """The running asyncio (uvloop) loop and a few threads beside it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.call_soon = loop.call_soon
        self.call_later = loop.call_later
        # Syncs, flushes and checkpoints: at most one of each at a time, so four never queue behind each other.
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="kvstore")

    def run_in_thread(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        def finished(future: asyncio.Future[Any]) -> None:
            error = future.exception()
            done(None if error else future.result(), error)

        self._loop.run_in_executor(self._threads, work).add_done_callback(finished)

    def close(self) -> None:
        """Wait for what runs in threads, then end them."""
        self._threads.shutdown(wait=True)


class _TcpListener:
    def __init__(self, server: asyncio.Server) -> None:
        self._server = server
        host, port = server.sockets[0].getsockname()[:2]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def address(self) -> str:
        return self._address

    def close(self) -> None:
        self._server.close()


class TcpNetwork:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._connecting: set[asyncio.Task[None]] = set()

    async def listen(self, address: str, factory: Callable[[], asyncio.Protocol]) -> Listener:
        host, port = split_address(address)
        # 1,024 may wait to be accepted: a burst of clients after a leader change must not be turned away.
        return _TcpListener(await self._loop.create_server(factory, host, port, backlog=1024))

    def connect(
        self,
        address: str,
        factory: Callable[[], asyncio.Protocol],
        failed: Callable[[OSError], None],
        timeout_s: float,
    ) -> None:
        async def open_stream() -> None:
            try:
                host, port = split_address(address)
                async with asyncio.timeout(timeout_s):
                    await self._loop.create_connection(factory, host, port)
            except OSError as error:  # TimeoutError is one
                failed(error)
            except ValueError as error:
                failed(OSError(errno.EINVAL, str(error)))

        task = self._loop.create_task(open_stream())
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)


class SystemFile:
    def __init__(self, path: str, create: bool) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        self._fd = os.open(path, flags, 0o600)

    def write_at(self, offset: int, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        # pwritev takes at most IOV_MAX (1,024) buffers and may write fewer bytes than it was given.
        data: bytes | memoryview
        data = buffers[0] if len(buffers) == 1 and isinstance(buffers[0], bytes) else b"".join(buffers)
        written = os.pwrite(self._fd, data, offset)
        while written < len(data):
            more = os.pwrite(self._fd, memoryview(data)[written:], offset + written)
            if more == 0:
                raise OSError(errno.EIO, "a write made no progress")
            written += more

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def truncate(self, size_bytes: int) -> None:
        os.ftruncate(self._fd, size_bytes)

    def allocate(self, size_bytes: int) -> None:
        os.posix_fallocate(self._fd, 0, size_bytes)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read_at(self, offset: int, size_bytes: int) -> bytes:
        parts: list[bytes] = []
        while size_bytes > 0:
            part = os.pread(self._fd, size_bytes, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size_bytes -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        os.close(self._fd)


class SystemFiles:
    def open(self, path: str, create: bool = False) -> File:
        return SystemFile(path, create)

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def replace(self, path: str, data: bytes) -> None:
        temporary = path + ".tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        self.sync_dir(os.path.dirname(path))

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def remove(self, path: str) -> None:
        os.remove(path)

    def remove_tree(self, path: str) -> None:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            return

    def make_dirs(self, path: str) -> None:
        os.makedirs(path, mode=0o700, exist_ok=True)

    def list_dir(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def is_dir(self, path: str) -> bool:
        return os.path.isdir(path)

    def size(self, path: str) -> int:
        return os.path.getsize(path)

    def sync_dir(self, path: str) -> None:
        fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def lock(self, path: str) -> Callable[[], None] | None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return lambda: os.close(fd)


class SystemChance:
    """Quick for jitter, unpredictable for ids: asking the system for each float costs 25 times as much."""

    def __init__(self) -> None:
        self._system = random.SystemRandom()
        self.random = random.Random(self._system.getrandbits(64)).random
        self.getrandbits = self._system.getrandbits


def system_environment(loop: asyncio.AbstractEventLoop) -> Environment:
    """The real world, on a running loop."""
    return Environment(SystemClock(), SystemChance(), LoopScheduler(loop), TcpNetwork(loop), SystemFiles())
