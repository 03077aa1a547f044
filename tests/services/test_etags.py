"""What `If-Match` and `If-None-Match` demand of a record before it is written (RFC 9110, section 13)."""

from __future__ import annotations

import re

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from services.web.etags import IF_MATCH_PATTERN, check_match
from services.web.problems import Problem
from tests.services.shop import Shop, problem


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
