"""Every problem that a service answers with: RFC 9457 bodies, each with a stable code.

Raise `Problem(code, detail)` anywhere below a handler; the application (`app.py`) turns it into the answer. `PROBLEMS`
is the whole list: what is not in it cannot be raised. `retryable` tells a program whether sending the very same
request again may succeed without anybody mending anything.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec
from aiohttp import web
from msgspec import Struct

CONTENT_TYPE = "application/problem+json"


class Kind(NamedTuple):
    status: int
    title: str
    retryable: bool = False


PROBLEMS: dict[str, Kind] = {
    # the request itself
    "malformed_request": Kind(400, "The request is malformed"),
    "malformed_json": Kind(400, "The body is not JSON"),
    "invalid_body": Kind(422, "The body breaks a rule"),
    "invalid_parameter": Kind(400, "A parameter breaks a rule"),
    "unsupported_media_type": Kind(415, "The body must be application/json"),
    "body_too_large": Kind(413, "The body is too large"),
    "body_timeout": Kind(408, "The body took too long to arrive", retryable=True),
    "not_found": Kind(404, "There is nothing here"),
    "method_not_allowed": Kind(405, "This resource has no such method"),
    "precondition_failed": Kind(412, "The record has changed since you read it"),
    "precondition_required": Kind(428, "An If-Match header is required"),
    "rate_limited": Kind(429, "Too many requests from you", retryable=True),
    "too_many_streams": Kind(429, "Too many streams of yours are open", retryable=True),
    # who asks
    "authentication_required": Kind(401, "Sign in first"),
    "invalid_token": Kind(401, "The access token is not valid"),
    "token_expired": Kind(401, "The access token has expired"),
    "wrong_credentials": Kind(401, "Email or password is wrong"),
    "forbidden": Kind(403, "Your role may not do this"),
    "invalid_refresh_token": Kind(401, "The refresh token is not valid"),
    "refresh_token_reused": Kind(401, "The refresh token was used before, so its session has ended"),
    "sign_in_throttled": Kind(429, "Too many attempts with a password", retryable=True),
    "registration_throttled": Kind(429, "Too many registrations from your address", retryable=True),
    "mail_throttled": Kind(429, "Too many mails were asked for", retryable=True),
    # accounts
    "email_taken": Kind(409, "There is an account with this email"),
    "common_password": Kind(422, "This password is too common"),
    "wrong_password": Kind(403, "The password is wrong"),
    "account_blocked": Kind(403, "This account is blocked"),
    "invalid_mail_token": Kind(422, "The token from the mail is not valid, or no longer"),
    "too_many_addresses": Kind(409, "There is no room for another address"),
    "last_admin": Kind(409, "This is the last admin"),
    "admin_account": Kind(409, "This is an admin's account"),
    # idempotency
    "idempotency_key_required": Kind(400, "An Idempotency-Key header is required"),
    "invalid_idempotency_key": Kind(400, "The Idempotency-Key header is not valid"),
    "idempotency_key_reused": Kind(422, "This Idempotency-Key was used for another request"),
    # products, stock, orders
    "unknown_product": Kind(422, "There is no such product"),
    "product_unavailable": Kind(409, "This product is not sold now"),
    "insufficient_stock": Kind(409, "There is not enough stock"),
    "stock_too_large": Kind(422, "Stock cannot be that large"),
    "mixed_currencies": Kind(422, "One order has one currency"),
    "total_too_large": Kind(422, "The total is too large"),
    "cart_ordered": Kind(409, "This cart was ordered"),
    "cart_changed": Kind(409, "This cart is not what it was"),
    "cart_empty": Kind(409, "The cart is empty"),
    "too_many_carts": Kind(409, "There is no room for another cart"),
    "too_many_lines": Kind(409, "There is no room for another product in this cart"),
    "order_state": Kind(409, "The order's state does not allow this"),
    "not_in_order": Kind(422, "The order has no such line, or not so much of it"),
    "total_changed": Kind(409, "The total is not what it was"),
    "payment_in_progress": Kind(409, "A payment of this order is not at its end"),
    "too_many_payments": Kind(409, "Too many attempts to pay this order"),
    "too_many_refunds": Kind(409, "Too many refunds of this order"),
    "amount_too_large": Kind(422, "The amount is too large"),
    "not_paid": Kind(409, "The order is not paid"),
    "no_delivery_address": Kind(409, "The order has no delivery address"),
    "invalid_webhook": Kind(400, "This is no webhook of the provider"),
    "products_changing": Kind(503, "The products of this order are changing too fast", retryable=True),
    # the service and its store
    "internal": Kind(500, "Something is broken on our side"),
    "overloaded": Kind(503, "Too many requests at once", retryable=True),
    "shutting_down": Kind(503, "This process is shutting down", retryable=True),
    "store_unavailable": Kind(503, "The store is not available now", retryable=True),
    "contended": Kind(503, "Others kept changing the same record", retryable=True),
    "outcome_unknown": Kind(503, "The request may or may not have taken effect", retryable=True),
}


class FieldError(Struct, frozen=True, gc=False, rename={"place": "in"}):
    """One thing wrong with a request. `pointer` is an RFC 6901 JSON pointer into the body, where empty is the body
    itself, or into the parameters of the query: `/limit`. `in` says which."""

    pointer: str
    code: str
    message: str
    place: Literal["body", "query"] = "body"


class ProblemBody(Struct, frozen=True):
    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    retryable: bool
    errors: tuple[FieldError, ...] = ()


class Problem(Exception):
    """Ends a request with a problem body. `code` must be one of `PROBLEMS`; `detail` is for people."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        errors: tuple[FieldError, ...] = (),
        headers: dict[str, str] | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.kind = PROBLEMS[code]
        self.detail = detail
        self.errors = errors
        self.headers = headers
        self.retryable = self.kind.retryable if retryable is None else retryable

    def body(self, instance: str, request_id: str) -> bytes:
        return msgspec.json.encode(
            ProblemBody(
                f"/problems/{self.code}",
                self.kind.title,
                self.kind.status,
                self.detail,
                instance,
                self.code,
                request_id,
                self.retryable,
                self.errors,
            )
        )

    def response(self, instance: str, request_id: str) -> web.Response:
        response = web.Response(
            body=self.body(instance, request_id), status=self.kind.status, content_type=CONTENT_TYPE
        )
        if self.headers:
            response.headers.update(self.headers)
        if self.kind.status == 503:
            # A leader is elected within a second or so; an overload may be over sooner, but not by being hurried.
            response.headers.setdefault("Retry-After", "1")
        if self.kind.status == 401:
            response.headers.setdefault("WWW-Authenticate", 'Bearer error="invalid_token"')  # RFC 9110 demands one
        return response


class ProblemType(Struct, frozen=True):
    """What `GET /problems/{code}` says: a problem's `type` is an address that can be opened."""

    code: str
    title: str
    status: int
    retryable: bool


def field_problem(pointer: str, code: str, message: str, *, problem: str = "invalid_body") -> Problem:
    """A problem with one field of the body."""
    return Problem(problem, message, errors=(FieldError(pointer, code, message),))
