"""What happens to an order, live: server-sent events (WHATWG), which browsers reconnect by themselves.

A stream reads what there is after the last event that its client has, then watches from the very next revision, so
nothing is missed and nothing comes twice. Events of an order are numbered; the number is the event's id, and comes back
as `Last-Event-ID`. Nothing is kept for a client that is away.

A client that does not read is cut off: aiohttp waits for it, and no longer than `STALLED_S`.
"""

from __future__ import annotations

import asyncio
from typing import Final

import structlog
from aiohttp import web

import kvstore
from services.orders.bodies import event_of
from services.orders.records import EventRecord, decode_event, encode, event_key, events_of
from services.web.answers import early_headers
from services.web.app import STATE
from services.web.problems import Problem
from services.web.tokens import TOKEN_TTL_S

# A proxy gives up on a silent connection after a minute, often.
HEARTBEAT_S: Final = 15.0
# Looks so often whether the process is about to stop: the grace that it has is ten seconds.
LOOK_S: Final = 1.0
STALLED_S: Final = 10.0
STREAMS_MAX: Final = 2_000  # per process: each is a connection, a watch and some 50 KB
RETRY_MS: Final = 1_000
_SEQ_DIGITS: Final = 6
_PAGE: Final = 500

log = structlog.get_logger("services.orders")


class EventFeed:
    """One per process."""

    def __init__(self, store: kvstore.Client) -> None:
        self._store = store
        self._streams = 0

    async def stream(self, request: web.Request, order_id: int) -> web.StreamResponse:
        """Serve until the client leaves or the process stops. Raises `Problem` `overloaded`, `malformed_request`."""
        after = _last_event_id(request)
        if self._streams >= STREAMS_MAX:
            raise Problem("overloaded", f"{STREAMS_MAX} streams are open at this process; try again in a moment")
        self._streams += 1
        try:
            return await self._serve(request, order_id, after)
        finally:
            self._streams -= 1

    async def _serve(self, request: web.Request, order_id: int, after: int) -> web.StreamResponse:
        found = await self._read(order_id, after)  # before the answer begins, so that a store that is away is a 503
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
                **early_headers(request),
            }
        )
        try:
            await response.prepare(request)
            await _write(response, b"retry: %d\n\n" % RETRY_MS)
            while True:
                for record in found.records:
                    event = decode_event(record.value)
                    after = event.seq
                    await _write(response, _frame(event))
                if len(found.records) < _PAGE:
                    break
                found = await self._read(order_id, after)
            await self._follow(request, response, order_id, found.revision + 1, after)
        except (ConnectionError, TimeoutError, kvstore.KvError) as error:
            # The client has gone, does not read, or has to come again when the store is back: its Last-Event-ID says
            # where it was.
            log.info("stream ended", order_id=order_id, after=after, reason=type(error).__name__)
            response.force_close()
        return response

    async def _read(self, order_id: int, after: int) -> kvstore.RangeResult:
        return await self._store.range(
            event_key(order_id, after + 1), kvstore.prefix_end(events_of(order_id)), limit=_PAGE
        )

    async def _follow(
        self, request: web.Request, response: web.StreamResponse, order_id: int, revision: int, after: int
    ) -> None:
        state = request.app[STATE]
        loop = asyncio.get_running_loop()
        ends_at_s = loop.time() + TOKEN_TTL_S  # as long as a token is good: who comes again shows a newer one
        silent_s = 0.0
        async with self._store.watch(prefix=events_of(order_id), from_revision=revision, deletes=False) as events:
            following = asyncio.ensure_future(anext(events))
            try:
                while not (state.stopping or _has_left(request)) and loop.time() < ends_at_s:
                    done, _ = await asyncio.wait((following,), timeout=LOOK_S)
                    if not done:
                        silent_s += LOOK_S
                        if silent_s >= HEARTBEAT_S:
                            silent_s = 0.0
                            await _write(response, b":\n\n")
                        continue
                    record = following.result().record
                    assert record is not None  # deletes are not watched
                    event = decode_event(record.value)
                    following = asyncio.ensure_future(anext(events))
                    silent_s = 0.0
                    if event.seq > after:
                        after = event.seq
                        await _write(response, _frame(event))
            finally:
                following.cancel()


def _has_left(request: web.Request) -> bool:
    """Whether the client is gone: else a stream would stay until its next heartbeat."""
    return request.transport is None or request.transport.is_closing()


async def _write(response: web.StreamResponse, data: bytes) -> None:
    """Raises ConnectionError, and TimeoutError for a client that does not read."""
    async with asyncio.timeout(STALLED_S):
        await response.write(data)


def _frame(event: EventRecord) -> bytes:
    body = encode(event_of(event))  # one line: JSON escapes line feeds
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (event.seq, event.type.encode(), body)


def _last_event_id(request: web.Request) -> int:
    text = request.headers.get("Last-Event-ID", "").strip()
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= _SEQ_DIGITS):
        raise Problem("malformed_request", "Last-Event-ID is the id of an event of this order")
    return int(text)
