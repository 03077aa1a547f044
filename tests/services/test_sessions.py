"""Sessions: refresh tokens that rotate, what ends a session, and how soon its access tokens end with it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import kvstore
from services.users.passwords import Passwords
from services.users.records import sessions_of
from services.users.sessions import GRACE_S, IDLE_S, LIFE_S, SESSIONS_MAX
from services.web import tracing
from services.web.ended import AGE_MAX_S, ENDED, LOOK_EVERY_S, EndedSessions, ended_key
from services.web.ids import now_ms
from services.web.problems import Problem
from services.web.tokens import Role, SigningKeys, Tokens
from tests.services.shop import PASSWORD, Person, Shop, problem

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def sign_in(shop: Shop, email: str, **headers: str) -> dict[str, Any]:
    body = {"email": email, "password": PASSWORD}
    answer = await shop.users.post("/v1/sessions", json=body, headers=headers)
    assert answer.status == 201, await answer.text()
    session: dict[str, Any] = await answer.json()
    return session


def bearer(session: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {session['access_token']}"}


async def refresh(shop: Shop, token: str, **headers: str) -> Any:
    return await shop.users.post("/v1/sessions/refresh", json={"refresh_token": token}, headers=headers)


async def refreshed(shop: Shop, token: str) -> dict[str, Any]:
    answer = await refresh(shop, token)
    assert answer.status == 200, await answer.text()
    session: dict[str, Any] = await answer.json()
    return session


async def is_signed_in(shop: Shop, session: dict[str, Any]) -> bool:
    return bool((await shop.users.get("/v1/users/me", headers=bearer(session))).status == 200)


async def listed(shop: Shop, person: Person) -> list[dict[str, Any]]:
    answer = await shop.users.get("/v1/sessions", headers=person.headers)
    assert answer.status == 200, await answer.text()
    data: list[dict[str, Any]] = (await answer.json())["data"]
    return data


# --- refreshing -------------------------------------------------------------------------------------------------------


async def test_a_refresh_token_is_used_once_and_followed_by_another(shop: Shop) -> None:
    ada = await shop.register()
    first = await sign_in(shop, ada.email)
    assert set(first) == {
        "access_token", "token_type", "expires_in", "user_id", "refresh_token", "refresh_expires_in", "session_id",
    }  # fmt: skip
    assert first["refresh_expires_in"] in (IDLE_S - 1, IDLE_S)
    second = await refreshed(shop, first["refresh_token"])
    third = await refreshed(shop, second["refresh_token"])
    assert len({one["refresh_token"] for one in (first, second, third)}) == 3
    assert {one["session_id"] for one in (first, second, third)} == {first["session_id"]}
    assert third["user_id"] == ada.id
    for one in (first, second, third):
        assert await is_signed_in(shop, one)


async def test_only_hashes_of_refresh_tokens_are_kept(shop: Shop) -> None:
    ada = await shop.register()
    first = await sign_in(shop, ada.email)
    second = await refreshed(shop, first["refresh_token"])
    everything = b"\n".join([record.key + record.value async for record in shop.store.scan(b"", b"")])
    for session in (first, second):
        _, family, secret = session["refresh_token"].split(".")
        assert len(secret) == 43  # 256 bits
        assert family.encode() not in everything
        assert secret.encode() not in everything


async def test_a_lost_answer_is_given_again_for_a_while(shop: Shop) -> None:
    ada = await shop.register()
    first = await sign_in(shop, ada.email)
    second = await refreshed(shop, first["refresh_token"])
    shop.clock.ahead_s = GRACE_S - 1
    again = await refreshed(shop, first["refresh_token"])
    assert again["refresh_token"] == second["refresh_token"]
    assert (await refreshed(shop, again["refresh_token"]))["refresh_token"] != second["refresh_token"]


async def test_two_tabs_that_refresh_at_once_get_the_same_successor(shop: Shop) -> None:
    ada = await shop.register()
    first = await sign_in(shop, ada.email)
    both = await asyncio.gather(*(refreshed(shop, first["refresh_token"]) for _ in range(5)))
    assert len({one["refresh_token"] for one in both}) == 1
    assert await refreshed(shop, both[0]["refresh_token"])


@pytest.mark.parametrize("how", ["after the grace", "when its successor was used"])
async def test_a_reused_token_ends_its_session(shop: Shop, how: str) -> None:
    ada = await shop.register()
    first = await sign_in(shop, ada.email)
    second = await refreshed(shop, first["refresh_token"])
    newest = second
    if how == "after the grace":
        shop.clock.ahead_s = GRACE_S + 1
    else:
        newest = await refreshed(shop, second["refresh_token"])
    await problem(await refresh(shop, first["refresh_token"]), 401, "refresh_token_reused")
    for session in (first, second, newest):
        await problem(await refresh(shop, session["refresh_token"]), 401, "invalid_refresh_token")
        assert not await is_signed_in(shop, session)
    assert [one["id"] for one in await listed(shop, ada)] != []  # other sessions go on
    answer = await shop.users.get("/v1/users/me/activity", headers=ada.headers)
    assert (await answer.json())["data"][0]["action"] == "refresh_token_reused"


async def test_of_a_reuse_and_a_refresh_at_once_none_leaves_a_session(shop: Shop) -> None:
    ada = await shop.register()
    first = await sign_in(shop, ada.email)
    second = await refreshed(shop, first["refresh_token"])
    shop.clock.ahead_s = GRACE_S + 1
    await asyncio.gather(refresh(shop, second["refresh_token"]), refresh(shop, first["refresh_token"]))
    # Whichever came first: the reuse was seen, and nothing that was given can be used.
    found = await shop.store.range(prefix=sessions_of(ada.id))
    assert first["session_id"] not in [record.key.decode().rpartition("/")[2] for record in found.records]


@pytest.mark.parametrize(
    "token", ["x", "1", "1.2", "1.2.3", "0.a.b", "9" * 16 + ".a.b", "1..x", "..", "é.ü.ß", "1.a.b.c.d"]
)
async def test_what_is_no_refresh_token(shop: Shop, token: str) -> None:
    await problem(await refresh(shop, token), 401, "invalid_refresh_token")


async def test_who_knows_a_sessions_id_cannot_end_it_by_a_wrong_token(shop: Shop) -> None:
    ada = await shop.register()
    first = await sign_in(shop, ada.email)
    user_id, family, secret = first["refresh_token"].split(".")
    for forged in (f"{user_id}.{first['session_id']}.{secret}", f"{int(user_id) + 1}.{family}.{secret}"):
        await problem(await refresh(shop, forged), 401, "invalid_refresh_token")
    assert await refreshed(shop, first["refresh_token"])


async def test_bodies_of_refreshes_are_checked(shop: Shop) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "/refresh_token"),
        ({"refresh_token": ""}, "/refresh_token"),
        ({"refresh_token": "x" * 200}, "/refresh_token"),
        ({"refresh_token": "x", "y": 1}, "/y"),
    ]
    for body, pointer in wrong:
        found = await problem(await shop.users.post("/v1/sessions/refresh", json=body), 422, "invalid_body")
        assert [error["pointer"] for error in found["errors"]] == [pointer]


async def test_a_stale_access_token_does_not_stand_in_the_way(shop: Shop) -> None:
    """Clients send it with everything; here of all places it has expired."""
    ada = await shop.register()
    first = await sign_in(shop, ada.email, Authorization="Bearer stale")
    assert (await refresh(shop, first["refresh_token"], Authorization="Bearer stale")).status == 200


async def test_an_unknown_outcome_may_be_tried_again_at_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = await shop.register()
    first = await sign_in(shop, ada.email)
    run_transaction = shop.store.run_transaction

    async def lost(body: Any, **more: Any) -> Any:
        await run_transaction(body, **more)
        raise kvstore.OutcomeUnknown("no answer came")

    monkeypatch.setattr(shop.store, "run_transaction", lost)
    found = await problem(await refresh(shop, first["refresh_token"]), 503, "outcome_unknown")
    assert found["retryable"] is True
    monkeypatch.undo()
    second = await refreshed(shop, first["refresh_token"])
    assert await refreshed(shop, second["refresh_token"])


# --- how sessions end -------------------------------------------------------------------------------------------------


async def test_sessions_are_listed_and_ended_one_by_one(shop: Shop) -> None:
    ada, bob = await shop.register(), await shop.register()
    here = {"User-Agent": "Firefox\u00e9 on the moon", "X-Forwarded-For": "203.0.113.7"}
    phone = await sign_in(shop, ada.email, **here)
    sessions = await listed(shop, ada)
    assert [(one["is_current"], one["address"]) for one in sessions] == [(False, "203.0.113.7"), (True, "127.0.0.1")]
    assert sessions[0]["id"] == phone["session_id"]
    assert sessions[0]["user_agent"].startswith("Firefox")
    assert sessions[0]["created_at"] <= sessions[0]["last_used_at"] < sessions[0]["expires_at"]
    url = f"/v1/sessions/{phone['session_id']}"
    await problem(await shop.users.delete(url, headers=bob.headers), 404, "not_found")
    await problem(await shop.users.delete("/v1/sessions/x", headers=ada.headers), 404, "not_found")
    answers = await asyncio.gather(*(shop.users.delete(url, headers=ada.headers) for _ in range(3)))
    assert sorted(answer.status for answer in answers) == [204, 404, 404]
    assert not await is_signed_in(shop, phone)
    await problem(await refresh(shop, phone["refresh_token"]), 401, "invalid_refresh_token")
    assert [one["is_current"] for one in await listed(shop, ada)] == [True]


async def test_signing_out(shop: Shop) -> None:
    ada = await shop.register()
    assert (await shop.users.delete("/v1/sessions/current", headers=ada.headers)).status == 204
    await problem(await shop.users.get("/v1/users/me", headers=ada.headers), 401, "invalid_token")
    await problem(await shop.users.delete("/v1/sessions/current"), 401, "authentication_required")
    nobody = await shop.customer()  # a token that no sign-in gave
    await problem(await shop.users.delete("/v1/sessions/current", headers=nobody.headers), 404, "not_found")


async def test_ending_all_others(shop: Shop) -> None:
    ada = await shop.register()
    others = [await sign_in(shop, ada.email) for _ in range(2)]
    answers = await asyncio.gather(*(shop.users.delete("/v1/sessions", headers=ada.headers) for _ in range(2)))
    assert sorted([(await answer.json())["ended"] for answer in answers]) == [0, 2]
    for session in others:
        assert not await is_signed_in(shop, session)
    assert (await shop.users.get("/v1/users/me", headers=ada.headers)).status == 200


async def test_a_session_ends_by_itself(shop: Shop) -> None:
    ada = await shop.register()
    first = await sign_in(shop, ada.email)
    (record, _) = (await shop.store.range(prefix=sessions_of(ada.id))).records
    status = await shop.store.lease_status(record.lease)
    assert IDLE_S * 1000 <= status.ttl_ms <= (IDLE_S + 2 * 24 * 3600) * 1000
    shop.clock.ahead_s = IDLE_S - 60
    second = await refreshed(shop, first["refresh_token"])
    assert len(await listed(shop, ada)) == 2
    shop.clock.ahead_s = 2 * IDLE_S - 120  # since the refresh, not since the beginning
    third = await refreshed(shop, second["refresh_token"])
    assert len(await listed(shop, ada)) == 1
    shop.clock.ahead_s = 3 * IDLE_S
    await problem(await refresh(shop, third["refresh_token"]), 401, "invalid_refresh_token")
    assert await listed(shop, ada) == []


async def test_no_session_lives_for_longer_than_a_year(shop: Shop) -> None:
    ada = await shop.register()
    token = (await sign_in(shop, ada.email))["refresh_token"]
    while shop.clock.ahead_s < LIFE_S - IDLE_S:
        shop.clock.ahead_s += IDLE_S - 60
        session = await refreshed(shop, token)
        token = session["refresh_token"]
    shop.clock.ahead_s = LIFE_S + 60
    await problem(await refresh(shop, token), 401, "invalid_refresh_token")


async def test_sessions_of_one_user_are_bounded(shop: Shop) -> None:
    ada = await shop.register()
    await asyncio.gather(*(sign_in(shop, ada.email) for _ in range(4)))
    answer = await shop.store.range(prefix=sessions_of(ada.id))
    template = answer.records[0]
    for number in range(SESSIONS_MAX - 5):  # as if signed in long ago: hashing takes its time
        name = f"{number:032x}"
        old = template.value.replace(template.key.rpartition(b"/")[2], name.encode())
        await shop.store.put(sessions_of(ada.id) + name.encode(), old)
    assert len((await shop.store.range(prefix=sessions_of(ada.id))).records) == SESSIONS_MAX
    await asyncio.gather(*(sign_in(shop, ada.email) for _ in range(3)))
    left = (await shop.store.range(prefix=sessions_of(ada.id))).records
    assert len(left) == SESSIONS_MAX
    assert len((await shop.store.range(prefix=ENDED)).records) == 3


# --- how soon access tokens end with them -----------------------------------------------------------------------------


async def test_another_process_refuses_an_ended_sessions_token_within_the_bound(store: kvstore.Client) -> None:
    now_s = 100.0
    tokens = Tokens(SigningKeys(store))
    tokens.ended = EndedSessions(store, 600.0, lambda: now_s)
    header = f"Bearer {await tokens.issue(7, Role.CUSTOMER, 'a' * 32)}"
    other = f"Bearer {await tokens.issue(7, Role.CUSTOMER, 'b' * 32)}"
    assert (await tokens.verify(header)).session_id == "a" * 32
    await store.put(ended_key("a" * 32, now_ms()), b"")  # by another process
    now_s += LOOK_EVERY_S - 0.1
    await tokens.verify(header)  # nothing was read: that is the cost that is saved
    now_s += AGE_MAX_S - LOOK_EVERY_S + 0.1
    for _ in range(2):
        with pytest.raises(Problem) as refused:
            await tokens.verify(header)
        assert refused.value.code == "invalid_token"
    assert (await tokens.verify(other)).user_id == 7


async def test_every_service_refuses_an_ended_sessions_token(shop: Shop) -> None:
    ada = await shop.register()
    assert (await shop.users.delete("/v1/sessions/current", headers=ada.headers)).status == 204
    await problem(await shop.orders.get("/v1/orders/7", headers=ada.headers), 401, "invalid_token")


async def test_only_what_was_added_is_read_again(store: kvstore.Client) -> None:
    now_s = 100.0
    ended = EndedSessions(store, 600.0, lambda: now_s)
    await store.put(ended_key("old", now_ms() - 300_000), b"")
    await store.put(ended_key("gone", now_ms() - 700_000), b"")
    assert await ended.has("old")
    assert not await ended.has("gone")  # its tokens have expired
    await store.put(ended_key("late", now_ms() - 299_000), b"")  # far behind: no clock differs that much
    await store.put(ended_key("new", now_ms()), b"")
    now_s += AGE_MAX_S
    assert await ended.has("new")
    assert await ended.has("old")
    assert not await ended.has("late")


# --- what signing in costs --------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the request with `TRACE` asks of the store; all that a client asks goes through these two."""
    requests: list[str] = []
    for name in ("_read", "_write"):
        ask = getattr(kvstore.Client, name)

        async def counting(self: kvstore.Client, *given: Any, _ask: Any = ask, _name: str = name, **more: Any) -> Any:
            if tracing.traceparent() == TRACE:
                requests.append(_name)
            return await _ask(self, *given, **more)

        monkeypatch.setattr(kvstore.Client, name, counting)
    return requests


