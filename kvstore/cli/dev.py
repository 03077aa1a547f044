"""`kvstore dev`: a whole local cluster as child processes, for development and for tests of failure.

A supervisor with one asyncio task per child: it starts the child, passes its output on with the node's name in front,
and starts it again after a while if it died. `DATA/cluster.json` tells others (a demo that kills the leader, say) who
runs where; it is rewritten, atomically, whenever that changes. `DATA/dev.lock` is held all the while, so that a second
supervisor there touches nothing.

Children run in sessions of their own, so that Ctrl-C reaches only the supervisor, and they hold a pipe to it, so that
they end with it even if it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from msgspec import Struct

import kvstore
from kvstore.env import SystemFiles
from kvstore.errors import KvError, StartupError
from kvstore.server.identity import cluster_id

HOST = "127.0.0.1"
CLIENT_PORT_ABOVE = 10
HTTP_PORT_ABOVE = 30
# A node stops within its own bounds (hand over 2 s, drain 2 s, close 2 s); who has not by then is killed.
STOP_S = 8.0
# A line is passed on whole up to this; a longer one in parts.
_LINE_BYTES_MAX = 64 * 1024
# An exit code that a new start will not cure: the node refused to start.
_STARTUP_EXIT = 5
_LEADER_POLL_S = 0.1


class DevOptions(Struct, frozen=True, kw_only=True):
    nodes: int
    data_dir: str
    base_port: int
    restart_after_s: float | None
    log_level: str = "info"


class _Node:
    """One child: where it lives, and its process while it has one."""

    def __init__(self, name: str, peer_port: int, data_dir: Path) -> None:
        self.name = name
        self.peer_address = f"{HOST}:{peer_port}"
        self.client_address = f"{HOST}:{peer_port + CLIENT_PORT_ABOVE}"
        self.http_address = f"{HOST}:{peer_port + HTTP_PORT_ABOVE}"
        self.data_dir = data_dir / name
        self.process: Process | None = None
        self.starts = 0


class Supervisor:
    """Runs the children until it is told to stop."""

    def __init__(self, options: DevOptions) -> None:
        self._options = options
        self._path = Path(options.data_dir)
        self._token = ""
        self._nodes = [
            _Node(f"n{number}", options.base_port + number - 1, self._path) for number in range(1, options.nodes + 1)
        ]
        self._stopping = asyncio.Event()
        self._exit_code = 0
        self._width = max(len(node.name) for node in self._nodes)

    @property
    def endpoints(self) -> str:
        return ",".join(node.client_address for node in self._nodes)

    @property
    def cluster_id(self) -> str:
        return cluster_id([node.name for node in self._nodes], self._token)

    async def run(self) -> int:
        """Until SIGINT, SIGTERM, or until no child is left. The process's exit code. Raises `StartupError`."""
        release = self._lock()
        try:
            return await self._run()
        finally:
            release()

    def _lock(self) -> Callable[[], None]:
        """Take the directory for this supervisor; call what is returned to give it back."""
        path = self._path / "dev.lock"
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            release = SystemFiles().lock(str(path))
        except OSError as error:
            raise StartupError(f"cannot use the data directory {self._path}: {error}") from error
        if release is None:
            raise StartupError(
                f"another `kvstore dev` runs in {self._path}; use that one, stop it, or give this one a directory and "
                "a --base-port of its own",
                code="data_dir_in_use",
            )
        return release

    async def _run(self) -> int:
        self._token = _kept_token(self._path / "token")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)
        watching = [asyncio.create_task(self._watch(node)) for node in self._nodes]
        announcing = asyncio.create_task(self._announce())
        try:
            all_ended = asyncio.gather(*watching)
            stopping = asyncio.create_task(self._stopping.wait())
            awaited: list[asyncio.Future[Any]] = [all_ended, stopping]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            self._stopping.set()
            await all_ended
        finally:
            announcing.cancel()
            await asyncio.wait([announcing])
            (self._path / "cluster.json").unlink(missing_ok=True)
        self._say("all nodes have ended")
        return self._exit_code

    # --- children -----------------------------------------------------------------------------------------------------

    async def _watch(self, node: _Node) -> None:
        """Keep one node running."""
        while not self._stopping.is_set():
            code = await self._run_once(node)
            if self._stopping.is_set():
                return
            self._say(f"{node.name} ended: {_describe(code)}")
            if code == 0:
                return  # it was asked to, or left the cluster
            if code == _STARTUP_EXIT and node.starts == 1:
                # It will not start the next time either (a port in use, another cluster's data): say so and give up.
                self._exit_code = _STARTUP_EXIT
                self._stopping.set()
                return
            if self._options.restart_after_s is None or code == _STARTUP_EXIT:
                self._exit_code = 1
                return
            self._say(f"{node.name} starts again in {self._options.restart_after_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._options.restart_after_s)

    async def _run_once(self, node: _Node) -> int:
        """One life of a node; its exit code (negative: the signal that ended it)."""
        process = node.process = await asyncio.create_subprocess_exec(
            *self._command(node),
            stdin=PIPE,
            stdout=PIPE,
            stderr=STDOUT,
            env={**os.environ, "KVSTORE_CLUSTER_TOKEN": self._token},
            start_new_session=True,
        )
        node.starts += 1
        self._write_cluster()
        passing_on = asyncio.create_task(self._pass_on(node.name, process))
        ended = asyncio.create_task(process.wait())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([ended, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not ended.done():
            await self._stop(node.name, process)
        await asyncio.wait([passing_on, ended])
        passing_on.result()
        node.process = None
        if not self._stopping.is_set():
            self._write_cluster()
        return ended.result()

    async def _stop(self, name: str, process: Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            self._say(f"{name} did not stop within {STOP_S:g} s: killed")
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def _command(self, node: _Node) -> list[str]:
        peers = ",".join(f"{other.name}={other.peer_address}/{other.client_address}" for other in self._nodes)
        return [
            sys.executable, "-m", "kvstore.cli.main", "serve",
            "--name", node.name, "--data-dir", str(node.data_dir), "--peers", peers,
            "--http-listen", node.http_address,
            "--log-format", "console", "--log-level", self._options.log_level, "--with-parent",
        ]  # fmt: skip

    async def _pass_on(self, name: str, process: Process) -> None:
        """A child's output, line by line, with its name in front."""
        assert process.stdout is not None, "started with a pipe"
        rest = b""
        while chunk := await process.stdout.read(_LINE_BYTES_MAX):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _LINE_BYTES_MAX:
                lines, rest = [*lines, rest], b""
            for line in lines:
                click.echo(f"{name:<{self._width}} | {line.decode(errors='replace')}")
        if rest:
            click.echo(f"{name:<{self._width}} | {rest.decode(errors='replace')}")

    # --- what others are told -----------------------------------------------------------------------------------------

    async def _announce(self) -> None:
        """Say where the cluster is, once it can be used: this one, whoever else may listen on its ports."""
        async with kvstore.connect(self.endpoints, timeout_s=2.0, cluster_id=self.cluster_id) as client:
            while True:
                try:
                    status = await client.status()
                    if status.leader:
                        break
                except KvError:
                    pass  # not yet: nothing listens, no leader is elected, or another cluster has our ports
                await asyncio.sleep(_LEADER_POLL_S)
        self._say(f"{len(self._nodes)} nodes, {status.leader} leads; data in {self._path}")
        self._say(f"export KVSTORE_ENDPOINTS={self.endpoints}")

    def _write_cluster(self) -> None:
        document = {
            "cluster_id": self.cluster_id,
            "endpoints": self.endpoints,
            "supervisor_pid": os.getpid(),
            "nodes": [
                {
                    "name": node.name,
                    "pid": node.process.pid if node.process is not None else None,
                    "peer_address": node.peer_address,
                    "client_address": node.client_address,
                    "data_dir": str(node.data_dir),
                    "starts": node.starts,
                }
                for node in self._nodes
            ],
        }
        temporary = self._path / "cluster.json.tmp"
        temporary.write_text(json.dumps(document, indent=2) + "\n")
        temporary.replace(self._path / "cluster.json")

    def _signalled(self) -> None:
        if self._stopping.is_set():
            self._say("stopping at once")
            for node in self._nodes:
                if node.process is not None:
                    with contextlib.suppress(ProcessLookupError):
                        node.process.kill()
        else:
            self._say("stopping; once more to stop at once")
            self._exit_code = 0
            self._stopping.set()

    def _say(self, text: str) -> None:
        click.echo(f"{'dev':<{self._width}} | {text}")


def run_dev(options: DevOptions) -> int:
    """The command's body."""

    return asyncio.run(Supervisor(options).run())


def _kept_token(path: Path) -> str:
    """This cluster's token: random, drawn once, kept beside its data for its owner only."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text().strip()
    with os.fdopen(descriptor, "w") as file:
        token = secrets.token_hex(16)
        file.write(token + "\n")
    return token


def _describe(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
