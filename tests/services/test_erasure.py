"""Everything that is held of someone can be taken along, and goes when they go."""

from __future__ import annotations

import asyncio
from typing import Any

from services.users.erasure import Retention
from services.users.records import (
    activity_of,
    addresses_of,
    decode_entry,
    decode_erased,
    email_change_key,
    erased_key,
    known_key,
    mailed_of,
    sessions_of,
    user_key,
)
from services.web.ids import timestamp
from services.web.tokens import TOKEN_GONE_AFTER_S
from services.work import steps
from services.work.kinds import FORGET_CUSTOMER
from tests.services.shop import PASSWORD, Person, Shop, problem

ME = "/v1/users/me"
NAME = "Augusta Ada King"
HERE = "203.0.113.7"
HOME = {"name": NAME, "line1": "12 St James's Square", "city": "London", "country": "GB", "phone": "+44 20 7946 0000"}


async def everything(shop: Shop) -> bytes:
    return b"\n".join([record.key + b" " + record.value async for record in shop.store.scan(b"", b"")])


async def someone_with_everything(shop: Shop) -> Person:
    """A record of every kind."""
    body = {"email": "ada@lovelace.example", "password": PASSWORD, "name": NAME, "age": 36}
    assert (await shop.users.post("/v1/users", json=body)).status == 201
    from_home = {"X-Forwarded-For": HERE, "User-Agent": "Ada's own browser"}
    credentials = {"email": body["email"], "password": PASSWORD}
    answer = await shop.users.post("/v1/sessions", json=credentials, headers=from_home)
    session = await answer.json()
    ada = Person(session["user_id"], str(body["email"]), session["access_token"])
    assert (await shop.users.post(f"{ME}/addresses", json=HOME, headers=ada.headers)).status == 201
    assert (await shop.users.post("/v1/password-resets", json={"email": ada.email})).status == 202
    await shop.outbox.next("password-reset")
    change = {"email": "countess@lovelace.example", "password": PASSWORD}
    assert (await shop.users.post(f"{ME}/email", json=change, headers=ada.headers)).status == 202
    await shop.outbox.next("email-change")
    return ada


async def erase(shop: Shop, person: Person, password: str = PASSWORD) -> Any:
    return await shop.users.post(f"{ME}/erasure", json={"password": password}, headers=person.headers)


async def test_an_export_holds_what_every_record_says(shop: Shop) -> None:
    ada = await someone_with_everything(shop)
    await shop.register()  # somebody else
    answer = await shop.users.get(f"{ME}/export", headers=ada.headers)
    assert answer.headers["Content-Disposition"].startswith("attachment")
    found = await answer.json()
    account = found["account"]
    assert (account["id"], account["email"], account["name"], account["age"]) == (ada.id, ada.email, NAME, 36)
    assert [(one["name"], one["phone"]) for one in found["addresses"]] == [(NAME, HOME["phone"])]
    assert [(one["address"], one["user_agent"]) for one in found["sessions"]] == [(HERE, "Ada's own browser")]
    assert found["known_addresses"] == [HERE]
    assert found["waiting_email"] == "countess@lovelace.example"
    assert {(one["purpose"], one["email"]) for one in found["mailed"]} == {
        ("password-reset", ada.email),
        ("email-change", "countess@lovelace.example"),
    }
    assert [one["action"] for one in found["activity"]] == [
        "email_change_requested", "password_reset_requested", "address_added", "signed_in", "registered",
    ]  # fmt: skip
    assert found["activity_is_complete"] is True
    # The sign-in was right, so nothing is left of its count for that address; the two mails are.
    assert [(one["rule"], one["address"], one["level"]) for one in found["attempts"]] == [
        ("sign-in-account", "", 0.0), ("mail-account", "", 1.0), ("mail-account", "", 1.0),
    ]  # fmt: skip
    # No kind of record that names the user is left out: whoever adds one adds it here and to the export.
    keys = [record.key.split(b"/") async for record in shop.store.scan(b"", b"", keys_only=True)]
    kinds = {parts[0] for parts in keys if b"%d" % ada.id in parts}
    assert kinds == {
        b"user", b"session", b"known-address", b"address", b"mailed", b"email-change", b"activity",
    }  # fmt: skip
    assert "password_hash" not in str(found)


async def test_an_export_says_from_where_passwords_were_tried(shop: Shop) -> None:
    ada, bob = await shop.register(), await shop.register()
    for person, address in ((ada, "203.0.113.66"), (ada, "203.0.113.66"), (ada, "203.0.113.67"), (bob, HERE)):
        guess = {"email": person.email, "password": "guess"}
        assert (await shop.users.post("/v1/sessions", json=guess, headers={"X-Forwarded-For": address})).status == 401
    found = await (await shop.users.get(f"{ME}/export", headers=ada.headers)).json()
    levels = {(one["rule"], one["address"]): round(one["level"]) for one in found["attempts"]}
    assert levels == {
        ("sign-in-account-address", "203.0.113.66"): 2,
        ("sign-in-account-address", "203.0.113.67"): 1,
        ("sign-in-account", ""): 3,
    }
    assert all(one["last_at"] <= one["next_at"] for one in found["attempts"])


