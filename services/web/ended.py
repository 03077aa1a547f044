"""Sessions that ended while an access token of theirs may still be good: such tokens are refused.

| key | holds |
|---|---|
| `ended-session/{milliseconds, 16 digits}/{session}` | nothing; goes by itself when the last token has expired |

Whoever ends a session writes the key in the transaction that ends it. Every process that verifies tokens, of whichever
service, keeps what it read: all of it at first, then every `LOOK_EVERY_S` only what has been added, so the cost is one
small read every few seconds and not one for each request.

The bound: a process that ended a session itself refuses its tokens at once, every other one `AGE_MAX_S` later at most.
While the store cannot be reached nothing is verified for longer than that: requests would fail at the store anyway.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

import kvstore
from services.web.ids import now_ms

ENDED: Final = b"ended-session/"
LOOK_EVERY_S: Final = 5.0
AGE_MAX_S: Final = 10.0
# Keys are named by the clock of who ended the session, and may be committed a little after they were named.
_CLOCKS_DIFFER_MS: Final = 60_000


def ended_key(session_id: str, ended_ms: int) -> bytes:
    return b"%b%016d/%b" % (ENDED, ended_ms, session_id.encode())


class EndedSessions:
    """What this process knows of ended sessions. One per process."""

    def __init__(self, store: kvstore.Client, kept_s: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        """`kept_s`: so long after its end a session may have tokens that have not expired."""
        self._store = store
        self._kept_ms = int(kept_s * 1000)
        self._clock_s = clock_s
        self._ended: dict[str, int] = {}
        self._loaded_at_s = float("-inf")
        self._loading = asyncio.Lock()

    async def has(self, session_id: str) -> bool:
        age_s = self._clock_s() - self._loaded_at_s
        # While one request reads, others go on with what is known, as long as that is not too old.
        if age_s >= AGE_MAX_S or (age_s >= LOOK_EVERY_S and not self._loading.locked()):
            await self._load()
        return session_id in self._ended

    def learn(self, session_ids: Iterable[str]) -> None:
        """This process has just ended them."""
        self._ended.update((session_id, now_ms()) for session_id in session_ids)

    async def _load(self) -> None:
        async with self._loading:
            began_s = self._clock_s()
            if began_s - self._loaded_at_s < LOOK_EVERY_S:
                return  # another request has just read
            now = now_ms()
            is_first = self._loaded_at_s == float("-inf")
            since_ms = 0 if is_first else now - _CLOCKS_DIFFER_MS - int((began_s - self._loaded_at_s) * 1000)
            start, end = b"%b%016d" % (ENDED, since_ms), kvstore.prefix_end(ENDED)
            async for record in self._store.scan(start, end, keys_only=True):
                ended_ms, _, session_id = record.key[len(ENDED) :].decode().partition("/")
                self._ended[session_id] = int(ended_ms)
            self._ended = {known: at for known, at in self._ended.items() if at > now - self._kept_ms}
            self._loaded_at_s = began_s
