"""The rest of the walk: an order's whole life, from a cart to a return, with the provider and a worker at work.

Nothing here waits for a time: each step follows what the order's own events say, from its stream.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, Final

from services.demo.cluster import CannotWalk
from services.demo.report import Report
from services.demo.shopper import Shopper

# A worker takes a step up at once; but it may have started a moment ago, or the store has just lost its leader.
_DONE_WITHIN_S: Final = 30.0
ADDRESS: Final = {"name": "Demo Customer", "line1": "12 Bell Yard", "city": "London", "country": "GB"}


class OrderLife:
    """One customer's order of two pieces of one product, and what staff do about it."""

    def __init__(self, report: Report, shopper: Shopper, customer: str, staff: str, sku: str, price: int) -> None:
        """`customer` and `staff` are access tokens."""
        self._report = report
        self._shopper = shopper
        self._customer = customer
        self._staff = staff
        self._sku = sku
        self._price = price
        self._path = ""

    async def run(self) -> None:
        """Raises `CannotWalk`."""
        await self._place()
        await self._pay()
        await self._ship()
        await self._refund_part()
        await self._give_back()
        await self._tell_events()

    async def _place(self) -> None:
        with self._report.step("fill a cart") as step:
            cart = await self._by_customer("/v1/carts")
            path = f"/v1/carts/{cart['id']}/lines/{self._sku}"
            cart = await self._shopper.put(self._customer, path, {"quantity": 2})
            step.detail = f"2 × {self._sku}, {cart['total']} cents"
        with self._report.step("order it, with an address") as step:
            placement = {
                "cart_id": cart["id"], "cart_version": cart["version"], "expected_total": cart["total"],
                "ship_to": ADDRESS,
            }  # fmt: skip
            order = await self._by_customer("/v1/orders", placement)
            self._path = f"/v1/orders/{order['id']}"
            step.detail = f"{order['number']}, {order['state']}"

    async def _pay(self) -> None:
        with self._report.step("pay it, and follow its events") as step:
            await self._by_customer(f"{self._path}/payments", {"token": "tok_ok"})
            seen = await self._until_event("payment.captured")
            order = await self._order(state="confirmed", payment_status="paid", captured=2 * self._price)
            step.detail = f"{_short(seen)}: {order['payment_status']}"

    async def _ship(self) -> None:
        lines = [{"sku": self._sku, "quantity": 2}]
        with self._report.step("ship it") as step:
            shipment = await self._by_staff(
                f"{self._path}/shipments", {"lines": lines, "carrier": "Royal Mail", "tracking": "RM123456785GB"}
            )
            step.detail = f"{shipment['carrier']} {shipment['tracking']}"
        with self._report.step("it arrives") as step:
            await self._by_staff(f"{self._path}/shipments/{shipment['number']}/deliver")
            order = await self._order(state="completed", fulfilment_status="delivered")
            step.detail = f"{order['fulfilment_status']}, {order['state']}"

    async def _refund_part(self) -> None:
        with self._report.step("refund a part: it came late") as step:
            amount = self._price // 5
            await self._by_staff(f"{self._path}/refunds", {"amount": amount, "reason": "it came late"})
            await self._until_event("refund.succeeded")
            order = await self._order(payment_status="partially_refunded", refunded=amount)
            step.detail = f"{order['refunded']} of {order['captured']} cents are back"

    async def _give_back(self) -> None:
        lines = [{"sku": self._sku, "quantity": 1}]
        with self._report.step("return one of the two") as step:
            asked = await self._by_customer(f"{self._path}/returns", {"lines": lines, "reason": "too small"})
            path = f"{self._path}/returns/{asked['number']}"
            await self._by_staff(f"{path}/approve", {"note": "send it back"})
            before, _ = await self._shopper.stock(self._staff, self._sku)
            await self._by_staff(f"{path}/receive", {"note": "as new", "restocked": lines})
            on_hand, _ = await self._shopper.stock(self._staff, self._sku)
            if on_hand != before + 1:
                raise CannotWalk(f"{self._sku} has {on_hand} on hand, not {before + 1}")
            step.detail = f"requested, approved, received, restocked: {on_hand} on hand"
        with self._report.step("its money goes back") as step:
            await self._until_event("refund.succeeded", times=2)
            order = await self._order(return_status="received", refunded=self._price // 5 + self._price)
            step.detail = f"{order['refunded']} of {order['captured']} cents are back"

    async def _tell_events(self) -> None:
        page = await self._shopper.get(self._customer, f"{self._path}/events?limit=100")
        types = [event["type"] for event in reversed(page["data"])]
        if page["has_more"] or [event["seq"] for event in page["data"]] != list(range(len(types), 0, -1)):
            raise CannotWalk(f"the order's events are not 1 to {len(types)}")
        self._report.say("  [dim]what happened to it:[/]")
        for begin in range(0, len(types), 4):
            self._report.say("  [dim]" + " → ".join(types[begin : begin + 4]) + "[/]")

    async def _until_event(self, wanted: str, times: int = 1) -> list[str]:
        """The types of the order's events, from its stream, up to where `wanted` came so often."""
        seen: list[str] = []
        try:
            async with (
                asyncio.timeout(_DONE_WITHIN_S),
                aclosing(self._shopper.events(self._customer, self._path)) as events,
            ):
                async for type_ in events:
                    seen.append(type_)
                    if type_ in ("order.needs_attention", "payment.failed"):
                        raise CannotWalk(f"the order's events are {', '.join(seen)}")
                    if seen.count(wanted) == times:
                        return seen
        except TimeoutError:
            pass
        since = f"no {wanted} within {_DONE_WITHIN_S:g} s, only {', '.join(seen)}"
        raise CannotWalk(f"{since}: do the sandbox provider and a worker run?")

    async def _order(self, **expected: Any) -> dict[str, Any]:
        order: dict[str, Any] = await self._shopper.get(self._customer, self._path)
        wrong = {name: order[name] for name, value in expected.items() if order[name] != value}
        if wrong:
            raise CannotWalk(f"the order has {wrong}, not {expected}")
        return order

    async def _by_customer(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return await self._shopper.post(self._customer, path, body)

    async def _by_staff(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return await self._shopper.post(self._staff, path, body)


def _short(types: list[str]) -> str:
    """Of the payment's events, without the word that all of them begin with."""
    return ", ".join(type_.removeprefix("payment.") for type_ in types if type_.startswith("payment."))
