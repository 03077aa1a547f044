"""What an auditor reads, and what a tester sets and counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from services.sandbox_psp.acquirer import Acquirer
from services.sandbox_psp.books import Books, page
from services.sandbox_psp.desk import Desk
from services.sandbox_psp.failures import TOKENS, Failures, Settings
from services.sandbox_psp.records import charge_body, encode
from services.sandbox_psp.rules import Refusal
from services.sandbox_psp.webhooks import Webhooks
from services.sandbox_psp.wire import json_answer, read_body

PAGE_MAX: Final = 100


class _PageQuery(Struct, frozen=True, forbid_unknown_fields=True):
    limit: Annotated[int, Meta(ge=1, le=PAGE_MAX)] = PAGE_MAX
    starting_after: Annotated[str, Meta(max_length=100)] = ""


class Lists:
    """The books as they are now. No failure meets these."""

    def __init__(self, books: Books, desk: Desk) -> None:
        self._books = books
        self._desk = desk

    async def list_charges(self, request: web.Request) -> web.Response:
        charges, has_more = _page(request, self._books.charges)
        url = self._desk.actions_url(request)
        return json_answer(encode({"data": [charge_body(one, url) for one in charges], "has_more": has_more}))

    async def list_refunds(self, request: web.Request) -> web.Response:
        refunds, has_more = _page(request, self._books.refunds)
        return json_answer(encode({"data": refunds, "has_more": has_more}))

    async def read_charge(self, request: web.Request) -> web.Response:
        charge = self._books.charge(request.match_info["charge"])
        return json_answer(encode(charge_body(charge, self._desk.actions_url(request))))

    async def read_refund(self, request: web.Request) -> web.Response:
        refund = self._books.refunds.get(request.match_info["refund"])
        if refund is None:
            raise Refusal(404, "not_found", "There is no such refund")
        return json_answer(encode(refund))


def _page(request: web.Request, records: Mapping[str, Any]) -> tuple[list[Any], bool]:
    try:
        query = msgspec.convert(dict(request.query), _PageQuery, strict=False)
    except msgspec.ValidationError as error:
        raise Refusal(400, "invalid_parameter", str(error)[:300]) from None
    return page(records, query.starting_after, query.limit)


class Control:
    def __init__(self, books: Books, failures: Failures, acquirer: Acquirer, webhooks: Webhooks | None) -> None:
        self._books = books
        self._failures = failures
        self._acquirer = acquirer
        self._webhooks = webhooks

    async def read_failures(self, request: web.Request) -> web.Response:
        return json_answer(encode(self._failures.settings))

    async def put_failures(self, request: web.Request) -> web.Response:
        """All settings anew; what is left out has its default. The counts go on."""
        self._failures.settings = await read_body(request, Settings)
        return json_answer(encode(self._failures.settings))

    async def counts(self, request: web.Request) -> web.Response:
        """Since this process started, except for what the books hold."""
        told = self._webhooks
        counts = {
            "failures": dict(self._failures.counts),
            "webhooks": {**told.counts, "waiting": told.waiting} if told is not None else {},
            "books": {
                "charges": len(self._books.charges),
                "refunds": len(self._books.refunds),
                "operations": len(self._books.operations),
            },
        }
        return json_answer(encode(counts))

    async def tokens(self, request: web.Request) -> web.Response:
        return json_answer(encode(TOKENS))

    async def settle(self, request: web.Request) -> web.Response:
        return json_answer(encode({"settled": self._acquirer.settle_all()}))
