"""`python -m bench http`: our services over HTTP beside what others write for the same work.

Rounds, each starting every system anew and one at a time, as in `core`: ours for orders, its peer, ours for users, its
peers. Every system answers with two processes, to 64 connections of wrk, on the same cores. Each answer's status is
looked at, and after the orders the store is asked how many were taken from stock: as many as there were answers, or
the run fails.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.console import Console

from bench import machine, people, report
from bench.peers.web import fastapi, flask
from bench.people import People
from bench.results import BenchError, Measurement, Report, Threshold, median_per_second, pick
from bench.shop import Shop
from bench.websystem import SKU, WebSystem, Workload
from bench.wrk import Wrk

OURS = "kvstore's services (3 nodes)"
CONNECTIONS = 64
# Tokens are good for 600 s, and a round measures five systems: starting each takes some seconds besides.
_WINDOW_MAX_S = 60.0
# Each process verifies each token once, then remembers it (see services/web/tokens.py for how many): a thousand are
# known to both when the warm-up ends, so that the window measures what goes on for the rest of a token's ten minutes.
_USERS_MAX = 8000
_SCRIPT = Path(__file__).with_name("http.lua")
_PEERS: dict[str, Callable[[], list[WebSystem]]] = {
    "fastapi": lambda: [fastapi.FastApi()],
    "flask": lambda: [flask.Flask(worker_class) for worker_class in flask.WORKER_CLASSES],
}


class Options(Struct, frozen=True, kw_only=True):
    """What the command line chose."""

    peers: tuple[str, ...]
    rounds: int = 3
    window_s: float = 10.0
    warmup_s: float = 2.0
    users: int = 1000
    scratch: Path | None = None
    json: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="windows of 4 s instead of 10; judge the thresholds")
    parser.add_argument("--peers", default=",".join(_PEERS), help="of %(default)s; or none")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: %(default)s)")
    parser.add_argument("--window", type=float, help="seconds measured for every system")
    parser.add_argument("--users", type=int, default=1000, help="who send the requests (default: %(default)s)")
    parser.add_argument("--scratch", type=Path, help="directory whose disk is measured (default: the temporary one)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")


def options_of(arguments: argparse.Namespace) -> Options:
    """Raises ValueError for what cannot be measured."""
    options = Options(
        peers=() if arguments.peers == "none" else tuple(arguments.peers.split(",")),
        rounds=arguments.rounds,
        window_s=arguments.window or (4.0 if arguments.quick else 10.0),
        warmup_s=1.0 if arguments.quick else 2.0,
        users=arguments.users,
        scratch=arguments.scratch,
        json=arguments.json,
    )
    if options.rounds < 1 or not 1 <= options.users <= _USERS_MAX or not 1 <= options.window_s <= _WINDOW_MAX_S:
        raise ValueError(
            f"rounds are at least 1, users 1 to {_USERS_MAX}, and a window is 1 to {_WINDOW_MAX_S:.0f} seconds"
        )
    unknown = [name for name in options.peers if name not in _PEERS]
    if unknown:
        raise ValueError(f"no such peer: {', '.join(unknown)}; there are {', '.join(_PEERS)}, and `none`")
    return options


def run(options: Options, console: Console) -> Report:
    """Measure and report. Raises BenchError: a peer is missing, a request was refused, a process died."""
    wrk = Wrk("wrk")
    systems: list[WebSystem] = [Shop(OURS, Workload.ORDERS), Shop(OURS, Workload.USERS)]
    systems += [system for name in options.peers for system in _PEERS[name]()]
    # Those that do the same work are measured one after the other, ours first.
    systems.sort(key=lambda system: list(Workload).index(system.workload))
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=options.scratch) as name:
        scratch = Path(name)
        os.chmod(scratch, 0o711)  # PostgreSQL runs as another user and must get through to its own directory
        described = machine.describe(scratch)
        measurements = tuple(_rounds(systems, options, wrk, scratch, console))
    result = Report(
        machine=described,
        command=report.command_line(sys.argv[1:]),
        started=started,
        window_s=options.window_s,
        warmup_s=options.warmup_s,
        generator_ceiling=(),
        measurements=measurements,
        thresholds=thresholds(measurements),
    )
    report.show(result, console, ours=OURS)
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
        console.print(f"written to {options.json}")
    return result


def thresholds(measurements: Sequence[Measurement]) -> tuple[Threshold, ...]:
    """What we promise, from the medians over the rounds; beside the faster of Flask's two."""

    def median(system: str, workload: Workload) -> float | None:
        return median_per_second(pick(measurements, system, workload, CONNECTIONS))

    readers = [median(flask.system_name(worker_class), Workload.USERS) for worker_class in flask.WORKER_CLASSES]
    return (
        report.threshold(
            "orders of one hot product, as a multiple of FastAPI's with PostgreSQL (the goal is 3)",
            median(OURS, Workload.ORDERS),
            median(fastapi.SYSTEM, Workload.ORDERS),
            "/s",
            at_least=1.5,
        ),
        report.threshold(
            "reading a user, linearizable, as a multiple of Flask's with Redis",
            median(OURS, Workload.USERS),
            max((one for one in readers if one is not None), default=None),
            "/s",
            at_least=2.0,
        ),
    )


