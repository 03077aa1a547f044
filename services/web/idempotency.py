"""Idempotency keys: a request that is sent again has its effect once, and is answered as the first time.

A key's scope is caller + method + path. Its record is written in the same transaction as the effect, under a compare
that it is absent, so that of two requests with one key at the same time exactly one has an effect; the other finds the
record and is answered from it. There is no moment in which a request is "still running" and so no 409 for it.

Rules:
1. Same key, another body: 422, whatever the record holds.
2. What the store's state decided (no such product, not enough stock) is stored like a success, in a transaction of its
   own: otherwise a copy of the request that was late on the network could place an order that its sender was told was
   refused. What the body alone decides is not stored: it would be decided the same way again. 503 is not stored.
3. A record is kept for at least `KEPT_S`. It goes with the lease that it is under, which many share: one lease for
   each request would cost the store as much as the request.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from typing import Final

import msgspec
from aiohttp import web
from msgspec import Raw, Struct

import kvstore
from services.web.answers import REQUEST_ID, json_response
from services.web.bodies import RequestBody
from services.web.ids import now_ms
from services.web.leases import SharedLease
from services.web.problems import CONTENT_TYPE, Problem
from services.web.tokens import Caller

KEPT_S: Final = 24 * 3600.0
_LEASE_FILLS_S: Final = 3600.0

_KEY: Final = re.compile(r"\A[!-~]{1,255}\Z")  # visible ASCII; the length that others allow


class IdempotencyRecord(Struct, frozen=True, tag_field="v", tag=1):
    """What the store keeps: a fingerprint of the body, and the answer that was given."""

    fingerprint: str
    status: int
    location: str
    body: Raw
    created_ms: int


_decode = msgspec.json.Decoder(IdempotencyRecord).decode
_encode = msgspec.json.Encoder().encode
_encode_fingerprint = msgspec.msgpack.Encoder().encode


class Idempotency:
    """The idempotency of one request: what its transaction compares, reads and writes."""

    __slots__ = ("_fingerprint", "_lease", "key")

    def __init__(self, key: bytes, fingerprint: str, lease: int) -> None:
        self.key = key
        self._fingerprint = fingerprint
        self._lease = lease

    @property
    def absent(self) -> kvstore.Compare:
        """Holds if this request was never answered."""
        return kvstore.Compare(self.key, kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0)

    @property
    def read(self) -> kvstore.Range:
        return kvstore.Range(self.key)

    def put(self, status: int, body: bytes, location: str = "") -> kvstore.Put:
        """Store the answer."""
        record = IdempotencyRecord(self._fingerprint, status, location, Raw(body), now_ms())
        return kvstore.Put(self.key, _encode(record), lease=self._lease)

    def replay(self, record: kvstore.Record) -> web.Response:
        """The stored answer. Raises `Problem` if the record is of another body."""
        stored = _decode(record.value)
        if stored.fingerprint != self._fingerprint:
            raise Problem("idempotency_key_reused", "Use a new Idempotency-Key for another request")
        response = json_response(bytes(stored.body), stored.status)
        if stored.status >= 400:
            response.content_type = CONTENT_TYPE
        if stored.location:
            response.headers["Location"] = stored.location
        response.headers["Idempotent-Replayed"] = "true"
        return response


class IdempotencyKeys:
    """Reads the keys of requests, and sees to it that records end some day. One per process."""

    def __init__(self, store: kvstore.Client, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._lease = SharedLease(store, KEPT_S, _LEASE_FILLS_S, clock_s)

    async def of(self, request: web.Request, caller: Caller, path: str, body: RequestBody | None) -> Idempotency:
        """`path` is the canonical path, without escapes or query. Raises `Problem` 400 where the header is missing."""
        key = request.headers.get("Idempotency-Key")
        if key is None:
            raise Problem(
                "idempotency_key_required", "Send an Idempotency-Key header: a new random value for each new request"
            )
        if not _KEY.match(key):
            raise Problem("invalid_idempotency_key", "An Idempotency-Key is 1 to 255 visible ASCII characters")
        # Neither a path nor a key holds a space, so no two scopes can be spelt alike.
        scope = f"idem/{caller.user_id} {request.method} {path} {key}".encode()
        fingerprint = hashlib.blake2b(_encode_fingerprint(body), digest_size=16).hexdigest()
        return Idempotency(scope, fingerprint, await self._lease.take())


async def refuse_and_store(
    store: kvstore.Client, idempotency: Idempotency, problem: Problem, request: web.Request
) -> web.Response:
    """Answer with `problem` and remember it; or, if the request was answered meanwhile, with that answer."""
    result = await store.txn(
        compare=[idempotency.absent],
        success=[idempotency.put(problem.kind.status, problem.body(request.path, request[REQUEST_ID]))],
        failure=[idempotency.read],
    )
    if result.succeeded:
        raise problem
    found = result.results[0]
    assert isinstance(found, kvstore.RangeResult)
    return idempotency.replay(found.records[0])
