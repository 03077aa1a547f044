"""`kvstore lock`: run a command while holding a lock.

However this process ends, the command ends with it: on SIGTERM, SIGHUP and Ctrl-C it is ended and waited for before the
lock is given up; where this process is killed, the system kills it too (Linux; elsewhere it goes on without the lock).

What that does not reach: what the command itself has started in the background or in a group of its own; a command that
the system runs with other rights than ours (set-user-ID), when this process is killed; and anything at all while this
process is stopped (SIGSTOP), as with every holder that is paused.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from kvstore.cli.options import Connection, Number, connection_options
from kvstore.cli.text import to_bytes
from kvstore.client.client import Client
from kvstore.client.lock import LOCK_TTL_S, lock_prefix
from kvstore.errors import Unavailable

# How long a command may take to end, once it was told to, before it is killed.
_END_S = 10.0
# Of <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--ttl",
    type=Number(1.0, 3600.0),
    default=LOCK_TTL_S,
    show_default=True,
    metavar="SECONDS",
    help="So long a dead holder keeps the others waiting.",
)
@click.option(
    "--wait",
    type=Number(0.0),
    metavar="SECONDS",
    help="Give up after so long (0: if it is not free now); as long as it takes if not given.",
)
@connection_options
def lock(name: str, command: tuple[str, ...], ttl: float, wait: float | None, connection: Connection) -> int:
    """Hold the lock NAME while COMMAND runs, and exit as it does. First come, first served.

    Write -- before a COMMAND that has options which are also options here.

    COMMAND finds the lock's fencing token in KVSTORE_LOCK_TOKEN: a number that grows with each holder. If the lock is
    lost while it runs, it is ended (SIGTERM, then SIGKILL after 10 s), and the exit code is 3; what a lock can and
    cannot promise stands in docs/consistency.md.

    SIGTERM and SIGHUP are passed on to COMMAND, which is killed if it has not ended 10 s later; then the lock is given
    up. A COMMAND that a signal ended makes the exit code 128 and the signal's number. If this process is killed,
    COMMAND is killed with it, on Linux; what COMMAND has started itself is not.

    \b
      kvstore lock nightly-report --wait 0 -- python report.py
    """
    key = to_bytes(name, "utf8")
    try:
        lock_prefix(key)
    except ValueError as error:
        raise click.UsageError(str(error)) from None

    async def held(client: Client) -> int:
        ending, lost = _Ending(), asyncio.Event()
        try:
            async with client.lock(key, ttl_s=ttl, wait_s=wait, on_lost=lost.set) as holder:
                ending.cancels = None
                return await _run(command, {**os.environ, "KVSTORE_LOCK_TOKEN": str(holder.token)}, lost, ending)
        except asyncio.CancelledError:
            if not ending.asked.done():
                raise  # Ctrl-C
            return 128 + ending.asked.result()

    return connection.call(held)


class _Ending:
    """SIGTERM and SIGHUP end this command and what it runs. One that was ignored when it began stays so (nohup)."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.asked: asyncio.Future[int] = loop.create_future()
        """The first of these signals."""
        self.cancels = asyncio.current_task()
        """What ends at once, while there is no command yet."""
        self.process: asyncio.subprocess.Process | None = None
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._ask, number)

    def _ask(self, number: int) -> None:
        is_first = not self.asked.done()
        if is_first:
            self.asked.set_result(number)
        if self.process is not None:
            _send(self.process, number)
        elif self.cancels is not None and is_first:  # once: who is cancelled still has to leave the line
            self.cancels.cancel()


async def _run(command: tuple[str, ...], environment: dict[str, str], lost: asyncio.Event, ending: _Ending) -> int:
    """Run the command to its end, or end it: then it has ended when this returns or raises."""
    try:
        process = await asyncio.create_subprocess_exec(*command, env=environment, preexec_fn=_ends_with_parent())
    except OSError as error:
        raise click.ClickException(f"cannot run {command[0]}: {error}") from error
    ending.process = process
    if ending.asked.done():  # before there was a process to pass it on to
        _send(process, ending.asked.result())
    ended, loss = asyncio.ensure_future(process.wait()), asyncio.ensure_future(lost.wait())
    ends: tuple[asyncio.Future[Any], ...] = (ended, loss, ending.asked)
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done() and not ending.asked.done():
            raise Unavailable("the lock was lost while the command ran; it is ended", code="lock_lost")
    finally:
        loss.cancel()
        if not ending.asked.done():
            _send(process, signal.SIGTERM)
        await _ended_or_killed(process)
    assert process.returncode is not None
    return process.returncode if process.returncode >= 0 else 128 - process.returncode  # as a shell tells of a signal


def _send(process: asyncio.subprocess.Process, number: int) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            process.send_signal(number)


async def _ended_or_killed(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        _send(process, signal.SIGKILL)
        await process.wait()


def _ends_with_parent() -> Callable[[], None] | None:
    """What a new process does before it becomes the command: ask the system to kill it when this one has ended. None
    where the system cannot do that."""
    if sys.platform != "linux":
        return None
    # Found here, because between fork and exec nothing may import or wait for a lock: another thread may have held it.
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it ended before the system was asked
            os.kill(os.getpid(), signal.SIGKILL)

    return ask


COMMANDS: tuple[click.Command, ...] = (lock,)
