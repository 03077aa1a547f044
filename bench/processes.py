"""Servers as child processes: started with their output in a file, awaited by a condition, always ended by id."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bench.results import BenchError

_T = TypeVar("_T")
# How long a server may take to end after it was asked to, before it is killed: they hold only throwaway data.
STOP_S = 10.0
# Pause between two looks at a condition; short against every start that is awaited (0.3 s and more).
_POLL_S = 0.02


class Server:
    """One child process. Its output goes to `log`, whose end is quoted when it fails."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        user: str | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        environment: dict[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self.name = name
        self._log = log
        self._stop_signal = stop_signal
        with open(log, "ab") as output:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                command,
                # Held open as long as we live: a server that watches it ends even if we are killed.
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=directory,
                # A session of its own, so that Ctrl-C reaches the benchmark alone, which then stops them in order.
                start_new_session=True,
                **({"user": user, "group": user, "extra_groups": []} if user else {}),  # type: ignore[call-overload]
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raises BenchError if the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise BenchError(f"{self.name} ended with code {code}; the end of its output:\n{self.output_tail()}")

    def ended(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._process.poll()

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def output_tail(self) -> str:
        return "\n".join(self.output().splitlines()[-15:])

    def stop(self) -> None:
        """Ask it to end, wait, kill it if it does not. Safe to call twice."""
        if self._process.poll() is None:
            self._process.send_signal(self._stop_signal)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def wait_until(what: str, look: Callable[[], _T | None], servers: Sequence[Server] = (), timeout_s: float = 30.0) -> _T:
    """The first result of `look` that is not None. Raises BenchError when a server ends or time runs out."""
    deadline = time.monotonic() + timeout_s
    while True:
        for server in servers:
            server.check()
        found = look()
        if found is not None:
            return found
        if time.monotonic() > deadline:
            tails = "".join(f"\n--- {server.name}:\n{server.output_tail()}" for server in servers)
            raise BenchError(f"waited {timeout_s:.0f} s for {what}{tails}")
        time.sleep(_POLL_S)


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def accepts(port: int) -> bool:
    """True if something listens on this loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def require(peer: str, program: str, directories: Sequence[str] = ()) -> str:
    """Full path of a peer's program. Raises BenchError that names the peer where it is missing."""
    for candidate in (program, *(f"{directory}/{program}" for directory in directories)):
        path = shutil.which(candidate)
        if path is not None:
            return path
    raise BenchError(
        f"peer {peer} is missing: there is no `{program}` on this machine. Install the peers: make bench-deps"
    )


def run_tool(command: Sequence[str], *, environment: dict[str, str] | None = None, timeout_s: float) -> str:
    """Run a program to its end; its standard output. Raises BenchError with its output where it fails."""
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{command[0]} did not end within {timeout_s:.0f} s") from None
    if done.returncode != 0:
        raise BenchError(
            f"{' '.join(command)} ended with code {done.returncode}:\n{done.stdout[-800:]}{done.stderr[-800:]}"
        )
    return done.stdout
