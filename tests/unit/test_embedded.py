"""`open_embedded`: the client suite on a whole node in this process, and what only an embedded store does."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import kvstore
from kvstore import Client, OutcomeUnknown, StartupError, Unavailable
from kvstore.embedded import EmbeddedClient, EmbeddedConnector
from kvstore.env import Files
from tests.client_suite import KvFactory
from tests.cluster.faulty_main import FullFiles
from tests.lease_suite import LeaseSuite
from tests.lock_suite import LockSuite
from tests.watch_suite import WatchSuite


class TestOnAnEmbeddedStore(LeaseSuite, WatchSuite, LockSuite):
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


async def test_a_store_whose_log_is_gone_is_refused_and_not_opened_empty(tmp_path: Path) -> None:
    async with kvstore.open_embedded(tmp_path) as kv:
        await kv.put(b"a", b"acknowledged")
    shutil.move(tmp_path / "wal", tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(StartupError) as caught:
            await kvstore.open_embedded(tmp_path)
        assert caught.value.code == "wal_damaged"
    shutil.move(tmp_path / "elsewhere", tmp_path / "wal")
    async with kvstore.open_embedded(tmp_path) as kv:
        assert await kv.get(b"a") is not None


async def test_a_store_whose_birth_was_cut_short_is_opened(tmp_path: Path) -> None:
    """Without META nobody was ever served from it; its log stays all the same."""
    async with kvstore.open_embedded(tmp_path) as kv:
        await kv.put(b"a", b"")
    (tmp_path / "META").unlink()
    async with kvstore.open_embedded(tmp_path) as kv:
        assert await kv.get(b"a") is not None


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


async def test_a_full_disk_is_named_by_every_write_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by the first write of a client that comes afterwards, which has no session and can open none."""
    flag = tmp_path / "full"

    def full_files(store: EmbeddedClient) -> Files:
        return FullFiles(flag)

    monkeypatch.setattr(EmbeddedClient, "_make_files", full_files)
    store = kvstore.open_embedded(tmp_path / "data")
    assert isinstance(store, EmbeddedClient)
    async with store:
        await store.put(b"a", b"1")
        flag.touch()
        with pytest.raises(OutcomeUnknown, match="No space left"):
            await store.put(b"a", b"2", timeout=0.3)
        fresh = Client(("embedded",), connector=EmbeddedConnector(store._connector_here.node))
        async with fresh:
            for kv in (store, fresh, store, fresh):
                with pytest.raises(Unavailable, match=r"No space left.*Free space or replace the disk") as caught:
                    await kv.put(b"a", b"3", timeout=0.3)
                assert caught.value.code == "storage_failed"
            record = await fresh.get(b"a", level="local")
            assert record is not None
            assert record.value == b"1"
