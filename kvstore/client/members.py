"""Asking each member of a cluster itself, by the address that the cluster has of it: and seeing who answers there."""

from __future__ import annotations

from contextlib import suppress

from kvstore.client.client import Client
from kvstore.errors import KvError, Refused
from kvstore.model import Member, NodeStatus


async def newest_status(client: Client) -> NodeStatus:
    """What the leader says of itself where it can be asked, else whoever answers: one that is cut off may know of older
    members. Raises `KvError`."""
    status = await client.status()
    with suppress(KvError, ValueError):
        status = await client.status(status.leader_client_address)
    return status


async def member_status(
    client: Client, member: Member, *, digest: bool = False, timeout: float | None = None
) -> NodeStatus:
    """What a member says of itself. Raises `KvError`; `Refused(wrong_node)` where another node answers at its address,
    whose word is not the member's."""
    try:
        status = await client.status(member.client_address, digest=digest, timeout=timeout)
    except ValueError as error:  # earlier versions took any text for an address
        raise Refused(f"{member.name} cannot be asked: {error}") from None
    if status.name != member.name:
        raise Refused(
            f"another node, {status.name}, answers at {member.client_address}, the address that the cluster has of "
            f"{member.name}",
            code="wrong_node",
        )
    if member.node_id and status.node_id and status.node_id != member.node_id:
        raise Refused(
            f"{member.name} answers with node id {status.node_id}, and the member is {member.node_id}: its data "
            "directory was lost or swapped",
            code="wrong_node",
        )
    return status
