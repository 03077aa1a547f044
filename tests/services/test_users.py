"""The user service over HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Any

import argon2
import jwt
import msgspec
import pytest
from yarl import URL

from services.users.emails import normalise_email
from services.users.passwords import HASHING_MAX, Passwords
from services.users.records import user_key
from services.web.problems import Problem
from services.web.tokens import ALGORITHM, AUDIENCE, CURRENT_KEY, ISSUER, Role, SigningKeys, Tokens
from tests.services.shop import PASSWORD, Shop, problem

ADA = {"email": "Ada@Example.com", "password": PASSWORD, "name": "Ada", "age": 36}


# --- registering ------------------------------------------------------------------------------------------------------


async def test_register_sign_in_read_self(shop: Shop) -> None:
    answer = await shop.users.post("/v1/users", json=ADA)
    assert answer.status == 201
    account = await answer.json()
    assert answer.headers["Location"] == f"/user/{account['id']}"
    assert answer.headers["Cache-Control"] == "no-store"
    assert {key: account[key] for key in ("email", "name", "age", "role")} == {
        "email": "Ada@Example.com",
        "name": "Ada",
        "age": 36,
        "role": "customer",
    }
    assert "password" not in json.dumps(account)
    assert 0 < account["id"] < 2**53

    ada = await shop.sign_in(" aDa@example.COM ")
    assert ada.id == account["id"]
    answer = await shop.users.get("/v1/users/me", headers=ada.headers)
    assert answer.status == 200
    assert await answer.json() == account
    again = await shop.users.get("/v1/users/me", headers={**ada.headers, "If-None-Match": answer.headers["ETag"]})
    assert again.status == 304

    answer = await shop.users.get(f"/user/{ada.id}", headers=ada.headers)
    assert await answer.json() == {"id": ada.id, "name": "Ada", "age": 36}


async def test_the_password_is_kept_as_argon2id_only(shop: Shop) -> None:
    ada = await shop.register()
    record = await shop.store.get(user_key(ada.id))
    assert record is not None
    assert PASSWORD.encode() not in record.value
    stored = json.loads(record.value)["password_hash"]
    parameters = argon2.extract_parameters(stored)
    assert stored.startswith("$argon2id$")
    assert (parameters.memory_cost, parameters.time_cost, parameters.parallelism) == (19456, 2, 1)


async def test_an_email_is_registered_once_in_any_spelling(shop: Shop) -> None:
    assert (await shop.users.post("/v1/users", json=ADA)).status == 201
    for email in ("ada@example.com", "ADA@EXAMPLE.COM", "ada@example．com"):
        await problem(await shop.users.post("/v1/users", json={**ADA, "email": email}), 409, "email_taken")


async def test_of_many_registering_one_email_at_once_one_wins(shop: Shop) -> None:
    answers = await asyncio.gather(*(shop.users.post("/v1/users", json=ADA) for _ in range(8)))
    assert sorted(answer.status for answer in answers) == [201] + [409] * 7
    users = await shop.store.range(prefix=b"user/")
    assert len(users.records) == 1


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"email": "ada"}, "/email"),
        ({"email": "ada@"}, "/email"),
        ({"email": "@example.com"}, "/email"),
        ({"email": "ada@localhost"}, "/email"),
        ({"email": "a@b@example.com"}, "/email"),
        ({"email": "ada@example..com"}, "/email"),
        ({"email": "a da@example.com"}, "/email"),
        ({"email": "ada\u0000@example.com"}, "/email"),
        ({"email": "a" * 65 + "@example.com"}, "/email"),
        ({"email": "a@" + "b" * 252 + ".c"}, "/email"),
        ({"email": "a@" + "字" * 84 + ".c"}, "/email"),  # few characters, and yet a long key
        ({"email": "a@\u202eb.c"}, "/email"),
        ({"email": 7}, "/email"),
        ({"password": "short7!"}, "/password"),
        ({"password": "x1" * 65}, "/password"),
        ({"password": None}, "/password"),
        ({"name": ""}, "/name"),
        ({"name": "a\nb"}, "/name"),
        ({"age": -1}, "/age"),
        ({"age": 151}, "/age"),
        ({"age": "36"}, "/age"),
        ({"age": 36.5}, "/age"),
        ({"role": "staff"}, "/role"),  # nobody gives himself a role
        ({"id": 1}, "/id"),
    ],
)
async def test_bad_registrations(shop: Shop, change: dict[str, Any], pointer: str) -> None:
    found = await problem(await shop.users.post("/v1/users", json={**ADA, **change}), 422, "invalid_body")
    assert [error["pointer"] for error in found["errors"]] == [pointer]
    assert (await shop.store.range(prefix=b"user")).records == ()


@pytest.mark.parametrize(
    "password", ["password", "PassWord", "12345678", "qwertyuiop", "aaaaaaaaaa", "ada@example.com"]
)
async def test_common_passwords_are_refused(shop: Shop, password: str) -> None:
    answer = await shop.users.post("/v1/users", json={**ADA, "password": password})
    found = await problem(answer, 422, "common_password")
    assert found["errors"][0]["pointer"] == "/password"


# --- signing in -------------------------------------------------------------------------------------------------------


async def test_wrong_password_and_unknown_email_look_alike(shop: Shop) -> None:
    ada = await shop.register()
    found = []
    for email, password in ((ada.email, "not the password"), ("nobody@example.com", PASSWORD), ("no email", PASSWORD)):
        answer = await shop.users.post("/v1/sessions", json={"email": email, "password": password})
        body = await problem(answer, 401, "wrong_credentials")
        del body["request_id"]
        found.append(body)
    assert found[0] == found[1] == found[2]


async def test_wrong_password_and_unknown_email_take_alike(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: each costs two reads of the store and one argon2 verification."""
    ada = await shop.register()
    verified: list[str] = []
    matches = Passwords._matches

    def counting(self: Passwords, stored: str, password: str) -> bool:
        verified.append(stored)
        return matches(self, stored, password)

    monkeypatch.setattr(Passwords, "_matches", counting)
    costs = []
    for email in (ada.email, "nobody@example.com"):
        verified.clear()
        answer = await shop.users.post("/v1/sessions", json={"email": email, "password": "not the password"})
        assert answer.status == 401
        costs.append([str(argon2.extract_parameters(stored)) for stored in verified])
    assert costs[0] == costs[1]
    assert len(costs[0]) == 1


