"""Passwords and emails change: with the old password, or with a token that came by mail."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import kvstore
from services.users.mail import CannotMail, FileMailer, Mail, load_mailer
from services.users.mailing import KIND, TOKEN_TTL_S, mail_step
from services.users.records import email_key, mailed_of, sessions_of
from services.web.ids import now_ms
from services.work import steps
from tests.services.shop import PASSWORD, Outbox, Person, Shop, plain_headers, problem

NEW = "a quite different phrase"


async def sign_in_status(shop: Shop, email: str, password: str) -> int:
    return (await shop.users.post("/v1/sessions", json={"email": email, "password": password})).status


async def change(shop: Shop, person: Person, old: str, new: str) -> Any:
    body = {"old_password": old, "new_password": new}
    return await shop.users.post("/v1/users/me/password", json=body, headers=person.headers)


async def ask_reset(shop: Shop, email: str, **headers: str) -> Any:
    return await shop.users.post("/v1/password-resets", json={"email": email}, headers=headers)


async def complete(shop: Shop, token: str, password: str = NEW) -> Any:
    return await shop.users.post("/v1/password-resets/completion", json={"token": token, "password": password})


async def mailed_token(shop: Shop, email: str) -> str:
    assert (await ask_reset(shop, email)).status == 202
    return (await shop.outbox.next("password-reset")).token


# --- with the old password --------------------------------------------------------------------------------------------


async def test_a_password_change_ends_the_other_sessions(shop: Shop) -> None:
    ada = await shop.register()
    other = await shop.sign_in(ada.email)
    assert (await change(shop, ada, PASSWORD, NEW)).status == 204
    assert (await shop.users.get("/v1/users/me", headers=ada.headers)).status == 200
    await problem(await shop.users.get("/v1/users/me", headers=other.headers), 401, "invalid_token")
    assert await sign_in_status(shop, ada.email, PASSWORD) == 401
    assert await sign_in_status(shop, ada.email, NEW) == 201
    assert (await shop.outbox.next("password-changed")).to == ada.email


async def test_refused_password_changes(shop: Shop) -> None:
    ada = await shop.register()
    found = await problem(await change(shop, ada, "not it", NEW), 403, "wrong_password")
    assert found["errors"][0]["pointer"] == "/old_password"
    for common in ("password1", ada.email):
        found = await problem(await change(shop, ada, PASSWORD, common), 422, "common_password")
        assert found["errors"][0]["pointer"] == "/new_password"
    found = await problem(await change(shop, ada, PASSWORD, "short"), 422, "invalid_body")
    assert found["errors"][0]["pointer"] == "/new_password"
    ghost = await shop.customer()
    await problem(await change(shop, ghost, PASSWORD, NEW), 404, "not_found")
    activity = await (await shop.users.get("/v1/users/me/activity", headers=ada.headers)).json()
    assert [one["action"] for one in activity["data"]] == ["password_wrong", "signed_in", "registered"]


async def test_of_two_password_changes_at_once_one_wins(shop: Shop) -> None:
    ada = await shop.register()
    answers = await asyncio.gather(*(change(shop, ada, PASSWORD, f"{NEW} {number}") for number in range(2)))
    assert sorted(answer.status for answer in answers) == [204, 403]
    winner = [answer.status for answer in answers].index(204)
    assert await sign_in_status(shop, ada.email, f"{NEW} {winner}") == 201


async def test_who_refreshes_during_a_password_change_is_out(shop: Shop) -> None:
    ada = await shop.register()
    body = {"email": ada.email, "password": PASSWORD}
    other = await (await shop.users.post("/v1/sessions", json=body)).json()

    async def refresh() -> Any:
        token = {"refresh_token": other["refresh_token"]}
        return await shop.users.post("/v1/sessions/refresh", json=token)

    changed, *_ = await asyncio.gather(change(shop, ada, PASSWORD, NEW), *(refresh() for _ in range(5)))
    assert changed.status == 204
    assert (await refresh()).status == 401
    assert len((await shop.store.range(prefix=sessions_of(ada.id))).records) == 1


# --- by mail ----------------------------------------------------------------------------------------------------------


async def test_a_forgotten_password(shop: Shop) -> None:
    ada = await shop.register()
    token = await mailed_token(shop, f" {ada.email.upper()} ")
    stored = b"\n".join([record.key + record.value async for record in shop.store.scan(b"", b"")])
    assert token.rpartition(".")[2].encode() not in stored
    assert (await complete(shop, token)).status == 204
    await problem(await shop.users.get("/v1/users/me", headers=ada.headers), 401, "invalid_token")
    assert await sign_in_status(shop, ada.email, PASSWORD) == 401
    assert await sign_in_status(shop, ada.email, NEW) == 201
    found = await problem(await complete(shop, token, PASSWORD), 422, "invalid_mail_token")
    assert found["errors"][0]["pointer"] == "/token"
    assert (await shop.outbox.next("password-changed")).token == ""


async def test_asking_tells_nothing_about_accounts(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same status, headers and body; and the same work, counted: what the store is asked for, and how much is put."""
    ada = await shop.register()
    asked: list[str] = []
    txn, get = shop.store.txn, shop.store.get

    async def counting(compare: Any = (), success: Any = (), failure: Any = (), **more: Any) -> Any:
        asked.append(" ".join([type(operation).__name__ for operation in success]))
        return await txn(compare, success, failure, **more)

    async def getting(key: bytes, **more: Any) -> Any:
        asked.append("get")
        return await get(key, **more)

    seen = []
    for email in (ada.email, "nobody@example.com", "no email"):
        monkeypatch.setattr(shop.store, "txn", counting)
        monkeypatch.setattr(shop.store, "get", getting)
        asked.clear()
        answer = await ask_reset(shop, email)
        by_request = asked[: asked.index("Put Put Put") + 1]  # the last is the step, and its audit entry
        monkeypatch.undo()
        assert await no_steps(shop.store)  # the worker asks the store as well, later
        seen.append((answer.status, await answer.text(), plain_headers(answer), by_request))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0] == 202
    assert [mail.to for mail in shop.outbox.mails] == [ada.email]


