"""What `If-Match` and `If-None-Match` demand of a record before it is written (RFC 9110, section 13)."""

from __future__ import annotations

import re

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from services.web.etags import IF_MATCH_PATTERN, check_match
from services.web.problems import Problem
from tests.services.paid_shop import PaidShop
from tests.services.shop import Person, Shop, problem


def verdict(revision: int, **headers: str | list[str]) -> str:
    sent: CIMultiDict[str] = CIMultiDict()
    for name, values in headers.items():
        for value in [values] if isinstance(values, str) else values:
            sent.add(name.replace("_", "-"), value)
    try:
        check_match(make_mocked_request("PUT", "/", headers=sent), revision)
    except Problem as refused:
        return refused.code
    return "holds"


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ('"7"', "holds"),
        (' "7" ', "holds"),
        ('"6", "7"', "holds"),
        ('"6","7","8"', "holds"),
        (['"6"', '"7"'], "holds"),
        ('W/"6", "7"', "holds"),
        ("*", "holds"),
        ('"6"', "precondition_failed"),
        ('"6", "8"', "precondition_failed"),
        ('W/"7"', "precondition_failed"),
        ('"6", W/"7"', "precondition_failed"),
        ('"of another service, perhaps"', "malformed_request"),  # a blank is no part of a tag
        ('"another"', "precondition_failed"),
        ('"a,\\"', "precondition_failed"),
        ('""', "precondition_failed"),
        ("7", "malformed_request"),
        ("", "malformed_request"),
        ('"7', "malformed_request"),
        ('"7" "8"', "malformed_request"),
        ('*, "7"', "malformed_request"),
        ('"7",', "malformed_request"),
        ('w/"7"', "malformed_request"),
    ],
)
def test_if_match(tags: str | list[str], said: str) -> None:
    assert verdict(7, If_Match=tags) == said
    joined = (tags if isinstance(tags, str) else ", ".join(tags)).strip()
    assert bool(re.search(IF_MATCH_PATTERN, joined)) is (said != "malformed_request")  # as the document says


def test_a_record_that_is_not_there() -> None:
    assert verdict(0) == "holds"
    assert verdict(0, If_Match="*") == "precondition_failed"
    assert verdict(0, If_Match='"0"') == "precondition_failed"
    assert verdict(0, If_None_Match="*") == "holds"
    assert verdict(7, If_None_Match="*") == "precondition_failed"
    assert verdict(7, If_None_Match='"6"') == "malformed_request"
    assert verdict(7, If_Match='"7"', If_None_Match="*") == "malformed_request"


async def test_a_list_of_tags_and_a_weak_one_over_http(shop: Shop) -> None:
    staff = await shop.staff()
    await shop.stock(staff, "cup", 0)
    tag = (await shop.orders.get("/v1/products/cup")).headers["ETag"]
    body = {"name": "A cup", "price": 1, "currency": "EUR"}
    weak = await shop.orders.put("/v1/products/cup", json=body, headers={**staff.headers, "If-Match": f"W/{tag}"})
    await problem(weak, 412, "precondition_failed")
    one_of = {**staff.headers, "If-Match": f'"999", {tag}'}
    assert (await shop.orders.put("/v1/products/cup", json=body, headers=one_of)).status == 200
    await problem(await shop.orders.put("/v1/products/cup", json=body, headers=one_of), 412, "precondition_failed")


# --- reads of what belongs to an order, and of stock ------------------------------------------------------------------


async def read(shop: Shop, path: str, who: Person | None = None, known: str | None = None) -> tuple[int, str, bytes]:
    """Status, ETag and body."""
    headers = {**(who.headers if who else {}), **({"If-None-Match": known} if known is not None else {})}
    answer = await shop.orders.get(path, headers=headers)
    assert answer.headers["Cache-Control"] == "private, no-cache"
    return answer.status, answer.headers["ETag"], await answer.read()


async def unchanged(shop: Shop, path: str, who: Person | None, tag: str) -> bool:
    """Whether the client that has it is told so. Either way the answer is what a read without a condition gives."""
    status, now, body = await read(shop, path, who, tag)
    assert status == (304 if now == tag else 200)
    whole_status, whole_tag, whole = await read(shop, path, who)
    assert (whole_status, whole_tag) == (200, now)
    assert body == (b"" if status == 304 else whole)
    return status == 304


async def revision_of(shop: Shop, key: str) -> int:
    record = await shop.store.get(key.encode())
    return record.mod_revision if record is not None else 0


