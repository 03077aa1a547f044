"""One node as a process: run it until a signal ends it.

`run_node` is the whole of it, in parts that a test may replace: the power-loss test gives it an environment whose
files lose what was not synced.

SIGTERM and SIGINT stop cleanly: a leader hands over, what is under way is answered; bounded in time. A second one ends
the process at once, which loses nothing that was acknowledged.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any

import uvloop

from kvstore.env import Environment, Log, LoopScheduler, system_environment
from kvstore.errors import KvError
from kvstore.server.assembly import build_node
from kvstore.server.node import ServerNode, ServerOptions

# A thread that finished a sync must get the interpreter soon beside a busy loop: with Python's 5 ms it waited 10 ms,
# so 0.3 ms (design section 6).
SWITCH_INTERVAL_S = 0.0001
# Fewer collections: nearly nothing on the hot path is cyclic (messages and answers are no gc objects at all), and what
# lives as long as the process is frozen out of them below.
GC_THRESHOLDS = (20_000, 50, 100)

EnvironmentFactory = Callable[[asyncio.AbstractEventLoop], Environment]
WhenServing = Callable[[ServerNode], Awaitable[None]]


def version() -> str:
    """The installed version; empty where it runs from its source without being installed."""
    try:
        return metadata.version("kvstore")
    except metadata.PackageNotFoundError:
        return ""


async def run_node(
    options: ServerOptions,
    log: Log,
    *,
    environment_factory: EnvironmentFactory = system_environment,
    when_serving: WhenServing | None = None,
    parent_pipe: bool = False,
) -> None:
    """Serve until a signal, or until consensus ends for good. `when_serving` runs beside it once the node serves; if
    it raises, so does this, after a clean stop. `parent_pipe`: also stop when standard input ends, as it does when the
    process that started this one is gone.

    Raises `StartupError`, also when the node was removed from its cluster, and `InternalError` where it met a bug.
    """
    loop = asyncio.get_running_loop()
    ending: asyncio.Future[KvError | None] = loop.create_future()

    def end(error: KvError | None) -> None:
        if not ending.done():
            ending.set_result(error)

    def signalled(number: int) -> None:
        if ending.done():
            log.warning("stopping at once", signal=signal.Signals(number).name)
            os._exit(128 + number)
        log.info("stopping", signal=signal.Signals(number).name)
        end(None)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled, int(number))
    if parent_pipe:
        loop.add_reader(sys.stdin.fileno(), _parent_gone, loop, end)

    def failed(error: KvError) -> None:
        # With a failed disk the node still serves local reads; anything else leaves it nothing to do.
        if error.code != "storage_failed":
            end(error)

    env = environment_factory(loop)
    node = build_node(options, env, log)
    node.on_fatal = failed
    try:
        await node.start()
        gc.collect()
        gc.freeze()
        log.info(
            "serving",
            peers=options.peer_listen,
            clients=node.door.address if node.door is not None else "",
            cluster_id=node.options.cluster_id,
            pid=os.getpid(),
        )
        beside = asyncio.ensure_future(when_serving(node)) if when_serving is not None else None
        awaited: list[asyncio.Future[Any]] = [ending] if beside is None else [ending, beside]
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if beside is not None and beside.done() and beside.exception() is None:
            await ending
        await node.stop()
        if beside is not None:
            beside.cancel()
            await asyncio.wait([beside])
            if not beside.cancelled():
                beside.result()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        if isinstance(env.scheduler, LoopScheduler):
            env.scheduler.close()
    error = ending.result() if ending.done() else None
    if error is not None:
        raise error
    log.info("stopped")


def serve(
    options: ServerOptions,
    log: Log,
    *,
    environment_factory: EnvironmentFactory = system_environment,
    when_serving: WhenServing | None = None,
    parent_pipe: bool = False,
) -> None:
    """`run_node` as a process's main thing, on uvloop."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.set_threshold(*GC_THRESHOLDS)
    uvloop.run(
        run_node(
            options,
            log,
            environment_factory=environment_factory,
            when_serving=when_serving,
            parent_pipe=parent_pipe,
        )
    )


def _parent_gone(loop: asyncio.AbstractEventLoop, end: Callable[[KvError | None], None]) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        loop.remove_reader(sys.stdin.fileno())
        end(None)