async def no_steps(store: kvstore.Client) -> bool:
    async with asyncio.timeout(10):
        while (await store.range(prefix=steps.steps_of("users"))).records:
            await asyncio.sleep(0.01)
    return True


async def test_a_tokens_time_and_purpose(shop: Shop) -> None:
    ada = await shop.register()
    token = await mailed_token(shop, ada.email)
    user_id, _, secret = token.partition(".")
    for wrong in ("x", f"{user_id}.x", f"{int(user_id) + 1}.{secret}", f"0.{secret}", secret, "."):
        await problem(await complete(shop, wrong), 422, "invalid_mail_token")
    confirmed = await shop.users.post("/v1/email-confirmations", json={"token": token})
    await problem(confirmed, 422, "invalid_mail_token")
    for common in ("password1", ada.email):
        found = await problem(await complete(shop, token, common), 422, "common_password")
        assert found["errors"][0]["pointer"] == "/password"
    (record,) = (await shop.store.range(prefix=mailed_of(ada.id))).records
    assert (await shop.store.lease_status(record.lease)).ttl_ms <= 3 * TOKEN_TTL_S * 1000
    shop.clock.ahead_s = TOKEN_TTL_S
    await problem(await complete(shop, token), 422, "invalid_mail_token")
    shop.clock.ahead_s = TOKEN_TTL_S - 5
    assert (await complete(shop, token)).status == 204


async def test_of_two_completions_at_once_one_wins(shop: Shop) -> None:
    ada = await shop.register()
    token = await mailed_token(shop, ada.email)
    answers = await asyncio.gather(*(complete(shop, token, f"{NEW} {number}") for number in range(2)))
    assert sorted(answer.status for answer in answers) == [204, 422]
    winner = [answer.status for answer in answers].index(204)
    assert await sign_in_status(shop, ada.email, f"{NEW} {winner}") == 201


async def test_a_password_change_voids_what_was_mailed(shop: Shop) -> None:
    ada = await shop.register()
    tokens = [await mailed_token(shop, ada.email) for _ in range(2)]  # either would do
    assert (await change(shop, ada, PASSWORD, NEW)).status == 204
    for token in tokens:
        await problem(await complete(shop, token, PASSWORD), 422, "invalid_mail_token")


async def test_a_mail_is_tried_again_with_another_token(shop: Shop) -> None:
    ada = await shop.register()
    shop.outbox.failures = 1
    token = await mailed_token(shop, ada.email)
    assert len((await shop.store.range(prefix=mailed_of(ada.id))).records) == 2  # the first may have arrived
    assert (await complete(shop, token)).status == 204


