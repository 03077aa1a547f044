"""`python -m tests.chaos`: a seeded campaign of faults on real processes. `make chaos MINUTES=20` runs it."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import shlex
import shutil
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import uvloop
from rich.console import Console

from tests.chaos.campaign import Campaign, Options
from tests.chaos.meter import by_kind
from tests.chaos.plot import draw
from tests.chaos.report import PLOT, report_of, write_report
from tests.chaos.schedule import schedule
from tests.chaos.terminal import Terminal
from tests.cluster.harness import COMMAND

MAINS = {"small": "tests.cluster.small_limits", "product": COMMAND}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long faults go on (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="decides which faults come when (default: 1)")
    parser.add_argument("--nodes", type=int, default=3, choices=(3, 5), help="how many (default: 3)")
    parser.add_argument("--limits", choices=tuple(MAINS), default="small", help="small: nodes cut their logs and flush "
                        "their stores all the time (the default); product: the command as it is")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("build/chaos"), help="where the report goes")
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults with this in their names")
    parser.add_argument("--plan", type=int, metavar="N", help="only print the first N faults of the schedule")
    arguments = parser.parse_args()
    try:
        next(schedule(arguments.seed, arguments.only))
    except ValueError as error:
        parser.error(str(error))
    console = Console(highlight=False, soft_wrap=True)
    if arguments.plan is not None:
        for planned in itertools.islice(schedule(arguments.seed, arguments.only), arguments.plan):
            console.print(str(planned))
        return 0
    options = Options(
        minutes=arguments.minutes,
        seed=arguments.seed,
        nodes=arguments.nodes,
        main=MAINS[arguments.limits],
        only=arguments.only,
    )
    command = (
        f"python -m tests.chaos --minutes {options.minutes:g} --seed {options.seed} --nodes {options.nodes} "
        f"--limits {arguments.limits}" + (f" --only {shlex.quote(options.only)}" if options.only else "")
    )
    try:
        return uvloop.run(run(options, command, arguments.out, console))
    except KeyboardInterrupt:
        console.print("interrupted: no report")
        return 130


async def run(options: Options, command: str, out: Path, console: Console) -> int:
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    nodes = out / "nodes"
    shutil.rmtree(nodes, ignore_errors=True)
    nodes.mkdir(parents=True)
    console.print(f"{command}: the report goes to {out}")
    terminal = Terminal(console)
    campaign = Campaign(options, nodes.resolve(), terminal)
    showing = asyncio.create_task(terminal.show(campaign))
    try:
        await campaign.run()
    finally:
        showing.cancel()
        with suppress(asyncio.CancelledError):
            await showing
    report = report_of(campaign, command, started)
    write_report(report, out)
    draw(report, out / PLOT)
    for kind in by_kind(campaign.spans):
        console.print(f"{kind.count:>4} × {kind.name}: median {kind.median_s:.2f} s, p95 {kind.p95_s:.2f} s, "
                      f"longest {kind.longest_s:.2f} s")  # fmt: skip
    for promise in report.promises:
        console.print(f"{'kept' if promise.kept else 'NOT KEPT'}: {promise.text}: {promise.measured}")
    console.print("histories that hold: " + ", ".join(f"{n} {count}" for n, count in sorted(report.judged.items())))
    console.print(f"{report.acknowledged} operations, {report.per_second:.0f}/s; report: {out / 'report.md'}")
    if campaign.violations:
        for violation in campaign.violations:
            console.print(f"VIOLATION {violation}", style="bold red", markup=False)
        console.print(f"the nodes' directories and logs stay in {nodes}")
        return 1
    shutil.rmtree(nodes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
