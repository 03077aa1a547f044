"""`kvstore join` by a program that is older than the cluster: it is told so, and does not wait for its vote."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvstore import versions
from kvstore.cli import join
from kvstore.client.client import Client
from kvstore.errors import StartupError
from kvstore.model import Member
from kvstore.server.node import ServerNode, ServerOptions
from tests.unit.server_fakes import RecordingLog

LEARNER = Member("n2", "n2:1", "n2:2", "id", False)
OPTIONS = ServerOptions(name="n2", data_dir="n2", peer_listen="n2:1", client_listen="n2:2")


def test_a_cluster_of_a_newer_version_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before anything is there."""

    async def ask(_endpoints: str, _timeout_s: float) -> Any:
        return SimpleNamespace(cluster_version=versions.VERSION + 1, members=(), cluster_id="c")

    monkeypatch.setattr(join, "_ask", ask)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartupError, match=rf"at version {versions.VERSION + 1}.*nothing was changed") as refused:
        join.join(OPTIONS, "127.0.0.1:1", 1.0, RecordingLog())
    assert refused.value.code == "data_format_newer"
    assert list(tmp_path.iterdir()) == []


async def test_a_node_that_is_too_old_for_a_vote_does_not_ask_again() -> None:
    async def status() -> Any:
        return SimpleNamespace(commit_index=1, members=(LEARNER,))

    async def member_promote(_name: str) -> Any:
        raise StartupError("n2 knows versions up to 1", code="data_format_newer")

    client = SimpleNamespace(status=status, member_promote=member_promote)
    own = SimpleNamespace(applied_index=1, last_index=1, receiving_bytes=(0, 0))
    node = SimpleNamespace(options=OPTIONS, status=lambda: own, raft=SimpleNamespace(status=lambda: own))
    with pytest.raises(StartupError) as refused:
        async with asyncio.timeout(5.0):
            await join._catch_up(
                cast(Client, client), cast(ServerNode, node), LEARNER, RecordingLog(), lambda *_: None, False
            )
    assert refused.value.code == "data_format_newer"
