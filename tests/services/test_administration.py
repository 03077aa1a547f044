"""What staff and admins do with others' accounts, the audit log, and the signing keys."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import kvstore
from services.users.audit import KEPT_S
from services.users.parts import create_staff, rotate_keys
from services.users.records import AUDIT, erased_key, user_key
from services.web.key_rotation import OLD_KEPT_S, rotate
from services.web.problems import Problem
from services.web.tokens import CURRENT_AGE_S, CURRENT_KEY, KEY_PREFIX, TOKEN_TTL_S, Role, SigningKeys, Tokens
from tests.services.shop import PASSWORD, Person, Shop, problem


async def read(shop: Shop, path: str, person: Person) -> Any:
    answer = await shop.users.get(path, headers=person.headers)
    assert answer.status == 200, await answer.text()
    return await answer.json()


async def give(shop: Shop, admin: Person, user_id: int, role: str) -> Any:
    return await shop.users.put(f"/v1/users/{user_id}/role", json={"role": role}, headers=admin.headers)


async def block(shop: Shop, admin: Person, user_id: int, reason: str = "fraud") -> Any:
    return await shop.users.put(f"/v1/users/{user_id}/block", json={"reason": reason}, headers=admin.headers)


async def is_signed_in(shop: Shop, person: Person) -> bool:
    return bool((await shop.users.get("/v1/users/me", headers=person.headers)).status == 200)


# --- finding ----------------------------------------------------------------------------------------------------------


async def test_staff_find_accounts(shop: Shop) -> None:
    people = [await shop.register() for _ in range(3)]
    staff = await shop.register(Role.STAFF)
    page = await read(shop, "/v1/users?limit=3", staff)
    rest = await read(shop, f"/v1/users?starting_after={page['next_cursor']}", staff)
    found = [one["id"] for one in page["data"] + rest["data"]]
    assert found == [staff.id, *(person.id for person in reversed(people))]
    assert [one["id"] for one in (await read(shop, "/v1/users?role=staff", staff))["data"]] == [staff.id]
    assert (await read(shop, "/v1/users?role=admin", staff))["data"] == []
    prefix = people[1].email.partition("@")[0] + "%40"
    assert [one["id"] for one in (await read(shop, f"/v1/users?email={prefix.upper()}", staff))["data"]] == [
        people[1].id
    ]
    one = await read(shop, f"/v1/users/{people[0].id}", staff)
    assert (one["email"], one["is_blocked"]) == (people[0].email, False)
    assert "password" not in str(one)
    for query in ("email=a&role=staff", "email=", "role=god", "limit=0"):
        await problem(await shop.users.get(f"/v1/users?{query}", headers=staff.headers), 400, "invalid_parameter")


async def test_who_may_do_what(shop: Shop) -> None:
    ada, staff = await shop.register(), await shop.staff()
    users = shop.users
    for path in ("/v1/users", f"/v1/users/{ada.id}", "/v1/audit"):
        await problem(await users.get(path), 401, "authentication_required")
        await problem(await users.get(path, headers=ada.headers), 403, "forbidden")
    for person in (ada, staff):
        await problem(await give(shop, person, ada.id, "admin"), 403, "forbidden")
        await problem(await block(shop, person, ada.id), 403, "forbidden")
        for path in (f"/v1/users/{ada.id}/block", f"/v1/users/{ada.id}/sessions"):
            await problem(await users.delete(path, headers=person.headers), 403, "forbidden")
    await problem(await users.get("/v1/audit", headers=staff.headers), 403, "forbidden")


# --- roles ------------------------------------------------------------------------------------------------------------


async def test_a_role_is_given_and_old_tokens_end(shop: Shop) -> None:
    admin, ada = await shop.register(Role.ADMIN), await shop.register()
    answer = await give(shop, admin, ada.id, "staff")
    assert (await answer.json())["role"] == "staff"
    assert not await is_signed_in(shop, ada)
    ada = await shop.sign_in(ada.email)
    assert [one["id"] for one in (await read(shop, "/v1/users?role=staff", ada))["data"]] == [ada.id]
    assert [one["id"] for one in (await read(shop, "/v1/users?role=customer", ada))["data"]] == []
    assert (await give(shop, admin, ada.id, "staff")).status == 200
    assert await is_signed_in(shop, ada)  # nothing changed
    await problem(await give(shop, admin, 7, "staff"), 404, "not_found")
    found = await problem(await give(shop, admin, ada.id, "god"), 422, "invalid_body")
    assert found["errors"][0]["pointer"] == "/role"


async def test_there_is_always_an_admin(shop: Shop) -> None:
    admins = [await shop.register(Role.ADMIN) for _ in range(2)]
    first, second = admins
    # Each takes the role from the other, at the same moment.
    answers = await asyncio.gather(give(shop, first, second.id, "staff"), give(shop, second, first.id, "customer"))
    assert sorted(answer.status for answer in answers) in ([200, 401], [200, 409])
    left = second if answers[1].status == 200 else first
    await problem(await give(shop, left, left.id, "staff"), 409, "last_admin")
    await problem(await block(shop, left, left.id), 409, "admin_account")
    erasure = await shop.users.post("/v1/users/me/erasure", json={"password": PASSWORD}, headers=left.headers)
    await problem(erasure, 409, "admin_account")
    assert [one["id"] for one in (await read(shop, "/v1/users?role=admin", left))["data"]] == [left.id]


async def test_operators_make_admins(store: kvstore.Client) -> None:
    async def create(role: Role, *, replace: bool) -> tuple[int, Role]:
        user = await create_staff(store, "boss@example.com", PASSWORD, "Boss", 50, role, replace=replace)
        return user.id, user.role

    user_id, role = await create(Role.STAFF, replace=True)
    assert role is Role.STAFF
    assert await create(Role.ADMIN, replace=True) == (user_id, Role.ADMIN)
    with pytest.raises(Problem) as refused:
        await create(Role.STAFF, replace=True)
    assert refused.value.code == "last_admin"
    with pytest.raises(Problem) as refused:
        await create(Role.ADMIN, replace=False)
    assert refused.value.code == "email_taken"


# --- blocking ---------------------------------------------------------------------------------------------------------


async def test_a_blocked_account_is_out_until_it_is_unblocked(shop: Shop) -> None:
    admin, ada = await shop.register(Role.ADMIN), await shop.register()
    assert (await (await block(shop, admin, ada.id)).json())["is_blocked"] is True
    assert not await is_signed_in(shop, ada)
    body = {"email": ada.email, "password": PASSWORD}
    await problem(await shop.users.post("/v1/sessions", json=body), 403, "account_blocked")
    wrong = {**body, "password": "guess"}
    await problem(await shop.users.post("/v1/sessions", json=wrong), 401, "wrong_credentials")  # tells nothing
    await problem(await give(shop, admin, ada.id, "admin"), 403, "account_blocked")
    shown = await read(shop, f"/v1/users/{ada.id}", admin)
    assert (shown["is_blocked"], shown["blocked_reason"]) == (True, "fraud")
    assert (await shop.users.delete(f"/v1/users/{ada.id}/block", headers=admin.headers)).status == 200
    ada = await shop.sign_in(ada.email)
    actions = [one["action"] for one in (await read(shop, "/v1/users/me/activity", ada))["data"]]
    assert actions == [
        "signed_in",
        "unblocked",
        "sign_in_failed",
        "sign_in_blocked",
        "blocked",
        "signed_in",
        "registered",
    ]
    seen = (await read(shop, "/v1/users/me/activity", ada))["data"][4]
    assert (seen["by_me"], seen["address"], seen["user_agent"]) == (False, "", "")  # where staff sit is not told
    for path in ("/v1/users/7/block",):
        await problem(await shop.users.delete(path, headers=admin.headers), 404, "not_found")
    await problem(await block(shop, admin, 7), 404, "not_found")
    found = await problem(await block(shop, admin, ada.id, ""), 422, "invalid_body")
    assert found["errors"][0]["pointer"] == "/reason"


async def test_who_signs_in_while_being_blocked_has_no_session(shop: Shop) -> None:
    admin, ada = await shop.register(Role.ADMIN), await shop.register()
    body = {"email": ada.email, "password": PASSWORD}

    async def sign_in() -> Any:
        return await shop.users.post("/v1/sessions", json=body)

    signed, blocked, _ = await asyncio.gather(sign_in(), block(shop, admin, ada.id), sign_in())
    assert blocked.status == 200
    assert signed.status in (201, 403)
    found = await shop.store.range(prefix=b"session/%d/" % ada.id)
    assert found.records == ()


async def test_an_admin_ends_a_users_sessions(shop: Shop) -> None:
    admin, ada = await shop.register(Role.ADMIN), await shop.register()
    answer = await shop.users.delete(f"/v1/users/{ada.id}/sessions", headers=admin.headers)
    assert await answer.json() == {"ended": 1}
    assert not await is_signed_in(shop, ada)
    answer = await shop.users.delete(f"/v1/users/{ada.id}/sessions", headers=admin.headers)
    assert await answer.json() == {"ended": 0}


# --- the log ----------------------------------------------------------------------------------------------------------


async def test_the_audit_log_says_who_did_what_from_where(shop: Shop) -> None:
    admin, ada = await shop.register(Role.ADMIN), await shop.register()
    headers = {**admin.headers, "X-Forwarded-For": "203.0.113.7", "X-Request-Id": "trace-0123", "User-Agent": "Browser"}
    await shop.users.put(f"/v1/users/{ada.id}/role", json={"role": "staff"}, headers=headers)
    await shop.users.post("/v1/sessions", json={"email": "nobody@example.com", "password": "guess"})
    page = await read(shop, "/v1/audit?limit=2", admin)
    failed, changed = page["data"]
    assert (failed["action"], failed["actor"], failed["subject"]) == ("sign_in_failed", None, None)
    assert "nobody@example.com" not in str(page)
    del changed["id"], changed["at"]
    assert changed == {
        "action": "role_changed", "actor": admin.id, "subject": ada.id, "address": "203.0.113.7",
        "user_agent": "Browser", "request_id": "trace-0123", "details": {"from": "customer", "to": "staff"},
    }  # fmt: skip
    rest = await read(shop, f"/v1/audit?starting_after={page['next_cursor']}", admin)
    assert [one["action"] for one in rest["data"]] == ["signed_in", "registered"] * 2
    for user_id, actions in (
        (ada.id, ["role_changed", "signed_in", "registered"]),
        (admin.id, ["role_changed", "signed_in", "registered"]),
        (0, ["sign_in_failed"]),
    ):
        page = await read(shop, f"/v1/audit?user={user_id}", admin)
        assert [one["action"] for one in page["data"]] == actions
    for record in (await shop.store.range(prefix=AUDIT)).records:
        assert (await shop.store.lease_status(record.lease)).ttl_ms >= KEPT_S * 1000
        assert ada.email.encode() not in record.value


# --- keys and ids -----------------------------------------------------------------------------------------------------


async def test_a_rotated_key_signs_on_and_the_old_one_is_good_until_its_tokens_expire(store: kvstore.Client) -> None:
    now_s = 1000.0
    signer, verifier = (Tokens(SigningKeys(store, lambda: now_s)) for _ in range(2))
    old = await signer.issue(7, Role.CUSTOMER)
    first = (await store.range(prefix=KEY_PREFIX)).records[0]
    await asyncio.gather(rotate(store), rotate(store))
    records = (await store.range(prefix=KEY_PREFIX)).records
    current = await store.get(CURRENT_KEY)
    assert current is not None
    assert len(records) == 3
    assert [record.key for record in records if not record.lease] == [KEY_PREFIX + current.value]
    for record in records:
        if record.lease:
            assert (await store.lease_status(record.lease)).ttl_ms == OLD_KEPT_S * 1000 > TOKEN_TTL_S * 1000
    now_s += CURRENT_AGE_S + 1
    new = await signer.issue(8, Role.CUSTOMER)
    assert (await verifier.verify(f"Bearer {new}")).user_id == 8
    assert (await verifier.verify(f"Bearer {old}")).user_id == 7
    # The lease ends: who verifies, and never signs, notices all the same.
    now_s += CURRENT_AGE_S + 1
    fresh = Tokens(SigningKeys(store, lambda: now_s))
    await fresh.verify(f"Bearer {old}")
    await store.revoke_lease(next(record.lease for record in records if record.key == first.key))
    now_s += CURRENT_AGE_S + 1
    again = Tokens(fresh._keys)
    with pytest.raises(Problem):
        await again.verify(f"Bearer {old}")


async def test_a_key_that_somebody_has_is_dropped_at_once(store: kvstore.Client) -> None:
    old = await Tokens(SigningKeys(store)).issue(7, Role.CUSTOMER)
    await rotate(store, drop_old=True)
    with pytest.raises(Problem):
        await Tokens(SigningKeys(store)).verify(f"Bearer {old}")
    assert len((await store.range(prefix=KEY_PREFIX)).records) == 1


@pytest.mark.parametrize(("drop_old", "said"), [(False, "kept until what they signed has expired"), (True, "dropped")])
async def test_a_rotation_is_in_the_audit_log(shop: Shop, drop_old: bool, said: str) -> None:
    admin = await shop.register(Role.ADMIN)
    kid = await rotate_keys(shop.store, drop_old=drop_old)
    page = await (await shop.users.get("/v1/audit?user=0", headers=admin.headers)).json()
    (entry,) = page["data"]
    assert (entry["action"], entry["actor"], entry["subject"]) == ("signing_keys_rotated", None, None)
    assert (entry["user_agent"], entry["details"]) == ("python -m services", {"key": kid, "old_keys": said})


async def test_an_id_of_an_erased_account_is_not_used_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([7, 8])
    monkeypatch.setattr("services.web.ids.Ids.next", lambda self: next(drawn))
    await shop.store.put(erased_key(7), b"{}")
    body = {"email": "a@example.com", "password": PASSWORD, "name": "Ada", "age": 36}
    answer = await shop.users.post("/v1/users", json=body)
    assert (await answer.json())["id"] == 8
    assert await shop.store.get(user_key(7)) is None