async def test_signing_in_asks_the_store_four_times_whether_it_succeeds_or_not(shop: Shop, asked: list[str]) -> None:
    ada = await shop.register()
    await sign_in(shop, ada.email, **{"X-Forwarded-For": "203.0.113.7"})  # leases are granted for many at once
    for email, password, address, status in (
        (ada.email, PASSWORD, "203.0.113.7", 201),
        (ada.email, PASSWORD, "203.0.113.8", 201),
        (ada.email, "a wrong password", "203.0.113.7", 401),
        (ada.email, "a wrong password", "203.0.113.66", 401),
        ("nobody@example.com", "a wrong password", "203.0.113.66", 401),
        ("no email", "a wrong password", "203.0.113.66", 401),
    ):
        asked.clear()
        headers = {"X-Forwarded-For": address, "traceparent": TRACE}
        body = {"email": email, "password": password}
        assert (await shop.users.post("/v1/sessions", json=body, headers=headers)).status == status
        assert asked == ["_read", "_read", "_write", "_write"], (email, password)


async def test_sign_ins_at_once_all_succeed_and_leave_no_count(shop: Shop) -> None:
    ada = await shop.register()
    await asyncio.gather(*(sign_in(shop, ada.email, **{"X-Forwarded-For": "203.0.113.7"}) for _ in range(4)))
    assert len((await shop.store.range(prefix=sessions_of(ada.id))).records) == 5
    for record in (await shop.store.range(prefix=b"throttle/sign-in-")).records:
        assert b'"level":0.0' in record.value


async def test_a_password_that_changes_while_it_is_checked_opens_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = await shop.register()
    verify = Passwords.verify

    async def slowly(self: Passwords, password_hash: str, password: str) -> bool:
        is_right = await verify(self, password_hash, password)
        monkeypatch.setattr(Passwords, "verify", verify)
        body = {"old_password": PASSWORD, "new_password": "another good password"}
        changed = await shop.users.post("/v1/users/me/password", json=body, headers=ada.headers)
        assert changed.status == 204
        return is_right

    monkeypatch.setattr(Passwords, "verify", slowly)
    body = {"email": ada.email, "password": PASSWORD}
    await problem(await shop.users.post("/v1/sessions", json=body), 401, "wrong_credentials")
    assert len((await shop.store.range(prefix=sessions_of(ada.id))).records) == 1
