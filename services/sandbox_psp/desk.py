"""Where money moves and is looked up by key, and where failures meet requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from aiohttp import web
from msgspec import Struct

from services.sandbox_psp.acquirer import Acquirer, Outcome
from services.sandbox_psp.books import Books
from services.sandbox_psp.failures import NO_TOKEN, Failure, Failures, Plan, plan_of
from services.sandbox_psp.faults import Faults
from services.sandbox_psp.records import OperationBody, OperationKind, charge_body, encode
from services.sandbox_psp.rules import Refusal
from services.sandbox_psp.wire import AmountBody, AuthoriseBody, VoidBody, json_answer, read_body, read_key

_NOT_ACTED_ON: Final = (Failure.TIMEOUT_BEFORE, Failure.ERROR_BEFORE, Failure.RESET_BEFORE, Failure.ACTS_LATE)


class Desk:
    def __init__(self, books: Books, failures: Failures, acquirer: Acquirer, faults: Faults, public_url: str) -> None:
        self._books = books
        self._failures = failures
        self._acquirer = acquirer
        self._faults = faults
        self._public_url = public_url.rstrip("/")

    async def authorise(self, request: web.Request) -> web.Response:
        key = read_key(request.headers.get("Idempotency-Key"))
        body = await read_body(request, AuthoriseBody)

        def decide() -> Outcome:
            return self._acquirer.authorise(
                key, body.amount, body.currency, body.token, body.reference, body.return_url
            )

        return await self._act(request, key, OperationKind.AUTHORISE, body, plan_of(body.token), decide)

    async def capture(self, request: web.Request) -> web.Response:
        key = read_key(request.headers.get("Idempotency-Key"))
        body = await read_body(request, AmountBody)
        charge = request.match_info["charge"]

        def decide() -> Outcome:
            return self._acquirer.capture(charge, body.amount, body.currency)

        return await self._act(request, key, OperationKind.CAPTURE, body, self._plan(charge), decide)

    async def void(self, request: web.Request) -> web.Response:
        key = read_key(request.headers.get("Idempotency-Key"))
        body = await read_body(request, VoidBody)
        charge = request.match_info["charge"]

        def decide() -> Outcome:
            return self._acquirer.void(charge)

        return await self._act(request, key, OperationKind.VOID, body, self._plan(charge), decide)

    async def refund(self, request: web.Request) -> web.Response:
        key = read_key(request.headers.get("Idempotency-Key"))
        body = await read_body(request, AmountBody)
        charge = request.match_info["charge"]

        def decide() -> Outcome:
            return self._acquirer.refund(key, charge, body.amount, body.currency)

        return await self._act(request, key, OperationKind.REFUND, body, self._plan(charge), decide)

    async def find(self, request: web.Request) -> web.Response:
        """What became of the request with this key. Look-ups fail by chance, too, but by no token."""
        key = read_key(request.query.get("key"))
        failure = self._failures.of_answer(key, None, Plan())
        settings = self._failures.settings
        if failure is Failure.SLOW:
            await self._faults.pause(settings.slow_ms)
        elif failure is not None:
            return await self._faults.fail(request, failure, settings.hold_ms)
        operation = self._books.operations.get(key)
        if operation is None:
            raise Refusal(404, "not_found", "Nothing was done with this key")
        charge, refund = self._books.charges.get(operation.charge), self._books.refunds.get(operation.refund)
        shown = charge_body(charge, self.actions_url(request)) if charge is not None else None
        return json_answer(encode(OperationBody(key, operation.kind, operation.http_status, shown, refund)))

    def actions_url(self, request: web.Request) -> str:
        return f"{self._public_url or request.url.origin()}/actions"

    def _plan(self, charge_id: str) -> Plan:
        charge = self._books.charges.get(charge_id)
        return plan_of(charge.token) if charge is not None else NO_TOKEN

    async def _act(
        self,
        request: web.Request,
        key: str,
        kind: OperationKind,
        body: Struct,
        plan: Plan,
        decide: Callable[[], Outcome],
    ) -> web.Response:
        failure, settings = self._failures.of_answer(key, kind, plan), self._failures.settings
        charge_id, actions_url = request.match_info.get("charge", ""), self.actions_url(request)

        def act() -> web.Response:
            is_replay = key in self._books.operations
            operation = self._acquirer.act(key, kind, charge_id, body, actions_url, decide)
            headers = {"Idempotent-Replayed": "true"} if is_replay else None
            return json_answer(bytes(operation.body), operation.http_status, headers)

        if failure is Failure.ACTS_LATE:
            self._faults.later(settings.late_ms, act)
        if failure in _NOT_ACTED_ON:
            return await self._faults.fail(request, failure, settings.hold_ms)
        answer = act()
        await self._books.synced()
        if failure is Failure.SLOW:
            await self._faults.pause(settings.slow_ms)
        elif failure is not None:
            return await self._faults.fail(request, failure, settings.hold_ms)
        return answer
