"""`python -m services shoppers`: run a simulation, show how it goes, and report what came of it."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Final

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import kvstore
from services.shoppers.simulation import Options, Simulation, StaffCredentials
from services.shoppers.tally import EndpointFigures, Tally
from services.shoppers.wire import Broken, GaveUp
from services.users.parts import create_staff
from services.web.tokens import Role

STAFF_EMAIL: Final = "shoppers-staff@example.com"
_REFRESH_S: Final = 0.25
_WIDTH: Final = 120  # where it is no terminal's: tables are to be read in a log as well


class ShoppersReport(Struct, frozen=True, kw_only=True):
    """What `--json` prints. `problems` are answers that were no success, by code, and requests without an answer;
    `errors` of them are what must not be, with the stories of the first hundred."""

    passed: bool
    seed: int
    lasted_s: float
    visits: int
    orders_placed: int
    orders_read_back: int
    requests: int
    outcomes: dict[str, int]
    problems: dict[str, int]
    endpoints: list[EndpointFigures]
    errors: int
    stories: list[str]


async def run_shoppers(endpoints: str, options: Options, as_json: bool) -> int:
    """The process's exit code: 0 if nothing acknowledged was lost and no answer was wrong."""
    console = Console(stderr=as_json, highlight=False)
    credentials = await staff_of(endpoints)
    began = time.monotonic()
    try:
        async with Simulation.open(options, credentials) as simulation:
            began = time.monotonic()
            showing = asyncio.create_task(_show(console, simulation, began))
            try:
                await simulation.run()
                lasted_s = time.monotonic() - began
                read_back = await simulation.read_back()
            finally:
                showing.cancel()
                await asyncio.gather(showing, return_exceptions=True)
    except (GaveUp, Broken) as error:
        console.print(f"[red]✗[/] the services do not answer as they must: {error}", soft_wrap=True)
        return 1
    report = report_of(simulation, lasted_s, read_back)
    if as_json:
        print(msgspec.json.encode(report).decode(), flush=True)
    else:
        show_report(console, report)
    return 0 if report.passed else 1


async def staff_of(endpoints: str) -> StaffCredentials:
    """The account of the simulation's staff, straight in the store, with a new password each time. Raises `KvError`."""
    credentials = StaffCredentials(STAFF_EMAIL, secrets.token_urlsafe(18))
    async with kvstore.connect(endpoints) as store:
        await create_staff(store, credentials.email, credentials.password, "Staff", 40, Role.STAFF, replace=True)
    return credentials


def report_of(simulation: Simulation, lasted_s: float, read_back: int) -> ShoppersReport:
    tally = simulation.tally
    return ShoppersReport(
        passed=not tally.error_count,
        seed=simulation.options.seed,
        lasted_s=round(lasted_s, 1),
        visits=sum(count for what, count in tally.outcomes.items() if not what.startswith("(")),
        orders_placed=len(simulation.ledger.orders),
        orders_read_back=read_back,
        requests=tally.requests,
        outcomes=dict(tally.outcomes.most_common()),
        problems=tally.problems(),
        endpoints=tally.endpoints(),
        errors=tally.error_count,
        stories=tally.stories,
    )


def show_report(console: Console, report: ShoppersReport) -> None:
    if not console.is_terminal:
        console.width = _WIDTH
    endpoints = Table("endpoint", title="Answers", title_justify="left", box=None, pad_edge=False)
    for column in ("requests", "p50 ms", "p99 ms", "longest"):
        endpoints.add_column(column, justify="right")
    endpoints.add_column("answers")
    for one in report.endpoints:
        answers = ", ".join(f"{count} {what}" for what, count in one.answers.items())
        figures = (one.p50_ms, one.p99_ms, one.longest_ms)
        endpoints.add_row(one.endpoint, str(one.requests), *(f"{figure:.1f}" for figure in figures), answers)
    outcomes = Table("outcome", title="Visits", title_justify="left", box=None, pad_edge=False)
    outcomes.add_column("count", justify="right")
    for what, count in report.outcomes.items():
        outcomes.add_row(what, str(count))
    console.print(endpoints, "", outcomes, "")
    for story in report.stories:
        console.print(f"[red]✗[/] {story}", markup=False, style="red", soft_wrap=True)
    mark = "[green]✓[/]" if report.passed else "[red]✗[/]"
    console.print(
        f"{mark} {report.visits} visits and {report.requests} requests in {report.lasted_s:.0f} s, seed {report.seed}; "
        f"{report.orders_placed} orders placed, {report.orders_read_back} read back; {report.errors} errors",
        soft_wrap=True,
    )


async def _show(console: Console, simulation: Simulation, began: float) -> None:
    """A bar of the time, with what has come of it so far, until cancelled."""
    total_s = 60 * simulation.options.minutes
    tally: Tally = simulation.tally
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total_s)
        while True:
            passed_s = min(time.monotonic() - began, total_s)
            what = "reading back" if passed_s >= total_s and not simulation.visitors else f"{simulation.visitors} in"
            text = (
                f"{what}, {len(simulation.ledger.orders)} orders, {tally.requests} requests, {tally.error_count} errors"
            )
            progress.update(bar, completed=passed_s, description=text)
            progress.refresh()
            await asyncio.sleep(_REFRESH_S)
