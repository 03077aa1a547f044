"""An order with all that belongs to it, and a draft of its next state.

`Whole` is what the store holds, read at one revision. A `Draft` begins with it; rules (`paying.py`, `fulfilling.py`,
`ending.py`) change the draft, and nothing else does; then `operations` are what one transaction writes, under the
compare `unchanged`. So everything that a rule looked at is as it was when its change takes effect.

Rules are pure: they see no store, no provider and no clock but `now_ms`. They refuse with `Problem`; a draft that was
refused is thrown away.

What a draft always does
- the order is written with every change, so its revision moves, and changes of one order follow each other;
- stock moves by `Add`, so that orders of one product do not get into each other's way; no number falls below 0;
- each new state is told in an event, with the next number of the order;
- of an order whose user's account is erased, the address goes with the change after which nothing is under way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeVar

import msgspec
from msgspec import Struct

import kvstore
from services.orders.records import (
    EventRecord,
    Order,
    OrderLine,
    Payment,
    Refund,
    Return,
    Shipment,
    ShipTo,
    StockHeld,
    address_key,
    allocated_key,
    attention_key,
    decode_order,
    decode_payment,
    decode_refund,
    decode_return,
    decode_shipment,
    encode,
    event_key,
    on_hand_key,
    order_key,
    order_state_key,
    part_key,
    part_prefix,
    reserved_key,
)
from services.orders.states import (
    LIVE,
    ORDER,
    TAKEN,
    OrderEvent,
    OrderState,
)
from services.work import steps

_HELD_KEYS: Final = {StockHeld.RESERVED: reserved_key, StockHeld.ALLOCATED: allocated_key}

PAYMENT_STEP: Final = "payment"
REFUND_STEP: Final = "refund"
EXPIRY_STEP: Final = "expire"

# More than twice as many as there are (docs/services.md lists them), so that none is ever dropped for another; and yet
# a code that is made of data by mistake does not make an order's record grow with each failure.
ATTENTION_CODES_MAX: Final = 40


class Whole(Struct, frozen=True):
    """An order with everything that belongs to it, as of one moment. Parts are by their numbers."""

    order: Order
    revision: int
    payments: dict[int, Payment]
    refunds: dict[int, Refund]
    shipments: dict[int, Shipment]
    returns: dict[int, Return]
    has_address: bool


def reads(order_id: int) -> list[kvstore.Range]:
    """The order, then its parts, and whether it has an address; `whole_of` makes a `Whole` of what each finds. (Rules
    bound how many parts there are.)"""
    prefixes = (part_prefix(kind, order_id) for kind in ("payment", "refund", "shipment", "return"))
    address = address_key(order_id)
    return [
        kvstore.Range(order_key(order_id)),
        *(kvstore.Range(one, kvstore.prefix_end(one)) for one in prefixes),
        kvstore.Range(address, address + b"\0", keys_only=True),
    ]


def whole_of(results: Sequence[tuple[kvstore.Record, ...]]) -> Whole | None:
    """None if there is no such order."""
    found, payments, refunds, shipments, returns, addresses = results
    if not found:
        return None
    return Whole(
        decode_order(found[0].value),
        found[0].mod_revision,
        {part.attempt: part for part in (decode_payment(record.value) for record in payments)},
        {part.number: part for part in (decode_refund(record.value) for record in refunds)},
        {part.number: part for part in (decode_shipment(record.value) for record in shipments)},
        {part.number: part for part in (decode_return(record.value) for record in returns)},
        bool(addresses),
    )


class Part(Protocol):
    """A payment, refund, shipment or return."""

    @property
    def state(self) -> Any: ...


P = TypeVar("P", Payment, Refund, Shipment, Return)


class Draft:
    def __init__(self, whole: Whole, now_ms: int, actor: int = 0) -> None:
        """`actor` is the user whose command it is; 0: a worker's."""
        self._before = whole
        self.now_ms = now_ms
        self._actor = actor
        self.order = whole.order
        self.payments = dict(whole.payments)
        self.refunds = dict(whole.refunds)
        self.shipments = dict(whole.shipments)
        self.returns = dict(whole.returns)
        self.has_address = whole.has_address
        self._writes: dict[bytes, kvstore.Operation] = {}  # by key: the last one counts
        self._stock: Counter[bytes] = Counter()

    # --- for rules ----------------------------------------------------------------------------------------------------

    @property
    def live_payment(self) -> Payment | None:
        return self.payments[self.order.live_payment] if self.order.live_payment else None

    def set(self, **changes: Any) -> None:
        """Change fields of the order."""
        self.order = msgspec.structs.replace(self.order, **changes)

    def advance(self, event: OrderEvent, **data: Any) -> None:
        """The order's own next state. Raises `Problem` `order_state`."""
        state = ORDER.next(self.order.state, event)
        if self.order.state is OrderState.PENDING_PAYMENT:
            step = steps.cancel(EXPIRY_STEP, str(self.order.id), self.order.expires_ms)
            self._writes[step.start] = step
        self.set(state=state)
        self.tell(f"order.{state}", **data)

    def set_payment(self, payment: Payment) -> Payment:
        before = self.payments.get(payment.attempt)
        payment = msgspec.structs.replace(payment, updated_ms=self.now_ms)
        self.payments[payment.attempt] = payment
        self._put_part("payment", payment.attempt, payment, before)
        if payment.state in LIVE:
            assert self.order.live_payment in (0, payment.attempt), "an order has one live payment"
            self.set(live_payment=payment.attempt)
        elif self.order.live_payment == payment.attempt:
            self.set(live_payment=0)
        return payment

    def set_refund(self, refund: Refund) -> Refund:
        before = self.refunds.get(refund.number)
        self.refunds[refund.number] = refund = msgspec.structs.replace(refund, updated_ms=self.now_ms)
        self._put_part("refund", refund.number, refund, before)
        return refund

    def set_shipment(self, shipment: Shipment) -> Shipment:
        before = self.shipments.get(shipment.number)
        self.shipments[shipment.number] = shipment = msgspec.structs.replace(shipment, updated_ms=self.now_ms)
        self._put_part("shipment", shipment.number, shipment, before)
        return shipment

    def set_return(self, ret: Return) -> Return:
        before = self.returns.get(ret.number)
        self.returns[ret.number] = ret = msgspec.structs.replace(ret, updated_ms=self.now_ms)
        self._put_part("return", ret.number, ret, before)
        self.set(return_status=self.returns[max(self.returns)].state)
        return ret

    def _put_part(self, kind: str, number: int, part: Part, before: Part | None) -> None:
        key = part_key(kind, self.order.id, number)
        self._writes[key] = kvstore.Put(key, encode(part))
        if before is None or before.state is not part.state:
            self.tell(f"{kind}.{part.state}", **{"attempt" if kind == "payment" else "number": number})

    def tell(self, type_: str, **data: Any) -> None:
        """Write an event."""
        seq = self.order.events + 1
        self.set(events=seq)
        key = event_key(self.order.id, seq)
        self._writes[key] = kvstore.Put(
            key, encode(EventRecord(self.order.id, seq, type_, self.now_ms, data, self._actor))
        )

    def want_attention(self, code: str) -> None:
        """Staff have to look at it, for this reason as well; they alone are told why. One that is open already says
        nothing new. Past the bound the oldest gives way."""
        assert len(code.split()) == 1, code
        open_codes = self.order.attention_codes
        if code not in open_codes:
            self.set(needs_attention=" ".join([*open_codes, code][-ATTENTION_CODES_MAX:]))
            self.tell("order.needs_attention")

    def attended(self, *codes: str) -> None:
        """Staff have seen to these of its open codes."""
        left = [code for code in self.order.attention_codes if code not in codes]
        if len(left) < len(self.order.attention_codes):
            self.set(needs_attention=" ".join(left))
            self.tell("order.attended")

    def send_to(self, ship_to: ShipTo) -> None:
        """Where it goes to from now on."""
        key = address_key(self.order.id)
        self._writes[key] = kvstore.Put(key, encode(ship_to))
        self.has_address = True
        self.tell("order.address_changed")

    def forget_address(self) -> None:
        """Nobody can say any more where it went to."""
        if self.has_address:
            key = address_key(self.order.id)
            self._writes[key] = kvstore.Delete(key)
            self.has_address = False

    def set_line(self, line: OrderLine) -> None:
        assert 0 <= line.returning + line.returned <= line.delivered <= line.shipped, line
        assert 0 <= line.cancelled <= line.quantity - line.shipped, line
        self.set(lines=tuple(line if other.sku == line.sku else other for other in self.order.lines))

    def line(self, sku: str) -> OrderLine | None:
        return next((line for line in self.order.lines if line.sku == sku), None)

    def take_from_stock(self, sku: str, quantity: int) -> None:
        """It leaves the number under which the order's stock counts: it is shipped."""
        self._stock[self._held_key(sku)] -= quantity

    def give_back_stock(self, sku: str, quantity: int) -> None:
        """It is on hand again, and not held for this order."""
        self.take_from_stock(sku, quantity)
        self.restock(sku, quantity)

    def restock(self, sku: str, quantity: int) -> None:
        """What was shipped is on hand again."""
        self._stock[on_hand_key(sku)] += quantity

    def hold_stock_as(self, held: StockHeld) -> None:
        """What is not yet shipped counts under another number from now on; with `NONE` it is on hand again."""
        for line in self.order.lines:
            if held is StockHeld.NONE:
                self.give_back_stock(line.sku, line.open)
            else:
                self._stock[self._held_key(line.sku)] -= line.open
                self._stock[_HELD_KEYS[held](line.sku)] += line.open
        self.set(stock=held)

    def _held_key(self, sku: str) -> bytes:
        return _HELD_KEYS[self.order.stock](sku)

    def due(self, kind: str, subject: str, *, at_ms: int = 0, once: bool = False) -> None:
        """A durable step, from now on or from a later moment; with `once` a look now at what is due anyway."""
        step = steps.put(kind, subject, due_ms=max(self.now_ms, at_ms), once=once)
        self._writes[step.key] = step

    # --- for the store ------------------------------------------------------------------------------------------------

    @property
    def is_changed(self) -> bool:
        return self.order is not self._before.order or bool(self._writes)

    @property
    def unchanged(self) -> kvstore.Compare:
        """Holds while nobody else has changed the order."""
        key, revision = order_key(self.order.id), self._before.revision
        return kvstore.Compare(key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, revision)

    def operations(self) -> list[kvstore.Operation]:
        """What the change writes; nothing if nothing has changed."""
        if not self.is_changed:
            return []
        if self.order.forget_by_ms and not self.order.is_under_way:
            self.forget_address()
        order, before = msgspec.structs.replace(self.order, updated_ms=self.now_ms), self._before.order
        writes: list[kvstore.Operation] = [
            kvstore.Add(key, delta, min=0) for key, delta in sorted(self._stock.items()) if delta
        ]
        writes.append(kvstore.Put(order_key(order.id), encode(order)))
        if order.state is not before.state:
            writes.append(kvstore.Delete(order_state_key(before.state, order.id)))
            writes.append(kvstore.Put(order_state_key(order.state, order.id), b""))
        if order.needs_attention != before.needs_attention:
            key = attention_key(order.id)
            needed = order.needs_attention.encode()
            writes.append(kvstore.Put(key, needed) if needed else kvstore.Delete(key))
        return [*writes, *self._writes.values()]


def payment_subject(order_id: int, attempt: int) -> str:
    return f"{order_id}-{attempt}"


def settle(draft: Draft) -> None:
    """What follows by itself from a change: the last thing that every rule does."""
    order, payment = draft.order, draft.live_payment
    taken = payment is not None and payment.state in TAKEN
    if order.state is OrderState.PENDING_PAYMENT and (payment is None or taken):
        # Expiry may have come, and gone because a payment was in flight. (What was taken of an order that still waits
        # was too little, and goes back.)
        draft.due(EXPIRY_STEP, str(order.id), at_ms=order.expires_ms)
    if order.refunds_pending:
        return
    if order.state is OrderState.CANCELLING:
        if (payment is None or taken) and order.captured == order.refunded:
            draft.hold_stock_as(StockHeld.NONE)
            draft.advance(OrderEvent.SETTLE)
    elif order.state is OrderState.CONFIRMED:
        arrived = all(line.delivered + line.cancelled == line.quantity for line in order.lines)
        if arrived and order.captured >= order.owed:
            draft.advance(OrderEvent.COMPLETE)
