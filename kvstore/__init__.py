"""kvstore: a replicated, transactional key-value store.

The public face. A program needs nothing else than what is named here:

    async with kvstore.connect("127.0.0.1:7421,127.0.0.1:7422") as kv:
        await kv.put(b"user/1", b"...")
        await kv.txn(success=[kvstore.Add(b"stock/42", -1, min=0), kvstore.Put(b"order/1001", order)])

`connect` reaches a cluster; `open_embedded` runs a one-node store inside this process. Both give a `Client`, which is
asyncio's; `connect_sync` gives one that blocks, for Flask, Django and scripts.
"""

from __future__ import annotations

import os

from kvstore.client.client import Client
from kvstore.client.connection import parse_endpoints
from kvstore.client.lease import Lease
from kvstore.client.lock import Election, Lock
from kvstore.client.sync import SyncClient
from kvstore.client.transaction import Transaction
from kvstore.client.watch import Watch
from kvstore.embedded import open_embedded
from kvstore.errors import (
    InternalError,
    KvError,
    OutcomeUnknown,
    Refused,
    StartupError,
    Unavailable,
)
from kvstore.model import (
    Add,
    AddResult,
    CompactResult,
    Compare,
    Delete,
    DeleteResult,
    DoneResult,
    Event,
    LeaseResult,
    LeaseStatus,
    Member,
    NodeStatus,
    Operation,
    OperationResult,
    PeerStatus,
    Put,
    PutResult,
    Range,
    RangeResult,
    Record,
    Relation,
    SortBy,
    Target,
    Txn,
    TxnResult,
    prefix_end,
)

__all__ = [
    "Add",
    "AddResult",
    "Client",
    "CompactResult",
    "Compare",
    "Delete",
    "DeleteResult",
    "DoneResult",
    "Election",
    "Event",
    "InternalError",
    "KvError",
    "Lease",
    "LeaseResult",
    "LeaseStatus",
    "Lock",
    "Member",
    "NodeStatus",
    "Operation",
    "OperationResult",
    "OutcomeUnknown",
    "PeerStatus",
    "Put",
    "PutResult",
    "Range",
    "RangeResult",
    "Record",
    "Refused",
    "Relation",
    "SortBy",
    "StartupError",
    "SyncClient",
    "Target",
    "Transaction",
    "Txn",
    "TxnResult",
    "Unavailable",
    "Watch",
    "connect",
    "connect_sync",
    "open_embedded",
    "prefix_end",
]


def connect(endpoints: str | None = None, *, timeout_s: float = 5.0, cluster_id: str = "") -> Client:
    """A client of the cluster at `endpoints`: `host:port`, several of them with commas in between.

    Without the argument they come from the environment variable KVSTORE_ENDPOINTS. Any one reachable node is enough:
    the client learns the others from it. `timeout_s` is for each call that names none. `cluster_id` refuses any other
    cluster; empty takes the first that answers, and no other afterwards. Raises ValueError for no or bad endpoints.
    """
    text = endpoints if endpoints is not None else os.environ.get("KVSTORE_ENDPOINTS", "")
    return Client(parse_endpoints(text), timeout_s=timeout_s, cluster_id=cluster_id)


def connect_sync(endpoints: str | None = None, *, timeout_s: float = 5.0, cluster_id: str = "") -> SyncClient:
    """The same for programs without asyncio, and for all threads of one: `with kvstore.connect_sync() as kv: ...`."""
    connect(endpoints, timeout_s=timeout_s, cluster_id=cluster_id)  # bad endpoints are told here, not at the first call
    return SyncClient(lambda: connect(endpoints, timeout_s=timeout_s, cluster_id=cluster_id))
