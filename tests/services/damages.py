"""What may be wrong in a store, and on the provider's books: each damage is filed under the code of the check that must
name it, and returns the key at which."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

import kvstore
from services.audit.run import Report, audit
from services.payments.provider import Charge, ChargeEntry, RefundEntry
from services.web.ids import order_number
from tests.services.busy_shop import FixedBooks, Snapshot

LARGEST: Final = 2**53 - 1


class Damaged:
    """A store that was right, and the provider's books, to be made wrong."""

    def __init__(self, store: kvstore.Client, snapshot: Snapshot) -> None:
        self.store = store
        self.orders = snapshot.orders
        self.charges, self.refunds = list(snapshot.charges), list(snapshot.refunds)

    async def read(self, key: str) -> dict[str, Any]:
        record = await self.store.get(key.encode())
        assert record is not None, key
        found: dict[str, Any] = json.loads(record.value)
        return found

    async def set(self, key: str, **fields: Any) -> str:
        """Change fields of a record."""
        await self.put(key, {**await self.read(key), **fields})
        return key

    async def put(self, key: str, value: object) -> None:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        await self.store.put(key.encode(), raw)

    async def delete(self, key: str) -> str:
        assert (await self.store.delete(key.encode())).deleted == 1, key
        return key

    async def delete_all(self, prefix: str) -> None:
        assert (await self.store.delete_prefix(prefix.encode())).deleted > 0, prefix

    async def keys(self, prefix: str) -> list[str]:
        return [record.key.decode() async for record in self.store.scan(prefix=prefix.encode())]

    def order(self, name: str) -> str:
        return f"order/{self.orders[name]}"

    def part(self, kind: str, name: str, number: int = 1) -> str:
        return f"{kind}/{self.orders[name]}/{number:06d}"

    async def line(self, name: str, position: int = 0, **fields: Any) -> str:
        """Change the line of an order."""
        key = self.order(name)
        lines = (await self.read(key))["lines"]
        lines[position] |= fields
        return await self.set(key, lines=lines)

    def charge_of(self, name: str, attempt: int = 1) -> int:
        """Its place on the books."""
        key = f"{self.orders[name]}:{attempt}:authorise"
        return next(at for at, entry in enumerate(self.charges) if entry.key == key)

    def set_charge(self, name: str, **fields: Any) -> str:
        at = self.charge_of(name)
        entry = self.charges[at]
        self.charges[at] = ChargeEntry(entry.key, msgspec.structs.replace(entry.charge, **fields))
        return entry.key

    async def audit(self) -> Report:
        return await audit(self.store, FixedBooks(self.charges, self.refunds))


Damage = Callable[[Damaged], Awaitable[str]]
DAMAGES: Final[list[tuple[str, Damage]]] = []


def damage(code: str) -> Callable[[Damage], Damage]:
    def add(function: Damage) -> Damage:
        DAMAGES.append((code, function))
        return function

    return add


@damage("payment_amounts")
async def captured_more_than_authorised(it: Damaged) -> str:
    return await it.set(it.part("payment", "in parts"), captured=9000)


@damage("payment_amounts")
async def paid_another_amount(it: Damaged) -> str:
    return await it.set(it.part("payment", "returned"), amount=6000)


@damage("payment_state")
async def captured_though_failed(it: Damaged) -> str:
    return await it.set(it.part("payment", "second attempt"), authorised=4000, captured=4000)


@damage("payment_state")
async def captured_in_part_but_called_captured(it: Damaged) -> str:
    return await it.set(it.part("payment", "in parts"), state="captured")


@damage("request_keys")
async def another_payments_key(it: Damaged) -> str:
    return await it.set(it.part("payment", "returned"), request_key=f"{it.orders['voided']}:1:authorise")


@damage("request_keys")
async def another_refunds_key(it: Damaged) -> str:
    return await it.set(it.part("refund", "returned"), request_key=f"{it.orders['returned']}:1:refund-2")