def _rounds(
    systems: Sequence[WebSystem], options: Options, wrk: Wrk, scratch: Path, console: Console
) -> Iterator[Measurement]:
    for turn in range(options.rounds):
        directory = scratch / f"round-{turn}"
        directory.mkdir(mode=0o711)
        everyone = people.make(directory, options.users)
        for number, system in enumerate(systems):
            below = directory / str(number)
            below.mkdir()
            with ExitStack() as stack:
                stack.callback(system.stop)
                system.start(below, everyone)
                one = measure(system, everyone, options, wrk, below)
            console.print(
                f"{time.strftime('%H:%M:%S')} round {turn + 1}: {one.system}, {one.workload}: "
                f"{one.per_second:,.0f}/s, p50 {one.p50_ms or 0:.2f} ms",
                highlight=False,
                style="dim",
            )
            yield msgspec.structs.replace(one, round=turn)


def measure(system: WebSystem, everyone: People, options: Options, wrk: Wrk, scratch: Path) -> Measurement:
    """Load one system, which is up, and say what came of it. Raises BenchError."""
    customers = scratch / "customers"
    everyone.write(customers)
    who = f"{system.name}, {system.workload}"

    def arguments() -> list[str]:
        if system.workload is Workload.USERS:
            return ["user", str(customers)]
        # The keys of two runs of wrk must not meet; it counts up behind this in 12 digits, to the length of a UUID.
        return ["order", str(customers), SKU, secrets.token_hex(12)]

    taken_before = system.taken()
    warmup = wrk.load(who, system.url, _SCRIPT, arguments(), CONNECTIONS, options.warmup_s)
    before, busy_before, tool_before = system.cpu_seconds(), machine.busy_seconds(), machine.tools_seconds()
    result = wrk.load(who, system.url, _SCRIPT, arguments(), CONNECTIONS, options.window_s)
    after, busy, tool = system.cpu_seconds(), machine.busy_seconds(), machine.tools_seconds()
    system.check()
    if system.workload is Workload.ORDERS:
        check_taken(who, system.taken() - taken_before, warmup.requests + result.requests)
    seconds, count = result.duration_us / 1e6, result.requests
    used = {part: spent - before[part] for part, spent in after.items()}
    used["generator"] = tool - tool_before
    return Measurement(
        system=system.name,
        workload=system.workload,
        connections=CONNECTIONS,
        seconds=seconds,
        operations=count,
        per_second=count / seconds,
        p50_ms=result.p50_us / 1e3,
        p99_ms=result.p99_us / 1e3,
        p999_ms=result.p999_us / 1e3,
        cpu_us_per_op={part: spent * 1e6 / count for part, spent in used.items()},
        others_cores=max(0.0, busy - busy_before - sum(used.values())) / seconds,
    )


def check_taken(who: str, taken: int, answered: int) -> None:
    """Raises BenchError unless each order that was answered took one from stock. Those that were under way when wrk
    ended, in the warm-up and in the window, may have taken one as well."""
    if not answered <= taken <= answered + 2 * CONNECTIONS:
        raise BenchError(f"{who}: {answered} orders were answered with 201, but {taken} were taken from stock")
