"""Throttles: how attempts are counted, and that nobody is shut out by others."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec
import pytest

import kvstore
from services.users.throttle import (
    MAIL_ACCOUNT,
    REGISTRATION,
    SIGN_IN_ACCOUNT,
    SIGN_IN_ADDRESS,
    SIGN_IN_PAIR,
    Counted,
    Throttle,
)
from services.web.problems import Problem
from tests.services.shop import PASSWORD, Shop, plain_headers, problem


async def records(store: kvstore.Client) -> tuple[kvstore.Record, ...]:
    return (await store.range(prefix=b"throttle/")).records


class Setup:
    def __init__(self, store: kvstore.Client) -> None:
        self.now_ms = 1_000_000
        self.throttles = [Throttle(store, lambda: self.now_ms) for _ in range(2)]  # as in two processes

    async def wait_s(self, *counts: Counted) -> int:
        """0: the attempt was let through, and counted."""
        self.throttles.reverse()
        try:
            await self.throttles[0].take("sign_in_throttled", counts)
        except Problem as refused:
            return _wait_of(refused)
        return 0


def _wait_of(refused: Problem) -> int:
    assert refused.code == "sign_in_throttled"
    assert refused.headers is not None
    return int(refused.headers["Retry-After"])


async def test_pauses_double_after_the_free_attempts_and_asking_does_not_prolong_them(store: kvstore.Client) -> None:
    setup, count = Setup(store), Counted(SIGN_IN_PAIR, "a/203.0.113.7")
    pauses = []
    for _ in range(18):
        while (wait_s := await setup.wait_s(count)) > 0:
            assert await setup.wait_s(count) == wait_s
            pauses.append(wait_s)
            setup.now_ms += wait_s * 1000
    assert pauses[:5] == [1, 2, 4, 8, 16]
    assert pauses == sorted(pauses)
    assert 500 < max(pauses) <= SIGN_IN_PAIR.pause_max_s
    assert await setup.wait_s(Counted(SIGN_IN_PAIR, "a/203.0.113.8")) == 0


async def test_attempts_are_forgotten_slowly(store: kvstore.Client) -> None:
    setup, count = Setup(store), Counted(SIGN_IN_PAIR, "a/203.0.113.7")
    for _ in range(SIGN_IN_PAIR.free + 1):
        assert await setup.wait_s(count) == 0
    assert await setup.wait_s(count) == 1
    setup.now_ms += int(SIGN_IN_PAIR.leak_s * 1000 * 2)
    assert [await setup.wait_s(count) for _ in range(3)] == [0, 0, 1]
    setup.now_ms -= 3_600_000  # a clock that goes back
    assert await setup.wait_s(count) <= SIGN_IN_PAIR.pause_max_s


async def test_a_right_password_is_taken_back(store: kvstore.Client) -> None:
    setup, count = Setup(store), Counted(SIGN_IN_ADDRESS, "203.0.113.7")
    for _ in range(3 * SIGN_IN_ADDRESS.free // 2):
        taken = await setup.throttles[0].take("sign_in_throttled", [count])
        await setup.throttles[1].take_back(taken)


async def test_what_others_count_meanwhile_stays_counted(store: kvstore.Client) -> None:
    setup, one, other = Setup(store), Counted(SIGN_IN_ADDRESS, "203.0.113.7"), Counted(SIGN_IN_ACCOUNT, "a")
    taken = await setup.throttles[0].take("sign_in_throttled", [one, other])
    for _ in range(3):
        await setup.throttles[1].take("sign_in_throttled", [one])
    await setup.throttles[0].take_back(taken)
    levels = {record.key: msgspec.json.decode(record.value)["level"] for record in await records(store)}
    assert levels == {one.key: 3, other.key: 0}
    # One that has gone by itself needs no taking back.
    taken = await setup.throttles[0].take("sign_in_throttled", [one])
    await store.delete(one.key)
    await setup.throttles[0].take_back(taken)
    assert await store.get(one.key) is None


async def test_if_one_count_has_to_wait_none_is_raised(store: kvstore.Client) -> None:
    setup, full, other = Setup(store), Counted(SIGN_IN_PAIR, "a/x"), Counted(SIGN_IN_ADDRESS, "x")
    for _ in range(SIGN_IN_PAIR.free + 1):
        await setup.wait_s(full)
    for _ in range(5):
        assert await setup.wait_s(full, other) == 1
    assert await store.get(other.key) is None


async def test_many_at_once_are_no_way_round(store: kvstore.Client) -> None:
    setup, count = Setup(store), Counted(SIGN_IN_PAIR, "a/x")
    waits = await asyncio.gather(*(setup.wait_s(count) for _ in range(20)))
    assert waits.count(0) <= SIGN_IN_PAIR.free + 1
    (record,) = (await store.range(prefix=b"throttle/")).records
    assert (await store.lease_status(record.lease)).ttl_ms >= SIGN_IN_PAIR.level_max * SIGN_IN_PAIR.leak_s * 1000


# --- over HTTP --------------------------------------------------------------------------------------------------------


async def sign_in(shop: Shop, email: str, password: str, address: str) -> Any:
    body = {"email": email, "password": password}
    return await shop.users.post("/v1/sessions", json=body, headers={"X-Forwarded-For": address})


async def fill(shop: Shop, rule: Any, whom: str) -> None:
    """As after as many attempts as are free; guessing costs 25 ms each."""
    throttle = Throttle(shop.store, shop.clock.now_ms)
    with contextlib.suppress(Problem):
        for _ in range(rule.free + 2):
            await throttle.take("sign_in_throttled", [Counted(rule, whom)])


async def account_names(shop: Shop) -> list[str]:
    found = await shop.store.range(prefix=f"throttle/{SIGN_IN_ACCOUNT.name}/".encode(), keys_only=True)
    return [record.key.decode().rpartition("/")[2] for record in found.records]


async def test_who_guesses_shuts_out_himself_and_nobody_else(shop: Shop) -> None:
    ada = await shop.register()
    answers = [await sign_in(shop, ada.email, "guess", "203.0.113.66") for _ in range(SIGN_IN_PAIR.free + 2)]
    assert [answer.status for answer in answers] == [401] * (SIGN_IN_PAIR.free + 1) + [429]
    found = await problem(answers[-1], 429, "sign_in_throttled")
    assert found["retryable"] is True
    assert answers[-1].headers["Retry-After"] == "1"
    assert (await sign_in(shop, ada.email, PASSWORD, "203.0.113.66")).status == 429  # the right one does not help now
    assert (await sign_in(shop, ada.email, PASSWORD, "203.0.113.7")).status == 201
    shop.clock.ahead_s = 2
    assert (await sign_in(shop, ada.email, PASSWORD, "203.0.113.66")).status == 201
    assert (await sign_in(shop, ada.email, "guess", "203.0.113.66")).status == 401  # forgotten with the right one


async def test_an_email_that_nobody_has_is_throttled_in_the_same_way(shop: Shop) -> None:
    ada = await shop.register()
    seen = []
    for number, email in enumerate((ada.email, "nobody@example.com", "no email")):
        answers = [await sign_in(shop, email, "guess", f"203.0.113.{number}") for _ in range(SIGN_IN_PAIR.free + 2)]
        bodies = []
        for answer in answers:
            body = await answer.json(content_type=None)
            del body["request_id"]
            bodies.append((answer.status, body, plain_headers(answer)))
        seen.append(bodies)
    assert seen[0] == seen[1] == seen[2]


async def test_a_known_address_is_not_kept_out_by_the_rest_of_the_world(shop: Shop) -> None:
    ada = await shop.register()
    assert (await sign_in(shop, ada.email, PASSWORD, "203.0.113.7")).status == 201
    assert (await sign_in(shop, ada.email, "guess", "203.0.113.66")).status == 401
    (name,) = set(await account_names(shop))
    await fill(shop, SIGN_IN_ACCOUNT, name)
    await problem(await sign_in(shop, ada.email, PASSWORD, "203.0.113.8"), 429, "sign_in_throttled")
    assert (await sign_in(shop, ada.email, PASSWORD, "203.0.113.7")).status == 201
    # From a new address there is the mail.
    assert (await shop.users.post("/v1/password-resets", json={"email": ada.email})).status == 202
    token = (await shop.outbox.next("password-reset")).token
    body, headers = {"token": token, "password": "a new password"}, {"X-Forwarded-For": "203.0.113.8"}
    done = await shop.users.post("/v1/password-resets/completion", json=body, headers=headers)
    assert done.status == 204
    assert (await sign_in(shop, ada.email, "a new password", "203.0.113.8")).status == 201


async def test_one_address_over_many_accounts(shop: Shop) -> None:
    await fill(shop, SIGN_IN_ADDRESS, "203.0.113.66")
    await problem(await sign_in(shop, "a@example.com", "guess", "203.0.113.66"), 429, "sign_in_throttled")
    assert (await sign_in(shop, "a@example.com", "guess", "203.0.113.67")).status == 401
    await fill(shop, SIGN_IN_ADDRESS, "2001:db8:1:2::")
    await problem(await sign_in(shop, "a@example.com", "guess", "2001:db8:1:2::99"), 429, "sign_in_throttled")


async def test_registrations_from_one_address(shop: Shop) -> None:
    await fill(shop, REGISTRATION, "203.0.113.66")
    body = {"email": "a@example.com", "password": PASSWORD, "name": "Ada", "age": 36}
    headers = {"X-Forwarded-For": "203.0.113.66"}
    answer = await shop.users.post("/v1/users", json=body, headers=headers)
    await problem(answer, 429, "registration_throttled")
    assert int(answer.headers["Retry-After"]) >= 1
    assert (await shop.users.post("/v1/users", json=body)).status == 201


@pytest.mark.parametrize("email", ["known", "nobody@example.com", "no email"])
async def test_mails_for_one_account(shop: Shop, email: str) -> None:
    given = (await shop.register()).email if email == "known" else email
    answers = [
        await shop.users.post("/v1/password-resets", json={"email": given}) for _ in range(MAIL_ACCOUNT.free + 2)
    ]
    assert [answer.status for answer in answers] == [202] * (MAIL_ACCOUNT.free + 1) + [429]
    await problem(answers[-1], 429, "mail_throttled")
    assert answers[-1].headers["Retry-After"] == "60"


async def test_a_password_that_is_asked_for_again_is_throttled_like_a_sign_in(shop: Shop) -> None:
    """Who has a stolen access token must not find the password out with it."""
    ada = await shop.register()
    headers = {**ada.headers, "X-Forwarded-For": "203.0.113.66"}
    body = {"old_password": "guess", "new_password": "a new password"}
    answers = [
        await shop.users.post("/v1/users/me/password", json=body, headers=headers) for _ in range(SIGN_IN_PAIR.free + 2)
    ]
    assert [answer.status for answer in answers] == [403] * (SIGN_IN_PAIR.free + 1) + [429]
