"""What `python -m services audit` prints."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Final

import aiohttp
import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

import kvstore
from services.audit.findings import CODES
from services.audit.run import CannotAudit, Report, audit
from services.payments.loading import OpenProvider
from services.payments.provider import Books, Provider, ProviderUnknown

CLEAN, VIOLATED, COULD_NOT = 0, 1, 2
_CELL_CHARS: Final = 90  # of a column that is wrapped
_WIDTH_UNBOUNDED: Final = 100_000  # of a pipe: no cell is to be cut there


async def run_audit(endpoints: str, open_provider: OpenProvider | None, *, as_json: bool) -> int:
    """The exit code: 0 nothing found, 1 violations, 2 it could not be done, and standard error says why."""
    try:
        async with kvstore.connect(endpoints) as store, aiohttp.ClientSession() as session:
            books = _books(open_provider(session)) if open_provider is not None else None
            console = Console(stderr=True)
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
                shown = bar.add_task("Auditing", total=None)
                report = await audit(
                    store, books, lambda done, expected: bar.update(shown, completed=done, total=expected or None)
                )
    except (kvstore.KvError, CannotAudit, ProviderUnknown, ValueError) as error:
        click.echo(f"Cannot audit: {error}", err=True)
        return COULD_NOT
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print_report(report)
    return CLEAN if report.is_clean else VIOLATED


def print_checks() -> None:
    _print_table(("code", "what it proves"), sorted(CODES.items()))


def print_report(report: Report) -> None:
    if report.violations:
        rows = [(one.code, one.key, one.expected, one.found) for one in report.violations]
        _print_table(("violation", "at", "expected", "found"), rows)
        total = sum(report.counts.values())
        if total > len(report.violations):
            click.echo(f"These are {len(report.violations)} of {total}:")
        _print_table(("violation", "times"), [(code, str(count)) for code, count in report.counts.items()])
    checked = ", ".join(f"{count:,} {what}" for what, count in report.checked.items())
    click.echo(f"Revision {report.revision:,} in {report.duration_s:.1f} s: {checked}.")
    if report.books_unsettled:
        click.echo(f"{report.books_unsettled} charges changed with each look, and were not compared with the books.")
    books = "with the provider's books" if report.with_books else "without the provider's books"
    verdict = "no violation" if report.is_clean else f"{sum(report.counts.values())} VIOLATIONS"
    click.echo(f"{report.checks} checks, {books}: {verdict}.")


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    shapes = (Column(name, overflow="fold", max_width=_CELL_CHARS) for name in columns)
    table = Table(*shapes, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else _WIDTH_UNBOUNDED).print(table)


def _books(provider: Provider) -> Books:
    if not isinstance(provider, Books):
        raise CannotAudit(f"the provider {provider.name} keeps no books that could be read: it lacks `Books`")
    return provider
