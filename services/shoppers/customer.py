"""A customer's visit: looks around, fills a cart or orders at once, pays with whatever card, waits, changes their mind.

Visits differ by chance, and each of them has an outcome. Whatever the services say on the way goes into the ledger.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from random import Random
from typing import Any, Final

import aiohttp
from msgspec import Struct

from services.sandbox_psp.failures import OF_ANSWERS, OF_WEBHOOKS
from services.shoppers.accounts import ADDRESS, Account
from services.shoppers.ledger import Ledger, OrderNote
from services.shoppers.staff import ReturnsDesk
from services.shoppers.tally import Tally
from services.shoppers.wire import Broken, GaveUp, Refused, Wire

GOOD: Final = ("tok_ok",)
DECLINED: Final = (
    "tok_declined", "tok_insufficient_funds", "tok_stolen_card", "tok_expired_card", "tok_pending_declined",
    "tok_that_is_none",
)  # fmt: skip
ODD: Final = (
    "tok_pending", "tok_refund_pending", "tok_refund_fails",
    *(f"tok_{failure}" for failure in (*OF_ANSWERS, *OF_WEBHOOKS)),
    *(f"tok_{kind}_{failure}" for kind in ("capture", "void", "refund") for failure in OF_ANSWERS),
)  # fmt: skip
ACTION: Final = ("tok_requires_action",)
TOKENS: Final = ((GOOD, 50), (DECLINED, 10), (ODD, 25), (ACTION, 15))

PAYMENTS_MAX: Final = 3  # cards that somebody tries before they go elsewhere
CARTS_LEFT_MAX: Final = 8  # of an account; the service keeps 20 active ones, and some are being filled
POLL_MIN_S: Final = 0.3
POLL_MAX_S: Final = 2.0
_ACTION_TIMEOUT_S: Final = 5.0
_ENDED: Final = frozenset({"partially_captured", "captured", "voided", "failed"})
WORDS: Final = ("hot", "cup", "kettle", "lamp", "oak")


class Habits(Struct, frozen=True, kw_only=True):
    """`skus` are what they all want. `patience_s` is how long somebody waits for what is to happen by itself."""

    skus: tuple[str, ...]
    think_s: float
    patience_s: float


class Left(Exception):
    """The visit is over; the message is its outcome."""


class Customer:
    """One visit."""

    def __init__(
        self,
        account: Account,
        staff: Account,
        orders: Wire,
        session: aiohttp.ClientSession,
        habits: Habits,
        ledger: Ledger,
        tally: Tally,
        desk: ReturnsDesk,
        chance: Random,
    ) -> None:
        """`staff` takes payments by telephone, where the money is only held at first. `orders` and `session` are for
        the few requests that are no plain ones: streams, and the bank's page."""
        self._account = account
        self._staff = staff
        self._orders = orders
        self._session = session
        self._habits = habits
        self._ledger = ledger
        self._tally = tally
        self._desk = desk
        self._chance = chance

    async def visit(self) -> None:
        """Raises nothing but being cancelled: how it ended is counted."""
        try:
            outcome = await self._visit()
        except Left as left:
            outcome = str(left)
        except GaveUp:
            outcome = "gave_up"
        except Broken:
            outcome = "broken"
        self._tally.outcomes[outcome] += 1

    async def _visit(self) -> str:
        await self._look_around()
        lines = self._wanted()
        note = await (self._order_a_cart(lines) if self._chance.random() < 0.6 else self._order_at_once(lines))
        if self._happens(0.06):
            return "left_unpaid"
        if self._happens(0.05):
            return await self._cancel(note, "cancelled_unpaid")
        await self._pay(note)
        if self._happens(0.08):
            return await self._cancel(note, "cancelled")
        return await self._wait_for_parcel(note)

    # --- looking and ordering -----------------------------------------------------------------------------------------

    async def _look_around(self) -> None:
        chance, account = self._chance, self._account
        looks: list[tuple[str, tuple[object, ...], str]] = [
            ("/v1/products", (), "?limit=20"),
            ("/v1/products", (), f"?q={chance.choice(WORDS)}&limit=20"),
            ("/v1/products", (), "?category=hot&in_stock=true"),
            ("/v1/products", (), "?currency=EUR&max_price=2000"),
            ("/v1/products/{}", (chance.choice(self._habits.skus),), ""),
            ("/v1/products/{}/stock", (chance.choice(self._habits.skus),), ""),
            ("/v1/orders", (), "?limit=5"),
        ]
        for template, parts, query in chance.sample(looks, chance.randint(1, 3)):
            await account.ask("GET", template, *parts, query=query)
            await self._think()

    def _wanted(self) -> dict[str, int]:
        skus = self._chance.sample(self._habits.skus, min(len(self._habits.skus), self._chance.choice((1, 1, 2, 3))))
        return {sku: self._chance.choice((1, 1, 2)) for sku in skus}

    async def _order_at_once(self, lines: dict[str, int]) -> OrderNote:
        body: dict[str, Any] = {"lines": [{"sku": sku, "quantity": quantity} for sku, quantity in lines.items()]}
        if self._happens(0.9):  # who does not say where it goes to is asked by staff
            body["ship_to"] = ADDRESS
        return await self._place(lines, body, None)

    async def _order_a_cart(self, lines: dict[str, int]) -> OrderNote:
        try:
            cart = (await self._account.do("/v1/carts", key=self._key(), allowed=("too_many_carts",))).body
        except Refused:
            raise Left("too_many_carts") from None
        for sku, quantity in lines.items():
            path = "/v1/carts/{}/lines/{}"
            cart = (await self._account.ask("PUT", path, cart["id"], sku, body={"quantity": quantity})).body
            await self._think()
        if len(lines) > 1 and self._happens(0.1):
            sku = self._chance.choice(sorted(lines))
            del lines[sku]
            try:
                cart = (
                    await self._account.ask("DELETE", "/v1/carts/{}/lines/{}", cart["id"], sku, allowed=("not_found",))
                ).body
            except Refused:  # it was deleted by a request whose answer was lost
                cart = (await self._account.ask("GET", "/v1/carts/{}", cart["id"])).body
        if self._happens(0.08):
            if self._account.carts_left < CARTS_LEFT_MAX and self._happens(0.3):
                self._account.carts_left += 1
            else:
                await self._delete_cart(cart["id"])
            raise Left("abandoned_cart")
        placement = {"cart_id": cart["id"], "cart_version": cart["version"], "ship_to": ADDRESS}
        if cart["total"] is not None:
            placement["expected_total"] = cart["total"]
        try:
            return await self._place(lines, placement, cart["id"])
        except Left:
            await self._delete_cart(cart["id"])
            raise

    async def _delete_cart(self, cart_id: int) -> None:
        with suppress(Refused):  # an earlier attempt did
            await self._account.ask("DELETE", "/v1/carts/{}", cart_id, allowed=("not_found",))

    async def _place(self, lines: dict[str, int], body: dict[str, Any], cart_id: int | None) -> OrderNote:
        placement = self._ledger.asks(self._account, lines, cart_id)
        try:
            answers = await self._command("/v1/orders", body=body, allowed=("insufficient_stock", "total_changed"))
        except Refused as refused:
            self._ledger.refused(placement)
            raise Left("sold_out" if refused.code == "insufficient_stock" else refused.code) from None
        note = self._ledger.placed(placement, answers[0])
        if any(answer["id"] != note.id for answer in answers):
            self._tally.error(f"placed_twice: one Idempotency-Key, orders {[answer['id'] for answer in answers]}")
        self._tally.outcomes["(orders placed)"] += 1
        return note

    # --- paying -------------------------------------------------------------------------------------------------------

    async def _pay(self, note: OrderNote) -> None:
        """Until the order is paid, or authorised where staff take the money later. Raises `Left`."""
        for number in range(PAYMENTS_MAX):
            tokens: Sequence[str] = GOOD
            if number == 0 or self._happens(0.3):
                (tokens,) = self._chance.choices([one for one, _ in TOKENS], [weight for _, weight in TOKENS])
            is_manual = self._happens(0.15)
            body: dict[str, Any] = {"token": self._chance.choice(tokens)}
            if is_manual:
                body["capture"] = "manual"
            if self._happens(0.3):
                body["return_url"] = "https://shop.example.com/back"
            known = note.known()
            path, allowed = "/v1/orders/{}/payments", ("order_state", "payment_in_progress")
            by = self._staff if is_manual else self._account
            try:
                payment, *_ = await self._command(path, note.id, body=body, allowed=allowed, by=by)
            except Refused as refused:
                raise Left(f"pay_{refused.code}") from None
            attempt = payment["attempt"]
            self._ledger.saw(note, known, ("payment", attempt), payment["state"])
            payment = await self._until_paid(note, attempt, is_manual)
            if payment["state"] == "requires_action":
                payment = await self._at_the_bank(note, payment, is_manual)
            if payment["state"] in ("captured", "partially_captured", "authorised"):
                return
            if payment["state"] == "voided":
                raise Left("too_late_to_pay")
            if self._happens(0.2):
                break
        raise Left("payment_failed")

    async def _at_the_bank(self, note: OrderNote, payment: Any, is_manual: bool) -> Any:
        """The provider's page; it may be away, as anything may."""
        if self._happens(0.1):
            raise Left("left_at_the_bank")
        decision = "refuse" if self._happens(0.2) else "approve"
        try:
            async with self._session.post(
                payment["action_url"], data={"decision": decision}, allow_redirects=False,
                timeout=aiohttp.ClientTimeout(_ACTION_TIMEOUT_S),
            ) as answer:  # fmt: skip
                self._tally.outcomes[f"(bank {decision}: {answer.status})"] += 1
        except (aiohttp.ClientError, TimeoutError, OSError):
            self._tally.outcomes["(bank away)"] += 1
        if self._happens(0.8):  # others close the window
            await self._command("/v1/orders/{}/payments/{}/complete", note.id, payment["attempt"])
        return await self._until_paid(note, payment["attempt"], is_manual, beyond="requires_action")

    async def _until_paid(self, note: OrderNote, attempt: int, is_manual: bool, beyond: str = "") -> Any:
        """The payment, once there is something to do for the customer, or nothing more. Raises `Left`."""
        wanted = _ENDED | ({"authorised"} if is_manual else set()) | ({"requires_action"} - {beyond})
        streams = self._happens(0.5)
        deadline = time.monotonic() + self._habits.patience_s
        pause_s = POLL_MIN_S
        while time.monotonic() < deadline:
            known = note.known()
            payment = (await self._account.ask("GET", "/v1/orders/{}/payments/{}", note.id, attempt)).body
            self._ledger.saw(note, known, ("payment", attempt), payment["state"])
            if payment["state"] in wanted:
                return payment
            if streams:
                await self._next_event(note, deadline)
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(POLL_MAX_S, 1.5 * pause_s)
        raise Left("left_waiting_for_payment")

    async def _next_event(self, note: OrderNote, deadline: float) -> None:
        """The next thing that happens to the order, from its stream; or nothing, when that has ended."""
        token = await self._account.token()
        path, after = "/v1/orders/{}/events/stream", note.events_seen
        try:
            async with (
                asyncio.timeout(max(0.0, deadline - time.monotonic())),
                aclosing(self._orders.stream(path, note.id, token=token, after=after)) as events,
            ):
                async for event in events:
                    note.events_seen = max(note.events_seen, event.seq)
                    return
        except TimeoutError:
            return
        await asyncio.sleep(POLL_MIN_S)

    # --- afterwards ---------------------------------------------------------------------------------------------------

    async def _cancel(self, note: OrderNote, outcome: str) -> str:
        known = note.known()
        try:
            body, *_ = await self._command(
                "/v1/orders/{}/cancel", note.id, body={"reason": "changed my mind"}, allowed=("order_state",)
            )
        except Refused:
            return "too_late_to_cancel"
        self._ledger.saw_order(note, known, body)
        return outcome

    async def _wait_for_parcel(self, note: OrderNote) -> str:
        deadline = time.monotonic() + self._habits.patience_s
        pause_s = POLL_MIN_S
        while True:
            known = note.known()
            order = (await self._account.ask("GET", "/v1/orders/{}", note.id)).body
            self._ledger.saw_order(note, known, order)
            if order["state"] not in ("confirmed", "completed") or order["fulfilment_status"] == "delivered":
                break
            if time.monotonic() > deadline:
                return "left_waiting_for_parcel"
            await asyncio.sleep(pause_s)
            pause_s = min(POLL_MAX_S, 1.5 * pause_s)
        if order["fulfilment_status"] != "delivered":
            return str(order["state"])
        if not self._happens(0.2):
            return "delivered"
        line = self._chance.choice(order["lines"])
        quantity = line["delivered"] - line["returned"]
        if not quantity:
            return "delivered"
        body = {"lines": [{"sku": line["sku"], "quantity": self._chance.randint(1, quantity)}], "reason": "too small"}
        known = note.known()
        asked, *_ = await self._command("/v1/orders/{}/returns", note.id, body=body)
        self._ledger.saw(note, known, ("return", asked["number"]), asked["state"])
        self._desk.hand_in(note, asked["number"])
        return "returned"

    # --- all of it ----------------------------------------------------------------------------------------------------

    async def _command(
        self,
        template: str,
        *parts: object,
        body: Any = None,
        allowed: tuple[str, ...] = (),
        by: Account | None = None,
    ) -> list[Any]:
        """What a command is answered with; of one in twenty twice, because somebody pressed the button twice."""
        key = self._key()

        async def once() -> Any:
            return (await (by or self._account).do(template, *parts, key=key, body=body, allowed=allowed)).body

        if not self._happens(0.05):
            return [await once()]
        both = await asyncio.gather(once(), once(), return_exceptions=True)
        told = [str(one) if isinstance(one, Refused) else one for one in both if not isinstance(one, GaveUp)]
        if len(told) == 2 and told[0] != told[1]:
            self._tally.error(f"answers_differ: POST {template} with one key: {told[0]} and {told[1]}")
        for one in both:
            if isinstance(one, BaseException):
                raise one
        return list(both)

    def _key(self) -> str:
        return f"{self._chance.getrandbits(128):032x}"

    def _happens(self, share: float) -> bool:
        return self._chance.random() < share

    async def _think(self) -> None:
        await asyncio.sleep(self._chance.expovariate(1.0) * self._habits.think_s)
