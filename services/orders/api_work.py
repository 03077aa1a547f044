"""Endpoints for staff to see what workers could not do by themselves, or not yet, and to have them try again."""

from __future__ import annotations

from typing import Annotated, Any

from aiohttp import web
from msgspec import Meta, Struct

import kvstore
from services.orders.records import encode
from services.web.answers import json_response
from services.web.endpoints import Access, Call, get, post
from services.web.idempotency import refuse_and_store
from services.web.ids import Timestamp, timestamp
from services.web.paging import Page, PageQuery, after_cursor, cursor_of, page_of
from services.web.problems import Problem
from services.work.steps import PARKED, STEPS, ParkedStep, Step, read_parked, unpark
from services.work.waiting import run_now, waiting

StepKind = Annotated[str, Meta(max_length=40, pattern=r"\A[a-z-]+\Z")]
Subject = Annotated[str, Meta(max_length=64, pattern=r"\A[0-9A-Za-z-]+\Z")]


class ParkedStepBody(Struct, frozen=True):
    """`subject` of a payment's step is the order and the attempt, as `12-1`. `code` says why it was given up."""

    kind: str
    subject: str
    code: str
    detail: str
    attempts: int
    created_at: Timestamp
    parked_at: Timestamp
    arguments: dict[str, Any]


class WaitingStepBody(Struct, frozen=True):
    """`code` says why the last of so many `attempts` failed; the next is at `due_at`."""

    kind: str
    subject: str
    code: str
    attempts: int
    created_at: Timestamp
    due_at: Timestamp
    arguments: dict[str, Any]


class WorkEndpoints:
    def __init__(self, store: kvstore.Client) -> None:
        self._store = store

    @get("/v1/parked-steps", {200: Page[ParkedStepBody]}, access=Access.STAFF)
    async def list_parked_steps(self, call: Call, query: PageQuery) -> web.Response:
        """List what workers gave up, by kind and subject"""

        async def read(records: list[kvstore.Record]) -> list[ParkedStepBody]:
            return [_body(read_parked(record)) for record in records]

        return json_response(encode(await page_of(self._store, PARKED, query, read)))

    @post("/v1/parked-steps/{kind}/{subject}/retry", {200: ParkedStepBody}, access=Access.STAFF, idempotent=True)
    async def retry_parked_step(self, call: Call, kind: StepKind, subject: Subject) -> web.Response:
        """Give a step back to the workers, as if new"""
        idempotency = call.idempotency
        found = await unpark(
            self._store,
            kind,
            subject,
            also=lambda parked: idempotency.put(200, encode(_body(parked))),
            compare=[idempotency.absent],
        )
        if found is None:  # or this was answered before
            gone = Problem("not_found", "No such step is parked, or none that this version can read")
            return await refuse_and_store(self._store, idempotency, gone, call.request)
        return json_response(encode(_body(found)))

    @get("/v1/waiting-steps", {200: Page[WaitingStepBody]}, access=Access.STAFF)
    async def list_waiting_steps(self, call: Call, query: PageQuery) -> web.Response:
        """List what failed and will be tried again, the next first

        A page may have fewer than `limit`, or none, and still more follow: `has_more` says so."""
        found = await waiting(self._store, STEPS + after_cursor(query.starting_after), query.limit)
        cursor = cursor_of(found.last.removeprefix(STEPS)) if found.last else None
        page = Page([_waiting_body(step) for step in found.steps], cursor is not None, cursor)
        return json_response(encode(page))

    @post("/v1/waiting-steps/{kind}/{subject}/run", {200: WaitingStepBody}, access=Access.STAFF, idempotent=True)
    async def run_waiting_step(self, call: Call, kind: StepKind, subject: Subject) -> web.Response:
        """Have a step that failed tried now, not after its pause"""
        idempotency = call.idempotency
        step = await run_now(
            self._store,
            kind,
            subject,
            also=lambda moved: idempotency.put(200, encode(_waiting_body(moved))),
            compare=[idempotency.absent],
        )
        if step is None:  # or this was answered before
            gone = Problem("not_found", "No such step has failed and waits to be tried again")
            return await refuse_and_store(self._store, idempotency, gone, call.request)
        return json_response(encode(_waiting_body(step)))


def _waiting_body(step: Step) -> WaitingStepBody:
    return WaitingStepBody(
        step.kind,
        step.subject,
        step.code,
        step.attempt,
        timestamp(step.created_ms),
        timestamp(step.due_ms),
        step.arguments,
    )


def _body(parked: ParkedStep) -> ParkedStepBody:
    step = parked.step
    return ParkedStepBody(
        step.kind,
        step.subject,
        parked.code,
        parked.detail,
        step.attempt + 1,
        timestamp(step.created_ms),
        timestamp(parked.parked_ms),
        step.arguments,
    )