async def test_a_hash_of_older_parameters_is_renewed(shop: Shop) -> None:
    ada = await shop.register()
    key = user_key(ada.id)
    record = await shop.store.get(key)
    assert record is not None
    stored = json.loads(record.value)
    stored["password_hash"] = argon2.PasswordHasher(time_cost=1, memory_cost=8192, parallelism=1).hash(PASSWORD)
    await shop.store.put(key, json.dumps(stored).encode())
    await shop.sign_in(ada.email)
    record = await shop.store.get(key)
    assert record is not None
    assert argon2.extract_parameters(json.loads(record.value)["password_hash"]).memory_cost == 19456
    await shop.sign_in(ada.email)


async def test_hashing_is_bounded() -> None:
    passwords = Passwords()
    try:
        stored = await passwords.hash(PASSWORD)
        tasks = [asyncio.ensure_future(passwords.verify(stored, PASSWORD)) for _ in range(HASHING_MAX + 5)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        passwords.close()
    refused = [result for result in results if isinstance(result, Problem)]
    assert [result.code for result in refused] == ["overloaded"] * 5
    assert results.count(True) == HASHING_MAX


def test_normalise_email() -> None:
    assert normalise_email(" Ada.Lovelace@EXAMPLE.com") == "ada.lovelace@example.com"
    assert normalise_email("straße@example.com") == "strasse@example.com"


# --- whose account ----------------------------------------------------------------------------------------------------


async def test_another_users_account_is_not_there(shop: Shop) -> None:
    ada, bob, staff = await shop.register(), await shop.register(), await shop.staff()
    unknown = max(ada.id, bob.id) + 1
    bodies = []
    for user_id in (bob.id, unknown):
        body = await problem(await shop.users.get(f"/user/{user_id}", headers=ada.headers), 404, "not_found")
        bodies.append(body["detail"])
    assert bodies[0] == bodies[1]
    answer = await shop.users.get(f"/user/{bob.id}", headers=staff.headers)
    assert answer.status == 200
    assert (await answer.json())["id"] == bob.id
    await problem(await shop.users.get(f"/user/{unknown}", headers=staff.headers), 404, "not_found")


@pytest.mark.parametrize("user_id", ["0", "-1", "me", "1.0", str(2**53), "9" * 500, "%00", "1%2f..", "%F0%9F"])
async def test_what_is_no_user_id(shop: Shop, user_id: str) -> None:
    staff = await shop.staff()
    await problem_404(shop, f"/user/{user_id}", staff.headers)


async def problem_404(shop: Shop, path: str, headers: dict[str, str]) -> None:
    answer = await shop.users.get(URL(path, encoded=True), headers=headers)
    assert answer.status == 404
    assert (await answer.json(content_type=None))["code"] == "not_found"


# --- tokens -----------------------------------------------------------------------------------------------------------


async def signing_key(shop: Shop) -> tuple[str, bytes]:
    current = await shop.store.get(CURRENT_KEY)
    assert current is not None
    record = await shop.store.get(b"signing-key/" + current.value)
    assert record is not None
    return current.value.decode(), base64.b64decode(json.loads(record.value)["secret"])


def claims(user_id: int, **change: Any) -> dict[str, Any]:
    now = int(time.time())
    whole = {"iss": ISSUER, "aud": AUDIENCE, "sub": str(user_id), "role": "customer", "iat": now, "exp": now + 600}
    whole.update(change)
    return {key: value for key, value in whole.items() if value is not None}


async def test_no_token_and_no_bearer(shop: Shop) -> None:
    answer = await shop.users.get("/v1/users/me")
    await problem(answer, 401, "authentication_required")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    for header in ("Basic YTpi", "Bearer", "Bearer ", "Bearer a.b", "Bearer " + "x" * 5000, "Bearer \u00e9.b.c"):
        await problem(await shop.users.get("/v1/users/me", headers={"Authorization": header}), 401, "invalid_token")


@pytest.mark.parametrize(
    "change",
    [
        {"aud": "others"},
        {"aud": None},
        {"iss": "me"},
        {"iss": None},
        {"exp": None},
        {"exp": "soon"},
        {"sub": None},
        {"sub": "0"},
        {"sub": "me"},
        {"role": "god"},
        {"role": None},
    ],
)
async def test_tokens_with_wrong_claims(shop: Shop, change: dict[str, Any]) -> None:
    ada = await shop.register()
    kid, secret = await signing_key(shop)
    token = jwt.encode(claims(ada.id, **change), secret, algorithm=ALGORITHM, headers={"kid": kid})
    await problem(
        await shop.users.get("/v1/users/me", headers={"Authorization": f"Bearer {token}"}), 401, "invalid_token"
    )


async def test_forged_tokens(shop: Shop) -> None:
    ada = await shop.register()
    kid, secret = await signing_key(shop)
    good = jwt.encode(claims(ada.id), secret, algorithm=ALGORITHM, headers={"kid": kid})
    assert (await shop.users.get("/v1/users/me", headers={"Authorization": f"Bearer {good}"})).status == 200
    head, body, signature = good.split(".")
    forged = [
        jwt.encode(claims(ada.id), "another secret that is long enough ....", ALGORITHM, headers={"kid": kid}),
        jwt.encode(claims(ada.id), "", "none", headers={"kid": kid}),
        jwt.encode(claims(ada.id), secret + b"." * 64, "HS512", headers={"kid": kid}),
        jwt.encode(claims(ada.id), secret, ALGORITHM, headers={"kid": "0123456789abcdef"}),
        jwt.encode(claims(ada.id), secret, ALGORITHM),
        jwt.encode(claims(ada.id), secret, ALGORITHM, headers={"kid": "../user/1"}),
        f"{head}.{body}.",
        f"{head}.{body}.{signature[:-2]}AA",
        f"{head}.{base64.urlsafe_b64encode(json.dumps(claims(ada.id, role='staff')).encode()).decode()}.{signature}",
    ]
    for token in forged:
        answer = await shop.users.get("/v1/users/me", headers={"Authorization": f"Bearer {token}"})
        await problem(answer, 401, "invalid_token")


async def test_a_stale_token(shop: Shop) -> None:
    ada = await shop.register()
    kid, secret = await signing_key(shop)
    old = claims(ada.id, iat=int(time.time()) - 700, exp=int(time.time()) - 100)
    token = jwt.encode(old, secret, ALGORITHM, headers={"kid": kid})
    answer = await shop.users.get("/v1/users/me", headers={"Authorization": f"Bearer {token}"})
    await problem(answer, 401, "token_expired")
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]


