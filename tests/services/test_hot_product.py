"""One product, 64 buyers, two order services, the leader killed in the middle: sold exactly as often as it is there.

Buyers behave as clients on a bad network do: they give up waiting and send again under the same key, to the other
process, some of them almost at once; and one order in five is sent twice at the same time, to both.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from services.web.tokens import Role, SigningKeys, Tokens
from tests.cluster.harness import ClusterProcesses
from tests.services.processes import ServiceProcess

BUYERS = 64
STOCK = 500
KILL_AT = 200  # orders placed: well in the middle
PATIENCE_S = 0.25  # about as long as the cluster is without a leader, so that requests are sent again then
IMPATIENCE_S = 0.002  # about as long as an order takes: given up while it is under way
ATTEMPTS_MAX = 100  # of one request: with pauses of a hundredth of a second that is longer than any election
SKU = "hot"


@dataclass
class Sale:
    """What the buyers were told."""

    urls: list[str]
    answers: dict[str, set[tuple[int, bytes]]] = field(default_factory=dict)  # by idempotency key
    resent: int = 0
    replayed: int = 0
    placed: set[str] = field(default_factory=set)  # keys
    other: Counter[str] = field(default_factory=Counter)
    enough: asyncio.Event = field(default_factory=asyncio.Event)


async def send(
    sale: Sale, session: aiohttp.ClientSession, token: str, key: str, first_url: int, patience_s: float = PATIENCE_S
) -> int:
    """Send one order until it is answered for good; the status."""
    headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": key}
    for attempt in range(ATTEMPTS_MAX):
        sale.resent += attempt > 0
        url = sale.urls[(first_url + attempt) % len(sale.urls)]
        try:
            async with session.post(
                f"{url}/v1/orders",
                json={"lines": [{"sku": SKU, "quantity": 1}]},
                headers=headers,
                timeout=aiohttp.ClientTimeout(PATIENCE_S if attempt else patience_s),
            ) as answer:
                body = await answer.read()
                sale.replayed += "Idempotent-Replayed" in answer.headers
        except (aiohttp.ClientError, TimeoutError) as error:
            sale.other[type(error).__name__] += 1
        else:
            if answer.status in (201, 409):
                sale.answers.setdefault(key, set()).add((answer.status, body))
                if answer.status == 201:
                    sale.placed.add(key)
                if len(sale.placed) >= KILL_AT:
                    sale.enough.set()
                return answer.status
            assert answer.status == 503, body
            assert json.loads(body)["retryable"] is True
            sale.other[json.loads(body)["code"]] += 1
        await asyncio.sleep(0.01)
    raise AssertionError(f"{key} was not answered in {ATTEMPTS_MAX} attempts: {sale.other}")


async def buy_until_sold_out(sale: Sale, session: aiohttp.ClientSession, token: str, buyer: int) -> None:
    for number in itertools.count():
        key = f"buyer-{buyer}-order-{number}"
        patience_s = IMPATIENCE_S if number % 3 == 1 else PATIENCE_S
        statuses = [await send(sale, session, token, key, buyer, patience_s)]
        if number % 5 == 0:  # and a copy of it that was late, to the other process
            statuses = await asyncio.gather(
                *(send(sale, session, token, f"{key}-twice", buyer + copy) for copy in range(2))
            ) + statuses  # fmt: skip
        if 409 in statuses:
            return


@pytest.mark.timeout(120)
async def test_a_hot_product_is_sold_exactly_as_often_as_it_is_there(tmp_path: Path) -> None:
    async with (
        ClusterProcesses(tmp_path, nodes=3) as cluster,
        ServiceProcess("orders", cluster.endpoints, tmp_path) as one,
        ServiceProcess("orders", cluster.endpoints, tmp_path) as two,
        cluster.client(timeout_s=10.0) as store,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        tokens = Tokens(SigningKeys(store))
        staff = {"Authorization": f"Bearer {await tokens.issue(1, Role.STAFF)}"}
        product = {"name": "The hot one", "price": 100, "currency": "EUR"}
        async with session.put(f"{one.url}/v1/products/{SKU}", json=product, headers=staff) as answer:
            assert answer.status == 201
        stock = {"delta": STOCK, "reason": "received"}
        keyed = {**staff, "Idempotency-Key": "stock"}
        async with session.post(f"{two.url}/v1/products/{SKU}/stock", json=stock, headers=keyed) as answer:
            assert answer.status == 201

        killed = await cluster.leader()
        sale = Sale([one.url, two.url])
        issued = [await tokens.issue(100 + buyer, Role.CUSTOMER) for buyer in range(BUYERS)]
        buying = asyncio.gather(
            *(buy_until_sold_out(sale, session, token, buyer) for buyer, token in enumerate(issued))
        )
        first: list[asyncio.Future[Any]] = [buying, asyncio.ensure_future(sale.enough.wait())]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        assert not buying.done(), "the leader must be killed while they buy"
        cluster.kill(killed)
        placed_at_kill = len(sale.placed)
        await buying

        # One answer for each request, however often it was sent.
        assert all(len(answers) == 1 for answers in sale.answers.values())
        told = [next(iter(answers)) for answers in sale.answers.values()]
        placed: list[dict[str, Any]] = [json.loads(body) for status, body in told if status == 201]
        assert len(placed) == STOCK
        assert len({order["id"] for order in placed}) == STOCK
        assert len({order["number"] for order in placed}) == STOCK
        assert KILL_AT <= placed_at_kill < STOCK
        assert sale.resent > 0
        assert sale.replayed > 0

        # And that is what the store holds, on every node, the killed one included.
        cluster.start(killed)
        await cluster.converged()
        numbers = {}
        for name in ("on_hand", "reserved"):
            record = await store.get(f"stock/{SKU}/{name}".encode())
            assert record is not None
            numbers[name] = int(record.value)
        assert numbers == {"on_hand": 0, "reserved": STOCK}
        stored = {json.loads(record.value)["id"] async for record in store.scan(prefix=b"order/")}
        assert stored == {order["id"] for order in placed}
        index = [record.key async for record in store.scan(prefix=b"user-orders/", keys_only=True)]
        assert {int(key.rpartition(b"/")[2]) for key in index} == stored
        assert len(index) == STOCK
        answered = [json.loads(record.value)["status"] async for record in store.scan(prefix=b"idem/")]
        assert answered.count(201) == STOCK + 1  # and the stock's own
        print(f"resent {sale.resent}, replayed {sale.replayed}, at the kill {placed_at_kill}, {dict(sale.other)}")
