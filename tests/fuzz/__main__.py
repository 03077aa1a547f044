"""`python -m tests.fuzz`: fuzz both services from their own OpenAPI documents. `make fuzz MINUTES=10` runs it.

Exit codes: 0 no failure; 1 some, and the report has a curl line for each; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from pathlib import Path

import uvloop

from services.audit.command import print_report
from tests.fuzz.campaign import ALL_PHASES, Effort, Outcome, endpoints_by_luck, fuzz_all
from tests.fuzz.shops import SERVICES, WHO, FuzzedShop


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="how long, over all callers (default: 10; 0: one round)"
    )
    parser.add_argument("--seed", type=int, default=1, help="decides which requests are made (default: 1)")
    parser.add_argument("--examples", type=int, default=50, help="for each operation, phase and round (default: 50)")
    parser.add_argument("--service", choices=SERVICES, help="only this one")
    parser.add_argument("--who", choices=WHO, help="only as this caller")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="where the reports go")
    arguments = parser.parse_args()
    return uvloop.run(run(arguments))


async def run(arguments: argparse.Namespace) -> int:
    services = (arguments.service,) if arguments.service else SERVICES
    callers = (arguments.who,) if arguments.who else WHO
    out: Path = arguments.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    seconds = int(arguments.minutes * 60 / len(callers))
    logging.basicConfig(filename=out / "aiohttp.log")  # what is no HTTP is logged with its story, each time
    effort = Effort(arguments.seed, arguments.examples, ALL_PHASES, seconds, time_limit_s=600.0)

    def done(outcome: Outcome) -> None:
        (out / f"{outcome.service}-{outcome.who}.txt").write_text(outcome.report)
        print(f"{outcome.service} as {outcome.who}: {'no failure' if outcome.is_good else outcome.report}", flush=True)

    async with FuzzedShop(out, for_s=arguments.minutes * 60 + 3600) as shop:
        outcomes = await fuzz_all(shop, services, callers, effort, done)
        for service in services:
            answered = await shop.answered(service)
            print(f"{service}: {answered.total()} requests", flush=True)
            never_asked, never_good = await endpoints_by_luck(shop, service)
            for what, endpoints in (("asked", never_asked), ("answered with success", never_good)):
                if endpoints:
                    print(f"  never {what}: {', '.join(endpoints)}")
        report = await shop.audited()
        print_report(report)
    shutil.rmtree(out / "store")
    failed = [] if report.is_clean else ["the audit"]
    failed += [f"{one.service} as {one.who}" for one in outcomes if not one.is_good]
    print(f"failures: {', '.join(failed)}; the reports are in {out}" if failed else "no failure")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
