"""Trace context: taken from requests, made where there is none, in the log, remembered by steps and taken up again."""

from __future__ import annotations

import asyncio
import io
import json
import re

import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

import kvstore
from services.web import app as web_app
from services.web import logs, tracing
from services.web.app import new_app
from services.web.endpoints import Api, Call, get
from services.web.idempotency import IdempotencyKeys
from services.web.logs import AccessLog
from services.web.tokens import SigningKeys, Tokens
from services.work import steps
from services.work.steps import Again, Step, StepRun, decode_step
from services.work.worker import Worker
from tests.services.shop import plain_headers, problem

THEIRS = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
MADE = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00\Z")


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        (THEIRS, THEIRS),
        # Of a version to come what is known is taken.
        (f"cc{THEIRS[2:]}", THEIRS),
        (f"cc{THEIRS[2:]}-what-the-future-brings", THEIRS),
        (f"{THEIRS}-no-field-of-today", None),
        (f"ff{THEIRS[2:]}", None),
        (THEIRS.upper(), None),
        (THEIRS[:-1], None),
        (f"{THEIRS}\n", None),
        (f" {THEIRS}", None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01", None),
        (f"cc{THEIRS[2:]}-{'x' * 1000}", None),
        ("", None),
        (None, None),
    ],
)
def test_what_is_valid_is_taken_and_one_is_made_otherwise(header: str | None, taken: str | None) -> None:
    trace = tracing.begin(header)
    assert tracing.traceparent() == trace
    if taken is None:
        assert MADE.match(trace)
        assert tracing.begin(header) != trace
    else:
        assert trace == taken
    tracing.resume("")


class Things:
    def __init__(self, store: kvstore.Client) -> None:
        self._store = store

    @get("/later", {204: None})
    async def later(self, call: Call) -> web.Response:
        """Leave a step"""
        await self._store.txn(success=[steps.put("later", "1")])
        return web.Response(status=204)

    @get("/broken", {204: None})
    async def broken(self, call: Call) -> web.Response:
        """Fail"""
        raise RuntimeError("as if")


async def test_from_a_request_to_the_steps_that_follow_from_it(store: kvstore.Client) -> None:
    stream = io.BytesIO()
    access_log = AccessLog("things", stream)
    api = Api("Things", "For tests.", Tokens(SigningKeys(store)), IdempotencyKeys(store))
    api.add(Things(store), tag="Things")
    client: TestClient[web.Request, web.Application] = TestClient(TestServer(new_app(store, api, access_log)))
    async with client:
        answer = await client.get("/later", headers={"traceparent": THEIRS})
        assert answer.status == 204
        # On the same connection, so in the same task: nothing of the request before is left.
        other = await client.get("/livez")
        assert "traceparent" not in plain_headers(answer)
        assert "traceparent" not in plain_headers(other)
    access_log.flush()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines[0]["traceparent"] == THEIRS
    assert MADE.match(lines[1]["traceparent"])

    seen: list[tuple[str, str]] = []
    done = asyncio.Event()

    async def later(run: StepRun) -> None:
        seen.append(("later", tracing.traceparent()))
        if run.step.attempt == 0:
            raise Again("not_yet", after_s=0.0)
        assert await run.finish(success=[steps.put("last", "1")])

    async def last(run: StepRun) -> None:
        seen.append(("last", tracing.traceparent()))
        assert await run.finish()
        done.set()

    working = asyncio.create_task(Worker(store, {"later": later, "last": last}).run())
    try:
        async with asyncio.timeout(10):
            await done.wait()
    finally:
        working.cancel()
        await asyncio.wait([working])
    assert seen == [("later", THEIRS), ("later", THEIRS), ("last", THEIRS)]


async def test_what_goes_wrong_is_logged_with_its_trace(store: kvstore.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, object]] = []

    def keep(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        written.append(dict(event))
        raise structlog.DropEvent

    monkeypatch.setattr(web_app, "log", structlog.wrap_logger(None, processors=[logs.with_trace, keep]))
    api = Api("Things", "For tests.", Tokens(SigningKeys(store)), IdempotencyKeys(store))
    api.add(Things(store), tag="Things")
    client: TestClient[web.Request, web.Application] = TestClient(TestServer(new_app(store, api)))
    async with client:
        await problem(await client.get("/broken", headers={"traceparent": THEIRS}), 500, "internal")
    assert [(line["event"], line["traceparent"]) for line in written] == [("unforeseen", THEIRS)]


def test_a_step_of_before_belongs_to_no_trace() -> None:
    old = b'{"v":1,"kind":"expire","subject":"order/1","due_ms":1,"created_ms":1}'
    assert decode_step(old) == Step("expire", "order/1", 1, 1)
    assert decode_step(old).traceparent == ""
    assert b"traceparent" in steps.put("expire", "order/1", traceparent=THEIRS).value
