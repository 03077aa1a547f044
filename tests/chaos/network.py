"""The proxy as a process of its own, and the campaign's hold on it.

    async with Network() as network:
        await network.open(Door("n1", 20001, 20002, for_peers=True))
        await network.cut(HOLD, ["n1"], ["n2", "n3"])
        await network.heal()

A process of its own, because what it passes on must not wait for clients, checkers and plots. It is told one command a
line (JSON) on its standard input, and answers each with its counts once it is carried out; it ends when that input
does, so it never outlives the campaign.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import msgspec
import uvloop

from tests.chaos.proxy import PASS, Counts, Door, Proxy, Rule

_ROOT = Path(__file__).parents[2]
# Starting an interpreter on a busy machine; a command takes a millisecond.
_ANSWER_TIMEOUT_S = 20.0
# A rule for each of the few dozen pairs fits into a thousandth of it.
_LINE_BYTES_MAX = 1024 * 1024


class _Open(msgspec.Struct, tag="open"):
    door: Door


class _Rules(msgspec.Struct, tag="rules"):
    pairs: list[tuple[str, str]]
    rule: Rule


class _Heal(msgspec.Struct, tag="heal"):
    pass


class _Reset(msgspec.Struct, tag="reset"):
    pairs: list[tuple[str, str]]


class _Deafen(msgspec.Struct, tag="deafen"):
    pairs: list[tuple[str, str]]


class _Look(msgspec.Struct, tag="look"):
    pass


_Command = _Open | _Rules | _Heal | _Reset | _Deafen | _Look
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Command)


class Network:
    """See the module."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Network:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.chaos.network", str(self._seed),
            cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, limit=_LINE_BYTES_MAX,
        )  # fmt: skip
        await self.look()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 5)
        except TimeoutError:
            process.kill()
            await process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    async def open(self, door: Door) -> None:
        await self._tell(_Open(door))

    async def cut(self, rule: Rule, sources: Iterable[str], targets: Iterable[str]) -> None:
        """The rule for what each of `sources` sends to each of `targets`, and the other way round."""
        sources, targets = tuple(sources), tuple(targets)
        pairs = _pairs(sources, targets)
        await self._tell(_Rules(pairs + [(target, source) for source, target in pairs], rule))

    async def cut_one_way(self, rule: Rule, sources: Iterable[str], targets: Iterable[str]) -> None:
        """The rule for what each of `sources` sends to each of `targets`, and not the other way round."""
        await self._tell(_Rules(_pairs(sources, targets), rule))

    async def mend(self, sources: Iterable[str], targets: Iterable[str]) -> None:
        await self.cut(PASS, sources, targets)

    async def heal(self) -> None:
        """All rules go."""
        await self._tell(_Heal())

    async def reset(self, ones: Iterable[str], others: Iterable[str]) -> None:
        """End the connections between them that exist now."""
        await self._tell(_Reset(_pairs(ones, others)))

    async def deafen(self, ones: Iterable[str], others: Iterable[str]) -> None:
        """Let the connections between them that exist now carry nothing any more."""
        await self._tell(_Deafen(_pairs(ones, others)))

    async def look(self) -> Counts:
        return await self._tell(_Look())

    async def _tell(self, command: _Command) -> Counts:
        process = self._process
        assert process is not None, "not started"
        assert process.stdin is not None
        assert process.stdout is not None
        async with self._turn, asyncio.timeout(_ANSWER_TIMEOUT_S):
            process.stdin.write(_encoder.encode(command) + b"\n")
            line = await process.stdout.readline()
        assert line, f"the proxy's process has ended: {process.returncode}"
        return msgspec.json.decode(line, type=Counts)


def _pairs(ones: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    others = tuple(others)
    return [(one, other) for one in ones for other in others if one != other]


async def _serve(seed: int) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_fail)
    proxy = Proxy(random.Random(seed))
    commands = asyncio.StreamReader(_LINE_BYTES_MAX)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        command = _decoder.decode(line)
        match command:
            case _Open():
                await proxy.open(command.door)
            case _Rules():
                for pair in command.pairs:
                    proxy.set_rule(*pair, command.rule)
            case _Heal():
                proxy.heal()
            case _Reset():
                for pair in command.pairs:
                    proxy.reset(*pair)
            case _Deafen():
                for pair in command.pairs:
                    proxy.deafen(*pair)
        print(_encoder.encode(proxy.counts).decode(), flush=True)
    await proxy.close()


def _fail(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> NoReturn:
    """A proxy with a bug would be a fault that nobody planned: better none."""
    loop.default_exception_handler(context)
    logging.shutdown()
    os._exit(1)


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
