"""What people see of a campaign: a line for each kill while it runs, and a report with tables at the end."""

from __future__ import annotations

import asyncio
import os
import platform
from pathlib import Path

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tests.chaos.campaign import Promise
from tests.chaos.report import clock
from tests.chaos_shop.campaign import Campaign, Figures, Options

_REFRESH_S = 0.5


class ShopReport(msgspec.Struct, frozen=True, kw_only=True):
    command: str
    started: str
    machine: str
    options: Options
    figures: Figures
    targets: list[Promise]
    violations: list[str]

    @property
    def is_good(self) -> bool:
        return not self.violations and all(target.kept for target in self.targets)


class Terminal:
    """The campaign's `Watcher`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._now_doing = "starting the shop"

    def says(self, text: str) -> None:
        self._now_doing = text
        self.console.print(text, highlight=False)

    def killed(self, at_s: float, what: str, names: list[str], back_s: float) -> None:
        text = f"{clock(at_s):>6}  killed {what} ({', '.join(names)}), back after {back_s:.1f} s"
        self.console.print(text, highlight=False)

    async def show(self, campaign: Campaign) -> None:
        """Until it is cancelled. Without a terminal there are only the lines for each kill."""
        if not self.console.is_terminal:
            return
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            while True:
                simulation = campaign.simulation
                orders = len(simulation.ledger.orders) if simulation is not None else 0
                errors = simulation.tally.error_count if simulation is not None else 0
                text = (
                    f"{clock(campaign.now())} of {clock(60 * campaign.options.minutes)}  {orders} orders  "
                    f"{campaign.processes_killed} kills  {errors} errors  now: {self._now_doing}"
                )
                live.update(Text(text, style="bold", no_wrap=True, overflow="ellipsis"), refresh=True)
                await asyncio.sleep(_REFRESH_S)


def report_of(campaign: Campaign, command: str, started: str) -> ShopReport:
    return ShopReport(
        command=command,
        started=started,
        machine=f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}",
        options=campaign.options,
        figures=campaign.figures,
        targets=campaign.targets(),
        violations=[str(violation) for violation in campaign.violations],
    )


def summary(report: ShopReport) -> list[tuple[str, str, bool]]:
    """(what, measured, whether it is as it must be)"""
    figures = report.figures
    rows = [(target.text, target.measured, target.kept) for target in report.targets]
    shoppers, audit = figures.shoppers, figures.audit
    if shoppers is not None:
        text = f"{shoppers.visits} visits, {shoppers.requests} requests; {shoppers.orders_read_back} orders read back"
        rows.append(("shoppers met no error, nothing acknowledged is lost", text, not shoppers.errors))
    else:
        rows.append(("shoppers met no error, nothing acknowledged is lost", "not read back", False))
    parked = ", ".join(f"{count} × {code}" for code, count in figures.parked.items()) or "none"
    rows.append(("parked steps have a listed reason", parked, not _violated(report, "parked")))
    rows.append(("quiet after the last fault", f"{figures.quiet_after_s:.0f} s", not _violated(report, "steps")))
    if audit is not None:
        checked = ", ".join(f"{count} {what}" for what, count in audit["checked"].items())
        rows.append((f"the auditor's {audit['checks']} checks", checked, bool(audit["is_clean"])))
    else:
        rows.append(("the auditor", "not asked", False))
    rows.append(("no order is paid twice by the provider's books", "", not _violated(report, "paid twice")))
    return rows


def _violated(report: ShopReport, rule: str) -> bool:
    return any(violation.startswith(rule) for violation in report.violations)


def show(console: Console, report: ShopReport) -> None:
    table = Table("what", "measured", "", box=None, pad_edge=False)
    for what, measured, is_good in summary(report):
        table.add_row(what, measured, "[green]✓[/]" if is_good else "[red]✗[/]")
    console.print("", table)
    for violation in report.violations:
        console.print(f"VIOLATION {violation}", style="bold red", markup=False, soft_wrap=True)


def write(report: ShopReport, out: Path) -> None:
    """`report.json` and `report.md` in a directory."""
    (out / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    (out / "report.md").write_text(markdown(report))


def markdown(report: ShopReport) -> str:
    options, figures = report.options, report.figures
    outcome = "As it must be." if report.is_good else f"**{len(report.violations)} violations.**"
    lines = [
        "# The shop under faults",
        "",
        f"{outcome} {options.shoppers} shoppers, {options.minutes:g} minutes of faults, seed {options.seed}; "
        f"{report.started}; {report.machine}.",
        "",
        f"    {report.command}",
        "",
    ]
    for violation in report.violations:
        lines += ["```", violation, "```", ""]
    lines += ["| | measured | |", "|---|---|---|"]
    lines += [f"| {what} | {measured} | {'yes' if good else '**no**'} |" for what, measured, good in summary(report)]
    lines += ["", "## Kills (SIGKILL), by process", "", "| killed | processes |", "|---|---:|"]
    lines += [f"| {what} | {count} |" for what, count in sorted(figures.kills.items())]
    lines += [
        "",
        "## Failures of the provider",
        "",
        "Counted at least so often.",
        "",
        "| failure | times |",
        "|---|---:|",
    ]
    lines += [f"| {what} | {count} |" for what, count in figures.failures.items()]
    shoppers = figures.shoppers
    if shoppers is not None:
        lines += ["", "## Visits", "", "| outcome | times |", "|---|---:|"]
        lines += [f"| {what} | {count} |" for what, count in shoppers.outcomes.items()]
        lines += ["", "## Answers that were no success", "", "| code | times |", "|---|---:|"]
        lines += [f"| {what} | {count} |" for what, count in shoppers.problems.items()]
        lines += ["", "## Latencies, faults included", ""]
        lines += ["| endpoint | requests | p50 ms | p99 ms | longest ms |", "|---|---:|---:|---:|---:|"]
        lines += [
            f"| `{one.endpoint}` | {one.requests} | {one.p50_ms:.1f} | {one.p99_ms:.0f} | {one.longest_ms:.0f} |"
            for one in shoppers.endpoints
        ]
    return "\n".join(lines) + "\n"
