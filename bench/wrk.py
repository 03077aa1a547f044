"""wrk, which loads whatever speaks HTTP: run with a Lua script that prints one line when it is done.

The script says what a request is and what answer it must have; see `etcd.lua` and `http.lua`. wrk runs for whole
seconds, on one thread: the servers need the cores more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from bench.processes import require, run_tool
from bench.results import BenchError

# What wrk may take beyond its own duration: it starts and ends within milliseconds, or with its own timeout.
_GRACE_S = 30.0
_ANSWER_S = 10  # the same for every system; an answer that takes longer fails the run


class WrkResult(Struct, frozen=True, array_like=True):
    """What the scripts print. `errors`: connections that failed, answers that came too late, statuses above 399;
    `unexpected`: answers with another status than the script demands, where it demands one."""

    requests: int
    duration_us: int
    p50_us: float
    p99_us: float
    p999_us: float
    errors: int
    unexpected: int = 0


class Wrk:
    """The program, found. `peer` is who needs it, for the message where it is missing."""

    def __init__(self, peer: str) -> None:
        self._program = require(peer, "wrk")

    def load(
        self, who: str, url: str, script: Path, arguments: Sequence[str], connections: int, duration_s: float
    ) -> WrkResult:
        """Raises BenchError where any request failed; `who` is who answered it, as the message says it."""
        command = [self._program, "--threads", "1", "--connections", str(connections)]
        command += ["--duration", f"{max(1, round(duration_s))}s", "--timeout", f"{_ANSWER_S}s"]
        command += ["--script", str(script), url, "--", *arguments]
        printed = run_tool(command, timeout_s=duration_s + _GRACE_S)
        found = re.search(r"^RESULT (.*)$", printed, re.MULTILINE)
        if found is None:
            raise BenchError(f"wrk printed no result:\n{printed[-800:]}")
        result = msgspec.json.decode(found.group(1), type=WrkResult)
        if result.unexpected:
            first = re.search(r"^UNEXPECTED (.*)$", printed, re.MULTILINE)
            answer = f"; the first answer was: {first.group(1)}" if first else ""
            raise BenchError(f"{who}: {result.unexpected} of {result.requests} requests were refused{answer}")
        if result.errors or not result.requests:
            raise BenchError(f"{who}: {result.errors} errors beside {result.requests} answers")
        return result
