"""Typed request bodies: JSON in, a checked msgspec struct out; what is wrong with it is said with a JSON pointer.

`RequestBody` is the base of every body: frozen, and a field that it does not know is refused (a misspelt field must
not be silently ignored where money is concerned). What a type cannot say, the handler checks with `field_problem`.
"""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from services.web.problems import FieldError, Problem

BODY_BYTES_MAX = 64 * 1024  # an order of 100 lines is 10 KiB; nothing else comes near
BODY_TIMEOUT_S = 10.0  # a client on a bad line sends 64 KiB in that time; one that dawdles may not hold memory
_MESSAGE_CHARS_MAX = 300  # a message may quote a field name of the client's, as long as the body

# Control characters, and the marks that break a line or turn text around, have no place in a name or a reason; nor is
# one that is all blanks a name. (\Z and not $, which also matches before a line feed at the end.)
_UNPRINTABLE = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
_PRINTABLE = rf"\A[^{_UNPRINTABLE}]*[^\s{_UNPRINTABLE}][^{_UNPRINTABLE}]*\Z"

Name = Annotated[str, Meta(min_length=1, max_length=200, pattern=_PRINTABLE)]
Text = Annotated[str, Meta(min_length=1, max_length=500, pattern=_PRINTABLE)]


class RequestBody(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of the bodies that clients send. Encoded again (for a fingerprint) it leaves out what has its default, so
    that a field added later does not change what older requests amount to.

    `schema_adds` is what the types cannot say, as JSON Schema has it, for the document; the handler checks it."""

    schema_adds: ClassVar[dict[str, Any]] = {}


B = TypeVar("B", bound=RequestBody)


class BodyReader(Generic[B]):
    """Reads one type of body. Made once per endpoint: building a decoder costs more than using it."""

    __slots__ = ("_decoder",)

    def __init__(self, kind: type[B]) -> None:
        self._decoder = msgspec.json.Decoder(kind)

    async def read(self, request: web.Request) -> B:
        """The body of `request`. Raises `Problem`; a body over the limit ends as aiohttp's 413, which becomes one."""
        if request.content_type != "application/json":
            raise Problem("unsupported_media_type", f"Content-Type is {request.content_type}")
        if "Content-Encoding" in request.headers:  # a few bytes could unpack to more memory than there is
            raise Problem("unsupported_media_type", "Send the body as it is, without Content-Encoding")
        if request.content.is_eof():  # the usual case: it came in one piece with the headers
            raw = await request.read()
        else:
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    raw = await request.read()
            except TimeoutError:
                raise Problem("body_timeout", f"The body was not complete after {BODY_TIMEOUT_S:g} s") from None
        return self.decode(raw)

    def decode(self, raw: bytes) -> B:
        """Raises `Problem`: `malformed_json` where it is no JSON, `invalid_body` where it is not of this type."""
        try:
            return self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            field = field_error(str(error), "body")
            raise Problem("invalid_body", _sentence(field), errors=(field,)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Problem("malformed_json", str(error)[:_MESSAGE_CHARS_MAX]) from None


_AT = re.compile(r"\A(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?\Z", re.DOTALL)
_STEP = re.compile(r"\.([A-Za-z_][A-Za-z0-9_]*)|\[(\d+)\]")
_NAMED = re.compile(r"(?P<which>missing required|contains unknown) field `(?P<name>.*)`\Z", re.DOTALL)


def field_error(message: str, place: Literal["body", "query"]) -> FieldError:
    """msgspec's message, with its path turned into a JSON pointer: "… - at `$.lines[0].sku`" is "/lines/0/sku"."""
    match = _AT.match(message)
    assert match is not None  # every part of it is optional
    what, path = match["what"], match["path"] or ""
    pointer = "".join(f"/{name or index}" for name, index in _STEP.findall(path))
    named = _NAMED.search(what)
    if named is not None:
        pointer += "/" + named["name"].replace("~", "~0").replace("/", "~1")
        code = "missing" if named["which"].startswith("missing") else "unknown_field"
    else:
        code = "invalid_type" if ", got " in what else "invalid_value"
    if "matching regex" in what:
        what = "has characters, or a form, that are not allowed here"
    return FieldError(pointer[:_MESSAGE_CHARS_MAX], code, what.replace("`", "")[:_MESSAGE_CHARS_MAX], place)


def _sentence(field: FieldError) -> str:
    return f"{field.pointer}: {field.message}" if field.pointer else field.message
