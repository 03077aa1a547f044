"""One request of a shopper: sent again, with the same Idempotency-Key, while there is no answer, or 503; then judged.

Every answer is either what was asked for, or a problem that its endpoint may give, or an error of the services, which
is counted and ends the visit. Several addresses may be those of one service: each attempt goes to any of them, so that
a request whose answer was lost is asked for again at another process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from random import Random
from typing import Any, Final, NamedTuple

import aiohttp
import msgspec

from services.shoppers.tally import Tally
from services.web.problems import CONTENT_TYPE, PROBLEMS

# The services answer after 5 s where the store does not; longer than that only a stopped process takes.
ATTEMPT_TIMEOUT_S: Final = 12.0
_TIMEOUT: Final = aiohttp.ClientTimeout(ATTEMPT_TIMEOUT_S)
# A burst of attempts would only add to what keeps the service from answering; people press the button once a second.
PAUSE_MIN_S: Final = 0.2
PAUSE_MAX_S: Final = 1.5
_BODY_CHARS: Final = 400  # of an answer, in an error's story


class Answer(NamedTuple):
    status: int
    body: Any
    is_replayed: bool
    attempts: int


class Refused(Exception):
    """A problem that the endpoint may answer with."""

    def __init__(self, code: str, body: Any) -> None:
        super().__init__(f"{body.get('detail', '')} [{code}]")
        self.code = code


class GaveUp(Exception):
    """No usable answer within the shopper's patience: it may have been done or not."""


class Broken(Exception):
    """An answer that must not be; it has been counted."""


class StreamEvent(NamedTuple):
    seq: int
    type: str
    data: Any


class Wire:
    """To one service; one for each shopper."""

    def __init__(
        self, session: aiohttp.ClientSession, urls: Sequence[str], tally: Tally, chance: Random, patience_s: float
    ) -> None:
        self._session = session
        self._urls = [url.rstrip("/") for url in urls]
        self._tally = tally
        self._chance = chance
        self._patience_s = patience_s

    async def send(
        self,
        method: str,
        template: str,
        *parts: object,
        token: str = "",
        body: Any = None,
        key: str = "",
        allowed: Sequence[str] = (),
        query: str = "",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """`template` is the path with `{}` for each of `parts`; `allowed` are the problems that are no error here.
        Raises `Refused`, `GaveUp`, `Broken`."""
        endpoint = f"{method} {template}"
        path = template.format(*parts) + query
        headers = dict(headers or {})
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if key:
            headers["Idempotency-Key"] = key
        deadline = time.monotonic() + self._patience_s
        attempts = 0
        while True:
            attempts += 1
            began = time.monotonic()
            pause_s = self._chance.uniform(PAUSE_MIN_S, PAUSE_MAX_S)
            url = self._chance.choice(self._urls)
            try:
                async with self._session.request(
                    method, url + path, json=body, headers=headers, allow_redirects=False, timeout=_TIMEOUT
                ) as response:
                    raw = await response.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                what = "no_answer" if isinstance(error, TimeoutError) else "connection_lost"
                self._tally.answered(endpoint, what, _since_ms(began))
            else:
                answer = self._judged(endpoint, path, response, raw, began, attempts, allowed)
                if answer is not None:
                    return answer
            if time.monotonic() + pause_s > deadline:
                raise GaveUp(endpoint)
            await asyncio.sleep(pause_s)

    def _judged(
        self,
        endpoint: str,
        path: str,
        response: aiohttp.ClientResponse,
        raw: bytes,
        began: float,
        attempts: int,
        allowed: Sequence[str],
    ) -> Answer | None:
        """None: send it again. Raises `Refused` and `Broken`."""
        status = response.status
        try:
            body = msgspec.json.decode(raw) if raw else None
        except msgspec.DecodeError:
            body = None
        if 200 <= status < 300:
            self._tally.answered(endpoint, str(status), _since_ms(began))
            replayed = response.headers.get("Idempotent-Replayed") == "true"
            return Answer(status, body, replayed, attempts)
        code = body.get("code") if isinstance(body, dict) else None
        kind = PROBLEMS.get(code) if isinstance(code, str) else None
        if kind is None or kind.status != status or response.content_type != CONTENT_TYPE:
            self._tally.answered(endpoint, f"unknown_{status}", _since_ms(began))
            self._fail(f"{endpoint} ({path}) answered {status}, which is no known problem: {_short(raw)}")
        assert isinstance(code, str)
        self._tally.answered(endpoint, code, _since_ms(began))
        if status == 503 or status == 429:
            if "Retry-After" not in response.headers:
                self._fail(f"{endpoint} ({path}) answered {code} without Retry-After: {_short(raw)}")
            return None
        if code not in allowed:
            self._fail(f"{endpoint} ({path}) answered {code}, unexpectedly: {_short(raw)}")
        raise Refused(code, body)

    async def stream(self, template: str, *parts: object, token: str, after: int) -> AsyncGenerator[StreamEvent, None]:
        """Server-sent events after that one, until the service ends the stream or is gone. Raises `Broken`."""
        endpoint = f"GET {template}"
        url = self._chance.choice(self._urls) + template.format(*parts)
        headers = {"Authorization": f"Bearer {token}"}
        if after:
            headers["Last-Event-ID"] = str(after)
        timeout = aiohttp.ClientTimeout(total=None, connect=ATTEMPT_TIMEOUT_S)
        began = time.monotonic()
        try:
            async with self._session.get(url, headers=headers, timeout=timeout) as response:
                if response.status != 200:
                    self._judged(endpoint, template, response, await response.read(), began, 1, ())
                    return
                self._tally.answered(endpoint, "200", _since_ms(began))
                seq, type_ = 0, ""
                async for line in response.content:
                    name, _, value = line.rstrip(b"\n").partition(b": ")
                    if name == b"id":
                        seq = int(value)
                    elif name == b"event":
                        type_ = value.decode()
                    elif name == b"data":
                        after += 1
                        if seq != after:
                            self._fail(f"{url}: event {seq} came in the place of {after}")
                        yield StreamEvent(seq, type_, msgspec.json.decode(value))
        except (aiohttp.ClientError, TimeoutError, OSError):
            self._tally.answered(endpoint, "connection_lost", _since_ms(began))

    def _fail(self, story: str) -> None:
        self._tally.error(story)
        raise Broken(story)


def _since_ms(began: float) -> float:
    return (time.monotonic() - began) * 1000


def _short(raw: bytes) -> str:
    return raw[:_BODY_CHARS].decode(errors="replace")
