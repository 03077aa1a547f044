"""`status`, `leave` and `member`: looking at a cluster and changing who is in it."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any

import click
import msgspec

from kvstore.cli.options import Connection, NodeName, connection_options, output_option
from kvstore.cli.text import print_json, print_table, progress
from kvstore.client.client import Client
from kvstore.client.members import member_status
from kvstore.errors import KvError, OutcomeUnknown, Refused
from kvstore.model import Member, NodeStatus

# A node that does not answer its status in this time is shown as unreachable.
_STATUS_TIMEOUT_S = 1.0
_POLL_S = 0.05
STATUS_COLUMNS = ("node", "address", "role", "leader", "term", "commit", "applied", "revision", "note")
# A digest stands there whole; why a node's disk failed takes several lines.
STATUS_WIDTHS = {"note": 40}


@click.command()
@click.option("--digest", is_flag=True, help="Also hash each node's whole state; takes time in proportion to it.")
@output_option
@connection_options
def status(digest: bool, output: str, connection: Connection) -> None:
    """How each node of the cluster is: its role, and how far its log and state are."""

    async def look(client: Client) -> list[tuple[Member, NodeStatus | KvError]]:
        first = await client.status()
        members = [member for member in first.members if member.client_address]
        timeout_s = connection.timeout_s if digest else min(_STATUS_TIMEOUT_S, connection.timeout_s)

        async def ask(member: Member) -> NodeStatus | KvError:
            try:
                return await member_status(client, member, digest=digest, timeout=timeout_s)
            except KvError as error:
                return error

        answers = await asyncio.gather(*map(ask, members))
        return list(zip(members, answers, strict=True))

    with progress("hashing") if digest else nullcontext():
        nodes = connection.call(look)
    if output == "json":
        print_json(
            [
                {"member": _plain(member), "status": None, "error": {"code": answer.code, "message": answer.message}}
                if isinstance(answer, KvError)
                else {"member": _plain(member), "status": _plain(answer), "error": None}
                for member, answer in nodes
            ]
        )
        return
    print_table(STATUS_COLUMNS, [_status_row(member, answer) for member, answer in nodes], widths=STATUS_WIDTHS)


force_option = click.option(
    "--force",
    is_flag=True,
    help="Also where the nodes that are alive would be no quorum of the rest. RISK: the cluster then takes no writes "
    "and no linearizable reads until enough of the rest are back; if they never are, only `kvstore recover` helps.",
)


@click.command()
@click.argument("name", type=NodeName())
@force_option
@output_option
@connection_options
def leave(name: str, force: bool, output: str, connection: Connection) -> None:
    """Take a node out of the cluster, alive or dead; a leader hands over first.

    Refused where the rest would have no quorum; nothing has changed then. The node's process ends by itself if it runs.
    """
    _remove(name, force, output, connection)


def _remove(name: str, force: bool, output: str, connection: Connection) -> None:
    with progress(f"removing {name}"):
        members = connection.call(lambda client: remove_member(client, name, connection.timeout_s, force=force))
    _show_members(f"{name} is out", members, output)


def _show_members(what: str, members: tuple[Member, ...], output: str) -> None:
    if output == "json":
        print_json([_plain(member) for member in members])
    else:
        click.echo(f"{what}; members: {', '.join(member.name for member in members)}")


async def remove_member(client: Client, name: str, timeout_s: float, *, force: bool = False) -> tuple[Member, ...]:
    """Remove a member, whoever it is. A leader hands over, once it has said that only this keeps it from being removed:
    so where the removal is refused, nothing has changed. Returns the others. Raises `KvError`."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    voters = [member.name for member in (await client.status()).members if member.voter]
    if voters == [name]:
        raise Refused(f"{name} is the only voter; a cluster cannot be without one", code="would_lose_quorum")
    while True:
        try:
            return await client.member_remove(name, force=force)
        except Refused as error:
            # It may have become the leader again in between; bounded by the deadline.
            if error.code != "cannot_remove_leader" or asyncio.get_running_loop().time() > deadline:
                raise
        except OutcomeUnknown:
            members = (await client.status()).members
            if all(member.name != name for member in members):
                return members
            raise
        await client.transfer_leader()
        await _until_another_leads(client, name, deadline)


async def _until_another_leads(client: Client, name: str, deadline: float) -> None:
    while asyncio.get_running_loop().time() < deadline:
        now = await client.status()
        if now.leader and now.leader != name:
            return
        await asyncio.sleep(_POLL_S)


@click.group()
def member() -> None:
    """Who is in the cluster."""


@member.command(name="list")
@output_option
@connection_options
def list_(output: str, connection: Connection) -> None:
    """The members, and which of them has a vote."""
    members = connection.call(lambda client: client.status()).members
    if output == "json":
        print_json([_plain(member) for member in members])
        return
    print_table(
        ("name", "peers", "clients", "node id", "role"),
        [(m.name, m.peer_address, m.client_address, m.node_id, "voter" if m.voter else "learner") for m in members],
    )


@member.command()
@click.argument("name", type=NodeName())
@force_option
@output_option
@connection_options
def remove(name: str, force: bool, output: str, connection: Connection) -> None:
    """The same as `kvstore leave`: take a node out, to replace a dead one with `kvstore join`."""
    _remove(name, force, output, connection)


@member.command()
@click.argument("name", type=NodeName())
@output_option
@connection_options
def promote(name: str, output: str, connection: Connection) -> None:
    """Give a learner its vote. Refused while the leader does not hear it, or it lacks too much of the log."""
    members = connection.call(lambda client: client.member_promote(name))
    _show_members(f"{name} has a vote", members, output)


@click.command(name="transfer-leader")
@click.argument("name", type=NodeName(), default="")
@output_option
@connection_options
def transfer_leader(name: str, output: str, connection: Connection) -> None:
    """Hand leadership to NAME, or to the node that is furthest.

    Exit code 0: done. 1: NAME is no member, or has no vote. 3: NAME cannot be reached or did not take over in time;
    leadership stays where it is.
    """

    async def hand_over(client: Client) -> str:
        before = (await client.status()).leader
        if name and before == name:
            return before
        await client.transfer_leader(name)
        await _until_another_leads(client, before, asyncio.get_running_loop().time() + connection.timeout_s)
        return (await client.status()).leader

    leader = connection.call(hand_over)
    if output == "json":
        print_json({"leader": leader})
    else:
        click.echo(f"{leader or 'nobody yet'} leads")


def _status_row(member: Member, answer: NodeStatus | KvError) -> tuple[str, ...]:
    if isinstance(answer, KvError):
        what, note = ("another node", answer.message) if answer.code == "wrong_node" else ("unreachable", answer.code)
        return (member.name, member.client_address, what, "", "", "", "", "", note)
    return (
        member.name,
        member.client_address,
        answer.role,
        answer.leader,
        str(answer.term),
        str(answer.commit_index),
        str(answer.applied_index),
        str(answer.revision),
        answer.storage_error or ", ".join(f"alarm: {alarm}" for alarm in answer.alarms) or answer.digest,
    )


def _plain(data: msgspec.Struct) -> dict[str, Any]:
    """A struct as a JSON object: `to_builtins` would give an array, as these travel."""
    plain = {}
    for field, value in msgspec.structs.asdict(data).items():
        if isinstance(value, tuple):
            value = [_plain(part) if isinstance(part, msgspec.Struct) else part for part in value]
        plain[field] = value
    return plain


COMMANDS: tuple[click.Command, ...] = (status, leave, transfer_leader, member)
