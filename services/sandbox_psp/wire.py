"""Bodies that come in, and answers that go out."""

from __future__ import annotations

import re
from typing import Annotated, Final, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from services.sandbox_psp.rules import Refusal

_MESSAGE_CHARS_MAX: Final = 300  # a message may quote a field name, as long as the body
_KEY: Final = re.compile(r"\A[!-~]{1,255}\Z")  # visible ASCII; the length that others allow

_Amount = Annotated[int, Meta(ge=1, le=2**53 - 1)]
_Currency = Annotated[str, Meta(pattern=r"\A[A-Z]{3}\Z")]


class _Body(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class AuthoriseBody(_Body, frozen=True):
    amount: _Amount
    currency: _Currency
    token: Annotated[str, Meta(min_length=1, max_length=200)]
    reference: Annotated[str, Meta(min_length=1, max_length=200)]
    return_url: Annotated[str, Meta(max_length=2000, pattern=r"\A(https?://[!-~]+)?\Z")] = ""


class AmountBody(_Body, frozen=True):
    amount: _Amount
    currency: _Currency


class VoidBody(_Body, frozen=True):
    pass


class CardBody(_Body, frozen=True):
    card: Annotated[str, Meta(max_length=40)]


B = TypeVar("B", bound=Struct)


async def read_body(request: web.Request, kind: type[B]) -> B:
    """Raises `Refusal`."""
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.ValidationError as error:
        raise Refusal(422, "invalid_body", str(error)[:_MESSAGE_CHARS_MAX]) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, "malformed_json", str(error)[:_MESSAGE_CHARS_MAX]) from None


def read_key(key: str | None) -> str:
    """An idempotency key, from a header or a query. Raises `Refusal`."""
    if key is None or not _KEY.match(key):
        raise Refusal(400, "idempotency_key", "An idempotency key of 1 to 255 visible ASCII characters is needed")
    return key


def json_answer(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)
