"""Why staff have to look at an order: every distinct reason is kept until it is seen to."""

from __future__ import annotations

import json
from typing import Any

import pytest

import kvstore
from services.audit.run import audit
from services.orders.book import OrderBook
from services.orders.draft import ATTENTION_CODES_MAX, Draft, Whole
from services.orders.records import Order, attention_key, decode_order, encode, order_key
from services.orders.states import OrderState
from tests.services.shop import Person, Shop, problem


def whole(order: Order) -> Whole:
    return Whole(order, 1, {}, {}, {}, {}, has_address=True)


@pytest.fixture
def draft() -> Draft:
    return Draft(whole(Order(12, "n", 7, OrderState.CONFIRMED, "EUR", (), 5, 1)), 2)


def written(draft: Draft) -> dict[bytes, bytes | None]:
    """What the draft puts, and None for what it deletes."""
    found: dict[bytes, bytes | None] = {}
    for write in draft.operations():
        if isinstance(write, kvstore.Put):
            found[write.key] = write.value
        elif isinstance(write, kvstore.Delete):
            found[write.start] = None
    return found


def test_each_distinct_code_is_kept_and_told_once(draft: Draft) -> None:
    for code in ("refund_failed", "void_refused", "refund_failed", "void_refused"):
        draft.want_attention(code)
    assert draft.order.attention_codes == ("refund_failed", "void_refused")
    assert draft.order.events == 2
    assert written(draft)[attention_key(12)] == b"refund_failed void_refused"


def test_what_is_seen_to_is_open_no_more_and_the_rest_is(draft: Draft) -> None:
    for code in ("refund_failed", "void_refused", "late_capture"):
        draft.want_attention(code)
    draft.attended("void_refused")
    assert draft.order.attention_codes == ("refund_failed", "late_capture")
    events = draft.order.events
    draft.attended("void_refused", "contended")
    assert draft.order.events == events
    draft.want_attention("void_refused")  # it happened again
    assert draft.order.attention_codes == ("refund_failed", "late_capture", "void_refused")
    after = Draft(whole(draft.order), 3)
    after.attended(*after.order.attention_codes)
    assert after.order.attention_codes == ()
    assert written(after)[attention_key(12)] is None


def test_codes_are_bounded_and_the_newest_stays(draft: Draft) -> None:
    codes = [f"code_{number}" for number in range(ATTENTION_CODES_MAX + 3)]
    for code in codes:
        draft.want_attention(code)
    assert draft.order.attention_codes == tuple(codes[3:])
    for no_code in ("", "two codes"):
        with pytest.raises(AssertionError):
            draft.want_attention(no_code)


def test_records_of_older_versions_are_read(draft: Draft) -> None:
    """They have one code, or none; and what is written now is a text to them, as theirs was."""
    old: dict[str, Any] = json.loads(encode(draft.order))
    assert decode_order(json.dumps({**old, "needs_attention": "late_capture"})).attention_codes == ("late_capture",)
    assert decode_order(json.dumps({**old, "needs_attention": ""})).attention_codes == ()
    del old["needs_attention"]
    assert decode_order(json.dumps(old)).attention_codes == ()
    draft.want_attention("late_capture")
    draft.want_attention("refund_failed")
    assert json.loads(encode(draft.order))["needs_attention"] == "late_capture refund_failed"


# --- over HTTP --------------------------------------------------------------------------------------------------------


async def order_with(shop: Shop, buyer: Person, *codes: str) -> int:
    order_id: int = (await (await shop.order(buyer, {"cup": 1})).json())["id"]
    for code in codes:
        assert await OrderBook(shop.store).apply(order_id, lambda draft, code=code: draft.want_attention(code))  # type: ignore[misc]
    return order_id


