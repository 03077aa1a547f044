"""`kvstore lease …`: records that go when nobody keeps them."""

from __future__ import annotations

import sys
import time

import click

from kvstore import model
from kvstore.cli.options import Connection, Number, connection_options, encoding_option, output_option
from kvstore.cli.text import print_json, to_text
from kvstore.client.client import Client
from kvstore.client.lease import keep_alive as kept_alive

lease_argument = click.argument("lease", type=click.IntRange(1, model.LEASE_ID_MAX))


@click.group(name="lease")
def group() -> None:
    """Leases: records that go when nobody keeps them.

    A record that is put under a lease (kvstore put --lease ID …) is deleted when the lease ends: when it is revoked, or
    when its time to live has passed since it was granted or kept alive.
    """


@group.command()
@click.argument("seconds", type=Number(model.LEASE_TTL_MS_MIN / 1000, model.LEASE_TTL_MS_MAX / 1000))
@click.option("--id", "lease", type=click.IntRange(1, model.LEASE_ID_MAX), help="An id of your own; free, or refused.")
@output_option
@connection_options
def grant(seconds: float, lease: int | None, output: str, connection: Connection) -> None:
    """Grant a lease that lives SECONDS without being kept alive. Prints its id."""
    granted = connection.call(lambda client: client.grant_lease(seconds, lease=lease or 0))
    if output == "json":
        print_json({"lease": granted.lease, "ttl_ms": granted.ttl_ms})
    else:
        click.echo(f"lease {granted.lease} lives {granted.ttl_ms / 1000:g} s")


@group.command()
@lease_argument
@output_option
@connection_options
def revoke(lease: int, output: str, connection: Connection) -> None:
    """End a lease and delete its records."""
    ended = connection.call(lambda client: client.revoke_lease(lease))
    if output == "json":
        print_json({"revision": ended.revision, "deleted": ended.count})
    else:
        click.echo(f"lease {lease} ended, deleted {ended.count}, revision {ended.revision}")


@group.command(name="keep-alive")
@lease_argument
@click.option("--once", is_flag=True, help="Keep it alive once, and return.")
@output_option
@connection_options
def keep_alive(lease: int, once: bool, output: str, connection: Connection) -> None:
    """Keep a lease alive until interrupted.

    A keep-alive that is not answered is sent again until the lease may have ended: then the exit code is 3, and 1 when
    the store says that it has. --timeout is for the first.
    """

    def show(kept: model.LeaseResult) -> None:
        if output == "json":
            print_json({"lease": kept.lease, "ttl_ms": kept.ttl_ms})
        else:
            click.echo(f"{time.strftime('%H:%M:%S')}  lease {lease} lives another {kept.ttl_ms / 1000:g} s")
        sys.stdout.flush()

    async def keep(client: Client) -> None:
        async for kept in kept_alive(client, lease):
            show(kept)
            if once:
                return

    connection.call(keep)


@group.command()
@lease_argument
@click.option("--keys", is_flag=True, help="Name its records, too.")
@encoding_option
@output_option
@connection_options
def show(lease: int, keys: bool, encoding: str, output: str, connection: Connection) -> None:
    """Say how long a lease has to live, and what is under it."""
    status = connection.call(lambda client: client.lease_status(lease, keys=keys))
    names = [to_text(key, encoding)[0] for key in status.keys]
    if output == "json":
        print_json(
            {
                "lease": status.lease,
                "ttl_ms": status.ttl_ms,
                "remaining_ms": status.remaining_ms,
                "key_count": status.key_count,
                **({"keys": names} if keys else {}),
            }
        )
        return
    left = f"{status.remaining_ms / 1000:.1f} of {status.ttl_ms / 1000:g} s left"
    click.echo(f"lease {lease}: {left}, {status.key_count} records")
    for name in names:
        click.echo(f"  {name}")


@group.command(name="list")
@output_option
@connection_options
def list_(output: str, connection: Connection) -> None:
    """List the ids of all leases."""

    async def read(client: Client) -> list[int]:
        return [lease async for lease in client.leases()]

    leases = connection.call(read)
    if output == "json":
        print_json(leases)
    else:
        for lease in leases:
            click.echo(str(lease))


COMMANDS: tuple[click.Command, ...] = (group,)
