"""What a Raft node is told, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from kvstore.errors import KvError
from kvstore.model import Member, PeerStatus


class RaftConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`members` is the configuration to begin with, where neither state nor log holds one: of a new cluster, or, for a
    node that joins, the cluster's present one. An empty `listen_address` opens no listener: a cluster of one. Times
    in milliseconds. `version` is what the state machine here understands; the other nodes are told."""

    name: str
    cluster_id: str
    listen_address: str = ""
    peer_address: str = ""
    client_address: str = ""
    members: tuple[Member, ...]
    heartbeat_ms: int = 100
    election_min_ms: int = 500
    election_max_ms: int = 1000
    version: int = 1


class RaftStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`role` is leader, candidate, follower, learner, removed or failed. `storage_error` says what failed.
    `common_version` is what all members understand, as far as this node has heard from them; else 0.
    `receiving_bytes`: how much of a snapshot has arrived here, and how large it is; zeroes while none does."""

    role: str
    leader: str
    term: int
    commit_index: int
    applied_index: int
    last_index: int
    durable_index: int
    peers: tuple[PeerStatus, ...]
    storage_error: str
    common_version: int
    receiving_bytes: tuple[int, int]
    dropped: Mapping[str, int]


class EngineView(Protocol):
    @property
    def is_leader(self) -> bool: ...
    @property
    def is_candidate(self) -> bool: ...


def role_of(failure: KvError | None, engine: EngineView, is_voter: bool) -> str:
    """The word for what a node is now."""
    if failure is not None:
        return "removed" if failure.code == "removed_from_cluster" else "failed"
    if engine.is_leader:
        return "leader"
    if not is_voter:
        return "learner"
    return "candidate" if engine.is_candidate else "follower"
