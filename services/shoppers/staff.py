"""Staff: deliveries of stock, prices, parcels, returns, refunds, and what workers could not do by themselves.

They look for their work as staff do, in the lists of orders; only returns are brought to them, as parcels are. Two of
them never have one order in hand at one time; customers and workers change it all the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, Final

from services.shoppers.accounts import ADDRESS, Account
from services.shoppers.ledger import Ledger, OrderNote
from services.shoppers.tally import Tally
from services.shoppers.wire import Broken, GaveUp, Refused

IDLE_S: Final = 0.5  # between two looks at a list that held nothing to do
LOW_STOCK: Final = 3
DELIVERY: Final = (8, 20)  # pieces: less than what is wanted until the next one
# Returns that wait to be taken in; when there are more, customers are told to come again, and do not.
RETURNS_MAX: Final = 10_000
# What an order may answer where its customer, or a worker, was quicker; a quantity that is not there any more is the
# same.
_OVERTAKEN: Final = ("order_state", "not_paid", "amount_too_large", "invalid_body", "too_many_refunds")
_NO_ADDRESS: Final = "no_delivery_address"


class ReturnsDesk:
    """Where customers hand in what they return."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[OrderNote, int]] = deque()

    def hand_in(self, note: OrderNote, number: int) -> None:
        if len(self._waiting) < RETURNS_MAX:
            self._waiting.append((note, number))

    def next(self) -> tuple[OrderNote, int] | None:
        return self._waiting.popleft() if self._waiting else None


