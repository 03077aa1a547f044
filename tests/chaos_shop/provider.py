"""The campaign's hold on the sandbox provider: its failures, what is pending, and how often each failure came.

The provider counts since its start, and is killed now and then: counts are read all the time, and once more just before
a kill. What came in between is lost, so a sum here is what there was at least.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Any

import aiohttp

from services.payments.loading import open_sandbox
from services.payments.sandbox import SandboxProvider
from services.sandbox_psp.failures import OF_ANSWERS, OF_WEBHOOKS, Failure
from services.sandbox_psp.process import API_KEY

_LOOK_EVERY_S = 0.5
_TIMEOUT = aiohttp.ClientTimeout(3.0)
# One request in six gets no plain answer, and one webhook in eight does not come as it should.
RATES: dict[str, float] = {
    **{str(kind): 0.02 for kind in OF_ANSWERS},
    **{str(kind): 0.03 for kind in OF_WEBHOOKS},
    str(Failure.DECLINE): 0.04,
}


class ProviderControl:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url
        self._before: Counter[str] = Counter()
        self._latest: dict[str, int] = {}

    @property
    def counts(self) -> dict[str, int]:
        """How often each failure came, in all lives of the process; those that never came, too."""
        total = self._before + Counter(self._latest)
        return {str(kind): total[kind] for kind in Failure}

    async def watch(self) -> None:
        """Read the counts until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def look(self) -> int | None:
        """Read them once; how many webhooks are still to be delivered. None if it does not answer: it may be down."""
        try:
            found = await self._ask("GET", "/control/counts")
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None
        self._latest = found["failures"]
        return int(found["webhooks"]["waiting"])

    async def ends(self) -> None:
        """Before it is killed."""
        await self.look()
        self._before += Counter(self._latest)
        self._latest = {}

    async def begins_again(self, seed: int) -> None:
        """After it was started again: with the same seed a request that came for the first time since would meet the
        same failure as it did then, start after start. If it is gone again, that is the next start's."""
        with suppress(aiohttp.ClientError, TimeoutError, OSError):
            await self._ask("PUT", "/control/failures", {"seed": seed, "rates": RATES})

    async def heal(self) -> None:
        """No failures by chance any more, and what is pending ends now. Raises `aiohttp.ClientError`."""
        await self._ask("PUT", "/control/failures", {"rates": {}, "settle_ms": 0, "late_ms": 0})
        await self._ask("POST", "/control/settle")

    async def paid_twice(self) -> list[str]:
        """Orders for which money was taken by more than one charge; in the provider's own books, whatever our store
        says. Raises `ProviderUnknown`."""
        provider = open_sandbox(self._session, self.url)
        assert isinstance(provider, SandboxProvider)
        taken: Counter[str] = Counter()
        after = ""
        while entries := await provider.charges(after):
            taken.update(entry.key.partition(":")[0] for entry in entries if entry.charge.captured)
            after = entries[-1].charge.id
        return [order for order, times in taken.items() if times > 1]

    async def _ask(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {API_KEY}"}
        async with self._session.request(
            method, self.url + path, json=body, headers=headers, timeout=_TIMEOUT
        ) as answer:
            answer.raise_for_status()
            return await answer.json()
