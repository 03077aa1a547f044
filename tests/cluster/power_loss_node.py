"""Processes whose files lose power when they are killed, and the zygote that makes starting them cheap.

The zygote is a process that has everything imported and runs nothing: no loop, no thread, no RocksDB. For each start it
forks, and the child is a node or an embedded store: 20 ms in place of 600 ms. It kills its children too, all of them
within microseconds, and waits until they are gone. When the test's process ends, so do the zygote and all of them.

`Zygote` is the test's side; `python -m tests.cluster.power_loss_node FD` the zygote itself, which answers one packet
with one packet.

A node is the real one (`run_node`), on `PowerLossFiles`. An embedded store is opened, reports all that it holds, and
then writes until it is killed; it reports each attempt before it is made, and each acknowledgement after it came.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random, SystemRandom
from types import TracebackType
from typing import Any, NoReturn, Union

import msgspec
import uvloop
from msgspec import Struct

from kvstore.cli.logs import server_log
from kvstore.cli.serve import GC_THRESHOLDS, SWITCH_INTERVAL_S, run_node
from kvstore.embedded import EmbeddedClient
from kvstore.env import Environment, File, Files, LoopScheduler, SystemClock, TcpNetwork
from kvstore.server.node import ServerOptions
from tests.cluster.histories import everything, write
from tests.cluster.small_limits import use_small_limits
from tests.powerloss import PowerLossFile, PowerLossFiles

ROOT = Path(__file__).parents[2]
EMBEDDED_WRITERS = 8
_PACKET_BYTES_MAX = 64 * 1024
# The zygote only forks and waits; a minute means that it is gone or the machine is.
_ANSWER_S = 60.0


class Disk(Struct, frozen=True, kw_only=True):
    """How a process's disk behaves. `sync_s`: how long each sync takes before anything of it is durable."""

    sync_does_nothing: bool = False
    sync_s: float = 0.0
    small_limits: bool = True


class StartNode(Struct, frozen=True, tag=True):
    options: ServerOptions
    disk: Disk


class StartEmbedded(Struct, frozen=True, tag=True):
    """`name` is given to no other process of the same store: its keys carry it."""

    path: str
    name: str
    disk: Disk


class Kill(Struct, frozen=True, tag=True):
    pids: list[int]


Command = Union[StartNode, StartEmbedded, Kill]


# --- the test's side --------------------------------------------------------------------------------------------------


class Zygote:
    """Starts and kills; a context manager. Its calls wait for the zygote, which takes milliseconds."""

    def __enter__(self) -> Zygote:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_ANSWER_S)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(other.fileno())],
                cwd=ROOT,
                stdin=subprocess.PIPE,  # nodes end when it does
                pass_fds=[other.fileno()],
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(_ANSWER_S)

    def start(self, command: StartNode | StartEmbedded, log_path: Path, report: int | None = None) -> int:
        """Start a process that logs to a file; its pid. `report`: the descriptor that an embedded store reports to."""
        with log_path.open("ab") as log:
            fds = [log.fileno()] if report is None else [log.fileno(), report]
            return int(self._ask(command, fds))

    def kill(self, pids: Sequence[int]) -> None:
        """SIGKILL to all of them, in this order; returns when they are gone. AssertionError if one was dead before."""
        assert self._ask(Kill(list(pids)), []) == [signal.SIGKILL] * len(pids), "a process ended before it was killed"

    def _ask(self, command: Command, fds: list[int]) -> Any:
        socket.send_fds(self._socket, [msgspec.msgpack.encode(command)], fds)
        answer = self._socket.recv(_PACKET_BYTES_MAX)
        assert answer, "the zygote is gone"
        return msgspec.msgpack.decode(answer)


# --- the zygote -------------------------------------------------------------------------------------------------------


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    decoder = msgspec.msgpack.Decoder[Command](Command)
    children: set[int] = set()
    gc.freeze()
    while True:
        packet, fds, _, _ = socket.recv_fds(control, _PACKET_BYTES_MAX, 2)
        if not packet:
            _kill(list(children))
            return
        command = decoder.decode(packet)
        if isinstance(command, Kill):
            statuses = _kill(command.pids)
            children.difference_update(command.pids)
            control.send(msgspec.msgpack.encode(statuses))
            continue
        child = os.fork()
        if child == 0:
            control.close()
            _run(command, fds)
        for fd in fds:
            os.close(fd)
        children.add(child)
        control.send(msgspec.msgpack.encode(child))


