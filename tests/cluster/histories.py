"""What writers tried and what they were told, and whether what is found afterwards can be true.

`write` makes one random write through a client; a `History` hears of it before it is sent and after it is acknowledged.
`Ledger` is the history that judges:

- A key has one writer, which writes one value after another, each of them once. What is found there must be the last
  acknowledged value or one that was tried after it: an older one means a lost write, or one that was applied late.
- A counter may have many writers. What is found must lie between what was acknowledged and what was tried, and no two
  acknowledgements may have seen the same sum: one that did was lost, and its place given away.
- `receipts/COUNTER` counts the keys below `receipt/COUNTER/`, each written in the transaction that counted it: the two
  agree, or a transaction was torn.

`Ledger.floor` is what was acknowledged at a moment; reading may begin after it, while writers go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import NamedTuple, Protocol

from kvstore import Add, AddResult, Client, OutcomeUnknown, Put, Unavailable

# So few that every counter meets concurrent writers, and every key is overwritten soon.
COUNTERS = 4
KEYS_PER_WRITER = 8


class History(Protocol):
    def try_put(self, key: bytes, value: bytes) -> None: ...

    def put(self, key: bytes, value: bytes) -> None: ...

    def try_add(self, counter: bytes) -> None: ...

    def add(self, counter: bytes, total: int) -> None: ...


async def write(kv: Client, history: History, writer: bytes, number: int, chance: Random) -> bool:
    """The writer's next write: a put, an addition of one, or a transaction of both. True if it was acknowledged."""
    kind, which = chance.randrange(4), chance.randrange(COUNTERS)
    key = counter = b""
    value = b"%s %d" % (writer, number)
    if kind < 2:
        key = b"put/%s/%d" % (writer, number % KEYS_PER_WRITER)
    elif kind == 2:
        counter = b"sums/%d" % which
    else:
        counter, key = b"receipts/%d" % which, b"receipt/%d/%s/%d" % (which, writer, number)
    if key:
        history.try_put(key, value)
    if counter:
        history.try_add(counter)
    total = 0
    try:
        if not counter:
            await kv.put(key, value)
        elif not key:
            total = (await kv.add(counter, 1)).value
        else:
            added, _ = (await kv.txn(success=[Add(counter, 1), Put(key, value)])).results
            assert isinstance(added, AddResult)
            total = added.value
    except (OutcomeUnknown, Unavailable):
        return False
    if key:
        history.put(key, value)
    if counter:
        history.add(counter, total)
    return True


class Floor(NamedTuple):
    """What was acknowledged at one moment: for each key the place of its value among the tried ones, and sums."""

    puts: Mapping[bytes, int]
    sums: Mapping[bytes, int]


class _Key:
    __slots__ = ("acknowledged", "tried")

    def __init__(self) -> None:
        self.tried: dict[bytes, int] = {}  # value -> its place, from 0
        self.acknowledged = -1  # the place of the last acknowledged one


class _Counter:
    __slots__ = ("acknowledged", "greatest", "tried")

    def __init__(self) -> None:
        self.tried = 0
        self.acknowledged: set[int] = set()
        self.greatest = 0


class Ledger:
    """See the module's docstring. What it keeps grows with the number of writes."""

    def __init__(self) -> None:
        self._keys: dict[bytes, _Key] = {}
        self._counters: dict[bytes, _Counter] = {}
        self._contradictions: list[str] = []
        self.acknowledged = 0
        """Acknowledgements so far; one for each operation of a transaction."""

    def try_put(self, key: bytes, value: bytes) -> None:
        if key not in self._keys:
            self._keys[key] = _Key()
        tried = self._keys[key].tried
        assert value not in tried, "a value is written once"
        tried[value] = len(tried)

    def put(self, key: bytes, value: bytes) -> None:
        self.acknowledged += 1
        entry = self._keys[key]
        entry.acknowledged = max(entry.acknowledged, entry.tried[value])

    def try_add(self, counter: bytes) -> None:
        if counter not in self._counters:
            self._counters[counter] = _Counter()
        self._counters[counter].tried += 1

    def add(self, counter: bytes, total: int) -> None:
        self.acknowledged += 1
        entry = self._counters[counter]
        if total in entry.acknowledged:
            self._contradictions.append(f"two additions to {counter!r} were told the sum {total}")
        entry.acknowledged.add(total)
        entry.greatest = max(entry.greatest, total)

    def floor(self) -> Floor:
        return Floor(
            {key: entry.acknowledged for key, entry in self._keys.items() if entry.acknowledged >= 0},
            # A sum counts every addition before it; so many were acknowledged, so it is at least that.
            {key: max(entry.greatest, len(entry.acknowledged)) for key, entry in self._counters.items()},
        )

    def judge(self, found: Mapping[bytes, bytes], floor: Floor) -> list[str]:
        """What cannot be: `found` is everything in the store at one revision, read after `floor` was taken."""
        wrong: list[str] = []
        for key, place in floor.puts.items():
            value = found.get(key)
            tried = self._keys[key].tried
            if value is None:
                wrong.append(f"{key!r} is gone; {place + 1} values were written")
            elif tried.get(value, place) < place:
                wrong.append(f"{key!r} holds {value!r}, although a later value was acknowledged")
        for counter, least in floor.sums.items():
            total = int(found.get(counter, b"0"))
            if total < least:
                wrong.append(f"{counter!r} is {total}; {least} was acknowledged")
        receipts: dict[bytes, int] = {}
        for key, value in found.items():
            if key in self._counters:
                if int(value) > self._counters[key].tried:
                    wrong.append(f"{key!r} is {int(value)}; only {self._counters[key].tried} additions were tried")
            elif key not in self._keys or value not in self._keys[key].tried:
                wrong.append(f"{key!r} holds {value!r}, which nobody wrote")
            elif key.startswith(b"receipt/"):
                counter = b"receipts/" + key.split(b"/")[1]
                receipts[counter] = receipts.get(counter, 0) + 1
        for counter in self._counters:
            if counter.startswith(b"receipts/") and int(found.get(counter, b"0")) != receipts.get(counter, 0):
                wrong.append(f"{counter!r} is {found.get(counter)!r}; there are {receipts.get(counter, 0)} receipts")
        return wrong + self._contradictions


async def everything(kv: Client) -> dict[bytes, bytes]:
    """The whole store at one revision, which is linearizable: it shows every write acknowledged before this call."""
    return {record.key: record.value async for record in kv.scan(prefix=b"")}
