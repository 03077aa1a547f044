"""How the server words what goes wrong, in one place."""

from __future__ import annotations

from msgspec import Raw

from kvstore import codec, model
from kvstore.errors import KvError, Unavailable
from kvstore.server.ports import Proposer


def not_leading(raft: Proposer) -> Unavailable:
    """Why this node takes no write now."""
    failure = raft.failure
    if failure is not None:
        code = "storage_failed" if failure.code == "storage_failed" else "unavailable"
        return Unavailable(failure.message, code=code)
    if raft.leader and not raft.is_leader:
        return Unavailable(f"{raft.leader} leads, not this node; send it there", code="not_leader")
    return Unavailable("no leader is known; an election may be under way", code="no_leader")


def starting() -> Unavailable:
    return Unavailable("this node is starting; try again")


def shutting_down() -> Unavailable:
    return Unavailable("this node is shutting down; use another", code="shutting_down")


def refusal(request_id: int, error: KvError) -> codec.Answer:
    """What is wrong with a request itself is its result."""
    result = model.ErrorResult(error.code, error.message, error.operation)
    return codec.Answer(request_id, Raw(codec.encode_result(result)))
