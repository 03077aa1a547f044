"""One's own account: the profile, postal addresses, activity."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from services.users.postal import ADDRESSES_MAX
from services.users.records import addresses_of
from tests.services.shop import Person, Shop, problem

ME = "/v1/users/me"
HOME = {"name": "Ada", "line1": "12 St James's Square", "city": "London", "country": "GB", "postal_code": "SW1Y 4JH"}


async def tag(shop: Shop, person: Person, path: str = ME) -> str:
    return str((await shop.users.get(path, headers=person.headers)).headers["ETag"])


async def patch(shop: Shop, person: Person, body: Any, if_match: str | None) -> Any:
    headers = person.headers if if_match is None else {**person.headers, "If-Match": if_match}
    return await shop.users.patch(ME, json=body, headers=headers)


# --- the profile ------------------------------------------------------------------------------------------------------


async def test_a_profile_changes_as_it_was_read_or_not_at_all(shop: Shop) -> None:
    ada = await shop.register()
    read = await tag(shop, ada)
    answer = await patch(shop, ada, {"name": "Augusta"}, read)
    assert answer.status == 200
    changed = await answer.json()
    assert (changed["name"], changed["age"], changed["email"]) == ("Augusta", 36, ada.email)
    assert answer.headers["ETag"] == await tag(shop, ada) != read
    await problem(await patch(shop, ada, {"age": 37}, read), 412, "precondition_failed")
    await problem(await patch(shop, ada, {"age": 37}, None), 428, "precondition_required")
    await problem(await patch(shop, ada, {"age": 37}, "x"), 400, "malformed_request")
    assert (await patch(shop, ada, {"age": 37, "name": None}, "*")).status == 200
    me = await (await shop.users.get(ME, headers=ada.headers)).json()
    assert (me["name"], me["age"]) == ("Augusta", 37)
    assert await (await shop.users.get(f"/user/{ada.id}", headers=ada.headers)).json() == {
        "id": ada.id, "name": "Augusta", "age": 37,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, ""),
        ({"name": None}, ""),
        ({"name": ""}, "/name"),
        ({"name": "a\nb"}, "/name"),
        ({"age": 151}, "/age"),
        ({"email": "b@example.com"}, "/email"),
        ({"role": "admin"}, "/role"),
        ({"is_blocked": False}, "/is_blocked"),
    ],
)
async def test_refused_changes(shop: Shop, body: dict[str, Any], pointer: str) -> None:
    ghost = await shop.customer()
    found = await problem(await patch(shop, ghost, body, "*"), 422, "invalid_body")
    assert [error["pointer"] for error in found["errors"]] == [pointer]


async def test_changes_at_once(shop: Shop) -> None:
    ada = await shop.register()
    read = await tag(shop, ada)
    answers = await asyncio.gather(*(patch(shop, ada, {"age": age}, read) for age in range(5)))
    assert sorted(answer.status for answer in answers) == [200, 412, 412, 412, 412]
    answers = await asyncio.gather(patch(shop, ada, {"age": 7}, "*"), patch(shop, ada, {"name": "Both"}, "*"))
    assert [answer.status for answer in answers] == [200, 200]
    me = await (await shop.users.get(ME, headers=ada.headers)).json()
    assert (me["name"], me["age"]) == ("Both", 7)


async def test_an_account_that_is_gone(shop: Shop) -> None:
    ghost = await shop.customer()
    await problem(await patch(shop, ghost, {"age": 7}, "*"), 404, "not_found")
    await problem(await shop.users.get(ME, headers=ghost.headers), 404, "not_found")
    await problem(await shop.users.post(f"{ME}/addresses", json=HOME, headers=ghost.headers), 404, "not_found")
    await problem(await shop.users.get(f"{ME}/export", headers=ghost.headers), 404, "not_found")


# --- postal addresses -------------------------------------------------------------------------------------------------


async def add(shop: Shop, person: Person, **change: Any) -> Any:
    return await shop.users.post(f"{ME}/addresses", json={**HOME, **change}, headers=person.headers)


async def test_addresses_are_added_listed_changed_and_deleted(shop: Shop) -> None:
    ada, bob = await shop.register(), await shop.register()
    answer = await add(shop, ada)
    assert answer.status == 201
    home = await answer.json()
    path = answer.headers["Location"]
    assert {name: home[name] for name in HOME} == HOME
    assert (home["line2"], home["region"], home["phone"]) == ("", "", "")
    shop.clock.ahead_s = 1
    office = await (await add(shop, ada, line1="1 Lombard Street", phone="+44 20 7946 0000")).json()
    listed = await (await shop.users.get(f"{ME}/addresses", headers=ada.headers)).json()
    assert [one["id"] for one in listed["data"]] == [office["id"], home["id"]]  # newest first
    read = await tag(shop, ada, path)
    known = await shop.users.get(path, headers={**ada.headers, "If-None-Match": read})
    assert known.status == 304

    moved = {**HOME, "line1": "St James's Square"}
    await problem(await shop.users.put(path, json=moved, headers=ada.headers), 428, "precondition_required")
    headers = {**ada.headers, "If-Match": read}
    answer = await shop.users.put(path, json=moved, headers=headers)
    assert (await answer.json())["line1"] == "St James's Square"
    assert (await answer.json())["created_at"] == home["created_at"]
    await problem(await shop.users.put(path, json=moved, headers=headers), 412, "precondition_failed")
    await problem(await shop.users.delete(path, headers=headers), 412, "precondition_failed")

    for method in (shop.users.get, shop.users.delete):
        await problem(await method(path, headers=bob.headers), 404, "not_found")
    headers = {**bob.headers, "If-Match": "*"}
    await problem(await shop.users.put(path, json=moved, headers=headers), 404, "not_found")
    answers = await asyncio.gather(*(shop.users.delete(path, headers=ada.headers) for _ in range(2)))
    assert sorted(answer.status for answer in answers) == [204, 404]
    listed = await (await shop.users.get(f"{ME}/addresses", headers=ada.headers)).json()
    assert listed == {"data": [office], "has_more": False, "next_cursor": None}


async def test_addresses_are_bounded_also_when_added_at_once(shop: Shop) -> None:
    ada = await shop.register()
    answers = await asyncio.gather(*(add(shop, ada) for _ in range(ADDRESSES_MAX - 2)))
    assert {answer.status for answer in answers} == {201}
    answers = await asyncio.gather(*(add(shop, ada) for _ in range(4)))
    assert sorted(answer.status for answer in answers) == [201, 201, 409, 409]
    await problem(await add(shop, ada), 409, "too_many_addresses")
    assert len((await shop.store.range(prefix=addresses_of(ada.id))).records) == ADDRESSES_MAX
    first = await (await shop.users.get(f"{ME}/addresses?limit=15", headers=ada.headers)).json()
    rest = f"{ME}/addresses?limit=15&starting_after={first['next_cursor']}"
    second = await (await shop.users.get(rest, headers=ada.headers)).json()
    assert len({one["id"] for one in itertools.chain(first["data"], second["data"])}) == ADDRESSES_MAX


async def test_what_is_no_address(shop: Shop) -> None:
    ghost = await shop.customer()
    for change, pointer in (
        ({"name": ""}, "/name"),
        ({"line1": " "}, "/line1"),
        ({"line2": "a\tb"}, "/line2"),
        ({"city": "x" * 201}, "/city"),
        ({"country": "gb"}, "/country"),
        ({"country": "ZZ"}, "/country"),
        ({"postal_code": "1/2"}, "/postal_code"),
        ({"postal_code": "1" * 21}, "/postal_code"),
        ({"region": 7}, "/region"),
        ({"phone": "call me"}, "/phone"),
        ({"id": 7}, "/id"),
    ):
        found = await problem(await add(shop, ghost, **change), 422, "invalid_body")
        assert [error["pointer"] for error in found["errors"]] == [pointer]


# --- activity ---------------------------------------------------------------------------------------------------------


async def test_one_sees_what_happened_to_ones_account_and_to_no_others(shop: Shop) -> None:
    ada, bob = await shop.register(), await shop.register()
    here = {"X-Forwarded-For": "203.0.113.7", "User-Agent": "A browser"}
    wrong = {"email": ada.email, "password": "guess"}
    assert (await shop.users.post("/v1/sessions", json=wrong, headers=here)).status == 401
    await patch(shop, ada, {"age": 37}, "*")
    answer = await shop.users.get(f"{ME}/activity?limit=2", headers=ada.headers)
    page = await answer.json()
    assert [(one["action"], one["by_me"]) for one in page["data"]] == [
        ("profile_changed", True),
        ("sign_in_failed", False),
    ]
    assert (page["data"][1]["address"], page["data"][1]["user_agent"]) == ("203.0.113.7", "A browser")
    rest = await shop.users.get(f"{ME}/activity?starting_after={page['next_cursor']}", headers=ada.headers)
    assert [one["action"] for one in (await rest.json())["data"]] == ["signed_in", "registered"]
    other = await (await shop.users.get(f"{ME}/activity", headers=bob.headers)).json()
    assert [one["action"] for one in other["data"]] == ["signed_in", "registered"]