async def test_a_mail_that_nobody_waits_for_any_more_is_not_sent(shop: Shop) -> None:
    ada = await shop.register()
    put = mail_step("password-reset", ada.id)
    step = json.loads(put.value)
    long_ago = now_ms() - 3_600_000
    old = json.dumps({**step, "created_ms": long_ago, "due_ms": long_ago}).encode()
    await shop.store.put(steps.step_key(KIND, step["subject"], long_ago, "users"), old)
    assert await no_steps(shop.store)
    assert shop.outbox.mails == []


# --- another email ----------------------------------------------------------------------------------------------------


async def ask_email(shop: Shop, person: Person, email: str, password: str = PASSWORD) -> Any:
    body = {"email": email, "password": password}
    return await shop.users.post("/v1/users/me/email", json=body, headers=person.headers)


async def confirm(shop: Shop, token: str) -> Any:
    return await shop.users.post("/v1/email-confirmations", json={"token": token})


async def test_an_email_changes_when_the_new_address_has_said_so(shop: Shop) -> None:
    ada = await shop.register()
    reset = await mailed_token(shop, ada.email)
    assert (await ask_email(shop, ada, "Countess@Example.com")).status == 202
    mail = await shop.outbox.next("email-change")
    assert mail.to == "Countess@Example.com"
    me = await (await shop.users.get("/v1/users/me", headers=ada.headers)).json()
    assert me["email"] == ada.email
    assert (await confirm(shop, mail.token)).status == 204
    me = await (await shop.users.get("/v1/users/me", headers=ada.headers)).json()
    assert me["email"] == "Countess@Example.com"
    assert await sign_in_status(shop, ada.email, PASSWORD) == 401
    assert await sign_in_status(shop, "countess@example.com", PASSWORD) == 201
    assert (await shop.outbox.next("email-changed")).to == ada.email
    await problem(await confirm(shop, mail.token), 422, "invalid_mail_token")
    await problem(await complete(shop, reset), 422, "invalid_mail_token")  # it went to a mailbox that counts no more
    assert await shop.store.get(email_key(ada.email)) is None


async def test_an_email_that_is_taken_is_told_to_its_owner_only(shop: Shop) -> None:
    ada, bob = await shop.register(), await shop.register()
    assert (await ask_email(shop, ada, bob.email)).status == 202
    token = (await shop.outbox.next("email-change")).token
    await problem(await confirm(shop, token), 409, "email_taken")
    assert await sign_in_status(shop, bob.email, PASSWORD) == 201


async def test_the_later_of_two_changes_counts_and_two_confirmations_are_one(shop: Shop) -> None:
    ada = await shop.register()
    await ask_email(shop, ada, "one@example.com")
    first = await shop.outbox.next("email-change")
    await ask_email(shop, ada, "two@example.com")
    second = await shop.outbox.next("email-change")
    await problem(await confirm(shop, first.token), 422, "invalid_mail_token")
    answers = await asyncio.gather(*(confirm(shop, second.token) for _ in range(3)))
    assert sorted(answer.status for answer in answers) == [204, 422, 422]


async def test_two_who_want_one_email_at_once(shop: Shop) -> None:
    people = [await shop.register() for _ in range(2)]
    tokens = []
    for person in people:
        await ask_email(shop, person, "wanted@example.com")
        tokens.append((await shop.outbox.next("email-change")).token)
    answers = await asyncio.gather(*(confirm(shop, token) for token in tokens))
    assert sorted(answer.status for answer in answers) == [204, 409]


async def test_refused_email_changes(shop: Shop) -> None:
    ada = await shop.register()
    found = await problem(await ask_email(shop, ada, "no email"), 422, "invalid_body")
    assert found["errors"][0]["pointer"] == "/email"
    found = await problem(await ask_email(shop, ada, "a@example.com", "not it"), 403, "wrong_password")
    assert found["errors"][0]["pointer"] == "/password"


# --- mailers ----------------------------------------------------------------------------------------------------------


async def test_mails_as_files(tmp_path: Path) -> None:
    mailer = FileMailer(tmp_path / "mail")
    mail = Mail("password-reset/7/ab", "password-reset", "a@example.com", "Ada", "7.token", "Subject", "Text")
    await mailer.send(mail)
    await mailer.send(mail)
    (written,) = (tmp_path / "mail").iterdir()
    assert json.loads(written.read_text())["token"] == "7.token"


def test_a_mailer_is_loaded_by_name() -> None:
    assert isinstance(load_mailer("tests.services.shop:Outbox"), Outbox)
    for wrong in ("x", "x:y", "tests.services.shop:nothing", "tests.services.shop:", "os.path:sep", "builtins:dict"):
        with pytest.raises(CannotMail):
            load_mailer(wrong)
