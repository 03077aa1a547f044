"""Checks of where an order stands: its number, and its entries in the indexes, both ways.

From an order to its entries is a check of each order. From an entry to its order is a pass over the index
(`IndexPass`): whatever it holds beside the right entries is found there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from services.audit.findings import Difference
from services.audit.view import READS_AT_ONCE, View, batched
from services.audit.whole import ORDER_CHECKS, Case
from services.orders.records import Order, decode_order

ATTENTION: Final = b"order-attention/"
STATES: Final = b"order-state/"
USERS: Final = b"user-orders/"
_LARGEST: Final = 2**53 - 1  # keys of newest first hold what is missing to this

# Crockford's base 32, and the field of 32 elements in which an order's number has its check digit.
_DIGITS: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_MODULUS: Final = 0b100101


def inverted(number: int) -> str:
    return f"{_LARGEST - number:016d}"


def state_place(order: Order) -> bytes:
    return b"%b%b/%b" % (STATES, order.state.encode(), inverted(order.id).encode())


def user_place(order: Order) -> bytes:
    return f"user-orders/{order.user_id}/{inverted(order.created_ms)}/{order.id}".encode()


def attention_place(order: Order) -> bytes:
    return ATTENTION + inverted(order.id).encode()


def number_of(order_id: int) -> str:
    """Eleven digits of base 32, and the sum of each times α to the power of its place, in GF(32)."""
    values = [order_id // 32**place % 32 for place in range(10, -1, -1)]
    check, power = 0, 1
    for value in reversed(values):
        power = _times_alpha(power)
        check ^= _times(value, power)
    text = "".join(_DIGITS[value] for value in [*values, check])
    return f"{text[:4]}-{text[4:8]}-{text[8:]}"


def _times_alpha(value: int) -> int:
    value *= 2
    return value ^ _MODULUS if value >= 32 else value


def _times(one: int, other: int) -> int:
    product = 0
    for bit in range(5):
        if one >> bit & 1:
            product ^= other
        other = _times_alpha(other)
    return product


@ORDER_CHECKS("order_number")
def order_number(case: Case) -> Iterator[Difference]:
    """Each order has the number that its id gives, and so no two have the same."""
    expected = number_of(case.order.id)
    if case.order.number != expected:
        yield Difference(case.key, expected, case.order.number)


@ORDER_CHECKS("state_index")
def state_index(case: Case) -> Iterator[Difference]:
    """Each order stands in the index of states under its state, and the index holds nothing else."""
    if not case.in_state_index:
        yield Difference(state_place(case.order), "an entry", "none")


@ORDER_CHECKS("user_index")
def user_index(case: Case) -> Iterator[Difference]:
    """Each order stands in the index of its user's orders, and the index holds nothing else."""
    if not case.in_user_index:
        yield Difference(user_place(case.order), "an entry", "none")


@ORDER_CHECKS("attention_index")
def attention_index(case: Case) -> Iterator[Difference]:
    """Orders that need attention stand in their index with the codes of why, and the index holds nothing else."""
    needed = case.order.needs_attention or None
    if case.attention != needed:
        yield Difference(attention_place(case.order), needed or "no entry", case.attention or "no entry")


async def check_indexes(view: View) -> int:
    """From each entry to its order. Returns how many entries there are."""
    entries = 0
    for prefix, code in ((STATES, "state_index"), (USERS, "user_index"), (ATTENTION, "attention_index")):
        async for batch in batched(view.scan(prefix, keys_only=True), READS_AT_ONCE):
            entries += len(batch)
            keys = [record.key for record in batch]
            found = await view.get([b"order/%d" % _order_id(key) for key in keys])
            for key, record in zip(keys, found, strict=True):
                if record is None:
                    view.findings.add(code, key, "an entry of an order", "there is no such order")
                    continue
                order = view.decode(decode_order, record)
                if order is not None and key not in (
                    state_place(order), user_place(order), attention_place(order),
                ):  # fmt: skip
                    view.findings.add(code, key, "an entry where its order stands", f"the order is {order.state}")
    return entries


def _order_id(key: bytes) -> int:
    """0, which is no order's, where the key names none."""
    last = key.rpartition(b"/")[2]
    if not last.isdigit():
        return 0
    return int(last) if key.startswith(USERS) else _LARGEST - int(last)