@damage("request_keys")
async def one_charge_in_two_payments(it: Damaged) -> str:
    charge = (await it.read(it.part("payment", "second attempt", 2)))["charge"]
    await it.set(it.part("payment", "second attempt", 1), charge=charge)
    return it.order("second attempt")


@damage("refund_amounts")
async def refunded_another_amount(it: Damaged) -> str:
    await it.set(it.part("refund", "returned"), amount=1)
    return it.part("payment", "returned")


@damage("refund_amounts")
async def refunded_from_no_payment(it: Damaged) -> str:
    return await it.set(it.part("refund", "returned"), attempt=7)


@damage("order_authorised")
async def not_so_much_authorised(it: Damaged) -> str:
    return await it.set(it.order("in parts"), authorised=7999)


@damage("order_captured")
async def not_so_much_captured(it: Damaged) -> str:
    return await it.set(it.order("in parts"), captured=999)


@damage("order_refunded")
async def settled_outside_and_not_counted(it: Damaged) -> str:
    await it.set(it.part("refund", "refund failed"), state="settled_outside")
    return it.order("refund failed")


@damage("order_refunded")
async def not_so_much_refunded(it: Damaged) -> str:
    return await it.set(it.order("returned"), refunded=0)


@damage("order_refunded")
async def not_so_much_pending(it: Damaged) -> str:
    return await it.set(it.order("second attempt"), refunds_pending=0)


@damage("order_money")
async def paid_twice(it: Damaged) -> str:
    return await it.set(it.order("returned"), authorised=10000, captured=10000)


@damage("live_payment")
async def live_and_not_named(it: Damaged) -> str:
    return await it.set(it.order("just paid"), live_payment=0)


@damage("live_payment")
async def two_live_payments(it: Damaged) -> str:
    await it.set(it.part("payment", "second attempt", 1), state="authorising")
    return it.order("second attempt")


@damage("confirmed_paid")
async def confirmed_and_not_paid(it: Damaged) -> str:
    return await it.set(it.order("in parts"), authorised=0, captured=0)


@damage("confirmed_paid")
async def shipped_and_not_captured(it: Damaged) -> str:
    return await it.set(it.order("lines cancelled"), captured=2499)


@damage("ended_settled")
async def cancelled_and_not_refunded(it: Damaged) -> str:
    return await it.set(it.order("cancelled"), refunded=0)


@damage("ended_settled")
async def cancelled_and_still_held(it: Damaged) -> str:
    return await it.set(it.part("payment", "voided"), state="authorised")


@damage("order_total")
async def a_line_that_costs_less(it: Damaged) -> str:
    return await it.line("placed", total=1)


@damage("order_total")
async def a_total_that_is_not_the_sum(it: Damaged) -> str:
    return await it.set(it.order("placed"), total=1)


@damage("line_bounds")
async def more_delivered_than_shipped(it: Damaged) -> str:
    return await it.line("lines cancelled", delivered=2)


@damage("line_shipped")
async def shipped_without_a_shipment(it: Damaged) -> str:
    return await it.line("lines cancelled", shipped=2)


@damage("line_delivered")
async def delivered_without_a_shipment(it: Damaged) -> str:
    return await it.line("lines cancelled", delivered=1)


@damage("line_returns")
async def returning_without_a_return(it: Damaged) -> str:
    return await it.line("returned", returning=2)


@damage("line_returns")
async def returned_without_a_return(it: Damaged) -> str:
    return await it.line("returned", returned=1)


@damage("line_cancelled")
async def a_line_cancelled_in_silence(it: Damaged) -> str:
    return await it.line("lines cancelled", cancelled=1)


@damage("return_restocked")
async def more_restocked_than_came(it: Damaged) -> str:
    return await it.set(it.part("return", "returned"), restocked=[{"sku": "cup", "quantity": 3}])


@damage("return_restocked")
async def restocked_before_it_came(it: Damaged) -> str:
    return await it.set(it.part("return", "returned", 3), restocked=[{"sku": "cup", "quantity": 1}])


@damage("order_complete")
async def completed_and_not_delivered(it: Damaged) -> str:
    return await it.line("returned", delivered=3)


