"""The cluster's configuration, and the rules by which it may change. Pure.

A MEMBERS entry holds a *whole* configuration, so the current one is the last such entry in the log, committed or not,
or the state machine's where the log holds none: appending, truncating and restarting all give the same answer (the
engine's own deltas do not, fault 17). Two configurations that follow each other differ by one voter at most, so any
two of their majorities share a node (Ongaro's thesis, 4.1).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import msgspec

from kvstore import limits
from kvstore.errors import Refused
from kvstore.model import Member
from kvstore.raft.fsm import EntryKind

CONFIGURATION_FORMAT = 1
# Far more than a quorum can sensibly span; it bounds what one entry may hold.
MEMBERS_MAX = 64


class MalformedConfiguration(Exception):
    """Bytes that are no configuration."""


class NewerConfiguration(Exception):
    """A configuration of a format that this version does not know. Whoever cannot read it cannot take part."""


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    format: int
    members: tuple[Member, ...]


class _AnyFormat(msgspec.Struct, array_like=True, frozen=True):
    """What every format begins with."""

    format: int


class Configuration(msgspec.Struct, frozen=True):
    """The members by name, sorted."""

    members: tuple[Member, ...] = ()

    @staticmethod
    def of(members: Iterable[Member]) -> Configuration:
        return Configuration(tuple(sorted(members, key=lambda member: member.name)))

    @staticmethod
    def decode(payload: bytes) -> Configuration:
        """From what `encode` made. Raises `MalformedConfiguration`, `NewerConfiguration`."""
        try:
            stored_format = msgspec.msgpack.decode(payload, type=_AnyFormat).format
            if stored_format > CONFIGURATION_FORMAT:
                raise NewerConfiguration(
                    f"configuration of format {stored_format}; this version knows {CONFIGURATION_FORMAT}"
                )
            stored = msgspec.msgpack.decode(payload, type=_Stored)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedConfiguration(str(error)) from None
        return Configuration.of(stored.members)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(_Stored(CONFIGURATION_FORMAT, self.members))

    def entry(self) -> bytes:
        """The log entry that makes this the configuration."""
        return bytes([EntryKind.MEMBERS]) + self.encode()

    def get(self, name: str) -> Member | None:
        return next((member for member in self.members if member.name == name), None)

    def holds(self, name: str, node_id: str) -> bool:
        """Whether the node with this id is the member of this name, not one that had it before or has it since."""
        member = self.get(name)
        return member is not None and member.node_id == node_id

    def is_voter(self, name: str) -> bool:
        member = self.get(name)
        return member is not None and member.voter

    @property
    def voters(self) -> frozenset[str]:
        return frozenset(member.name for member in self.members if member.voter)

    @property
    def learners(self) -> frozenset[str]:
        return frozenset(member.name for member in self.members if not member.voter)

    @property
    def quorum(self) -> int:
        """How many voters make a majority."""
        return len(self.voters) // 2 + 1

    def has_quorum(self, names: Collection[str]) -> bool:
        return len(self.voters & set(names)) >= self.quorum

    def _with(self, changed: Member) -> Configuration:
        return Configuration.of([*(member for member in self.members if member.name != changed.name), changed])

    # --- changes: each gives the next configuration, or says why not --------------------------------------------------

    def add_learner(self, new: Member) -> Configuration:
        """Raises `Refused`: `member_exists`, `node_identity_changed`, `invalid_request`."""
        known = self.get(new.name)
        if known is not None:
            if known.node_id and known.node_id != new.node_id:
                raise Refused(
                    f"member {new.name} is known with another node id (its data directory was lost or swapped): "
                    f"remove it with `kvstore leave {new.name}`, then join again",
                    code="node_identity_changed",
                )
            raise Refused(f"there is a member named {new.name} already; choose another name", code="member_exists")
        if len(self.members) >= MEMBERS_MAX:
            raise Refused(f"a cluster has at most {MEMBERS_MAX} members", code="invalid_request")
        limits.check_member(new)
        self._check_addresses(new)
        return self._with(msgspec.structs.replace(new, voter=False))

    def _check_addresses(self, new: Member) -> None:
        """One address leads to one node, and there to one of its doors."""
        if new.peer_address == new.client_address:
            raise Refused(
                f"{new.name} cannot be reached by nodes and by clients at one address, {new.peer_address}",
                code="invalid_request",
            )
        for member in self.members:
            taken = {new.peer_address, new.client_address} & {member.peer_address, member.client_address} - {""}
            if taken:
                raise Refused(
                    f"{min(taken)} is the address of member {member.name}: give {new.name} one of its own, or take "
                    f"{member.name} out first with `kvstore leave {member.name}`",
                    code="invalid_request",
                )

    def promote(self, name: str, alive: Collection[str]) -> Configuration:
        """Make a learner a voter. `alive`: the members that the leader hears, itself among them.
        Raises `Refused`: `member_unknown`, `not_learner`, `would_lose_quorum`."""
        member = self._known(name)
        if member.voter:
            raise Refused(f"{name} is a voter already", code="not_learner")
        return self._checked(self._with(msgspec.structs.replace(member, voter=True)), alive)

    def remove(self, name: str, alive: Collection[str]) -> Configuration:
        """Raises `Refused`: `member_unknown`, `would_lose_quorum`."""
        self._known(name)
        return self._checked(Configuration.of(m for m in self.members if m.name != name), alive)

    def identify(self, seen: dict[str, Member]) -> Configuration:
        """Record what members last said of themselves. A node id, once known, stays."""

        def updated(member: Member) -> Member:
            said = seen.get(member.name)
            if said is None or (member.node_id and member.node_id != said.node_id):
                return member
            return msgspec.structs.replace(
                member,
                node_id=said.node_id,
                peer_address=said.peer_address or member.peer_address,
                client_address=said.client_address or member.client_address,
            )

        return Configuration.of(updated(member) for member in self.members)

    def _known(self, name: str) -> Member:
        member = self.get(name)
        if member is None:
            raise Refused(
                f"there is no member named {name}; there are {', '.join(m.name for m in self.members)}",
                code="member_unknown",
            )
        return member

    def check_voter(self, name: str) -> None:
        """Only who has a vote can lead. Raises `Refused`: `member_unknown`, `not_voter`."""
        if not self._known(name).voter:
            raise Refused(
                f"{name} is a learner, and cannot lead: give it a vote first with `kvstore member promote {name}`",
                code="not_voter",
            )

    @staticmethod
    def _checked(changed: Configuration, alive: Collection[str]) -> Configuration:
        if not changed.has_quorum(alive):
            living = sorted(changed.voters & set(alive))
            raise Refused(
                f"this would leave {len(living)} of {len(changed.voters)} voters alive ({', '.join(living)}), "
                f"and a quorum is {changed.quorum}: bring back a node first",
                code="would_lose_quorum",
            )
        return changed


def newest_configuration(
    entries: Sequence[tuple[bytes, int, int]], applied: bytes, applied_at: tuple[int, int], initial: Iterable[Member]
) -> tuple[Configuration, tuple[int, int]]:
    """The last configuration in the log, committed or not; where it holds none, the state machine's (`applied`, empty
    before the first); where there is none either, the one to begin with. And the place (term, index) at which it is
    known to be in force: its own, or the state machine's (`applied_at`); (0, 0) for the one to begin with. O(entries),
    but only membership changes, truncations and restarts ask."""
    for payload, index, term in reversed(entries):
        if payload[0] == EntryKind.MEMBERS:
            return Configuration.decode(payload[1:]), (term, index)
    return (Configuration.decode(applied), applied_at) if applied else (Configuration.of(initial), (0, 0))
