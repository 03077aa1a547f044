"""Fixtures of the services' tests: a real embedded store, and both services over it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import kvstore
from tests.services.shop import Shop


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[kvstore.Client]:
    async with kvstore.open_embedded(str(tmp_path / "store")) as client:
        yield client


@pytest.fixture
async def shop(store: kvstore.Client) -> AsyncIterator[Shop]:
    async with Shop(store) as both:
        yield both