class Staff:
    """All of them, by one account."""

    def __init__(
        self,
        account: Account,
        skus: tuple[str, ...],
        ledger: Ledger,
        tally: Tally,
        desk: ReturnsDesk,
        chance: Random,
    ) -> None:
        self._account = account
        self._skus = skus
        self._ledger = ledger
        self._tally = tally
        self._desk = desk
        self._chance = chance
        self._in_hand: set[int] = set()

    # --- products -----------------------------------------------------------------------------------------------------

    async def open_shop(self, stock: int) -> None:
        """The hot products, with at least so much of each. Raises `Broken` and `GaveUp`."""
        for number, sku in enumerate(self._skus):
            await self._put_product(sku, number)
            level = (await self._account.ask("GET", "/v1/products/{}/stock", sku)).body
            if level["on_hand"] < stock:
                await self._adjust(sku, stock - level["on_hand"], "opening stock")

    async def run_stock(self, every_s: float) -> None:
        """Deliveries, losses, and now and then another price, until cancelled."""
        while True:
            await asyncio.sleep(self._chance.expovariate(1.0) * every_s)
            await self._tried(self._tend(self._chance.choice(self._skus)))

    async def _tend(self, sku: str) -> None:
        level = (await self._account.ask("GET", "/v1/products/{}/stock", sku)).body
        if level["on_hand"] < LOW_STOCK:
            await self._adjust(sku, self._chance.randint(*DELIVERY), "delivery")
        elif self._happens(0.1):
            await self._adjust(sku, -1, "broken")
        if self._happens(0.05):
            await self._put_product(sku, self._skus.index(sku))

    async def _put_product(self, sku: str, number: int) -> None:
        body = {
            "name": f"Hot {('kettle', 'cup', 'lamp', 'oak table')[number % 4]} {number + 1}",
            "price": self._chance.choice((499, 990, 1250, 2000, 4999)),
            "currency": "EUR",
            "category": "hot",
        }
        await self._account.ask("PUT", "/v1/products/{}", sku, body=body)

    async def _adjust(self, sku: str, delta: int, reason: str) -> None:
        body = {"delta": delta, "reason": reason}
        await self._do("/v1/products/{}/stock", sku, body=body, allowed=("insufficient_stock",))

    # --- orders -------------------------------------------------------------------------------------------------------

    async def run_parcels(self) -> None:
        """Take the money where it is only held, ship, deliver: through the list of confirmed orders, over and over."""
        while True:
            await self._tried(self._through("?state=confirmed&limit=50", self._pack))
            await asyncio.sleep(IDLE_S)

    async def run_attention(self) -> None:
        """What needs somebody to look at it: parked steps are tried again, orders ticked off."""
        while True:
            await self._tried(self._through("?needs_attention=true&limit=50", self._attend))
            await self._tried(self._retry_parked())
            await asyncio.sleep(4 * IDLE_S)

    async def run_returns(self) -> None:
        while True:
            handed_in = self._desk.next()
            if handed_in is None:
                await asyncio.sleep(IDLE_S)
            else:
                await self._tried(self._take_back(*handed_in))

    async def finish_returns(self) -> None:
        """What was handed in, and nothing else."""
        while (handed_in := self._desk.next()) is not None:
            await self._tried(self._take_back(*handed_in))

    async def _through(self, query: str, deal_with: Callable[[Any], Awaitable[None]]) -> None:
        """Every order of a list that is in nobody's hand."""
        cursor = ""
        while True:
            page = (await self._account.ask("GET", "/v1/orders", query=query + cursor)).body
            for order in page["data"]:
                if order["id"] in self._in_hand:
                    continue
                self._in_hand.add(order["id"])
                try:
                    await self._tried(deal_with(order))
                finally:
                    self._in_hand.discard(order["id"])
            if not page["has_more"]:
                return
            cursor = f"&starting_after={page['next_cursor']}"

    async def _pack(self, listed: Any) -> None:
        order = (await self._account.ask("GET", "/v1/orders/{}", listed["id"])).body  # the list is a moment old
        if order["state"] != "confirmed":
            return
        paid = order["payment_status"]
        if paid in ("authorised", "partially_paid"):
            await self._capture(order["id"])
        elif paid == "none":
            return
        elif order["fulfilment_status"] in ("none", "partial"):
            await self._ship(order)
        if order["fulfilment_status"] in ("shipped", "partial"):
            await self._deliver(order["id"])

    async def _capture(self, order_id: int) -> None:
        for payment in (await self._account.ask("GET", "/v1/orders/{}/payments", order_id)).body:
            if payment["state"] not in ("authorised", "partially_captured"):
                continue
            rest = payment["authorised"] - payment["captured"]
            body = {"amount": self._chance.randint(1, rest)} if rest and self._happens(0.3) else {}
            known = self._known(order_id)
            answer = await self._do(
                "/v1/orders/{}/payments/{}/capture", order_id, payment["attempt"], body=body, allowed=_OVERTAKEN
            )
            self._note(order_id, known, "payment", payment["attempt"], answer["state"])

    async def _ship(self, order: Any) -> None:
        lines = []
        for line in order["lines"]:
            rest = line["quantity"] - line["shipped"] - line["cancelled"]
            if rest and self._happens(0.8):
                lines.append({"sku": line["sku"], "quantity": self._chance.randint(1, rest)})
        if not lines:
            return
        if self._happens(0.03):
            body = {"lines": lines[:1], "reason": "fell off the shelf"}
            await self._do("/v1/orders/{}/cancel-lines", order["id"], body=body, allowed=_OVERTAKEN)
            return
        known = self._known(order["id"])
        try:
            shipment = await self._do(
                "/v1/orders/{}/shipments", order["id"],
                body={"lines": lines, "carrier": "Post", "tracking": f"P{self._chance.getrandbits(32):08X}"},
                allowed=(*_OVERTAKEN, _NO_ADDRESS),
            )  # fmt: skip
        except Refused as refused:
            if refused.code != _NO_ADDRESS:
                raise
            # The customer is asked; it is shipped when the list of orders comes to it again.
            await self._do("/v1/orders/{}/ship-to", order["id"], body=ADDRESS, allowed=_OVERTAKEN)
            return
        self._note(order["id"], known, "shipment", shipment["number"], shipment["state"])

    async def _deliver(self, order_id: int) -> None:
        for shipment in (await self._account.ask("GET", "/v1/orders/{}/shipments", order_id)).body:
            if shipment["state"] != "shipped":
                continue
            known = self._known(order_id)
            path = "/v1/orders/{}/shipments/{}/deliver"
            done = await self._do(path, order_id, shipment["number"], allowed=_OVERTAKEN)
            self._note(order_id, known, "shipment", shipment["number"], done["state"])
        if self._happens(0.1):
            body = {"amount": self._chance.randint(1, 300), "reason": "it came late"}
            known = self._known(order_id)
            refund = await self._do("/v1/orders/{}/refunds", order_id, body=body, allowed=_OVERTAKEN)
            self._note(order_id, known, "refund", refund["number"], refund["state"])

    async def _attend(self, order: Any) -> None:
        await self._account.ask("GET", "/v1/orders/{}/details", order["id"])
        await self._do("/v1/orders/{}/attended", order["id"])

    async def _retry_parked(self) -> None:
        for parked in (await self._account.ask("GET", "/v1/parked-steps", query="?limit=20")).body["data"]:
            self._tally.outcomes[f"(parked: {parked['code']})"] += 1
            path = "/v1/parked-steps/{}/{}/retry"
            await self._do(path, parked["kind"], parked["subject"], allowed=("not_found",))

    async def _take_back(self, note: OrderNote, number: int) -> None:
        path = "/v1/orders/{}/returns/{}/"
        known = note.known()
        if self._happens(0.15):
            body = {"note": "it was worn"}
            rejected = await self._do(path + "reject", note.id, number, body=body, allowed=_OVERTAKEN)
            self._ledger.saw(note, known, ("return", number), rejected["state"])
            return
        body = {"note": "send it back"}
        approved = await self._do(path + "approve", note.id, number, body=body, allowed=_OVERTAKEN)
        self._ledger.saw(note, known, ("return", number), approved["state"])
        known = note.known()
        receipt: dict[str, Any] = {"note": "checked", "restocked": approved["lines"] if self._happens(0.7) else []}
        if self._happens(0.1):
            receipt["refund_amount"] = 0
        received = await self._do(path + "receive", note.id, number, body=receipt, allowed=_OVERTAKEN)
        self._ledger.saw(note, known, ("return", number), received["state"])
        if received["refund"]:
            self._ledger.saw(note, known, ("refund", received["refund"]), "pending")

    # --- all of it ----------------------------------------------------------------------------------------------------

    async def _do(self, template: str, *parts: object, body: Any = None, allowed: tuple[str, ...] = ()) -> Any:
        key = f"{self._chance.getrandbits(128):032x}"
        return (await self._account.do(template, *parts, key=key, body=body, allowed=allowed)).body

    async def _tried(self, work: Awaitable[None]) -> None:
        """Somebody else was quicker, the service was away, or it answered what it must not (which is counted): there is
        other work."""
        try:
            await work
        except (Refused, GaveUp, Broken) as error:
            self._tally.outcomes[f"(staff: {type(error).__name__.lower()})"] += 1

    def _known(self, order_id: int) -> Any:
        note = self._ledger.orders.get(order_id)
        return note.known() if note is not None else None

    def _note(self, order_id: int, known: Any, kind: str, number: int, state: str) -> None:
        """Orders of which this simulation was not told are none of its ledger."""
        note = self._ledger.orders.get(order_id)
        if note is not None and known is not None:
            self._ledger.saw(note, known, (kind, number), state)

    def _happens(self, share: float) -> bool:
        return self._chance.random() < share