async def test_staff_see_every_code_find_by_it_and_tick_it_off(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 9)
    both = await order_with(shop, ada, "refund_failed", "void_refused")
    one = await order_with(shop, ada, "void_refused")
    old = await order_with(shop, ada)
    record = await shop.store.get(order_key(old))
    assert record is not None
    before = {**json.loads(record.value), "needs_attention": "late_capture"}  # as an older version wrote it
    entry = kvstore.Put(attention_key(old), b"late_capture")
    await shop.store.txn(success=[kvstore.Put(order_key(old), json.dumps(before).encode()), entry])
    none = await order_with(shop, ada)

    async def details(order_id: int) -> tuple[str | None, list[str]]:
        answer = await shop.orders.get(f"/v1/orders/{order_id}/details", headers=staff.headers)
        found = await answer.json()
        return found["needs_attention"], found["attention_codes"]

    async def found(query: str) -> list[int]:
        ids: list[int] = []
        cursor = ""
        while True:
            answer = await shop.orders.get(f"/v1/orders?limit=1&{query}{cursor}", headers=staff.headers)
            page = await answer.json()
            ids += [order["id"] for order in page["data"]]
            if not page["has_more"]:
                return ids
            cursor = f"&starting_after={page['next_cursor']}"

    async def say(tail: str, key: str | None = None) -> int:
        answer = await shop.orders.post(f"/v1/orders/{both}/attended{tail}", headers=staff.once(key))
        return answer.status

    assert await details(both) == ("void_refused", ["refund_failed", "void_refused"])
    assert await details(old) == ("late_capture", ["late_capture"])
    assert await details(none) == (None, [])
    assert await found("needs_attention=true") == [old, one, both]
    assert await found("needs_attention=false") == [none]
    assert await found("attention_code=void_refused") == [one, both]
    assert await found("attention_code=refund_failed") == [both]
    assert await found("attention_code=late_capture&state=pending_payment&sku=cup") == [old]
    assert await found("attention_code=refund") == await found("attention_code=contended") == []
    assert await found("attention_code=void_refused&needs_attention=true") == [one, both]
    assert await found("attention_code=void_refused&needs_attention=false") == []
    # One is seen to: the order still needs attention for the other.
    assert await say("/void_refused", "k") == 200
    assert await details(both) == ("refund_failed", ["refund_failed"])
    assert await found("attention_code=void_refused") == [one]
    assert await found("needs_attention=true") == [old, one, both]
    await OrderBook(shop.store).apply(both, lambda draft: draft.want_attention("void_refused"))
    assert await say("/void_refused", "k") == 200  # the same request, late: what has come since stays
    assert await details(both) == ("void_refused", ["refund_failed", "void_refused"])
    assert await say("/contended") == 200
    assert await details(both) == ("void_refused", ["refund_failed", "void_refused"])
    report = await audit(shop.store)
    assert report.is_clean, report.violations
    # All are.
    assert await say("") == 200
    assert await details(both) == (None, [])
    assert await found("needs_attention=true") == [old, one]
    assert await shop.store.get(attention_key(both)) is None
    for who, tail in ((ada, ""), (ada, "/void_refused")):
        answer = await shop.orders.post(f"/v1/orders/{both}/attended{tail}", headers=who.once())
        await problem(answer, 403, "forbidden")
    for tail in ("/Void", "/a%20b", "/" + "a" * 65):
        assert await say(tail) == 404


async def test_codes_are_for_staff_and_are_codes(shop: Shop) -> None:
    ada, staff = await shop.customer(), await shop.staff()
    answer = await shop.orders.get("/v1/orders?attention_code=refund_failed", headers=ada.headers)
    await problem(answer, 403, "forbidden")
    for wrong in ("", "Refund", "refund%20failed", "_", "a" * 65):
        answer = await shop.orders.get(f"/v1/orders?attention_code={wrong}", headers=staff.headers)
        found = await problem(answer, 400, "invalid_parameter")
        assert [error["pointer"] for error in found["errors"]] == ["/attention_code"]
