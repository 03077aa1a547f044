"""`watch` and `compact`: what changes, and how long it is remembered."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from kvstore import model
from kvstore.cli.data import bounds
from kvstore.cli.options import Connection, NumbersAreArguments, connection_options, encoding_option, output_option
from kvstore.cli.text import print_json, record_json, to_text
from kvstore.client.client import Client


@click.command(cls=NumbersAreArguments)
@click.argument("key", default="")
@click.argument("end", required=False)
@click.option("--prefix", is_flag=True, help="Every key that starts with KEY.")
@click.option(
    "--from-revision",
    type=click.IntRange(0, model.INT64_MAX),
    default=0,
    help="From this revision on; 0 is from now on.",
)
@click.option("--future", is_flag=True, help="Wait for --from-revision, where the store has yet to reach it.")
@click.option("--prev", is_flag=True, help="Also show the value as it was before.")
@click.option("--no-puts", is_flag=True, help="Only deletions.")
@click.option("--no-deletes", is_flag=True, help="Only puts.")
@click.option("--count", type=click.IntRange(min=0), default=0, help="End after so many events; 0 is never.")
@encoding_option
@output_option
@connection_options
def watch(
    key: str,
    end: str | None,
    prefix: bool,
    from_revision: int,
    future: bool,
    prev: bool,
    no_puts: bool,
    no_deletes: bool,
    count: int,
    encoding: str,
    output: str,
    connection: Connection,
) -> None:
    """Show every change of a key, of all keys from KEY up to, not including, END, or, without KEY, of all.

    Goes on until interrupted, through failures of nodes; --timeout is how long it may be without any.

    With --output json, each event is one line of JSON.
    """
    if no_puts and no_deletes:
        raise click.UsageError("with --no-puts and --no-deletes there is nothing to watch")
    start, stop = bounds(key, "" if not key and end is None and not prefix else end, prefix, encoding)

    async def follow(client: Client) -> None:
        shown = 0
        async with client.watch(
            start, stop, from_revision=from_revision, future=future, prev=prev, puts=not no_puts, deletes=not no_deletes
        ) as events:
            if sys.stderr.isatty():
                click.echo(f"watching from revision {events.next_revision}; Ctrl-C ends it", err=True)
            async for event in events:
                click.echo(_line(event, encoding) if output == "table" else json.dumps(_json(event, encoding)))
                sys.stdout.flush()
                shown += 1
                if shown == count:
                    return

    connection.call(follow)


@click.command()
@click.argument("revision", type=click.IntRange(1, model.INT64_MAX))
@output_option
@connection_options
def compact(revision: int, output: str, connection: Connection) -> None:
    """Forget history below REVISION: reads at an older one, and watches from there, are refused from then on.

    The cluster does this by itself, too: it keeps an hour, a million log entries, or 1 GiB, whichever is least.
    """
    result = connection.call(lambda client: client.compact(revision))
    if output == "json":
        print_json({"compacted_revision": result.revision})
    else:
        click.echo(f"compacted up to revision {result.revision}")


def _line(event: model.Event, encoding: str) -> str:
    def text(data: bytes) -> str:
        text, found = to_text(data, encoding)
        return text if found == encoding else f"{text} ({found})"

    what = f"{event.revision:>10}  "
    if event.record is None:
        what += f"{click.style('del', fg='red')}  {text(event.key)}"
    else:
        what += f"{click.style('put', fg='green')}  {text(event.key)} = {text(event.record.value)}"
    return what + (f"  (before: {text(event.prev.value)})" if event.prev is not None else "")


def _json(event: model.Event, encoding: str) -> dict[str, Any]:
    key, key_encoding = to_text(event.key, encoding)
    return {
        "type": "delete" if event.record is None else "put",
        "key": key,
        "key_encoding": key_encoding,
        "revision": event.revision,
        "record": None if event.record is None else record_json(event.record, encoding),
        "prev": None if event.prev is None else record_json(event.prev, encoding),
    }


COMMANDS: tuple[click.Command, ...] = (watch, compact)
