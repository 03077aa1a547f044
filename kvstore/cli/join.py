"""Adding this node to a running cluster: learner first, voter once it has caught up.

Each step may be repeated: a join that was interrupted goes on where it was when the same command is run again.
"""

from __future__ import annotations

import asyncio

import msgspec

import kvstore
from kvstore.cli.serve import serve
from kvstore.cli.text import Report, progress
from kvstore.client.client import Client
from kvstore.env import Log
from kvstore.errors import KvError, Refused, StartupError, Unavailable
from kvstore.model import Member, NodeStatus
from kvstore.server.node import ServerNode, ServerOptions

# How often the node looks how far it is.
_POLL_S = 0.1
# How long promotion is tried: adding a node to a busy store of many gigabytes takes a snapshot's time first.
CATCH_UP_S = 3600.0


def join(
    options: ServerOptions,
    endpoints: str,
    timeout_s: float,
    log: Log,
    *,
    stay_learner: bool = False,
    parent_pipe: bool = False,
) -> None:
    """Ask the cluster at `endpoints` who it is, serve as a node of it, and have it take this one in. Serves until it
    is stopped."""
    status = asyncio.run(_ask(endpoints, timeout_s))
    others = tuple(member for member in status.members if member.name != options.name)
    options = msgspec.structs.replace(options, cluster_id=status.cluster_id, members=others)

    async def become_member(node: ServerNode) -> None:
        async with kvstore.connect(endpoints, timeout_s=timeout_s, cluster_id=status.cluster_id) as client:
            await _become_member(client, node, log, stay_learner)

    serve(options, log, when_serving=become_member, parent_pipe=parent_pipe)


async def _ask(endpoints: str, timeout_s: float) -> NodeStatus:
    async with kvstore.connect(endpoints, timeout_s=timeout_s) as client:
        return await client.status()


async def _become_member(client: Client, node: ServerNode, log: Log, stay_learner: bool) -> None:
    options = node.options
    member = _find(await _members(client), options.name)
    if member is None:
        members = await client.member_add(
            options.name,
            options.peer_advertise or options.peer_listen,
            options.client_advertise or options.client_listen,
            node.raft.node_id,
            options.cluster_id,
        )
        member = _find(members, options.name)
        log.info("added as a learner", name=options.name)
    if member is not None and member.node_id != node.raft.node_id:
        raise StartupError(
            f"the cluster knows {options.name} with another data directory (node id {member.node_id}, this one is "
            f"{node.raft.node_id}): choose another name, or `kvstore leave {options.name}` first",
            code="node_identity_changed",
        )
    with progress("entries") as report:
        await _catch_up(client, node, member, log, report, stay_learner)
    log.info("joined", name=options.name)


async def _catch_up(
    client: Client, node: ServerNode, member: Member | None, log: Log, report: Report, stay_learner: bool
) -> None:
    name = node.options.name
    deadline = asyncio.get_running_loop().time() + CATCH_UP_S
    while member is None or not member.voter:
        if asyncio.get_running_loop().time() > deadline:
            raise Unavailable(f"{name} did not catch up within {CATCH_UP_S:.0f} s; it stays a learner")
        try:
            if await _caught_up(client, node, report):
                if stay_learner:
                    return
                member = _find(await client.member_promote(name), name)
                continue
        except Refused as error:
            if error.code == "not_learner":  # an earlier attempt took effect after all
                return
            if error.code != "not_caught_up":
                raise
        except KvError as error:
            log.warning("not promoted yet", code=error.code, message=error.message)
            member = _find(await _members(client), name) or member
        await asyncio.sleep(_POLL_S)


async def _caught_up(client: Client, node: ServerNode, report: Report) -> bool:
    leader = await client.status()
    applied = node.status().applied_index
    received, size = node.raft.status().receiving_bytes
    if size:
        report(received >> 20, size >> 20, "snapshot, MiB")
    else:
        report(min(applied, leader.commit_index), leader.commit_index, "entries")
    return applied >= leader.commit_index


async def _members(client: Client) -> tuple[Member, ...]:
    return (await client.status()).members


def _find(members: tuple[Member, ...], name: str) -> Member | None:
    return next((member for member in members if member.name == name), None)
