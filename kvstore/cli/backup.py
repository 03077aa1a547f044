"""`backup`, `restore`, `verify`, `inspect`, `recover`: keeping a store's data, and looking after it."""

from __future__ import annotations

import errno
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from kvstore.cli.nodes import parse_peers, token_option
from kvstore.cli.options import Connection, connection_options, output_option
from kvstore.cli.text import print_json, print_table, progress
from kvstore.client.backup import Made, ReplicaDigest, back_up
from kvstore.client.backup import verify as compare
from kvstore.client.client import Client
from kvstore.errors import Refused
from kvstore.model import Member

DIFFERS, NOT_COMPARED = 1, 3
# What clocks of machines may differ by without a word.
_CLOCKS_DIFFER_S = 60


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--force", is_flag=True, help="Overwrite FILE if it is there.")
@output_option
@connection_options
def backup(file: str, force: bool, output: str, connection: Connection) -> None:
    """Write all records and leases of a running cluster, as they are at one revision, to FILE.

    The cluster goes on meanwhile. FILE is compressed and checksummed, and appears when it is complete and on the disk.
    Until then it grows under the name FILE.*.part, which may be deleted if the command was killed. History before that
    revision, sessions and members are not in it. --timeout is for each page of records.

    Exit code 0: FILE is complete. 1: it cannot be written, or the history of its revision was forgotten meanwhile. 2:
    it is there already. 3: no node answers. But for 0, FILE is as it was, or the message says otherwise.
    """
    if not file or (os.path.exists(file) and not os.path.isfile(file)):
        raise click.UsageError(f"FILE must be the name of a file, which {file!r} is not")
    if os.path.exists(file) and not force:
        raise click.UsageError(f"{file} is there already; choose another name, or pass --force")
    made = _write(file, connection)
    _sync_directory_of(file)
    end = made.end
    if output == "json":
        print_json(
            {
                "file": file,
                "revision": made.revision,
                "records": end.records,
                "leases": end.leases,
                "digest": end.digest.hex(),
                "size_bytes": made.size_bytes,
            }
        )
    else:
        click.echo(
            f"{click.format_filename(file)}: {end.records} records and {end.leases} leases at revision "
            f"{made.revision}, {made.size_bytes} bytes, digest {end.digest.hex()}"
        )


def _write(file: str, connection: Connection) -> Made:
    """A backup under its name: whole, or not at all. Only its directory is not synced yet."""
    from kvstore.cli.serve import version

    # Two that write to one FILE at a time must not write into each other's.
    partial = f"{file}.{secrets.token_hex(4)}.part"
    try:
        with open(partial, "xb") as opened, progress("records") as report:
            made = connection.call(lambda client: back_up(client, opened, version(), report))
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, file)
    except BaseException as error:
        try:
            os.remove(partial)
        except FileNotFoundError:
            pass
        except OSError as left:
            click.echo(f"{partial} is incomplete and could not be removed ({left}); delete it", err=True)
        if isinstance(error, OSError):
            raise click.ClickException(f"cannot write {partial}: {error}; no backup was made") from error
        raise
    return made


def _sync_directory_of(file: str) -> None:
    from kvstore.env import SystemFiles

    try:
        SystemFiles().sync_dir(os.path.dirname(file))
    except OSError as error:
        if error.errno == errno.EINVAL:  # some network file systems know no sync of a directory
            return
        raise click.ClickException(
            f"{file} is complete, but its directory could not be synced ({error}): a power loss may undo that it is "
            "there; see to the disk and make another"
        ) from error


