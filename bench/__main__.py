"""The `python -m bench` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from bench import core, http, micro, watches
from bench.core import Options
from bench.exits import exit_code
from bench.results import Report
from bench.workloads import Kind


def main() -> int:
    """0: done. 1: a promise of --quick is not met. 2: the run could not be done, or a request was refused."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of kvstore; see bench/README.md.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("core", help="load three nodes, and the peers beside them, and compare")
    one.add_argument("--quick", action="store_true", help="windows of 4 s instead of 10; judge the thresholds")
    one.add_argument(
        "--peers", default="etcd,postgres", help="of etcd, postgres, redis; or none (default: %(default)s)"
    )
    one.add_argument("--endpoints", default="", help="load these nodes, host:port,…, instead of starting three")
    one.add_argument("--workloads", default=",".join(Kind), help="of %(default)s")
    one.add_argument("--rounds", type=int, default=3, help="how often each system is measured (default: %(default)s)")
    one.add_argument("--window", type=float, help="seconds measured at every point")
    one.add_argument("--keys", type=int, default=2000, help="number of keys (default: %(default)s)")
    one.add_argument("--generators", type=int, default=1, help="processes that make the load (default: %(default)s)")
    one.add_argument("--scratch", type=Path, help="directory whose disk is measured (default: the temporary one)")
    one.add_argument("--json", type=Path, help="write everything that was measured to this file")
    many = commands.add_parser(
        "watches", help="thousands of watches while others write: complete, in order, in bounds?"
    )
    defaults = watches.Options()
    many.add_argument("--watches", type=int, default=defaults.watches, help="default: %(default)s")
    many.add_argument("--connections", type=int, default=defaults.connections, help="default: %(default)s")
    many.add_argument("--broad", type=int, default=defaults.broad, help="watches on everything (default: %(default)s)")
    many.add_argument("--rate", type=int, default=defaults.rate, help="writes a second (default: %(default)s)")
    many.add_argument("--seconds", type=float, default=defaults.seconds, help="default: %(default)s")
    http.add_arguments(commands.add_parser("http", help="load the services, and others' beside them, and compare"))
    commands.add_parser("micro", help="pytest-benchmark of the hot functions; other arguments go to pytest")
    options, others = parser.parse_known_args()
    if options.command == "micro":
        return micro.run(others)
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    # Into a file or a pipe the table keeps the width that it needs.
    console = Console() if sys.stdout.isatty() else Console(width=180)
    if options.command == "watches":
        if min(options.watches, options.connections, options.rate) < 1 or not 1 <= options.seconds <= 3600:
            parser.error("watches, connections and rate are at least 1, seconds from 1 to 3600")
        return exit_code(
            lambda: watches.run(
                watches.Options(
                    watches=options.watches,
                    connections=options.connections,
                    broad=options.broad,
                    rate=options.rate,
                    seconds=options.seconds,
                ),
                console,
            ),
            console,
        )
    if options.command == "http":
        try:
            chosen_http = http.options_of(options)
        except ValueError as error:
            parser.error(str(error))
        return exit_code(lambda: _judged(http.run(chosen_http, console), options.quick), console)
    try:
        chosen = Options(
            peers=() if options.peers == "none" else tuple(options.peers.split(",")),
            endpoints=tuple(options.endpoints.split(",")) if options.endpoints else (),
            rounds=options.rounds,
            window_s=options.window or (4.0 if options.quick else 10.0),
            warmup_s=1.0 if options.quick else 2.0,
            keys=options.keys,
            generators=options.generators,
            kinds=tuple(Kind(kind) for kind in options.workloads.split(",")),
            scratch=options.scratch,
            json=options.json,
        )
        if min(chosen.rounds, chosen.keys, chosen.generators) < 1 or not 0.5 <= chosen.window_s <= 600:
            raise ValueError("rounds, keys and generators are at least 1, a window is 0.5 to 600 seconds")
    except ValueError as error:
        parser.error(str(error))

    return exit_code(lambda: _judged(core.run(chosen, console), options.quick), console)


def _judged(report: Report, is_quick: bool) -> int:
    return 1 if is_quick and any(threshold.met is False for threshold in report.thresholds) else 0


if __name__ == "__main__":
    sys.exit(main())
