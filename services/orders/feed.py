"""What happens to an order, live: server-sent events (WHATWG).

A browser's own `EventSource` cannot read them: it sends no Authorization header, and a token in the address would end
up in logs. Clients use `fetch` and read the body as it comes (`response.body.getReader()`), or a library that does;
they come again by themselves, with the last id as `Last-Event-ID` and, where it was refused, with a new token.

A stream reads what there is after the last event that its client has, then watches from the very next revision, so
nothing is missed and nothing comes twice. Events of an order are numbered; the number is the event's id, and comes back
as `Last-Event-ID`. Nothing is kept for a client that is away. An id that the order has not come to is refused: whoever
waited after it would hear nothing until then.

A stream lives no longer than the right to read it: it ends with its token, and soon after its session.

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
from services.web.app import STATE, began_to_stream
from services.web.problems import Problem
from services.web.tokens import Caller, Tokens

# A proxy gives up on a silent connection after a minute, often.
HEARTBEAT_S: Final = 15.0
# Looks so often whether the process is about to stop (the grace that it has is ten seconds), and whether the client may
# still read.
LOOK_S: Final = 1.0
STALLED_S: Final = 10.0
STREAMS_MAX: Final = 2_000  # per process: each is a connection, a watch and some 50 KB
STREAMS_EACH_MAX: Final = 10  # of one caller, per process: a few windows on two devices
_RETRY_AFTER_S: Final = 10
RETRY_MS: Final = 1_000
_SEQ_DIGITS: Final = 6
_PAGE: Final = 500

log = structlog.get_logger("services.orders")


class EventFeed:
    """One per process."""

    def __init__(self, store: kvstore.Client, tokens: Tokens) -> None:
        self._store = store
        self._tokens = tokens
        self._open: dict[int, list[web.Request]] = {}  # by user; those who have none are not in it
        self._streams = 0

    async def stream(self, request: web.Request, caller: Caller, order_id: int) -> web.StreamResponse:
        """Serve until the client leaves, may not read it any more, or the process stops. Raises `Problem`:
        `overloaded`, `too_many_streams`, `malformed_request`."""
        after = _last_event_id(request)
        if self._streams >= STREAMS_MAX:
            raise Problem("overloaded", f"{STREAMS_MAX} streams are open at this process; try again in a moment")
        theirs = self._open.get(caller.user_id, [])
        # A client that has just left one for the next has not that many, though we may not have looked yet.
        if sum(not _has_left(other) for other in theirs) >= STREAMS_EACH_MAX:
            detail = f"{STREAMS_EACH_MAX} streams of yours are open; close one"
            raise Problem("too_many_streams", detail, headers={"Retry-After": str(_RETRY_AFTER_S)})
        self._streams += 1
        self._open[caller.user_id] = [*theirs, request]
        try:
            return await self._serve(request, caller, order_id, after)
        finally:
            self._streams -= 1
            others = [other for other in self._open[caller.user_id] if other is not request]
            if others:
                self._open[caller.user_id] = others
            else:
                del self._open[caller.user_id]

    async def _serve(self, request: web.Request, caller: Caller, order_id: int, after: int) -> web.StreamResponse:
        # Before the answer begins, so that a store that is away is a 503.
        if after > 0 and await self._store.get(event_key(order_id, after)) is None:
            raise Problem("malformed_request", f"Last-Event-ID is {after}, and the order has no such event")
        found = await self._read(order_id, after)
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
            began_to_stream(request)
            await _write(response, b"retry: %d\n\n" % RETRY_MS)
            while True:
                for record in found.records:
                    event = decode_event(record.value)
                    after = event.seq
                    await _write(response, _frame(event))
                if not found.more:  # a page may be shorter, as large events fill it sooner
                    break
                found = await self._read(order_id, after)
            await self._follow(request, response, caller, order_id, found.revision + 1, after)
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
        self,
        request: web.Request,
        response: web.StreamResponse,
        caller: Caller,
        order_id: int,
        revision: int,
        after: int,
    ) -> None:
        state = request.app[STATE]
        silent_s = 0.0
        async with self._store.watch(prefix=events_of(order_id), from_revision=revision, deletes=False) as events:
            following = asyncio.ensure_future(anext(events))
            try:
                while not (state.stopping or _has_left(request)) and await self._tokens.is_still_good(caller):
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
