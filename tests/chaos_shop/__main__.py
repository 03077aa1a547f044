"""`python -m tests.chaos_shop`: the whole shop under kills and a provider that fails. `make chaos-shop` runs it."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import uvloop
from rich.console import Console

from tests.chaos_shop.campaign import Campaign, Options
from tests.chaos_shop.report import Terminal, report_of, show, write


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos_shop", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long faults go on (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="decides who does what, and what is killed (default: 1)")
    parser.add_argument("--shoppers", type=int, default=200, help="at once (default: 200)")
    parser.add_argument("--out", type=Path, default=Path("build/chaos-shop"), help="where the report goes")
    arguments = parser.parse_args()
    options = Options(minutes=arguments.minutes, seed=arguments.seed, shoppers=arguments.shoppers)
    command = (
        f"python -m tests.chaos_shop --minutes {options.minutes:g} --seed {options.seed} --shoppers {options.shoppers}"
    )
    console = Console(highlight=False, soft_wrap=True)
    try:
        return uvloop.run(run(options, command, arguments.out, console))
    except KeyboardInterrupt:
        console.print("interrupted: no report")
        return 130


async def run(options: Options, command: str, out: Path, console: Console) -> int:
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    path = out / "shop"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    console.print(f"{command}: the report goes to {out}")
    terminal = Terminal(console)
    campaign = Campaign(options, path.resolve(), terminal)
    showing = asyncio.create_task(terminal.show(campaign))
    try:
        await campaign.run()
    finally:
        showing.cancel()
        with suppress(asyncio.CancelledError):
            await showing
    report = report_of(campaign, command, started)
    write(report, out)
    show(console, report)
    console.print(f"report: {out / 'report.md'}")
    if not report.is_good:
        console.print(f"the processes' directories and logs stay in {path}")
        return 1
    shutil.rmtree(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
