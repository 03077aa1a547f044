"""What `python -m services audit` prints."""

from __future__ import annotations

import aiohttp
import click
import msgspec

import kvstore
from kvstore.cli.text import print_json, print_table, progress
from services.audit.findings import CODES
from services.audit.run import CannotAudit, Report, audit
from services.payments.loading import OpenProvider
from services.payments.provider import Books, Provider, ProviderUnknown

CLEAN, VIOLATED, COULD_NOT = 0, 1, 2


async def run_audit(endpoints: str, open_provider: OpenProvider | None, *, as_json: bool) -> int:
    """The exit code: 0 nothing found, 1 violations, 2 it could not be done, and standard error says why."""
    try:
        async with kvstore.connect(endpoints) as store, aiohttp.ClientSession() as session:
            books = _books(open_provider(session)) if open_provider is not None else None
            with progress("Auditing") as report_progress:
                report = await audit(store, books, None if as_json else report_progress)
    except (kvstore.KvError, CannotAudit, ProviderUnknown, ValueError) as error:
        click.echo(f"Cannot audit: {error}", err=True)
        return COULD_NOT
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        print_report(report)
    return CLEAN if report.is_clean else VIOLATED


def print_checks() -> None:
    print_table(("code", "what it proves"), sorted(CODES.items()), widths={"what it proves": 90})


def print_report(report: Report) -> None:
    if report.violations:
        rows = [(one.code, one.key, one.expected, one.found) for one in report.violations]
        print_table(("violation", "at", "expected", "found"), rows, widths={"at": 50, "expected": 50, "found": 50})
        total = sum(report.counts.values())
        if total > len(report.violations):
            click.echo(f"These are {len(report.violations)} of {total}:")
        print_table(("violation", "times"), [(code, str(count)) for code, count in report.counts.items()])
    checked = ", ".join(f"{count:,} {what}" for what, count in report.checked.items())
    click.echo(f"Revision {report.revision:,} in {report.duration_s:.1f} s: {checked}.")
    if report.books_unsettled:
        click.echo(f"{report.books_unsettled} charges changed with each look, and were not compared with the books.")
    books = "with the provider's books" if report.with_books else "without the provider's books"
    verdict = "no violation" if report.is_clean else f"{sum(report.counts.values())} VIOLATIONS"
    click.echo(f"{report.checks} checks, {books}: {verdict}.")


def _books(provider: Provider) -> Books:
    if not isinstance(provider, Books):
        raise CannotAudit(f"the provider {provider.name} keeps no books that could be read: it lacks `Books`")
    return provider
