"""`python -m bench http`: its load, its verdicts, and the peers' check of tokens."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import kvstore
from bench import http, people
from bench.http import OURS, check_taken, options_of, thresholds
from bench.peers.web import fastapi, flask, users
from bench.peers.web.tokens import LOOK_EVERY_S, Refused, TokenCheck
from bench.people import Customer, People
from bench.results import BenchError, Measurement
from bench.websystem import SKU, Workload
from bench.wrk import Wrk
from services.users.records import User
from services.web.tokens import ALGORITHM, AUDIENCE, ISSUER, Role, SigningKey, SigningKeys, Tokens

KEY = SigningKey("k1", ALGORITHM, b"0123456789abcdef0123456789abcdef", 0)
SCRIPT = Path(http.__file__).with_name("http.lua")
needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: make bench-deps")


def measured(system: str, workload: Workload, per_second: float) -> Measurement:
    return Measurement(
        system=system, workload=workload, connections=64, seconds=1.0, operations=1, per_second=per_second
    )


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_thresholds_use_medians_and_the_faster_flask() -> None:
    sync, gthread = (flask.system_name(worker_class) for worker_class in flask.WORKER_CLASSES)
    rounds = [
        *(measured(OURS, Workload.ORDERS, rate) for rate in (1, 3_000, 90_000)),
        *(measured(fastapi.SYSTEM, Workload.ORDERS, rate) for rate in (1_000, 2_000, 3_000)),
        *(measured(OURS, Workload.USERS, rate) for rate in (5_000, 5_000, 5_000)),
        *(measured(sync, Workload.USERS, rate) for rate in (1_000, 1_000, 1_000)),
        *(measured(gthread, Workload.USERS, rate) for rate in (3_000, 3_000, 3_000)),
    ]
    orders, readers = thresholds(rounds)
    assert (orders.ratio, orders.met) == (1.5, True)
    assert (readers.theirs, readers.met) == (3_000, False)
    assert [one.met for one in thresholds(rounds[:3])] == [None, None]


def test_each_order_that_was_answered_took_one() -> None:
    check_taken("x", taken=100, answered=100)
    check_taken("x", taken=100 + 2 * 64, answered=100)
    for taken in (99, 100 + 2 * 64 + 1):
        with pytest.raises(BenchError, match=f"x: 100 orders were answered with 201, but {taken} were taken"):
            check_taken("x", taken, 100)


def test_options() -> None:
    parser = argparse.ArgumentParser()
    http.add_arguments(parser)
    quick = options_of(parser.parse_args(["--quick", "--peers", "none"]))
    assert (quick.peers, quick.window_s, quick.warmup_s) == ((), 4.0, 1.0)
    assert options_of(parser.parse_args([])).peers == ("fastapi", "flask")
    for wrong in (["--rounds", "0"], ["--users", "0"], ["--users", "9000"], ["--window", "61"], ["--peers", "rails"]):
        with pytest.raises(ValueError, match=r"at least 1|no such peer: rails"):
            options_of(parser.parse_args(wrong))


# --- wrk and its script -----------------------------------------------------------------------------------------------


def everyone() -> People:
    made = [User(number, f"c{number}@example.com", "Ada", 36, Role.CUSTOMER, "", 0) for number in (7, 8, 9)]
    return People(KEY, tuple(Customer(user, f"token-{user.id}") for user in made), "staff")


class Seen:
    """What a server was sent, and how it answers."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str, str]] = []
        self.answer: Callable[[], web.Response] = lambda: web.Response(status=201)

    async def handle(self, request: web.Request) -> web.Response:
        key, body = request.headers.get("Idempotency-Key", ""), await request.text()
        self.requests.append((f"{request.method} {request.path}", request.headers["Authorization"], key, body))
        return self.answer()


@pytest.fixture
async def seen() -> AsyncIterator[tuple[Seen, str]]:
    one, app = Seen(), web.Application()
    app.router.add_route("*", "/{anything:.*}", one.handle)
    async with TestServer(app) as server:
        yield one, str(server.make_url("")).rstrip("/")


@pytest.fixture
def load(tmp_path: Path, seen: tuple[Seen, str]) -> Callable[..., Awaitable[object]]:
    everyone().write(tmp_path / "customers")

    async def run(*arguments: str) -> object:
        first, *others = arguments
        given = [first, str(tmp_path / "customers"), *others]
        return await asyncio.to_thread(Wrk("wrk").load, "them", seen[1], SCRIPT, given, 2, 1.0)

    return run


@needs_wrk
async def test_each_order_has_a_key_of_its_own(seen: tuple[Seen, str], load: Callable[..., Awaitable[object]]) -> None:
    await load("order", SKU, "ab" * 12)
    requests = seen[0].requests
    assert {(what, body) for what, _, _, body in requests} == {
        ("POST /v1/orders", f'{{"lines":[{{"sku":"{SKU}","quantity":1}}]}}')
    }
    assert {token for _, token, _, _ in requests} == {f"Bearer token-{number}" for number in (7, 8, 9)}
    keys = [key for _, _, key, _ in requests]
    assert len(set(keys)) == len(keys) > 10
    assert {len(key) for key in keys} == {36}


@needs_wrk
async def test_users_read_themselves(seen: tuple[Seen, str], load: Callable[..., Awaitable[object]]) -> None:
    seen[0].answer = lambda: web.Response(status=200)
    await load("user")
    assert {(what, token) for what, token, _, _ in seen[0].requests} == {
        (f"GET /user/{number}", f"Bearer token-{number}") for number in (7, 8, 9)
    }


