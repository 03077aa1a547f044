"""The real consensus and the real state machine under a `ServerNode`. The one place where the three rooms meet."""

from __future__ import annotations

from typing import cast

from kvstore import versions
from kvstore.env import Environment
from kvstore.raft.config import RaftConfig
from kvstore.raft.node import RaftNode
from kvstore.server.node import ServerNode, ServerOptions
from kvstore.server.ports import Log, Raft
from kvstore.state.machine import Machine
from kvstore.state.storage import OpenStorage, RocksStorage


def build_node(
    options: ServerOptions, env: Environment, log: Log, open_storage: OpenStorage = RocksStorage
) -> ServerNode:
    """A node, not yet started."""

    def open_raft(options: ServerOptions, env: Environment, data_dir: str, log: Log) -> Raft:
        config = RaftConfig(
            name=options.name,
            cluster_id=options.cluster_id,
            listen_address=options.peer_listen,
            peer_address=options.peer_advertise,
            client_address=options.client_advertise or options.client_listen,
            members=options.members,
            heartbeat_ms=options.heartbeat_ms,
            election_min_ms=options.election_min_ms,
            election_max_ms=options.election_max_ms,
            version=versions.VERSION,
        )
        return cast(
            Raft, RaftNode(config, env, data_dir, lambda path: Machine(open_storage, path, options.retention), log)
        )

    return ServerNode(options, env, log, open_raft)