@damage("held_stock")
async def expired_and_still_reserved(it: Damaged) -> str:
    return await it.set(it.order("expired"), stock="reserved")


@damage("event_numbers")
async def an_event_that_is_missing(it: Damaged) -> str:
    await it.delete(it.part("order-event", "returned", 3))
    return it.order("returned")


@damage("event_numbers")
async def an_event_too_many(it: Damaged) -> str:
    event = await it.read(it.part("order-event", "placed", 1))
    await it.put(it.part("order-event", "placed", 2), {**event, "seq": 2, "type": "order.attended"})
    return it.order("placed")


@damage("order_history")
async def a_state_that_no_event_told(it: Damaged) -> str:
    return await it.set(it.order("placed"), state="confirmed")


@damage("order_history")
async def a_step_that_is_not_in_the_table(it: Damaged) -> str:
    await it.set(it.part("order-event", "expired", 2), type="order.cancelled")
    await it.set(it.order("expired"), state="cancelled")
    return it.order("expired")


@damage("part_history")
async def a_payment_that_skipped_a_state(it: Damaged) -> str:
    await it.set(it.part("order-event", "returned", 3), type="payment.voided")
    return it.part("payment", "returned")


@damage("part_history")
async def a_return_that_no_event_told(it: Damaged) -> str:
    return await it.set(it.part("return", "returned", 3), state="approved")


@damage("part_history")
async def events_of_a_payment_that_is_not_there(it: Damaged) -> str:
    await it.set(it.order("placed"), events=2)
    event = await it.read(it.part("order-event", "placed", 1))
    event |= {"seq": 2, "type": "payment.created", "data": {"attempt": 1}}
    await it.put(it.part("order-event", "placed", 2), event)
    return it.part("payment", "placed")


@damage("part_numbers")
async def a_shipment_that_is_missing(it: Damaged) -> str:
    await it.delete(it.part("shipment", "returned", 1))
    return it.order("returned")


@damage("order_number")
async def another_orders_number(it: Damaged) -> str:
    return await it.set(it.order("placed"), number=order_number(it.orders["voided"]))


@damage("state_index")
async def in_no_state(it: Damaged) -> str:
    return await it.delete(f"order-state/expired/{LARGEST - it.orders['expired']:016d}")


@damage("state_index")
async def in_two_states(it: Damaged) -> str:
    key = f"order-state/confirmed/{LARGEST - it.orders['expired']:016d}"
    await it.put(key, b"")
    return key


@damage("state_index")
async def a_state_of_no_order(it: Damaged) -> str:
    await it.put("order-state/confirmed/0000000000000007", b"")
    return "order-state/confirmed/0000000000000007"


@damage("user_index")
async def in_no_users_orders(it: Damaged) -> str:
    order = await it.read(it.order("placed"))
    return await it.delete(f"user-orders/{order['user_id']}/{LARGEST - order['created_ms']:016d}/{order['id']}")


@damage("user_index")
async def in_anothers_orders(it: Damaged) -> str:
    order = await it.read(it.order("placed"))
    key = f"user-orders/999/{LARGEST - order['created_ms']:016d}/{order['id']}"
    await it.put(key, b"")
    return key


@damage("attention_index")
async def attention_that_nobody_sees(it: Damaged) -> str:
    return await it.delete(f"order-attention/{LARGEST - it.orders['refund failed']:016d}")


@damage("attention_index")
async def attention_for_nothing(it: Damaged) -> str:
    key = f"order-attention/{LARGEST - it.orders['placed']:016d}"
    await it.put(key, b"late_capture")
    return key


@damage("forgotten_expiry")
async def no_step_lets_it_expire(it: Damaged) -> str:
    order = await it.read(it.order("placed"))
    await it.delete(f"step/{order['expires_ms']:016d}/expire/{order['id']}")
    return it.order("placed")


@damage("forgotten_payment")
async def no_step_sends_it(it: Damaged) -> str:
    for key in await it.keys("step/"):
        if key.endswith(f"/payment/{it.orders['just paid']}-1"):
            await it.delete(key)
    return it.part("payment", "just paid")


