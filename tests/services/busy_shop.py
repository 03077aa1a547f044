"""A store and a provider's books after everything that can happen to an order has happened to one: for the auditor."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

import kvstore
from services.payments.provider import ChargeEntry, RefundEntry
from tests.cluster.harness import until
from tests.services.conftest import has_leases
from tests.services.paid_shop import PaidShop


@dataclass(frozen=True)
class Snapshot:
    """Orders by what became of them. Records are without their leases."""

    records: dict[bytes, bytes]
    charges: list[ChargeEntry]
    refunds: list[RefundEntry]
    orders: dict[str, int]

    async def restore(self, store: kvstore.Client) -> None:
        items = list(self.records.items())
        for at in range(0, len(items), 500):
            await store.txn(success=[kvstore.Put(key, value) for key, value in items[at : at + 500]])


class FixedBooks:
    """What was on them then."""

    def __init__(self, charges: list[ChargeEntry], refunds: list[RefundEntry], page: int = 3) -> None:
        self._charges, self._refunds, self._page = list(charges), list(refunds), page

    async def charges(self, after: str = "") -> list[ChargeEntry]:
        ids = [entry.charge.id for entry in self._charges]
        at = ids.index(after) + 1 if after else 0
        return self._charges[at : at + self._page]

    async def refunds(self, after: str = "") -> list[RefundEntry]:
        ids = [entry.id for entry in self._refunds]
        at = ids.index(after) + 1 if after else 0
        return self._refunds[at : at + self._page]


def take_snapshot() -> Snapshot:
    """Some seconds."""

    async def run() -> Snapshot:
        with tempfile.TemporaryDirectory() as path:
            async with kvstore.open_embedded(f"{path}/store") as store:
                await until(lambda: has_leases(store), 10.0, "leases", poll_s=0.005)
                async with PaidShop(store, Path(path)) as paid:
                    orders = await be_busy(paid)
                    await paid.stop_workers()
                    await _asleep(paid, orders)
                    charges = await paid.provider.charges()  # type: ignore[attr-defined]
                    refunds = await paid.provider.refunds()  # type: ignore[attr-defined]
                    records = {record.key: record.value async for record in store.scan(b"\0", b"")}
        claims = [key for key in records if key.startswith(b"claim/")]
        return Snapshot({key: value for key, value in records.items() if key not in claims}, charges, refunds, orders)

    return asyncio.run(run())


async def be_busy(paid: PaidShop) -> dict[str, int]:
    """Orders by what became of them."""
    staff, buyer = paid.staff, paid.buyer
    await paid.shop.stock(staff, "cup", 100, price=1250)
    await paid.shop.stock(staff, "pot", 50, price=4000)
    await paid.shop.stock(staff, "leaflet", 50, price=0)
    await paid.did(staff, "/v1/products/cup/stock", {"delta": -3, "reason": "broken"})
    orders: dict[str, int] = {}

    def path(name: str) -> str:
        return f"/v1/orders/{orders[name]}"

    async def begin(name: str, lines: dict[str, int], token: str = "", **more: str) -> dict[str, int]:
        order = await paid.placed(lines)
        orders[name] = order["id"]
        if token:
            await paid.paid(order, token, **more)
        return order

    def some(sku: str, quantity: int) -> list[dict[str, object]]:
        return [{"sku": sku, "quantity": quantity}]

    # From a cart; shipped, delivered, half of it returned.
    cart = await paid.did(buyer, "/v1/carts")
    line = await paid.shop.orders.put(f"/v1/carts/{cart['id']}/lines/cup", json={"quantity": 4}, headers=buyer.headers)
    assert line.status == 200, await line.text()
    order = await paid.did(buyer, "/v1/orders", {"cart_id": cart["id"], "ship_to": _ADDRESS})
    orders["returned"] = order["id"]
    await paid.paid(order, "tok_ok")
    await paid.becomes(order, payment_status="paid")
    for quantity in (3, 1):
        parcel = {"lines": some("cup", quantity), "carrier": "Post", "tracking": "P"}
        await paid.did(staff, f"{path('returned')}/shipments", parcel)
    for number in (1, 2):
        await paid.did(staff, f"{path('returned')}/shipments/{number}/deliver")
    for number, quantity in ((1, 2), (2, 1), (3, 1)):
        back = {"lines": some("cup", quantity), "reason": "too blue"}
        await paid.did(buyer, f"{path('returned')}/returns", back)
        if number == 2:
            await paid.did(staff, f"{path('returned')}/returns/2/reject", {"note": "no"})
        elif number == 1:
            await paid.did(staff, f"{path('returned')}/returns/1/approve", {"note": "send it"})
            await paid.did(
                staff, f"{path('returned')}/returns/1/receive", {"note": "one is broken", "restocked": some("cup", 1)}
            )
    await paid.becomes(order, state="completed", payment_status="partially_refunded")

    order = await begin("lines cancelled", {"cup": 2, "pot": 2}, "tok_ok")
    await paid.becomes(order, payment_status="paid")
    parcel = {"lines": some("cup", 1), "carrier": "Post", "tracking": "P"}
    await paid.did(staff, f"{path('lines cancelled')}/shipments", parcel)
    lines = {"lines": some("pot", 1), "reason": "dropped"}
    await paid.did(staff, f"{path('lines cancelled')}/cancel-lines", lines)
    await paid.becomes(order, refunded=4000)

    order = await begin("in parts", {"pot": 2}, "tok_ok", capture="manual")
    await paid.becomes(order, state="confirmed")
    await paid.did(staff, f"{path('in parts')}/payments/1/capture", {"amount": 1000})
    await paid.becomes(order, captured=1000)

    order = await begin("cancelled", {"cup": 1}, "tok_ok")
    await paid.becomes(order, payment_status="paid")
    await paid.did(buyer, f"{path('cancelled')}/cancel", {"reason": "no"})
    await paid.becomes(order, state="cancelled")

    order = await begin("voided", {"cup": 1}, "tok_ok", capture="manual")
    await paid.becomes(order, state="confirmed")
    await paid.did(buyer, f"{path('voided')}/cancel", {"reason": "no"})
    await paid.becomes(order, state="cancelled")

    order = await begin("second attempt", {"pot": 1}, "tok_insufficient_funds")
    await paid.payment_becomes(order, "failed")
    await paid.paid(order, "tok_timeout_after")
    await paid.becomes(order, payment_status="paid")

    order = await begin("refund failed", {"cup": 2}, "tok_refund_fails")
    await paid.becomes(order, payment_status="paid")
    await paid.did(staff, f"{path('refund failed')}/refunds", {"amount": 100, "reason": "late"})

    async def needs_attention() -> bool:
        details = await paid.get(f"{path('refund failed')}/details", staff)
        return bool(details["needs_attention"])

    await until(needs_attention, 20.0, "a refund that failed", poll_s=0.02)

    order = await begin("at the bank", {"cup": 1}, "tok_requires_action")
    await paid.payment_becomes(order, "requires_action")
    await begin("free", {"leaflet": 1})
    return orders


async def _asleep(paid: PaidShop, orders: dict[str, int]) -> None:
    """What stays as it is, since no worker is there any more."""
    order = await paid.placed({"cup": 1})
    orders["placed"] = order["id"]
    order = await paid.placed({"cup": 3})
    orders["just paid"] = order["id"]
    await paid.paid(order)
    pending = {"amount": 300, "reason": "late"}
    await paid.did(paid.staff, f"/v1/orders/{orders['second attempt']}/refunds", pending)
    order = await paid.placed({"cup": 1})
    orders["expired"] = order["id"]
    await _expire(paid, order["id"])
    await paid.did(paid.buyer, "/v1/carts")


async def _expire(paid: PaidShop, order_id: int) -> None:
    """As its step would, later."""
    from services.orders import ending
    from services.orders.book import OrderBook
    from services.orders.draft import Draft

    def expire(draft: Draft) -> None:
        draft.now_ms = draft.order.expires_ms
        ending.expire(draft)

    assert await OrderBook(paid.shop.store).apply(order_id, expire)


_ADDRESS = {"name": "Ada", "line1": "1 Road", "postal_code": "12345", "city": "Town", "country": "DE"}
