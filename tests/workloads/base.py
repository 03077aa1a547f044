"""What every workload is, and how an operation and its outcome get into the history.

A workload is a client program whose answers can be judged. It runs on any `kvstore.client.Client` (a simulated
cluster's, real processes', an embedded store's), takes all chance from the `Random` it is given, and reads no clock.

What an exception of `kvstore.errors` means for a history: `Refused` and `Unavailable` surely changed nothing,
`OutcomeUnknown` may take effect later, and anything else is a bug that goes up to whoever runs the workload. So does
cancellation, which leaves the operation open: that is unknown, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from random import Random
from typing import Protocol, TypeVar

from kvstore import Client, Compare, OutcomeUnknown, Put, Record, Refused, Relation, Target, Unavailable
from tests.checkers.history import Entry, History

# How often the first and the last requests are tried, where nothing is broken any more: each already waits for its
# whole timeout, in which a healthy cluster elects a leader several times over.
ATTEMPTS = 5

# Often enough that each run has dozens, and rare enough that most operations have the cluster for themselves.
BURST_SHARE, BURST_MAX = 0.1, 4

# A local read at a replica that has not applied the first state yet: an empty store is a past state of it, too.
NOT_THERE_YET = "not there yet"

_T = TypeVar("_T")


class BackedUp(Protocol):
    """A workload whose judge takes a backup for what it is: one more reading of everything, at one moment."""

    def begin_reading(self, worker: int) -> tuple[Entry, Callable[[Sequence[Record]], object]]:
        """What is noted of it, and how its result is made of all records of the store."""


class Workload(Protocol):
    name: str
    history: History

    async def set_up(self, kv: Client) -> None:
        """Write what must be there before the first step."""

    async def step(self, kv: Client, worker: int, chance: Random) -> None:
        """One operation or transaction (now and then a few at once), noted in the history. Any number of workers may
        be in it at the same time."""

    async def finish(self, kv: Client) -> None:
        """The last reads, once everything is healed and all workers have stopped."""

    def check(self) -> None:
        """Raises `checkers.verdict.Inconsistent`, or `CheckBudgetExceeded` where it could not decide."""


async def one_or_several(step: Callable[[], Awaitable[None]], chance: Random) -> None:
    """Do one step, or now and then some at once, as a client does that serves several users. Those race each other far
    more closely than workers do who wait for their answers, and they are in flight together in one session."""
    if chance.random() >= BURST_SHARE:
        await step()
        return
    await asyncio.gather(*(step() for _ in range(chance.randint(2, BURST_MAX))))


async def noted(entry: Entry, call: Awaitable[_T], answers: Collection[str] = ()) -> _T | Refused | None:
    """Await a call and note how it ended, if it ended without an answer (then None).

    An answer is returned, for the caller to note; so is a refusal whose code is among `answers`, because it tells
    something about the store's state.
    """
    try:
        return await call
    except Refused as refusal:
        if refusal.code in answers:
            return refusal
        entry.failed(refusal.code)
    except Unavailable as error:
        entry.failed(error.code)
    except OutcomeUnknown as error:
        entry.unknown(error.code)
    return None


async def insist(attempt: Callable[[], Awaitable[_T]]) -> _T:
    """Do something that may be done twice, until it is answered. Raises the last attempt's error."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await attempt()
        except (Unavailable, OutcomeUnknown):
            continue
    return await attempt()


async def establish(kv: Client, puts: Sequence[Put], timeout_s: float) -> None:
    """Write the first state, once: a repeated attempt finds it there and changes nothing."""
    absent = Compare(puts[0].key, Target.VERSION, Relation.EQUAL, 0)
    await insist(lambda: kv.txn(compare=[absent], success=puts, timeout=timeout_s))