@contextmanager
def _disk_may_fail(what: str) -> Iterator[None]:
    """What the disk refuses is no bug."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"cannot {what}: {error}") from error


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--name", required=True, help="The name of the node whose directory this will be.")
@click.option(
    "--data-dir", required=True, type=click.Path(file_okay=False), help="A directory that is empty or missing."
)
@click.option(
    "--peers",
    metavar="NAME=PEER[/CLIENT],…",
    help="All nodes of the new cluster, this one among them, as for `kvstore serve`; without it, this node alone.",
)
@token_option
@output_option
def restore(file: str, name: str, data_dir: str, peers: str | None, cluster_token: str | None, output: str) -> None:
    """Make the data directory of a node of a new cluster from a backup.

    For several nodes run it on each, with the same FILE, --peers and --cluster-token, before any of them is started;
    then start them with `kvstore serve` without --peers. The cluster's id is made of FILE, the names in --peers and the
    token: the cluster that FILE is of has another, so its nodes are refused, while two clusters that are restored from
    one FILE with the same names and token would take each other's nodes. Give each a token of its own.

    Exit code 0: all of it is there, and on the disk. 1: FILE is damaged, or a disk failed. 2: wrong usage. 5: DATA_DIR
    is not empty or in use, or no node can be of that name. But for 0, DATA_DIR is as it was and the command can be
    repeated, or the message says what to remove first. Where it was killed, the next one says that.

    \b
      kvstore restore shop.backup --name n1 --data-dir d1 --peers n1=127.0.0.1:7411/127.0.0.1:7421
      kvstore serve --name n1 --data-dir d1 --listen 127.0.0.1:7411 --client-listen 127.0.0.1:7421
    """
    from kvstore.env import SystemChance, SystemFiles
    from kvstore.server import offline
    from kvstore.state.storage import RocksStorage

    members = parse_peers(peers) if peers is not None else (Member(name, "", "", "", True),)
    with _disk_may_fail(f"restore {file} to {data_dir}"), open(file, "rb") as opened, progress("records") as report:
        restored = offline.restore(
            SystemFiles(), SystemChance(), RocksStorage, opened, data_dir, name, members, cluster_token or "",
            lambda records: report(records, 0),
        )  # fmt: skip
    ahead_s = restored.made_ms // 1000 - int(time.time())
    if ahead_s > _CLOCKS_DIFFER_S:
        click.echo(
            f"warning: by this machine's clock the backup will be made in {ahead_s} s only; no lease ends before then",
            err=True,
        )
    if output == "json":
        print_json(
            {
                "data_dir": data_dir,
                "cluster_id": restored.cluster_id,
                "revision": restored.revision,
                "records": restored.records,
                "leases": restored.leases,
                "digest": restored.digest.hex(),
            }
        )
    else:
        click.echo(
            f"{data_dir}: {restored.records} records and {restored.leases} leases at revision {restored.revision}, "
            f"digest {restored.digest.hex()}; of the new cluster {restored.cluster_id}"
        )


@click.command()
@output_option
@connection_options
def verify(output: str, connection: Connection) -> int:
    """Compare the records of all replicas at one revision, and tell since which revision one differs.

    What the cluster's state is, is what most replicas hold. One that differs is damaged: remove it with `kvstore member
    remove`, empty its data directory, and join it again. Where as many hold one thing as another, all are said to
    differ: then bring more replicas up, and verify again. --timeout is for each page of records.

    Exit code 0: all members were compared, and are the same. 1: one differs. 3: all that were compared are the same,
    but some were not: they do not answer, another node answers at their address, or they have none for clients.
    """

    async def look(client: Client) -> Any:
        with progress("records") as report:
            return await compare(client, report)

    verified = connection.call(look)
    if output == "json":
        print_json(
            {
                "revision": verified.revision,
                "agree": verified.agree,
                "undecided": verified.undecided,
                "replicas": [_plain(replica) for replica in verified.replicas],
            }
        )
    else:
        print_table(("node", "address", "records", "digest", "note"), [_row(replica) for replica in verified.replicas])
        same = "all replicas are the same" if verified.agree else "not all replicas are known to be the same"
        click.echo(f"{same} at revision {verified.revision}")
        if verified.undecided:
            click.echo("as many hold one thing as another: which of them is damaged cannot be told from these alone")
    if verified.agree:
        return 0
    return DIFFERS if any(replica.differs for replica in verified.replicas) else NOT_COMPARED


def _plain(replica: ReplicaDigest) -> dict[str, Any]:
    return {
        "name": replica.member.name,
        "status": replica.status,
        "records": replica.count,
        "digest": replica.digest.hex(),
        "differs_since_revision": replica.differs_since or None,
        "error": None if replica.error is None else {"code": replica.error.code, "message": replica.error.message},
    }


def _row(replica: ReplicaDigest) -> tuple[str, ...]:
    member, error = replica.member, ""
    if replica.error is not None:
        error = f": {replica.error.message if replica.status == 'another node' else replica.error.code}"
    if replica.status == "same":
        note = "the same"
    elif replica.status == "differs":
        since = f"since revision {replica.differs_since}" if replica.differs_since else "since when is not known"
        note = f"differs {since}{error}"
    else:
        return (member.name, member.client_address, "", "", f"{replica.status}{error}")
    return (member.name, member.client_address, str(replica.count), replica.digest.hex(), note)


@click.command()
@click.argument("data_dir", type=click.Path(exists=True, file_okay=False))
@click.option("--digest", is_flag=True, help="Also hash and count all records; takes time in proportion to them.")
@output_option
def inspect(data_dir: str, digest: bool, output: str) -> None:
    """What the data directory of a stopped node holds: whose it is, its log, its state.

    Exit code 0: done. 1: the disk failed. 5: it is no node's, a node runs on it, or it is damaged.
    """
    from kvstore.env import SystemFiles
    from kvstore.server import offline
    from kvstore.state.storage import RocksStorage

    with _disk_may_fail(f"inspect {data_dir}"), progress("looking"):
        found = offline.inspect(SystemFiles(), RocksStorage, data_dir, digest=digest)
    if output == "json":
        print_json(found)
        return
    rows = [("node", found["name"]), ("cluster id", found["cluster_id"])]
    rows += [
        (f"member {member['name']}", f"{member['peers']} {'voter' if member['voter'] else 'learner'}")
        for member in found["members"]
    ]
    for part in ("log", "state"):
        rows += [(f"{part}: {key.replace('_', ' ')}", _text(value)) for key, value in found[part].items()]
    print_table(("what", "is"), rows)


def _text(value: object) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


@click.command()
@click.argument("data_dir", type=click.Path(exists=True, file_okay=False))
@click.option("--name", required=True, help="The node whose directory this is.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_option
def recover(data_dir: str, name: str, yes: bool, output: str) -> None:
    """The last resort, when a majority is lost for good: make a cluster of one node from a survivor's directory.

    \b
    What you have to know before:
    - Writes that were acknowledged by the lost nodes and never reached this one are LOST. Nobody can tell which.
    - Writes in this node's log that were never acknowledged count from now on.
    - The cluster gets a new id. Never start a node of the old one again: this one refuses it, but a majority of them
      would be the old cluster once more. Join new, empty ones with `kvstore join`.
    - If several nodes survive, take the one whose log goes furthest (`kvstore inspect`: last term, then last index).

    Exit code 0: done. 1: not confirmed, or the disk failed. 5: it is no node's, another's, in use, or damaged.
    """
    from kvstore.env import SystemChance, SystemFiles
    from kvstore.server import offline
    from kvstore.state.storage import RocksStorage

    if not yes:
        warning = (
            f"{name} becomes the only member of a new cluster. Acknowledged writes that it does not hold are lost."
        )
        click.echo(click.style(warning, fg="red", bold=True), err=True)
        click.echo(f"To go on, type the node's name, {name}:", err=True)
        if sys.stdin.buffer.readline().strip() != os.fsencode(name):
            raise Refused("not confirmed; nothing was changed. Where nobody can be asked, pass --yes")
    with _disk_may_fail(f"recover {data_dir}"), progress("recovering"):
        recovered = offline.recover(SystemFiles(), SystemChance(), RocksStorage, data_dir, name)
    if output == "json":
        print_json(
            {
                "cluster_id": recovered.cluster_id,
                "old_cluster_id": recovered.old_cluster_id,
                "last_index": recovered.last_index,
                "lost_members": list(recovered.lost_members),
            }
        )
        return
    click.echo(f"{name} is the only member of the new cluster {recovered.cluster_id}")
    click.echo(f"gone: {', '.join(recovered.lost_members) or 'nobody'}; join new nodes once it runs")


COMMANDS: tuple[click.Command, ...] = (backup, restore, verify, inspect, recover)
