"""The workloads, as requests encoded before the clock starts: what a connection sends is one header and these bytes.

The peers' scripts do the same things to the same sizes: see README.md.

- `put`: a 100-byte value to one of `keys` keys, in a shuffled order of each connection's own.
- `get`, `get-local`: one of these keys, linearizable or from the replica at hand.
- `order-hot`, `order-1000`: a transaction that takes one from a product's stock, refusing below 0, and puts an order,
  an entry in its user's order index, and an idempotency record. All orders take from one product, or from 1,000.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from enum import StrEnum

from kvstore import codec
from kvstore.model import Add, Mutation, Put, Range, Txn

VALUE_BYTES = 100
PRODUCTS = 1000
# Far above what any run sells: an order that is refused fails the run, so stock must not end.
STOCK = 10**12
# In place of an order's id while a request is encoded; the same length, and nowhere else in the request.
_ID_PLACE = b"@@@@/@@@@@@@@@@"
# Result tags (`kvstore.model`) that mean the request was done.
_PUT_RESULT, _RANGE_RESULT, _TXN_RESULT = 1, 3, 5


class Kind(StrEnum):
    PUT = "put"
    GET = "get"
    GET_LOCAL = "get-local"
    ORDER_HOT = "order-hot"
    ORDER_MANY = "order-1000"


READ_LEVELS = {Kind.GET: codec.ReadLevel.LINEARIZABLE, Kind.GET_LOCAL: codec.ReadLevel.LOCAL}
RESULT_TAGS = {
    Kind.PUT: _PUT_RESULT,
    Kind.GET: _RANGE_RESULT,
    Kind.GET_LOCAL: _RANGE_RESULT,
    Kind.ORDER_HOT: _TXN_RESULT,
    Kind.ORDER_MANY: _TXN_RESULT,
}


def value_of(number: int) -> bytes:
    """A value of VALUE_BYTES that compresses about as little as real data does; the same for the same number."""
    return random.Random(number).randbytes(VALUE_BYTES * 3 // 4).hex().encode()[:VALUE_BYTES]


def key_of(number: int) -> bytes:
    return b"bench/key/%06d" % number


def stock_key(product: int) -> bytes:
    return b"bench/stock/%04d" % product


def preparation(keys: int) -> Iterator[Mutation]:
    """What must be in the store before any of the workloads."""
    for number in range(keys):
        yield Put(key_of(number), value_of(number))
    for product in range(PRODUCTS):
        yield Put(stock_key(product), b"%d" % STOCK)


def requests(kind: Kind, keys: int, connection: int, run: int) -> Iterator[bytes]:
    """The encoded requests of one connection, without end. `run` tells runs on the same store apart: order ids of two
    runs never meet (while `run` and `connection` stay below 10,000)."""
    shuffle = random.Random(connection).shuffle
    if kind in (Kind.ORDER_HOT, Kind.ORDER_MANY):
        products = [0] if kind is Kind.ORDER_HOT else list(range(PRODUCTS))
        shuffle(products)
        return _orders([_order_parts(product) for product in products], b"%04d/%04d" % (connection, run))
    numbers = list(range(keys))
    shuffle(numbers)
    if kind is Kind.PUT:
        return _cycle([codec.encode_request(Put(key_of(number), value_of(number))) for number in numbers])
    return _cycle([codec.encode_request(Range(key_of(number))) for number in numbers])


def _cycle(encoded: list[bytes]) -> Iterator[bytes]:
    while True:
        yield from encoded


def _orders(templates: list[list[bytes]], prefix: bytes) -> Iterator[bytes]:
    number = 0
    while True:
        for parts in templates:
            number += 1
            yield (prefix + b"%06d" % number).join(parts)


def _order_parts(product: int) -> list[bytes]:
    """An encoded order, cut where its id stands. Joining the parts with an id is the whole work per request."""
    order = b'{"id":"%b","product":%d,"quantity":1,"status":"pending_payment","total":"19.90"}' % (_ID_PLACE, product)
    parts = codec.encode_request(
        Txn(
            success=(
                Add(stock_key(product), -1, min=0),
                Put(b"bench/order/" + _ID_PLACE, order.ljust(VALUE_BYTES)),
                Put(b"bench/user-order/" + _ID_PLACE, b""),
                Put(b"bench/idempotency/" + _ID_PLACE, b"%032x" % product),
            )
        )
    ).split(_ID_PLACE)
    assert len(parts) == 5, "an order holds its id four times: in its own key and value, and in two more keys"
    return parts