@damage("forgotten_refund")
async def no_step_refunds_it(it: Damaged) -> str:
    for key in await it.keys("step/"):
        if key.endswith(f"/refund/{it.orders['second attempt']}-1"):
            await it.delete(key)
    return it.part("refund", "second attempt")


@damage("forgotten_cancellation")
async def cancelling_for_ever(it: Damaged) -> str:
    return await it.set(it.order("voided"), state="cancelling")


@damage("parked_reason")
async def parked_by_an_error_of_ours(it: Damaged) -> str:
    (key,) = [key for key in await it.keys("step/") if key.endswith(f"/payment/{it.orders['just paid']}-1")]
    step = await it.read(key)
    parked = f"parked/payment/{step['subject']}"
    await it.put(parked, {"v": 1, "step": step, "code": "internal", "detail": "a bug", "parked_ms": 1})
    return parked


@damage("step_key")
async def a_step_at_another_time(it: Damaged) -> str:
    key = (await it.keys("step/"))[0]
    return await it.set(key, due_ms=1)


@damage("stock_balance")
async def sold_and_still_there(it: Damaged) -> str:
    await it.store.add(b"stock/cup/on_hand", 1)
    return "stock/cup/on_hand"


@damage("stock_balance")
async def an_adjustment_that_is_gone(it: Damaged) -> str:
    await it.delete((await it.keys("stock/cup/adjustment/"))[0])
    return "stock/cup/on_hand"


@damage("stock_reserved")
async def reserved_for_nobody(it: Damaged) -> str:
    await it.store.add(b"stock/cup/reserved", 1)
    return "stock/cup/reserved"


@damage("stock_allocated")
async def allocated_for_nobody(it: Damaged) -> str:
    await it.store.add(b"stock/pot/allocated", -1)
    return "stock/pot/allocated"


@damage("stock_negative")
async def sold_what_is_not_there(it: Damaged) -> str:
    await it.store.add(b"stock/cup/on_hand", -1000)
    return "stock/cup/on_hand"


@damage("stock_product")
async def stock_of_no_product(it: Damaged) -> str:
    return await it.delete("product/pot")


@damage("stock_key")
async def stock_of_another_kind(it: Damaged) -> str:
    await it.put("stock/cup/lent", b"1")
    return "stock/cup/lent"


@damage("answered_order")
async def told_of_an_order_that_is_not_there(it: Damaged) -> str:
    for key in await it.keys("idem/"):
        if (await it.read(key))["location"] == f"/v1/orders/{it.orders['placed']}":
            return await it.set(key, location="/v1/orders/7")
    raise AssertionError("no answer names the order")


@damage("answered_order")
async def told_of_a_refund_that_is_not_there(it: Damaged) -> str:
    for key in await it.keys("idem/"):
        if (await it.read(key))["location"] == f"/v1/orders/{it.orders['second attempt']}/refunds/1":
            return await it.set(key, location=f"/v1/orders/{it.orders['second attempt']}/refunds/2")
    raise AssertionError("no answer names the refund")


@damage("answered_order")
async def told_of_anothers_order(it: Damaged) -> str:
    for key in await it.keys("idem/"):
        if (await it.read(key))["location"] == f"/v1/orders/{it.orders['placed']}":
            other = "idem/999 " + key.partition(" ")[2]
            await it.put(other, await it.read(key))
            return other
    raise AssertionError("no answer names the order")


@damage("ordered_cart")
async def ordered_and_still_active(it: Damaged) -> str:
    cart = (await it.read(it.order("returned")))["cart_id"]
    return await it.set(f"cart/{cart}", state="active")


@damage("ordered_cart")
async def a_cart_that_is_another_order(it: Damaged) -> str:
    cart = (await it.read(it.order("returned")))["cart_id"]
    return await it.set(f"cart/{cart}", order_id=it.orders["placed"])


@damage("ordered_cart")
async def a_cart_that_is_no_order(it: Damaged) -> str:
    named = (await it.read(it.order("returned")))["cart_id"]
    (key,) = [key for key in await it.keys("cart/") if key != f"cart/{named}"]
    return await it.set(key, state="ordered", order_id=7)