async def test_erasure_leaves_nothing_of_a_person_in_the_current_state(shop: Shop) -> None:
    ada, bob = await someone_with_everything(shop), await shop.register()
    before = (await everything(shop)).lower()
    for trace in (b"lovelace", NAME.lower().encode(), HERE.encode(), b"own browser"):
        assert trace in before
    answer = await erase(shop, ada)
    assert answer.status == 200
    erased = await answer.json()
    stored = await shop.store.get(erased_key(ada.id))
    assert stored is not None
    tombstone = decode_erased(stored.value)
    assert tombstone.free_by_ms - tombstone.erased_ms == (Retention().backups_s + TOKEN_GONE_AFTER_S) * 1000
    assert (erased["id"], erased["erased_at"] < erased["free_by"]) == (ada.id, True)
    assert (erased["free_by"], erased["orders_free_by"]) == (
        timestamp(tombstone.free_by_ms), timestamp(tombstone.orders_free_by_ms),
    )  # fmt: skip
    # An order that is under way may keep its address until then; and after that it is in backups for a while.
    assert tombstone.orders_free_by_ms - tombstone.free_by_ms == Retention().orders_s * 1000
    [(step, by_ms)] = [
        (found, found.arguments["by_ms"])
        for record in (await shop.store.range(prefix=steps.STEPS)).records
        if (found := steps.decode_step(record.value)).kind == FORGET_CUSTOMER
    ]
    assert step.due_ms == tombstone.erased_ms + TOKEN_GONE_AFTER_S * 1000
    assert by_ms == step.due_ms + Retention().orders_s * 1000
    await problem(await shop.users.get(ME, headers=ada.headers), 401, "invalid_token")
    again = await shop.users.post("/v1/sessions", json={"email": ada.email, "password": PASSWORD})
    await problem(again, 401, "wrong_credentials")

    async with asyncio.timeout(10):
        while (await shop.store.range(prefix=steps.steps_of("users"))).records:
            await asyncio.sleep(0.01)
    # Counts of attempts name an address for some hours, but not whose it is.
    after = [record async for record in shop.store.scan(b"", b"") if not record.key.startswith(b"throttle/")]
    text = b"\n".join([record.key + b" " + record.value for record in after]).lower()
    for trace in (b"lovelace", NAME.lower().encode(), HERE.encode(), b"own browser", b"7946"):
        assert trace not in text
    assert b"lovelace" not in (await everything(shop)).lower()
    for key in (user_key(ada.id), known_key(ada.id), email_change_key(ada.id)):
        assert await shop.store.get(key) is None
    for prefix in (addresses_of(ada.id), mailed_of(ada.id), sessions_of(ada.id), activity_of(ada.id)):
        assert (await shop.store.range(prefix=prefix)).records == ()
    # What happened stays known, to whom no more.
    entries = [decode_entry(record.value) for record in after if record.key.startswith(b"audit/")]
    about = [entry for entry in entries if entry.subject == ada.id]
    assert {"erased", "signed_in", "registered"} <= {entry.action for entry in about}
    assert {(entry.address, entry.user_agent) for entry in about} == {("", "")}
    assert (await shop.users.get(ME, headers=bob.headers)).status == 200


async def test_the_email_is_free_again_and_the_id_is_not(shop: Shop) -> None:
    ada = await shop.register()
    assert (await erase(shop, ada)).status == 200
    body = {"email": ada.email, "password": PASSWORD, "name": "Ada", "age": 36}
    answer = await shop.users.post("/v1/users", json=body)
    assert answer.status == 201
    assert (await answer.json())["id"] != ada.id


async def test_refused_erasures(shop: Shop) -> None:
    ada = await shop.register()
    found = await problem(await erase(shop, ada, "guess"), 403, "wrong_password")
    assert found["errors"][0]["pointer"] == "/password"
    answers = await asyncio.gather(*(erase(shop, ada) for _ in range(3)))
    assert sorted(answer.status for answer in answers)[0] == 200
    assert {answer.status for answer in answers} <= {200, 401, 404}
    assert [answer.status for answer in answers].count(200) == 1


async def test_an_address_that_is_added_during_erasure_does_not_stay(shop: Shop) -> None:
    ada = await shop.register()

    async def add() -> Any:
        return await shop.users.post(f"{ME}/addresses", json=HOME, headers=ada.headers)

    erased, *_ = await asyncio.gather(erase(shop, ada), *(add() for _ in range(8)))
    assert erased.status == 200
    assert (await shop.store.range(prefix=addresses_of(ada.id))).records == ()


def test_a_tombstone_of_an_older_version_says_nothing_of_orders() -> None:
    assert decode_erased(b'{"v":1,"id":7,"erased_ms":1,"free_by_ms":2}').orders_free_by_ms == 0


def test_the_date_is_the_latest_of_all_that_is_kept() -> None:
    day_ms = 24 * 3600 * 1000
    assert Retention(backups_s=90 * 24 * 3600).free_by_ms(0) == 90 * day_ms
    assert Retention(backups_s=0, log_s=2 * 24 * 3600).free_by_ms(0) == 2 * day_ms
    assert Retention(backups_s=0, log_s=0, history_s=0).free_by_ms(0) == 26 * 3600 * 1000  # what ends by itself