async def test_parts_of_an_order_have_the_etags_of_their_own_records(paid: PaidShop) -> None:
    shop, staff, buyer = paid.shop, paid.staff, paid.buyer
    address = {"name": "Ada", "line1": "1 Street", "city": "Town", "country": "DE"}
    order = await paid.did(buyer, "/v1/orders", {"lines": [{"sku": "cup", "quantity": 2}], "ship_to": address})
    path, id_ = f"/v1/orders/{order['id']}", order["id"]
    some = [{"sku": "cup", "quantity": 1}]
    await paid.paid(order)
    await paid.becomes(order, payment_status="paid")
    await paid.did(staff, f"{path}/shipments", {"lines": some, "carrier": "Post", "tracking": "P"})
    await paid.did(staff, f"{path}/shipments/1/deliver")
    await paid.did(buyer, f"{path}/returns", {"lines": some, "reason": "too blue"})
    await paid.did(staff, f"{path}/refunds", {"amount": 100, "reason": "late"})
    await paid.becomes(order, refunded=100)
    eve = await shop.customer()
    tags: dict[str, str] = {}
    for tail, key in (
        ("payments/1", f"payment/{id_}/000001"), ("refunds/1", f"refund/{id_}/000001"),
        ("shipments/1", f"shipment/{id_}/000001"), ("returns/1", f"return/{id_}/000001"),
        ("ship-to", f"order-address/{id_}"),
    ):  # fmt: skip
        status, tag, body = await read(shop, f"{path}/{tail}", buyer)
        assert (status, tag) == (200, f'"{await revision_of(shop, key)}"')
        assert await read(shop, f"{path}/{tail}", staff) == (status, tag, body)
        for known in (tag, f"W/{tag}", f'"1", {tag}', "*"):
            assert await read(shop, f"{path}/{tail}", buyer, known) == (304, tag, b"")
        for known in ('"1"', tag.strip('"'), f'{tag[:-1]}-1"', '"x", "y"', ""):
            assert await read(shop, f"{path}/{tail}", buyer, known) == (200, tag, body)
        # Whether a guessed tag is right is nobody else's business either.
        for who, said in ((eve, (404, "not_found")), (None, (401, "authentication_required"))):
            headers = {**(who.headers if who else {}), "If-None-Match": tag}
            await problem(await shop.orders.get(f"{path}/{tail}", headers=headers), *said)
        tags[tail] = tag
    for tail in ("payments/2", "refunds/2", "shipments/2", "returns/2"):
        answer = await shop.orders.get(f"{path}/{tail}", headers={**buyer.headers, "If-None-Match": "*"})
        await problem(answer, 404, "not_found")
    other = await paid.placed({"cup": 1})
    answer = await shop.orders.get(f"/v1/orders/{other['id']}/payments/1", headers=buyer.headers)
    await problem(answer, 404, "not_found")
    # A change of one (which demands no If-Match) is a new version of that one, and of the order.
    order_tag = (await read(shop, path, buyer))[1]
    await paid.did(staff, f"{path}/returns/1/approve", {"note": "send it"})
    assert not await unchanged(shop, path, buyer, order_tag)
    assert not await unchanged(shop, f"{path}/returns/1", buyer, tags.pop("returns/1"))
    for tail, tag in tags.items():
        assert await unchanged(shop, f"{path}/{tail}", buyer, tag)
    await paid.did(staff, f"{path}/refunds", {"amount": 100, "reason": "very late"})
    await paid.becomes(order, refunded=200)
    assert not await unchanged(shop, f"{path}/payments/1", buyer, tags["payments/1"])
    assert await unchanged(shop, f"{path}/refunds/1", buyer, tags["refunds/1"])


async def test_an_orders_details_change_with_the_order_and_with_where_it_goes(paid: PaidShop) -> None:
    shop, staff = paid.shop, paid.staff
    order = await paid.placed(ship_to=None)
    path, key = f"/v1/orders/{order['id']}", f"order-address/{order['id']}"

    async def tag_is_right() -> str:
        status, tag, _ = await read(shop, f"{path}/details", staff)
        whole, address = await revision_of(shop, f"order/{order['id']}"), await revision_of(shop, key)
        assert (status, tag) == (200, f'"{whole}-{address}"')
        assert await unchanged(shop, f"{path}/details", staff, tag)
        return tag

    tag = await tag_is_right()
    assert tag.endswith('-0"')
    address = {"name": "Ada", "line1": "1 Street", "city": "Town", "country": "DE"}
    await paid.did(paid.buyer, f"{path}/ship-to", address)
    assert not await unchanged(shop, f"{path}/details", staff, tag)
    tag = await tag_is_right()
    await shop.store.delete(key.encode())  # as when its customer is forgotten, which leaves the order as it is
    assert not await unchanged(shop, f"{path}/details", staff, tag)
    await tag_is_right()


async def test_stock_has_an_etag_for_what_each_may_see(shop: Shop) -> None:
    staff, ada = await shop.staff(), await shop.customer()
    await shop.stock(staff, "cup", 0)
    path = "/v1/products/cup/stock"
    assert [(await read(shop, path, who))[1] for who in (None, staff)] == ['"0"', '"0-0-0"']
    await shop.stock(staff, "cup", 5)
    await shop.stock(staff, "pot", 5)
    (_, seen, _), (_, known, _) = await read(shop, path), await read(shop, path, staff)
    on_hand = await revision_of(shop, "stock/cup/on_hand")
    assert (seen, known) == (f'"{on_hand}"', f'"{on_hand}-0-0"')
    assert (await shop.order(ada, {"pot": 1})).status == 201
    for who, tag in ((None, seen), (ada, seen), (staff, known)):
        assert await unchanged(shop, path, who, tag)
    for who, tag in ((None, known), (staff, seen)):  # the other's is not what one would see
        assert not await unchanged(shop, path, who, tag)
    assert (await shop.order(ada, {"cup": 1})).status == 201
    for who, tag in ((None, seen), (staff, known)):
        assert not await unchanged(shop, path, who, tag)
