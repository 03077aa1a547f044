"""The `python -m tests.simulation` command: campaigns, replays, and shrinking a violation."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from tests.simulation.campaign import campaign, nodes_of, options_of
from tests.simulation.outcome import Options, Outcome
from tests.simulation.report import Display, coloured, print_outcome, print_summary
from tests.simulation.shrink import shrink

EPILOG = """
exit code: 0 nothing was wrong; 1 a violation, or a full campaign in which too little happened; 130 interrupted.
docs/testing.md says how to read a story, and how to add a fault, a check or a mutant."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description="Whole clusters in virtual time, with faults; every run follows from its seed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seeds", type=int, metavar="N", help="a campaign: so many seeds, on all cores")
    what.add_argument("--seed", type=int, metavar="SEED", help="replay one and tell its story")
    what.add_argument("--shrink", type=int, metavar="SEED", help="look for the smallest run that still violates")
    parser.add_argument("--first", type=int, default=1, metavar="SEED", help="the campaign's first seed (default: 1)")
    parser.add_argument(
        "--nodes",
        choices=["1", "3", "5", "both"],
        help="both: three with odd seeds, five with even ones (default; with --mutant: the mutant's own sizes)",
    )
    parser.add_argument(
        "--duration", type=float, default=60.0, metavar="S", help="virtual seconds of load and faults (default: 60)"
    )
    parser.add_argument("--mutant", default="", metavar="NAME", help="take this protection out of the product first")
    parser.add_argument(
        "--without",
        metavar="KINDS",
        help="kinds of fault to leave out, with commas (default: the mutant's own)",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--fail-fast", action="store_true", help="end the campaign at the first violation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of the campaign to this file")
    parser.add_argument("--verbose", action="store_true", help="in a replay: tell every message, too")
    options = parser.parse_args(arguments)
    options.jobs = options.jobs or len(os.sched_getaffinity(0))
    if options.jobs < 1 or options.duration <= 0 or (options.seeds is not None and options.seeds < 1):
        parser.error("--seeds, --jobs and --duration must be above zero")
    sizes, without = _usual(parser, options.mutant)
    options.nodes_for = {None: sizes, "both": nodes_of}.get(options.nodes, lambda _seed: int(options.nodes))
    if options.without is not None:
        without = tuple(kind.strip() for kind in options.without.split(",") if kind.strip())
    options.without = without
    _check_faults(parser, options.without)
    return options


def _usual(parser: argparse.ArgumentParser, name: str) -> tuple[Callable[[int], int], tuple[str, ...]]:
    """The size of cluster by seed, and the faults that are left out, where nothing else is asked for. A name that
    nothing has would silently test nothing; so in `_check_faults`."""
    if not name:
        return nodes_of, ()
    from tests.simulation.mutants import MUTANTS

    if name not in MUTANTS:
        parser.error(f"no such mutant: {name}; there are: {', '.join(MUTANTS)}")
    return MUTANTS[name].nodes_for, MUTANTS[name].without


def _check_faults(parser: argparse.ArgumentParser, kinds: tuple[str, ...]) -> None:
    from tests.simulation.faults import FAULTS

    unknown = [kind for kind in kinds if kind not in FAULTS]
    if unknown:
        parser.error(f"no such fault: {', '.join(unknown)}; there are: {', '.join(FAULTS)}")


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    # Into a file or a pipe a table keeps the width that it needs.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    if options.seed is not None:
        return replay(options, console)
    if options.shrink is not None:
        return shrink(_run_with(), _options(options, options.shrink), options.jobs, console)
    return run_campaign(options, console)


def _run_with() -> Callable[[Options], Outcome]:
    from tests.simulation.world import run  # late: it imports the whole product, which --help need not wait for

    return run


def _options(options: argparse.Namespace, seed: int) -> Options:
    (one,) = options_of(
        [seed],
        nodes=options.nodes_for(seed),
        duration_s=options.duration,
        mutant=options.mutant,
        without=options.without,
    )
    return one


def run_campaign(options: argparse.Namespace, console: Console) -> int:
    seeds = range(options.first, options.first + options.seeds)
    todo = [_options(options, seed) for seed in seeds]
    with Display(console, len(todo)) as display:
        summary = campaign(
            _run_with(),
            todo,
            options.jobs,
            noted=display.noted,
            tick=display.tick,
            fail_fast=options.fail_fast,
        )
    print_summary(console, summary)
    if options.json:
        options.json.write_bytes(summary.to_json())
    return summary.exit_code


def replay(options: argparse.Namespace, console: Console) -> int:
    from tests.simulation.tap import tapped
    from tests.simulation.world import run

    one = _options(options, options.seed)
    began_s = time.perf_counter()

    def print_line(line: str) -> None:
        if console.is_terminal:
            console.print(coloured(line), soft_wrap=True)
        else:
            print(line)

    with tapped(print_line, every_message=options.verbose):
        outcome = run(one, print_line)
    print_outcome(console, outcome, time.perf_counter() - began_s)
    return 1 if outcome.rule else 0


def _interrupted(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def enter() -> int:
    """With a fixed hash seed: the order of sets of strings is part of what a seed decides."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})
    signal.signal(signal.SIGTERM, _interrupted)  # however we are told to end, our processes end first
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read along has seen enough (`| head`); Python must not fail again when it flushes on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(enter())
