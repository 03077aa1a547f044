"""A service, a worker or a command, as a process of its own, as it runs in earnest."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

from tests.cluster.harness import ROOT, free_ports, until

READY_S = 20.0
STOP_S = 15.0  # its own grace is 10 s


class Process:
    """`python -m services …`. Once left, it may be entered again."""

    def __init__(self, log_path: Path, *arguments: str) -> None:
        self.log_path = log_path
        self._command = [sys.executable, "-m", "services", *arguments]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Without waiting until it is ready."""
        assert not self.running, f"{self.log_path.stem} runs already"
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=os.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    async def ready(self) -> None:
        """Wait until it does its work. Raises AssertionError."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        self.start()
        try:
            await self.ready()
        except BaseException:
            await self.__aexit__(*sys.exc_info())
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(f"--- {self.log_path.name}\n{self.log()[-4000:]}", file=sys.stderr)
        self.kill()

    def kill(self) -> None:
        """SIGKILL if it runs, and wait until it is gone."""
        assert self.process is not None
        if self.running:
            self.process.kill()
        self.process.wait(STOP_S)

    async def stop(self) -> int:
        """SIGTERM, and wait; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, STOP_S)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


class ServiceProcess(Process):
    """`async with ServiceProcess("orders", endpoints, tmp_path) as orders: ... orders.url`"""

    def __init__(
        self,
        service: str,
        endpoints: str | None,
        path: Path,
        *arguments: str,
        wait_for: str = "/readyz",
        port: int | None = None,
    ) -> None:
        """`endpoints` None is a service without a store. It has the same port whenever it is entered."""
        self._wait_for = wait_for
        self.port = free_ports(1)[0] if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        mail = ["--mail-directory", str(path / "mail")] if service == "users" else []
        store = [] if endpoints is None else ["--endpoints", endpoints]
        log_path = path / f"{service}-{self.port}.log"
        super().__init__(log_path, service, "--port", str(self.port), *store, *mail, *arguments)

    async def ready(self) -> None:
        async with aiohttp.ClientSession() as session:
            await until(lambda: self._is_ready(session), READY_S, f"{self.url} {self._wait_for}")

    async def _is_ready(self, session: aiohttp.ClientSession) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"it ended with {self.process.returncode}"
        try:
            async with session.get(f"{self.url}{self._wait_for}") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError):
            return False


async def command(*arguments: str, stdin: str = "", **environment: str) -> tuple[int, str]:
    """`python -m services …` to its end: (exit code, all output)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services", *arguments, cwd=ROOT, env={**os.environ, **environment},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(30):
            out, _ = await process.communicate(stdin.encode())
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, out.decode()


class WorkerProcess(Process):
    """`async with WorkerProcess(endpoints, tmp_path, "--psp-url", psp.url):`"""

    def __init__(self, endpoints: str, path: Path, *arguments: str, name: str = "worker") -> None:
        super().__init__(path / f"{name}.log", "worker", "--endpoints", endpoints, *arguments)
        self._log_from = 0

    def start(self) -> None:
        self._log_from = self.log_path.stat().st_size if self.log_path.exists() else 0
        super().start()

    async def ready(self) -> None:
        async def says_so() -> bool:
            assert self.running, "the worker has ended"
            with self.log_path.open("rb") as log:  # that of a long life is long
                log.seek(self._log_from)
                return b'"working"' in log.read()

        await until(says_so, READY_S, "the worker to begin")
