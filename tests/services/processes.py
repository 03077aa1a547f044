"""A service, or a command, as a process of its own, as it runs in earnest."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import aiohttp

from tests.cluster.harness import ROOT, free_ports, until

READY_S = 20.0
STOP_S = 15.0  # its own grace is 10 s


class ServiceProcess:
    """`async with ServiceProcess("orders", endpoints, tmp_path) as orders: ... orders.url`"""

    def __init__(
        self, service: str, endpoints: str | None, path: Path, *arguments: str, wait_for: str = "/readyz"
    ) -> None:
        """`endpoints` None is a service without a store. Once left, it may be entered again: on the same port."""
        self._wait_for = wait_for
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = path / f"{service}-{port}.log"
        mail = ["--mail-directory", str(path / "mail")] if service == "users" else []
        self._command = [
            sys.executable, "-m", "services", service, "--port", str(port),
            *([] if endpoints is None else ["--endpoints", endpoints]), *mail, *arguments,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> ServiceProcess:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=os.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            async with aiohttp.ClientSession() as session:
                await until(lambda: self._ready(session), READY_S, f"{self.url} {self._wait_for}")
        except BaseException:
            await self.__aexit__(*sys.exc_info())
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(f"--- {self.log_path.name}\n{self.log()[-4000:]}", file=sys.stderr)
        assert self.process is not None
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_S)

    async def stop(self) -> int:
        """SIGTERM, and wait; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, STOP_S)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    async def _ready(self, session: aiohttp.ClientSession) -> bool:
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
