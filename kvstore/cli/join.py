"""Adding this node to a running cluster: learner first, voter once it has caught up.

Each step may be repeated: a join that was interrupted goes on where it was when the same command is run again.
"""

from __future__ import annotations

import asyncio

import msgspec

import kvstore
from kvstore import versions
from kvstore.cli.serve import serve
from kvstore.cli.text import Report, progress
from kvstore.client.client import Client
from kvstore.client.members import newest_status
from kvstore.env import Log, SystemFiles
from kvstore.errors import KvError, Refused, StartupError, Unavailable
from kvstore.model import Member, NodeStatus
from kvstore.raft.members import Configuration
from kvstore.server.identity import UNFINISHED, meta_of
from kvstore.server.node import ServerNode, ServerOptions

# How often the node looks how far it is.
_POLL_S = 0.1
# How long promotion is tried: adding a node to a busy store of many gigabytes takes a snapshot's time first.
CATCH_UP_S = 3600.0
# A leader that reaches the node sends it something far more often.
_SILENT_S = 10.0


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
    if status.cluster_version > versions.VERSION:
        raise StartupError(
            f"the cluster is at version {status.cluster_version}, and this program knows versions up to "
            f"{versions.VERSION}: join with a newer one; nothing was changed",
            code="data_format_newer",
        )
    _check(options, status, endpoints)
    others = tuple(member for member in status.members if member.name != options.name)
    options = msgspec.structs.replace(options, cluster_id=status.cluster_id, members=others)

    async def become_member(node: ServerNode) -> None:
        async with kvstore.connect(endpoints, timeout_s=timeout_s, cluster_id=status.cluster_id) as client:
            await _become_member(client, node, log, stay_learner)

    serve(options, log, when_serving=become_member, parent_pipe=parent_pipe)


async def _ask(endpoints: str, timeout_s: float) -> NodeStatus:
    async with kvstore.connect(endpoints, timeout_s=timeout_s) as client:
        return await newest_status(client)


def _check(options: ServerOptions, status: NodeStatus, endpoints: str) -> None:
    """Refuse what the cluster would, before the directory is this node's for good. Raises `KvError`."""
    meta = meta_of(SystemFiles(), options.data_dir)
    if meta is None and _find(status.members, options.name) is not None:
        raise StartupError(
            f"the cluster has a member {options.name} already, and {options.data_dir} is not its directory: choose "
            f"another name, or `kvstore leave {options.name}` first; nothing was changed",
            code="node_identity_changed",
        )
    if meta is not None and meta.cluster_id not in (status.cluster_id, UNFINISHED):
        raise StartupError(
            f"{options.data_dir} belongs to node {meta.name} of cluster {meta.cluster_id}, and the one at {endpoints} "
            f"is {status.cluster_id}: give the endpoints of the directory's cluster, or a new directory",
            code="data_dir_mismatch",
        )
    others = Configuration.of(member for member in status.members if member.name != options.name)
    others.add_learner(_as_member(options, "not-known-yet"))


def _as_member(options: ServerOptions, node_id: str) -> Member:
    peer_address = options.peer_advertise or options.peer_listen
    return Member(options.name, peer_address, options.client_advertise or options.client_listen, node_id, False)


async def _become_member(client: Client, node: ServerNode, log: Log, stay_learner: bool) -> None:
    options = node.options
    member = _find(await _members(client), options.name)
    if member is None:
        new = _as_member(options, node.raft.node_id)
        members = await client.member_add(
            new.name, new.peer_address, new.client_address, new.node_id, options.cluster_id
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
    loop = asyncio.get_running_loop()
    deadline = loop.time() + CATCH_UP_S
    so_far, warn_at = (0, 0, 0, 0), loop.time() + _SILENT_S
    while member is None or not member.voter:
        if loop.time() > deadline:
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
        except StartupError:  # the cluster's version was raised meanwhile, beyond what this program knows
            raise
        except KvError as error:
            log.warning("not promoted yet", code=error.code, message=error.message)
            member = _find(await _members(client), name) or member
        raft = node.raft.status()
        before, so_far = so_far, (raft.last_index, raft.applied_index, *raft.receiving_bytes)
        if so_far != before:
            warn_at = loop.time() + _SILENT_S
        elif loop.time() >= warn_at:
            warn_at = loop.time() + _SILENT_S
            address = _as_member(node.options, "").peer_address
            log.warning(
                "nothing arrives", message=f"see that the other nodes reach this one at {address} (--advertise)"
            )
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
