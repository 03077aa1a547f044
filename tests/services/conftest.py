"""Fixtures of the services' tests: a real embedded store, and both services over it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import kvstore
from services.web.app import VERSION_NEEDED
from tests.cluster.harness import until
from tests.services.paid_shop import PaidShop
from tests.services.shop import Shop


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[kvstore.Client]:
    async with kvstore.open_embedded(str(tmp_path / "store")) as client:
        # A new store takes a moment to find out that all of its members, this one, know leases: `/readyz` waits for it.
        await until(lambda: has_leases(client), 10.0, "leases", poll_s=0.005)
        yield client


async def has_leases(client: kvstore.Client) -> bool:
    return (await client.status()).cluster_version >= VERSION_NEEDED


@pytest.fixture
async def shop(store: kvstore.Client) -> AsyncIterator[Shop]:
    async with Shop(store) as both:
        yield both


@pytest.fixture
async def paid(store: kvstore.Client, tmp_path: Path) -> AsyncIterator[PaidShop]:
    async with PaidShop(store, tmp_path) as shop:
        await shop.shop.stock(shop.staff, "cup", 10, price=1250)
        await shop.shop.stock(shop.staff, "pot", 5, price=4000)
        yield shop
