"""Endpoints for staff to see what workers could not do by themselves, and to give it back to them."""

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
from services.web.paging import Page, PageQuery, page_of
from services.web.problems import Problem
from services.work.steps import PARKED, ParkedStep, read_parked, unpark

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