def _kill(pids: list[int]) -> list[int]:
    """The statuses that they ended with: the number of the signal, or the exit code times 256."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)  # one that died by itself is still there, until it is waited for
    return [os.waitpid(pid, 0)[1] for pid in pids]


def _run(command: StartNode | StartEmbedded, fds: list[int]) -> NoReturn:
    """What a child does, to its end."""
    code = 1
    try:
        os.dup2(fds[0], sys.stdout.fileno())
        os.dup2(fds[0], sys.stderr.fileno())
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.set_threshold(*GC_THRESHOLDS)
        if command.disk.small_limits:
            use_small_limits()
        files = _files(command.disk)
        if isinstance(command, StartNode):
            uvloop.run(_serve(command.options, files))
        else:
            uvloop.run(_write_embedded(command, files, fds[1]))
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


# --- what runs in its children ----------------------------------------------------------------------------------------


class _SlowFile(PowerLossFile):
    def sync(self) -> None:
        time.sleep(self._files.sync_s)  # type: ignore[attr-defined]  # a disk that takes its time
        super().sync()


class _SlowFiles(PowerLossFiles):
    """A power loss during a sync is likely when syncs take long. Nothing of one is durable before its time is over."""

    def __init__(self, sync_s: float) -> None:
        super().__init__()
        self.sync_s = sync_s

    def open(self, path: str, create: bool = False) -> File:
        opened = super().open(path, create)
        assert isinstance(opened, PowerLossFile)
        return _SlowFile(self, opened._inode)


def _files(disk: Disk) -> Files:
    if disk.sync_does_nothing:
        return PowerLossFiles(sync_does_nothing=True)
    return _SlowFiles(disk.sync_s) if disk.sync_s else PowerLossFiles()


async def _serve(options: ServerOptions, files: Files) -> None:
    def environment(loop: asyncio.AbstractEventLoop) -> Environment:
        return Environment(SystemClock(), SystemRandom(), LoopScheduler(loop), TcpNetwork(loop), files)

    log = server_log(options.name, "json", "info")
    await run_node(options, log, environment_factory=environment, parent_pipe=True)


class _PowerLossEmbedded(EmbeddedClient):
    def __init__(self, path: str, files: Files) -> None:
        super().__init__(path, timeout_s=5.0)
        self._power_loss_files = files

    def _make_files(self) -> Files:
        return self._power_loss_files


class Report(Struct, frozen=True, array_like=True):
    """A line of what an embedded store reports. `kind` is the name of a `History` method, `holds` (one record of those
    that were found), or `serves` (all were reported)."""

    kind: str
    key: bytes = b""
    value: bytes = b""
    total: int = 0

    def line(self) -> bytes:
        return base64.b64encode(msgspec.msgpack.encode(self)) + b"\n"

    @staticmethod
    def parse(line: bytes) -> Report:
        return msgspec.msgpack.decode(base64.b64decode(line), type=Report)


class _Reporter:
    """The history of an embedded store. Each line is one write, so a kill leaves whole lines."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def report(self, report: Report) -> None:
        line = report.line()
        written = os.write(self._fd, line)
        assert written == len(line), "up to 4 KiB go into a pipe whole"

    def try_put(self, key: bytes, value: bytes) -> None:
        self.report(Report("try_put", key, value))

    def put(self, key: bytes, value: bytes) -> None:
        self.report(Report("put", key, value))

    def try_add(self, counter: bytes) -> None:
        self.report(Report("try_add", counter))

    def add(self, counter: bytes, total: int) -> None:
        self.report(Report("add", counter, b"", total))


async def _write_embedded(command: StartEmbedded, files: Files, fd: int) -> None:
    reporter = _Reporter(fd)
    async with _PowerLossEmbedded(command.path, files) as kv:
        for key, value in (await everything(kv)).items():
            reporter.report(Report("holds", key, value))
        reporter.report(Report("serves"))

        async def writer(name: bytes) -> None:
            chance, number = Random(name), 0
            while True:
                assert await write(kv, reporter, name, number, chance), "an embedded store is always available"
                number += 1

        names = [f"{command.name}.{number}".encode() for number in range(EMBEDDED_WRITERS)]
        await asyncio.gather(*(writer(name) for name in names))


if __name__ == "__main__":
    main()