@damage("cart_lines")
async def not_what_was_in_the_cart(it: Damaged) -> str:
    cart = (await it.read(it.order("returned")))["cart_id"]
    await it.set(f"cart/{cart}", lines=[{"sku": "cup", "quantity": 5}])
    return it.order("returned")


@damage("orphan")
async def a_payment_of_no_order(it: Damaged) -> str:
    payment = await it.read(it.part("payment", "returned"))
    await it.put("payment/9/000001", {**payment, "order_id": 9})
    return "payment/9/000001"


@damage("orphan")
async def an_address_of_no_order(it: Damaged) -> str:
    await it.put("order-address/1", b"{}")
    return "order-address/1"


@damage("orphan")
async def an_order_that_is_gone(it: Damaged) -> str:
    await it.delete(it.order("returned"))
    return it.part("shipment", "returned", 2)


@damage("unreadable")
async def a_torn_order(it: Damaged) -> str:
    await it.put(it.order("placed"), b'{"v":1,"id"')
    return it.order("placed")


@damage("unreadable")
async def stock_that_is_no_number(it: Damaged) -> str:
    await it.put("stock/cup/reserved", b"many")
    return "stock/cup/reserved"


@damage("record_key")
async def an_order_at_another_id(it: Damaged) -> str:
    return await it.set(it.order("placed"), id=7)


@damage("record_key")
async def a_shipment_at_another_number(it: Damaged) -> str:
    return await it.set(it.part("shipment", "returned", 2), number=3)


@damage("charge_unknown")
async def charged_for_no_order(it: Damaged) -> str:
    it.charges.append(ChargeEntry("7:1:authorise", Charge("ch_7", "EUR", 100, 100, 0)))
    return "7:1:authorise"


@damage("charge_unknown")
async def charged_before_it_was_sent(it: Damaged) -> str:
    key = f"{it.orders['just paid']}:1:authorise"
    it.charges.append(ChargeEntry(key, Charge("ch_8", "EUR", 3750, 0, 0)))
    return key


@damage("charge_unknown")
async def another_charge_than_the_payment_names(it: Damaged) -> str:
    return it.set_charge("returned", id="ch_9")


@damage("charge_twice")
async def charged_twice(it: Damaged) -> str:
    entry = it.charges[it.charge_of("returned")]
    it.charges.append(ChargeEntry(entry.key, msgspec.structs.replace(entry.charge, id="ch_10")))
    return entry.key


@damage("charge_amounts")
async def captured_more_on_the_books(it: Damaged) -> str:
    return it.set_charge("in parts", captured=2000)


@damage("charge_amounts")
async def refunded_less_on_the_books(it: Damaged) -> str:
    return it.set_charge("cancelled", refunded=0)


@damage("charge_amounts")
async def still_held_on_the_books(it: Damaged) -> str:
    return it.set_charge("voided", is_voided=False)


@damage("charge_amounts")
async def taken_from_who_was_declined(it: Damaged) -> str:
    return it.set_charge("second attempt", authorised=4000)


@damage("charge_missing")
async def not_on_the_books(it: Damaged) -> str:
    del it.charges[it.charge_of("returned")]
    return f"payment/{it.orders['returned']}:1"


@damage("charge_missing")
async def a_refund_that_is_not_on_the_books(it: Damaged) -> str:
    it.refunds = [entry for entry in it.refunds if entry.key != f"{it.orders['returned']}:1:refund"]
    return f"refund/{it.orders['returned']}:1"


@damage("refund_unknown")
async def refunded_for_no_order(it: Damaged) -> str:
    it.refunds.append(RefundEntry("re_7", "7:1:refund", "ch_7", 100, "EUR", "succeeded"))
    return "7:1:refund"


@damage("refund_amounts_on_books")
async def refunded_more_on_the_books(it: Damaged) -> str:
    it.refunds = [msgspec.structs.replace(entry, amount=entry.amount + 1) for entry in it.refunds]
    return f"{it.orders['returned']}:1:refund"
