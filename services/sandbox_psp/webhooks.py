"""Webhooks to the merchant: signed, retried with backoff, and made late, lost or double when a failure says so.

An event is in the journal with the change that it tells of, and is marked there when it is delivered or given up; after
a restart what is left is delivered. So an event may come twice, even without a failure. Nothing is told of a change
before it is on the disk. Order is not kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

import aiohttp

from services.sandbox_psp.books import Books
from services.sandbox_psp.failures import Failure, Failures, plan_of
from services.sandbox_psp.records import Change, Event, encode

# An event that waits is a task of a few KiB: some 50 MB. A merchant who is down for longer asks for what was missed.
WAITING_MAX: Final = 10_000
AT_ONCE_MAX: Final = 16  # more would be an attack on the merchant
TIMEOUT_S: Final = 5.0  # to take an event in is one write; who needs longer gets it again
# 0.5, 1, 2 … 60 s: some ten minutes in all. A real provider goes on for days; nobody waits for that with a sandbox.
ATTEMPTS_MAX: Final = 16
BACKOFF_MIN_S: Final = 0.5
BACKOFF_MAX_S: Final = 60.0
HEADER: Final = "Sandbox-Signature"


class Webhooks:
    """Delivers the events of `books` to `url`. Belongs to one event loop."""

    def __init__(
        self, books: Books, failures: Failures, session: aiohttp.ClientSession, url: str, secrets: Sequence[str]
    ) -> None:
        self._books = books
        self._failures = failures
        self._session = session
        self._url = url
        self._secrets = [secret.encode() for secret in secrets]
        self._tasks: set[asyncio.Task[None]] = set()
        self._at_once = asyncio.Semaphore(AT_ONCE_MAX)
        self._held: set[asyncio.Event] = set()  # of events that let another one pass first
        self.counts: Counter[str] = Counter()

    def start(self) -> None:
        """Go on with what an earlier process left."""
        for event in list(self._books.events.values()):
            self.deliver(event)

    def deliver(self, event: Event) -> None:
        """Begin to deliver; returns at once."""
        if len(self._tasks) >= WAITING_MAX:
            self._end(event, "overflown")
            return
        task = asyncio.ensure_future(self._deliver(event))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def waiting(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """Stop; what was not delivered stays in the journal."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _deliver(self, event: Event) -> None:
        try:
            await self._books.synced()
            self._end(event, await self._told(event))
        except OSError:
            self.counts["journal_failed"] += 1  # a restart reads what is on the disk, and goes on from there

    async def _told(self, event: Event) -> str:
        """How it ended."""
        failure = self._failures.of_event(event, plan_of(self._books.charges[event.charge].token))
        if failure is Failure.WEBHOOK_LOST:
            return "lost"
        if failure is Failure.WEBHOOK_LATE:
            await asyncio.sleep(self._failures.settings.late_ms / 1000)
        if failure is Failure.WEBHOOK_REORDERED:
            await self._let_another_pass()
        body = encode(event)
        if not await self._post_until_taken(event, body):
            return "given_up"
        self._let_go()
        if failure is Failure.WEBHOOK_DUPLICATE:
            await self._post(event, body)
        return "delivered"

    async def _let_another_pass(self) -> None:
        passed = asyncio.Event()
        self._held.add(passed)
        try:
            await asyncio.wait_for(passed.wait(), self._failures.settings.late_ms / 1000)
        except TimeoutError:
            self._held.discard(passed)

    def _let_go(self) -> None:
        for passed in self._held:
            passed.set()
        self._held.clear()

    async def _post_until_taken(self, event: Event, body: bytes) -> bool:
        for attempt in range(ATTEMPTS_MAX):
            if await self._post(event, body):
                return True
            self.counts["failed_attempts"] += 1
            await asyncio.sleep(min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2.0**attempt))
        return False

    async def _post(self, event: Event, body: bytes) -> bool:
        headers = {
            "Content-Type": "application/json",
            HEADER: signature(self._secrets, body, time.time()),
            "Sandbox-Event": event.id,
        }
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with self._at_once:
            try:
                async with self._session.post(
                    self._url, data=body, headers=headers, timeout=timeout, allow_redirects=False
                ) as answer:
                    return 200 <= answer.status < 300
            except (aiohttp.ClientError, OSError, TimeoutError):
                return False

    def _end(self, event: Event, how: str) -> None:
        self.counts[how] += 1
        self._books.commit(Change(event_done=event.id))


def signature(secrets: Sequence[bytes], body: bytes, now_s: float) -> str:
    """`t=…,v1=…`: HMAC-SHA256 over `t.body`, with each secret in use."""
    stamp = str(int(now_s)).encode()
    made = [hmac.new(secret, stamp + b"." + body, hashlib.sha256).hexdigest() for secret in secrets]
    return ",".join([f"t={int(now_s)}", *(f"v1={one}" for one in made)])
