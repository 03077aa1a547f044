"""Bytes as text and back, and results for people and programs."""

from __future__ import annotations

import base64
import binascii
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import click

from kvstore.model import Record

# Where nobody looks at it a line may be as long as it is: a pipe must not cut values.
_WIDTH_UNBOUNDED = 16 * 1024 * 1024


class Report(Protocol):
    def __call__(self, done: int, total: int, what: str = "") -> None:
        """How many are done, and of how many (0: nobody knows); `what` they are, where that changes."""


def to_bytes(text: str, encoding: str) -> bytes:
    """What a user typed, as bytes. Raises `click.BadParameter`."""
    if encoding == "utf8":
        return text.encode("utf-8", "surrogateescape")  # the bytes of the command line, whatever its locale
    try:
        return bytes.fromhex(text) if encoding == "hex" else base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise click.BadParameter(f"{text!r} is no {encoding}: {error}") from None


def to_text(data: bytes, encoding: str) -> tuple[str, str]:
    """(text, encoding that it is in): base64 where UTF-8 was asked for and it is none."""
    if encoding == "hex":
        return data.hex(), "hex"
    if encoding == "utf8":
        try:
            return data.decode(), "utf8"
        except UnicodeDecodeError:
            pass
    return base64.b64encode(data).decode(), "base64"


def record_json(record: Record, encoding: str) -> dict[str, Any]:
    key, key_encoding = to_text(record.key, encoding)
    value, value_encoding = to_text(record.value, encoding)
    return {
        "key": key,
        "key_encoding": key_encoding,
        "value": value,
        "value_encoding": value_encoding,
        "create_revision": record.create_revision,
        "mod_revision": record.mod_revision,
        "version": record.version,
        "lease": record.lease,
    }


def print_json(document: Any) -> None:
    text = json.dumps(document, ensure_ascii=False, indent=2)
    try:
        text.encode()
    except UnicodeEncodeError:  # the name of a file may be any bytes
        text = json.dumps(document, indent=2)
    click.echo(text)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, widths: Mapping[str, int] | None = None
) -> None:
    """A table as wide as its terminal; as wide as it needs to be where there is none. A column in `widths` is at most
    that wide in any case, and its cells are wrapped."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    limits = widths or {}
    shapes = (Column(name, overflow="fold", max_width=limits.get(name)) for name in columns)
    table = Table(*shapes, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_UNBOUNDED)
    console.print(table)


def print_records(records: Iterable[Record], encoding: str) -> None:
    def cell(data: bytes) -> str:
        text, found = to_text(data, encoding)
        return text if found == encoding else f"{text} ({found})"

    print_table(
        ("key", "value", "revision", "version"),
        [(cell(r.key), cell(r.value), str(r.mod_revision), str(r.version)) for r in records],
    )


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def report(done: int, total: int, what: str = what) -> None:
            bar.update(task, completed=done, total=total or None, description=what)

        yield report
