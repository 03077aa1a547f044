"""Loading many records fast: full transactions, some under way at once, through the client library.

Record `n` has the key `key_of(n)`. Values are random bytes, which do not compress. Keys rise, so a load is as kind to
the store as any; what makes it unkind are the writes that come after it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import kvstore
from bench.results import BenchError
from kvstore import KvError, Put

KEY_BYTES = 15
# A transaction holds at most 1,024 operations and a request 1.5 MiB; a quarter of a log entry keeps entries full and
# the pipeline busy. Measured: 200 to 1,000 records of 200 bytes in each load alike fast.
_TXN_RECORDS = 1000
_TXN_BYTES = 256 * 1024
# Enough for the four entries that may be under way.
_UNDER_WAY = 12
_ANSWER_S = 60.0

Loaded = Callable[[int], None]


def key_of(number: int) -> bytes:
    return b"scale/%09d" % number


def load(endpoints: str, first: int, last: int, value_bytes: int, loaded: Loaded = lambda count: None) -> float:
    """Write records `[first, last)`. `loaded(count)` hears of each transaction. Returns the seconds it took. Raises
    BenchError."""
    began = time.monotonic()
    try:
        uvloop.run(_load(endpoints, first, last, value_bytes, loaded))
    except KvError as error:
        raise BenchError(f"loading records failed: {error}") from error
    return time.monotonic() - began


async def _load(endpoints: str, first: int, last: int, value_bytes: int, loaded: Loaded) -> None:
    each = max(1, min(_TXN_RECORDS, _TXN_BYTES // (KEY_BYTES + value_bytes)))
    starts = iter(range(first, last, each))
    chance = random.Random(first)

    async def write() -> None:
        for start in starts:
            numbers = range(start, min(start + each, last))
            values = chance.randbytes(len(numbers) * value_bytes)
            await kv.txn(
                success=[
                    Put(key_of(number), values[at * value_bytes : (at + 1) * value_bytes])
                    for at, number in enumerate(numbers)
                ]
            )
            loaded(len(numbers))

    async with kvstore.connect(endpoints, timeout_s=_ANSWER_S) as kv, asyncio.TaskGroup() as writers:
        for _ in range(_UNDER_WAY):
            writers.create_task(write())


def load_shown(endpoints: str, first: int, last: int, value_bytes: int, console: Console) -> float:
    """`load` with a bar, and a line at its end."""
    with bar("records", last - first, console) as loaded:
        took_s = load(endpoints, first, last, value_bytes, loaded)
    console.print(
        f"loaded {last - first:,} records of {KEY_BYTES + value_bytes:,} bytes in {took_s:.1f} s, "
        f"{(last - first) / took_s:,.0f}/s",
        highlight=False,
    )
    return took_s


@contextmanager
def bar(what: str, total: int, console: Console) -> Iterator[Loaded]:
    """A progress bar, where the console is a terminal; gives what takes how many more are done."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(what, total=total)
        yield lambda count: shown.advance(task, count)