@needs_wrk
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda: web.Response(status=409, text='{"code": "short"}'), r'them: \d+ of \d+ .*409 \{"code": "short"\}'),
        (lambda: web.Response(status=200, text="fine"), "first answer was: 200 fine"),
        (lambda: web.Response(status=201, headers={"Idempotent-Replayed": "true"}), "first answer was: 201"),
    ],
)
async def test_any_other_answer_fails_the_run(
    seen: tuple[Seen, str], load: Callable[..., Awaitable[object]], answer: Callable[[], web.Response], told: str
) -> None:
    turns = iter(range(1_000_000))
    # One in twenty is enough.
    seen[0].answer = lambda: answer() if next(turns) % 20 == 10 else web.Response(status=201)
    with pytest.raises(BenchError, match=told):
        await load("order", SKU, "ab" * 12)


def test_wrk_without_a_result_or_with_errors_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "wrk"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for printed, told in (
        ("nothing", "wrk printed no result"),
        ("RESULT [10,1000000,1.0,1.0,1.0,3,0]", "them: 3 errors beside 10 answers"),
        ("RESULT [0,1000000,1.0,1.0,1.0,0,0]", "them: 0 errors beside 0 answers"),
    ):
        program.write_text(f"#!/bin/sh\necho '{printed}'\n")
        program.chmod(0o755)
        with pytest.raises(BenchError, match=told):
            Wrk("wrk").load("them", "http://127.0.0.1:1", SCRIPT, [], 1, 1.0)


# --- people and their tokens ------------------------------------------------------------------------------------------


async def test_tokens_are_good_for_ours_and_for_the_peers(tmp_path: Path) -> None:
    made = await asyncio.to_thread(people.make, tmp_path, 3)
    assert len({customer.user.id for customer in made.customers}) == 3
    check = TokenCheck()
    check.learn({made.key.kid: made.key.secret}, ())
    async with kvstore.open_embedded(str(tmp_path / "people")) as store:
        ours = Tokens(SigningKeys(store))
        for customer in made.customers:
            header = f"Bearer {customer.token}"
            caller = await ours.verify(header)
            assert caller.user_id == customer.user.id
            assert check.caller(header) == tuple(caller)[:-1]  # the last says how long it is good


class Clock:
    def __init__(self) -> None:
        self.now_s = time.time()

    def __call__(self) -> float:
        return self.now_s


def header(clock: Clock, **changed: object) -> str:
    now = int(clock.now_s)
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "7", "role": "customer", "sid": "s", "iat": now, "exp": now + 600}
    return "Bearer " + jwt.encode({**claims, **changed}, KEY.secret, ALGORITHM, headers={"kid": KEY.kid})


def test_the_peers_refuse_what_ours_refuses() -> None:
    clock = Clock()
    check = TokenCheck(clock)
    good = header(clock)
    assert check.is_stale()
    with pytest.raises(Refused, match="invalid_token"):  # it knows no key yet
        check.caller(good)
    check.learn({KEY.kid: KEY.secret}, ())
    assert not check.is_stale()
    assert check.caller(good) == check.caller(good) == (7, "customer", "s")
    for wrong in (
        good[:-2],
        "Bearer",
        "Basic x",
        header(clock, aud="x"),
        header(clock, iss="x"),
        header(clock, sub="x"),
    ):
        with pytest.raises(Refused, match="invalid_token"):
            check.caller(wrong)
    with pytest.raises(Refused, match="authentication_required"):
        check.caller(None)
    with pytest.raises(Refused, match="token_expired"):
        check.caller(header(clock, exp=int(clock.now_s) - 60))
    clock.now_s += LOOK_EVERY_S
    assert check.is_stale()
    check.learn({KEY.kid: KEY.secret}, {"s"})
    with pytest.raises(Refused, match="invalid_token"):
        check.caller(good)
    check.learn({KEY.kid: KEY.secret}, ())
    assert check.caller(good)
    clock.now_s += 606
    with pytest.raises(Refused, match="token_expired"):
        check.caller(good)
    clock.now_s -= 606
    check.learn({}, ())  # what was verified under a key that is gone is not remembered
    with pytest.raises(Refused, match="invalid_token"):
        check.caller(good)


class FakeRedis:
    """The few commands that the peer sends, over dicts."""

    def hgetall(self, _name: str) -> dict[bytes, bytes]:
        return {KEY.kid.encode(): KEY.secret}

    def smembers(self, _name: str) -> set[bytes]:
        return set()

    def ping(self) -> bool:
        return True

    def hmget(self, name: str, *_fields: str) -> list[bytes | None]:
        return [b"Ada", b"36", b"5"] if name == "user:7" else [None, None, None]


def test_the_peer_for_users_answers_as_ours_does() -> None:
    client = users.build(FakeRedis()).test_client()
    own = {"Authorization": header(Clock())}
    answer = client.get("/user/7", headers=own)
    assert (answer.status_code, answer.json) == (200, {"id": 7, "name": "Ada", "age": 36})
    tag = answer.headers["ETag"]
    assert client.get("/user/7", headers={**own, "If-None-Match": tag}).status_code == 304
    assert client.get("/user/7", headers={**own, "If-None-Match": '"4"'}).status_code == 200
    assert client.get("/user/8", headers=own).status_code == 404
    assert client.get("/user/8", headers={"Authorization": header(Clock(), role="staff")}).status_code == 404
    assert client.get("/user/7", headers={"Authorization": header(Clock(), role="staff")}).status_code == 200
    assert client.get("/user/7").status_code == 401
    assert client.get("/readyz").status_code == 200
