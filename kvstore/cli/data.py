"""`get`, `put`, `del`, `range` and `txn`: the store's own operations, one call each."""

from __future__ import annotations

import sys
from typing import BinaryIO

import click

from kvstore import model
from kvstore.cli import txn_text
from kvstore.cli.options import Connection, NumbersAreArguments, connection_options, encoding_option, output_option
from kvstore.cli.text import print_json, print_records, record_json, to_bytes, to_text
from kvstore.client.client import Client
from kvstore.client.transaction import key_after
from kvstore.errors import Refused

NOT_FOUND = 6

level_option = click.option(
    "--level",
    type=click.Choice(["linearizable", "local"]),
    default="linearizable",
    show_default=True,
    help="linearizable sees every acknowledged write; local asks one replica, which may be a little behind.",
)
revision_option = click.option(
    "--revision", type=click.IntRange(min=0), default=0, help="As the store was at this revision; 0 is now."
)


@click.command(cls=NumbersAreArguments)
@click.argument("key")
@click.option("--value-only", is_flag=True, help="Write the value's bytes and nothing else.")
@level_option
@revision_option
@encoding_option
@output_option
@connection_options
def get(
    key: str, value_only: bool, level: str, revision: int, encoding: str, output: str, connection: Connection
) -> int:
    """Read one key. Exit code 6 if it is not there."""
    name = to_bytes(key, encoding)
    record = connection.call(lambda client: client.get(name, level=level, revision=revision))  # type: ignore[arg-type]
    if record is None:
        if output == "json":
            print_json(None)
        else:
            click.echo(f"no such key: {key}", err=True)
        return NOT_FOUND
    if value_only:
        sys.stdout.buffer.write(record.value)
        sys.stdout.flush()
    elif output == "json":
        print_json(record_json(record, encoding))
    else:
        print_records([record], encoding)
    return 0


@click.command(cls=NumbersAreArguments)
@click.argument("key")
@click.argument("value")
@click.option("--lease", type=click.IntRange(0, model.LEASE_ID_MAX), default=0, help="Delete it when this lease ends.")
@encoding_option
@output_option
@connection_options
def put(key: str, value: str, lease: int, encoding: str, output: str, connection: Connection) -> None:
    """Set a key. A VALUE of - reads it from standard input, as it is.

    Write -- before a KEY or VALUE that begins with a dash and is no number: kvstore put -- greeting -hello-
    """
    name = to_bytes(key, encoding)
    data = sys.stdin.buffer.read(model.VALUE_BYTES_MAX + 1) if value == "-" else to_bytes(value, encoding)
    result = connection.call(lambda client: client.put(name, data, lease=lease))
    if output == "json":
        print_json({"revision": result.revision})
    else:
        click.echo(f"revision {result.revision}")


@click.command(name="del", cls=NumbersAreArguments)
@click.argument("key")
@click.argument("end", required=False)
@click.option("--prefix", is_flag=True, help="Delete every key that starts with KEY.")
@click.option("--pieces", is_flag=True, help="One piece after the other, not all at once: for more than a request may.")
@encoding_option
@output_option
@connection_options
def delete(
    key: str, end: str | None, prefix: bool, pieces: bool, encoding: str, output: str, connection: Connection
) -> None:
    """Delete a key, or all keys from KEY up to, not including, END. An END of "" has no upper bound."""
    start, stop = bounds(key, end, prefix, encoding)
    try:
        result = connection.call(lambda client: (delete_pieces if pieces else Client.delete)(client, start, stop))
    except Refused as refusal:
        if refusal.code != "range_too_large":
            raise
        raise Refused(f"{refusal.message}, as --pieces does", code=refusal.code) from None
    if output == "json":
        print_json({"revision": result.revision, "deleted": result.deleted})
    else:
        click.echo(f"deleted {result.deleted}, revision {result.revision}")


async def delete_pieces(client: Client, start: bytes, end: bytes | None) -> model.DeleteResult:
    """Delete a range page by page. A page fits a result, so what it holds may be deleted at once. What others put there
    meanwhile goes, too, if it comes after the page at work."""
    deleted = 0
    while True:
        page = await client.range(start, end)
        if not page.records:
            return model.DeleteResult(page.revision, deleted)
        after = key_after(page.records[-1].key)
        piece = await client.delete(start, after)
        deleted += piece.deleted
        if not page.more:
            return model.DeleteResult(piece.revision, deleted)
        start = after


@click.command(name="range", cls=NumbersAreArguments)
@click.argument("start", default="")
@click.argument("end", required=False)
@click.option("--prefix", is_flag=True, help="Every key that starts with START.")
@click.option("--limit", type=click.IntRange(min=0), default=0, help="At most this many; 0: as many as 1 MiB holds.")
@click.option("--keys-only", is_flag=True, help="Leave values out.")
@click.option("--count-only", is_flag=True, help="Only how many there are.")
@click.option("--reverse", is_flag=True, help="Last key first.")
@level_option
@revision_option
@encoding_option
@output_option
@connection_options
def range_(
    start: str,
    end: str | None,
    prefix: bool,
    limit: int,
    keys_only: bool,
    count_only: bool,
    reverse: bool,
    level: str,
    revision: int,
    encoding: str,
    output: str,
    connection: Connection,
) -> None:
    """Read keys from START up to, not including, END. Without END, all from START on; without both, all."""
    first, stop = bounds(start, "" if end is None and not prefix else end, prefix, encoding)

    async def read(client: Client) -> model.RangeResult:
        return await client.range(
            first, stop, limit=limit, revision=revision, keys_only=keys_only, count_only=count_only,
            reverse=reverse, level=level,  # type: ignore[arg-type]
        )  # fmt: skip

    result = connection.call(read)
    if output == "json":
        print_json(
            {
                "revision": result.revision,
                "count": result.count,
                "more": result.more,
                "records": [record_json(record, encoding) for record in result.records],
            }
        )
        return
    if keys_only:
        for record in result.records:
            click.echo(to_text(record.key, encoding)[0])
    elif not count_only:
        print_records(result.records, encoding)
    more = "; there are more, start after the last key for them" if result.more else ""
    click.echo(f"{len(result.records)} of {result.count}, revision {result.revision}{more}", err=not count_only)


@click.command(help=txn_text.HELP)
@click.argument("file", type=click.File("rb"), default="-")
@encoding_option
@output_option
@connection_options
def txn(file: BinaryIO, encoding: str, output: str, connection: Connection) -> None:
    # Keys and values are JSON strings or {"base64": …}; an encoding is only for what is printed.
    request = txn_text.parse(file.read(8 * model.REQUEST_BYTES_MAX))

    async def commit(client: Client) -> model.TxnResult:
        return await client.txn(request.compare, request.success, request.failure)

    result = connection.call(commit)
    if output == "json":
        print_json(txn_text.result_json(result, encoding))
        return
    click.echo(f"{'succeeded' if result.succeeded else 'compares failed'}, revision {result.revision}")
    for line in txn_text.result_lines(result, encoding):
        click.echo(line)


def bounds(start: str, end: str | None, prefix: bool, encoding: str) -> tuple[bytes, bytes | None]:
    first = to_bytes(start, encoding)
    if prefix:
        if end is not None:
            raise click.UsageError("give END or --prefix, not both")
        return first, model.prefix_end(first)
    return first, None if end is None else to_bytes(end, encoding)


COMMANDS: tuple[click.Command, ...] = (get, put, delete, range_, txn)
