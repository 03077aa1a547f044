"""What the customer's browser meets: a token for a test card, and the page of the step in between (3-D Secure)."""

from __future__ import annotations

from html import escape
from typing import Final

from aiohttp import web

from services.sandbox_psp.acquirer import Acquirer
from services.sandbox_psp.books import Books
from services.sandbox_psp.failures import CARDS
from services.sandbox_psp.records import Charge, ChargeStatus, encode
from services.sandbox_psp.rules import Refusal
from services.sandbox_psp.wire import CardBody, json_answer, read_body

_HEAD: Final = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Sandbox bank</title>'


class Customer:
    def __init__(self, books: Books, acquirer: Acquirer) -> None:
        self._books = books
        self._acquirer = acquirer

    async def make_token(self, request: web.Request) -> web.Response:
        body = await read_body(request, CardBody)
        token = CARDS.get(body.card.replace(" ", ""))
        if token is None:
            raise Refusal(422, "unknown_card", "This is none of the test cards")
        return json_answer(encode({"token": token}), 201)

    async def show_action(self, request: web.Request) -> web.Response:
        return _page(self._books.charge_of_action(request.match_info["action"]))

    async def decide_action(self, request: web.Request) -> web.Response:
        """The first decision counts; a second click, whatever it says, is told what was decided."""
        decision = (await request.post()).get("decision")
        if decision not in ("approve", "refuse"):
            raise Refusal(422, "invalid_body", "decision is approve or refuse")
        charge = self._acquirer.decide_action(request.match_info["action"], decision == "approve")
        await self._books.synced()
        if charge.return_url:
            raise web.HTTPSeeOther(charge.return_url)
        return _page(charge)


def _page(charge: Charge) -> web.Response:
    text = f"{escape(charge.reference)}: {charge.amount} {charge.currency} in minor units. It is {charge.status}."
    buttons = (
        '<form method="post"><button name="decision" value="approve">Approve</button> '
        '<button name="decision" value="refuse">Refuse</button></form>'
        if charge.status is ChargeStatus.REQUIRES_ACTION
        else ""
    )
    html = (
        f'<!doctype html><html lang="en"><title>Sandbox bank</title><h1>Sandbox bank</h1><p>{text}</p>{buttons}</html>'
    )
    return web.Response(text=html, content_type="text/html", headers={"Cache-Control": "no-store"})
