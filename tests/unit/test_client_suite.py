"""The client suite in front of the fake server: with a plain dict, and with the real machine behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from msgspec import Raw

import kvstore
from kvstore import Client, codec, model
from kvstore.codec import RawBatchItem
from kvstore.state.machine import DATA, Machine
from kvstore.state.storage import MemoryDisk
from tests.client_suite import ClientSuite, KvFactory
from tests.fake_server import FakeCluster, FakeStore, Store


class MachineStore:
    """The real state machine as a fake cluster's store: each request is an entry of its own."""

    def __init__(self) -> None:
        self.machine = Machine(MemoryDisk().open, "state")
        self._log_time_ms = 0

    @property
    def revision(self) -> int:
        return self.machine.revision

    def apply(self, session: int, seq: int, acked_below: int, request: model.Mutation) -> model.Result:
        self._log_time_ms += 1
        item = RawBatchItem(session, seq, acked_below, Raw(codec.encode_request(request)))
        payload = codec.encode_batch(self._log_time_ms, [item])
        (result,) = self.machine.apply(self.machine.applied_index + 1, 1, DATA, payload)
        return codec.decode_result(result)

    def read(self, request: model.Range | model.Txn) -> model.Result:
        return codec.decode_result(self.machine.read(request))


class TestOnTheFakeServer(ClientSuite):
    @pytest.fixture(params=[FakeStore, MachineStore])
    async def store(self, request: pytest.FixtureRequest) -> Store:
        store: Store = request.param()
        return store

    @pytest.fixture
    async def kv_factory(self, store: Store) -> AsyncIterator[KvFactory]:
        clients: list[Client] = []

        async def factory() -> Client:
            client = await kvstore.connect(cluster.endpoints)
            clients.append(client)
            return client

        async with FakeCluster(3, store) as cluster:
            yield factory
            for client in clients:
                await client.close()
