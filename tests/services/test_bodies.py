"""Bodies: what is wrong with one is said with a code and a JSON pointer."""

from __future__ import annotations

import msgspec
import pytest

from services.orders.api_products import ProductInput
from services.orders.placing import Placement
from services.web.bodies import BodyReader
from services.web.problems import Problem

READER = BodyReader(Placement)


def line(text: str) -> bytes:
    return b'{"lines":[{"sku":"first","quantity":1},' + text.encode() + b"]}"


@pytest.mark.parametrize(
    ("raw", "pointer", "code"),
    [
        (b"[]", "", "invalid_type"),
        (b"null", "", "invalid_type"),
        (b'{"lines":[]}', "/lines", "invalid_value"),
        (b'{"lines":[' + b",".join([b'{"sku":"a","quantity":1}'] * 101) + b"]}", "/lines", "invalid_value"),
        (line("7"), "/lines/1", "invalid_type"),
        (line('{"sku":"a"}'), "/lines/1/quantity", "missing"),
        (line('{"quantity":1}'), "/lines/1/sku", "missing"),
        (line('{"sku":"a","quantity":0}'), "/lines/1/quantity", "invalid_value"),
        (line('{"sku":"a","quantity":-3}'), "/lines/1/quantity", "invalid_value"),
        (line('{"sku":"a","quantity":1000001}'), "/lines/1/quantity", "invalid_value"),
        (line('{"sku":"a","quantity":%s}' % ("9" * 400)), "/lines/1/quantity", "invalid_value"),
        (line('{"sku":"a","quantity":1.5}'), "/lines/1/quantity", "invalid_type"),
        (line('{"sku":"a","quantity":1e400}'), "/lines/1/quantity", "invalid_value"),
        (line('{"sku":"a","quantity":"1"}'), "/lines/1/quantity", "invalid_type"),
        (line('{"sku":"a","quantity":true}'), "/lines/1/quantity", "invalid_type"),
        (line('{"sku":"","quantity":1}'), "/lines/1/sku", "invalid_value"),
        (line('{"sku":"a/b","quantity":1}'), "/lines/1/sku", "invalid_value"),
        (line('{"sku":"a\\n","quantity":1}'), "/lines/1/sku", "invalid_value"),
        (line('{"sku":".a","quantity":1}'), "/lines/1/sku", "invalid_value"),
        (line('{"sku":"%s","quantity":1}' % ("a" * 65)), "/lines/1/sku", "invalid_value"),
        (line('{"sku":"a","quantity":1,"price":1}'), "/lines/1/price", "unknown_field"),
        (b'{"lines":[{"sku":"a","quantity":1}],"a/b~c":1}', "/a~1b~0c", "unknown_field"),
    ],
)
def test_invalid_body(raw: bytes, pointer: str, code: str) -> None:
    with pytest.raises(Problem) as caught:
        READER.decode(raw)
    assert caught.value.code == "invalid_body"
    assert [(field.pointer, field.code) for field in caught.value.errors] == [(pointer, code)]
    assert caught.value.errors[0].message


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"lines", b'{"lines":[}', b"\xff\xfe", b'{"lines":NaN}', line('{"sku":"a\\ud800","quantity":1}'),
     b'{"lines":[{"sku":"\xff","quantity":1}]}', b'{"lines":[{"sku":"a","quantity":1}]} {}'],
)  # fmt: skip
def test_malformed_json(raw: bytes) -> None:
    with pytest.raises(Problem) as caught:
        READER.decode(raw)
    assert caught.value.code == "malformed_json"


def test_a_message_never_grows_with_the_body() -> None:
    with pytest.raises(Problem) as caught:
        READER.decode(b'{"%s":1}' % (b"x" * 60_000))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["", " ", "\t", "a\nb", "a\u202eb", "a\u2028", "\x7f", "x" * 201])
def test_names_that_nobody_can_read(name: str) -> None:
    with pytest.raises(Problem) as caught:
        BodyReader(ProductInput).decode(msgspec.json.encode({"name": name, "price": 1, "currency": "EUR"}))
    assert caught.value.errors[0].pointer == "/name"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("price", -1),
        ("price", 1.5),
        ("price", 10**12 + 1),
        ("currency", "eur"),
        ("currency", "EURO"),
        ("currency", "EUR\n"),
        ("name", None),
    ],
)
def test_product_fields(field: str, value: object) -> None:
    body = {"name": "A cup", "price": 1250, "currency": "EUR", field: value}
    with pytest.raises(Problem) as caught:
        BodyReader(ProductInput).decode(msgspec.json.encode(body))
    assert caught.value.errors[0].pointer == f"/{field}"
