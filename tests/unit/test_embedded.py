"""`open_embedded`: the client suite on a whole node in this process, and what only an embedded store does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import kvstore
from kvstore import Client, StartupError, Unavailable
from kvstore.embedded import EmbeddedClient, EmbeddedConnector
from tests.client_suite import ClientSuite, KvFactory


class TestOnAnEmbeddedStore(ClientSuite):
    @pytest.fixture
    async def kv_factory(self, tmp_path: Path) -> AsyncIterator[KvFactory]:
        store = kvstore.open_embedded(tmp_path / "data")
        assert isinstance(store, EmbeddedClient)
        clients: list[Client] = []

        async def factory() -> Client:
            if not clients:
                clients.append(store)
            else:
                clients.append(await Client(("embedded",), connector=EmbeddedConnector(store._connector_here.node)))
            return clients[-1]

        async with store:
            yield factory
            for client in clients[1:]:
                await client.close()


async def test_what_was_acknowledged_is_there_after_reopening(tmp_path: Path) -> None:
    cluster_ids = set()
    for number in range(3):
        async with kvstore.open_embedded(tmp_path) as kv:
            assert (await kv.add(b"opened", 1)).value == number + 1
            cluster_ids.add((await kv.status()).cluster_id)
    assert len(cluster_ids) == 1


async def test_one_process_at_a_time(tmp_path: Path) -> None:
    async with kvstore.open_embedded(tmp_path):
        with pytest.raises(StartupError) as caught:
            await kvstore.open_embedded(tmp_path)
        assert caught.value.code == "data_dir_in_use"
    async with kvstore.open_embedded(tmp_path) as kv:
        await kv.put(b"a", b"")


async def test_a_store_that_is_not_open_says_so(tmp_path: Path) -> None:
    store = kvstore.open_embedded(tmp_path)
    with pytest.raises(Unavailable) as caught:
        await store.get(b"a")
    assert caught.value.code == "closed"
    assert "async with" in caught.value.message
    async with store:
        await store.put(b"a", b"")
    with pytest.raises(Unavailable) as caught:
        await store.get(b"a")
    assert caught.value.code == "closed"
    await store.close()
