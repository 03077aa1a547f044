"""What other nodes said of themselves in their handshakes, held against the configuration. Pure.

A name that the configuration knows with another node id has lost its disk: its votes and acknowledgements are worth
nothing until it is removed and joins anew. A node that the configuration does not know is listened to all the same: it
may be newer than our log, which learns of it only if it is answered. So may be one that joined anew while this node was
away: it has the place in the log where it became a member, behind our configuration's. To have that, it holds all that
was committed before, its predecessor's removal included; so nobody who lacks that gets its vote, and what it votes and
acknowledges is worth as much as any member's.
"""

from __future__ import annotations

import msgspec

from kvstore.model import Member
from kvstore.raft.config import RaftConfig
from kvstore.raft.members import Configuration
from kvstore.raft.transport import Identity


def own_identity(config: RaftConfig, node_id: str) -> Identity:
    """What this node says of itself."""
    peer_address = config.peer_address or config.listen_address
    return Identity(
        config.cluster_id, config.name, node_id, peer_address, config.client_address, version=config.version
    )


class Roster:
    """Bounded by those who know the cluster id, which is a secret; it is forgotten at a restart."""

    __slots__ = ("_member_at", "_members", "_members_at", "_versions", "own", "seen")

    def __init__(self, own: Identity) -> None:
        self.own = own
        self.seen: dict[str, Member] = {}
        self._member_at: dict[str, tuple[int, int]] = {}  # of those that were seen
        self._versions: dict[str, int] = {}  # of those too
        self._members = Configuration()
        self._members_at = (0, 0)
        self.note(own)

    def set_members(self, members: Configuration, at: tuple[int, int]) -> None:
        """The configuration in force from now on, known to be so at that place (term, index) of the log."""
        self._members, self._members_at = members, at
        is_member = members.holds(self.own.name, self.own.node_id)
        self.own = msgspec.structs.replace(self.own, member_at=at if is_member else (0, 0))

    def judge(self, identity: Identity) -> tuple[str, str] | None:
        """May this node talk to us? None, or (error code, message)."""
        member = self._members.get(identity.name)
        if (
            member is not None
            and member.node_id not in ("", identity.node_id)
            and identity.member_at <= self._members_at
        ):
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
        self._member_at[identity.name] = identity.member_at
        self._versions[identity.name] = identity.version
        return news

    def version_of(self, name: str, node_id: str) -> int:
        """What a node last said that it understands; 0 where it was not heard. An empty id: any node of that name."""
        seen = self.seen.get(name)
        return self._versions[name] if seen is not None and node_id in ("", seen.node_id) else 0

    @property
    def common_version(self) -> int:
        """What all members understand, by what they last said; 0 where one was not heard yet."""
        return min((self.version_of(member.name, member.node_id) for member in self._members.members), default=0)

    def addresses(self) -> dict[str, str]:
        """Where to dial every other node: what it last said itself, the configuration's until then."""
        addresses = {member.name: member.peer_address for member in self._members.members}
        for name, seen in self.seen.items():
            member = self._members.get(name)
            is_it = member is None or not member.node_id or member.node_id == seen.node_id
            if seen.peer_address and (is_it or self._member_at[name] > self._members_at):
                addresses[name] = seen.peer_address
        addresses.pop(self.own.name, None)
        return addresses
