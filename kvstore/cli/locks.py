"""`kvstore lock`: run a command while holding a lock."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import click

from kvstore.cli.options import Connection, connection_options
from kvstore.client.client import Client
from kvstore.client.lock import LOCK_TTL_S
from kvstore.errors import Unavailable

# How long a command that lost its lock may take to end before it is killed.
_END_S = 10.0


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--ttl",
    type=click.FloatRange(1.0, 3600.0),
    default=LOCK_TTL_S,
    show_default=True,
    metavar="SECONDS",
    help="So long a dead holder keeps the others waiting.",
)
@click.option(
    "--wait",
    type=click.FloatRange(0.0),
    metavar="SECONDS",
    help="Give up after so long (0: if it is not free now); as long as it takes if not given.",
)
@connection_options
def lock(name: str, command: tuple[str, ...], ttl: float, wait: float | None, connection: Connection) -> int:
    """Hold the lock NAME while COMMAND runs, and exit as it does. First come, first served.

    Write -- before a COMMAND that has options which are also options here.

    COMMAND finds the lock's fencing token in KVSTORE_LOCK_TOKEN: a number that grows with each holder. If the lock is
    lost while it runs, it is ended (SIGTERM, then SIGKILL), and the exit code is 3; what a lock can and cannot promise
    stands in docs/consistency.md.

    \b
      kvstore lock nightly-report --wait 0 -- python report.py
    """

    async def held(client: Client) -> int:
        lost = asyncio.Event()
        async with client.lock(name, ttl_s=ttl, wait_s=wait, on_lost=lost.set) as holder:
            environment = {**os.environ, "KVSTORE_LOCK_TOKEN": str(holder.token)}
            try:
                process = await asyncio.create_subprocess_exec(*command, env=environment)
            except OSError as error:
                raise click.ClickException(f"cannot run {command[0]}: {error}") from error
            try:
                return await _until_either(process, lost)
            finally:
                await _end(process)

    return connection.call(held)


async def _until_either(process: asyncio.subprocess.Process, lost: asyncio.Event) -> int:
    ended, loss = asyncio.ensure_future(process.wait()), asyncio.ensure_future(lost.wait())
    try:
        await asyncio.wait((ended, loss), return_when=asyncio.FIRST_COMPLETED)
    finally:
        loss.cancel()
    if not ended.done():
        ended.cancel()
        raise Unavailable("the lock was lost while the command ran; it is ended", code="lock_lost")
    code = ended.result()
    return code if code >= 0 else 128 - code  # as a shell tells of a signal


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    for number, within_s in ((signal.SIGTERM, _END_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        try:
            async with asyncio.timeout(within_s):
                await process.wait()
            return
        except TimeoutError:
            continue


COMMANDS: tuple[click.Command, ...] = (lock,)
