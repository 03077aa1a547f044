"""What a node that joins says while it waits."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvstore.cli import join
from kvstore.client.client import Client
from kvstore.errors import Refused
from kvstore.model import Member
from kvstore.server.node import ServerNode, ServerOptions
from tests.unit.server_fakes import RecordingLog

# So many entries arrive, one at each look; then nothing more.
ARRIVING = 40
ITSELF = Member("n4", "h:1", "h:2", "id", False)


class Waiting:
    """A node that joins, and its cluster, which is at entry 9."""

    def __init__(self) -> None:
        self.options = ServerOptions(name="n4", data_dir="d", peer_listen="0.0.0.0:1", peer_advertise="h:1")
        self.last_index = self.applied_index = 0
        self.receiving_bytes = (0, 0)
        self.raft = self
        self.promoted = False

    def status(self) -> Any:
        self.last_index += self.last_index < ARRIVING
        return self

    def as_client(self) -> Client:
        async def status() -> Any:
            return SimpleNamespace(commit_index=9)

        async def member_promote(_name: str) -> Any:
            if not self.promoted:
                raise Refused("it is not heard", code="not_caught_up")
            return (Member("n4", "h:1", "h:2", "id", True),)

        return cast(Client, SimpleNamespace(status=status, member_promote=member_promote))


async def test_a_join_that_hears_nothing_says_where_it_should_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "_SILENT_S", 0.0)
    monkeypatch.setattr(join, "_POLL_S", 0.001)
    node, log = Waiting(), RecordingLog()
    catching_up = asyncio.ensure_future(
        join._catch_up(node.as_client(), cast(ServerNode, node), ITSELF, log, lambda *_: None, False)
    )
    while not log.names():
        await asyncio.sleep(0.001)
    assert log.names() == ["nothing arrives"]
    assert node.last_index == ARRIVING, "as long as something arrives it says nothing"
    assert "at h:1 " in log.events[0][2]["message"]
    node.applied_index = 9
    node.promoted = True
    await catching_up
