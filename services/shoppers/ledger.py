"""What the services have acknowledged to anybody, and whether it is still so.

An order that a shopper was told of is there, once, with those lines; what it was told to be led on from what it was
told before, by the tables of `services/orders/states.py`; money that was taken or given back is not untaken. A
placement without an answer may have been done or not, but no account has an order that nobody asked for.

Who reads notes what is known before the request goes out (`OrderNote.known`), so that two answers that overtake each
other accuse nobody.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from msgspec import Struct

from services.orders.states import ORDER, PAYMENT, REFUND, RETURN, SHIPMENT, StateMachine
from services.shoppers.accounts import Account
from services.shoppers.tally import Tally

# Reading back is for correctness: a few at once, so that it does not look like an attack.
_AT_ONCE_MAX: Final = 16

Fact = tuple[str, int]
"""What of an order: `("payment", 2)`; the order itself is `("order", 0)`."""
THE_ORDER: Final[Fact] = ("order", 0)
Lines = tuple[tuple[str, int], ...]


def _reachable(machine: StateMachine[Any, Any]) -> dict[str, frozenset[str]]:
    """By state: itself, and all that can follow."""
    following: dict[str, set[str]] = {}
    for step in machine.transitions:
        following.setdefault(str(step.target), {str(step.target)})
        if step.source is not None:
            following.setdefault(str(step.source), {str(step.source)}).add(str(step.target))
    for middle in following:
        for reached in following.values():
            if middle in reached:
                reached |= following[middle]
    return {state: frozenset(reached) for state, reached in following.items()}


_REACHABLE: Final = {
    "order": _reachable(ORDER),
    "payment": _reachable(PAYMENT),
    "refund": _reachable(REFUND),
    "shipment": _reachable(SHIPMENT),
    "return": _reachable(RETURN),
}


class Known(NamedTuple):
    """Of one order, at one moment."""

    states: Mapping[Fact, str]
    captured: int
    refunded: int


class Placement(Struct, eq=False):
    """An order that somebody asked for."""

    account: Account
    lines: Lines
    cart_id: int | None


class OrderNote(Struct, eq=False):
    """What one order was said to be."""

    id: int
    number: str
    account: Account
    lines: Lines
    total: int
    states: dict[Fact, str]
    captured: int = 0
    refunded: int = 0
    events_seen: int = 0

    def known(self) -> Known:
        return Known(dict(self.states), self.captured, self.refunded)

    @property
    def state(self) -> str:
        return self.states[THE_ORDER]


class Ledger:
    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._unanswered: set[Placement] = set()
        self.orders: dict[int, OrderNote] = {}

    # --- while it goes on ---------------------------------------------------------------------------------------------

    def asks(self, account: Account, lines: Mapping[str, int], cart_id: int | None = None) -> Placement:
        """Before the request goes out."""
        placement = Placement(account, tuple(sorted(lines.items())), cart_id)
        self._unanswered.add(placement)
        return placement

    def refused(self, placement: Placement) -> None:
        self._unanswered.discard(placement)

    def placed(self, placement: Placement, body: Any) -> OrderNote:
        """It was acknowledged; told twice is told once."""
        self._unanswered.discard(placement)
        note = self.orders.get(body["id"])
        if note is None:
            states = {THE_ORDER: str(body["state"])}
            note = OrderNote(body["id"], body["number"], placement.account, _lines(body), body["total"], states=states)
            self.orders[note.id] = note
            if note.lines != placement.lines or body["user_id"] != placement.account.user_id:
                self._violation("order_differs", f"order {note.id} is of {note.lines}, not of {placement.lines}")
        return note

    def saw_order(self, note: OrderNote, known: Known, body: Any) -> None:
        """`known` is what was known before the question."""
        self.saw(note, known, THE_ORDER, body["state"])
        same = (body["id"], body["number"], _lines(body), body["total"], body["user_id"])
        was = (note.id, note.number, note.lines, note.total, note.account.user_id)
        if same != was:
            self._violation("order_differs", f"order {note.id} is {same}, and was {was}")
        for name in ("captured", "refunded"):
            if body[name] < getattr(known, name):
                self._violation("money_went_back", f"order {note.id}: {name} was {known}, and is {body[name]}")
        note.captured = max(note.captured, body["captured"])
        note.refunded = max(note.refunded, body["refunded"])

    def saw(self, note: OrderNote, known: Known, fact: Fact, state: str) -> None:
        """What a part of an order is. Its first state is as good as any."""
        reachable = _REACHABLE[fact[0]]
        before = known.states.get(fact)
        if before is not None and state not in reachable[before]:
            self._violation("went_back", f"order {note.id}: {fact[0]} {fact[1]} was {before}, and is {state}")
        latest = note.states.get(fact)
        if latest is None or state in reachable[latest]:
            note.states[fact] = state

    def _violation(self, code: str, text: str) -> None:
        self._tally.error(f"{code}: {text}")

    # --- at the end ---------------------------------------------------------------------------------------------------

    async def read_back(self, accounts: list[Account]) -> int:
        """Everything that was acknowledged, from the services; how many orders that was. Violations are in the tally.
        Raises `GaveUp` and `Broken`."""
        listed: dict[int, Any] = {}
        for account in accounts:
            found = await self._orders_of(account)
            self._judge_unasked(account, found)
            listed.update(found)
        at_once = asyncio.Semaphore(_AT_ONCE_MAX)
        async with asyncio.TaskGroup() as group:
            for note in self.orders.values():
                if note.id not in listed:
                    self._violation("order_lost", f"order {note.id} of user {note.account.user_id} is not listed")
                group.create_task(self._read_parts(note, at_once))
        return len(self.orders)

    async def _orders_of(self, account: Account) -> dict[int, Any]:
        """Those of this simulation, by id."""
        found: dict[int, Any] = {}
        known = {note.id: note.known() for note in self.orders.values() if note.account is account}
        query = "?limit=100"
        while True:
            page = (await account.ask("GET", "/v1/orders", query=query)).body
            for body in page["data"]:
                if body["id"] <= account.newest_before:
                    return found
                if body["id"] in found:
                    self._violation("order_twice", f"order {body['id']} is listed twice")
                found[body["id"]] = body
                if body["id"] in known:
                    self.saw_order(self.orders[body["id"]], known[body["id"]], body)
            if not page["has_more"]:
                return found
            query = f"?limit=100&starting_after={page['next_cursor']}"

    def _judge_unasked(self, account: Account, listed: Mapping[int, Any]) -> None:
        """Each order that nobody was told of is the work of a request that got no answer, and of one only."""
        unanswered = Counter((one.lines, one.cart_id) for one in self._unanswered if one.account is account)
        for order_id, body in listed.items():
            if order_id in self.orders:
                continue
            asked = (_lines(body), body["cart_id"])
            if not unanswered[asked]:
                self._violation("order_unasked", f"order {order_id} of {asked}: nobody asked for it, or not so often")
            unanswered[asked] -= 1

    async def _read_parts(self, note: OrderNote, at_once: asyncio.Semaphore) -> None:
        async with at_once:
            known = note.known()
            body = (await note.account.ask("GET", "/v1/orders/{}", note.id)).body
            self.saw_order(note, known, body)
            for kind, path, number in (
                ("payment", "payments", "attempt"), ("refund", "refunds", "number"),
                ("shipment", "shipments", "number"), ("return", "returns", "number"),
            ):  # fmt: skip
                told = {fact for fact in known.states if fact[0] == kind}
                if not told:
                    continue
                parts = (await note.account.ask("GET", "/v1/orders/{}/" + path, note.id)).body
                for part in parts:
                    self.saw(note, known, (kind, part[number]), part["state"])
                for fact in told - {(kind, part[number]) for part in parts}:
                    self._violation("part_lost", f"order {note.id} has no {kind} {fact[1]}")


def _lines(body: Any) -> Lines:
    return tuple(sorted((line["sku"], line["quantity"]) for line in body["lines"]))
