"""What other nodes said of themselves in their handshakes, held against the configuration. Pure.

A name that the configuration knows with another node id has lost its disk: its votes and acknowledgements are worth
nothing until it is removed and joins anew. A node that the configuration does not know is listened to all the same: it
may be newer than our log, which learns of it only if it is answered.
"""

from __future__ import annotations

from kvstore.model import Member
from kvstore.raft.config import RaftConfig
from kvstore.raft.members import Configuration
from kvstore.raft.transport import Identity


def own_identity(config: RaftConfig, node_id: str) -> Identity:
    """What this node says of itself."""
    peer_address = config.peer_address or config.listen_address
    return Identity(config.cluster_id, config.name, node_id, peer_address, config.client_address)


class Roster:
    """`members` is the configuration in force; the node keeps it up to date. Bounded by those who know the cluster id,
    which is a secret; it is forgotten at a restart."""

    __slots__ = ("_own_name", "members", "seen")

    def __init__(self, own: Identity) -> None:
        self._own_name = own.name
        self.members = Configuration()
        self.seen: dict[str, Member] = {}
        self.note(own)

    def judge(self, identity: Identity) -> tuple[str, str] | None:
        """May this node talk to us? None, or (error code, message)."""
        member = self.members.get(identity.name)
        if member is not None and member.node_id and member.node_id != identity.node_id:
            return (
                "node_identity_changed",
                f"member {identity.name} is known with node id {member.node_id}, not {identity.node_id}: its data "
                f"directory was lost or swapped. Remove it with `kvstore leave {identity.name}`, then join it again",
            )
        return None

    def note(self, identity: Identity) -> bool:
        """Remember what a node said of itself; True if that is news."""
        said = Member(identity.name, identity.peer_address, identity.client_address, identity.node_id, False)
        news = self.seen.get(identity.name) != said
        self.seen[identity.name] = said
        return news

    def addresses(self) -> dict[str, str]:
        """Where to dial every other node: what it last said itself, the configuration's until then."""
        addresses = {member.name: member.peer_address for member in self.members.members}
        for name, seen in self.seen.items():
            member = self.members.get(name)
            if seen.peer_address and (member is None or not member.node_id or member.node_id == seen.node_id):
                addresses[name] = seen.peer_address
        addresses.pop(self._own_name, None)
        return addresses