async def test_a_token_that_was_verified_before_still_expires(shop: Shop) -> None:
    now = [time.time()]
    tokens = Tokens(SigningKeys(shop.store), clock_s=lambda: now[0])
    token = await tokens.issue(7, Role.CUSTOMER)
    header = f"Bearer {token}"
    assert (await tokens.verify(header)).user_id == 7
    now[0] += 599
    assert (await tokens.verify(header)).user_id == 7
    now[0] += 7
    for _ in range(2):
        with pytest.raises(Problem) as caught:
            await tokens.verify(header)
        assert caught.value.code == "token_expired"


async def test_one_signing_key_however_many_start_at_once(shop: Shop) -> None:
    issuers = [Tokens(SigningKeys(shop.store)) for _ in range(8)]
    issued = await asyncio.gather(*(tokens.issue(7, Role.CUSTOMER) for tokens in issuers))
    assert len({jwt.get_unverified_header(token)["kid"] for token in issued}) == 1
    assert len((await shop.store.range(prefix=b"signing-key/")).records) == 1
    for token in issued:
        assert (await issuers[0].verify(f"Bearer {token}")).user_id == 7


async def test_a_rotated_key_is_picked_up_and_a_removed_one_refused(shop: Shop) -> None:
    now = [1000.0]
    tokens = Tokens(SigningKeys(shop.store, clock_s=lambda: now[0]))
    old = await tokens.issue(7, Role.CUSTOMER)
    assert (await tokens.verify(f"Bearer {old}")).user_id == 7
    # Another process makes a new key the current one.
    kid, _ = await signing_key(shop)
    record = await shop.store.get(b"signing-key/" + kid.encode())
    assert record is not None
    fresh = msgspec.json.encode(
        {**json.loads(record.value), "kid": "new", "secret": base64.b64encode(b"n" * 32).decode()}
    )
    await shop.store.put(b"signing-key/new", fresh)
    await shop.store.put(CURRENT_KEY, b"new")
    rotated = jwt.encode(claims(8), b"n" * 32, ALGORITHM, headers={"kid": "new"})
    now[0] += 61  # longer than any cache of keys is trusted
    assert (await tokens.verify(f"Bearer {rotated}")).user_id == 8
    assert (await tokens.verify(f"Bearer {old}")).user_id == 7
    assert jwt.get_unverified_header(await tokens.issue(7, Role.CUSTOMER))["kid"] == "new"
    await shop.store.delete(b"signing-key/" + kid.encode())
    now[0] += 61  # longer than any cache of keys is trusted
    with pytest.raises(Problem):
        await tokens.verify("Bearer " + jwt.encode(claims(8), b"n" * 32, ALGORITHM, headers={"kid": "unknown"}))
    with pytest.raises(Problem):
        await tokens.verify(f"Bearer {old}")


async def test_forged_key_ids_do_not_load_the_store(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(SigningKeys(shop.store, clock_s=lambda: 1000.0))
    await tokens.issue(7, Role.CUSTOMER)
    reads = 0
    txn = shop.store.txn

    async def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal reads
        reads += 1
        return await txn(*args, **kwargs)

    monkeypatch.setattr(shop.store, "txn", counting)
    for number in range(200):
        forged = jwt.encode(claims(7), b"n" * 32, ALGORITHM, headers={"kid": f"unknown{number}"})
        with pytest.raises(Problem):
            await tokens.verify(f"Bearer {forged}")
    assert reads == 0  # the keys were read less than a second ago, by that clock
