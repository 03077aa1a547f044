"""Throttling of what can be guessed or made a nuisance of, counted in the store: all processes count together.

Each attempt raises a level, which sinks by one every `leak_s`. Up to `free` nothing happens; each attempt above doubles
the pause until the next one, up to `pause_max_s`. Who comes within a pause is refused, and that is not counted: the
pause in `Retry-After` is never prolonged by asking. An attempt is counted before it is made, so a hundred at once are
no way round; after a right password it is taken back.

Sign-ins are counted three times:
- **account and address**: the one that bites. Whoever guesses from one address only shuts out himself.
- **account, from anywhere**: a slow lane against guessing from many addresses, one guess in `pause_max_s` at most. An
  address from which the password was right before (`known-address/`) does not pass through it, so its owner is not
  kept out by whoever fills the lane; from a new place there is the reset by mail, which makes that address known.
- **address, over all accounts**: one password tried on many accounts.

An email that nobody has is counted in the same way, under the same kind of name: its hash.

Cost: one read (of all counts at once) and one write for an attempt, one write more to take it back, which may be part
of another transaction. Records go by themselves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

import kvstore
from services.web.leases import SharedLease
from services.web.problems import Problem

_THROTTLES: Final = b"throttle/"
_KEPT_S: Final = 3 * 3600.0  # longer than the highest level of any rule takes to sink
_LEASE_FILLS_S: Final = 1800.0
# More addresses than can try one account before the slow lane fills, and every 30 s of the four hours after that.
_EXPORTED_MAX: Final = 1000
# Attempts at one account at one moment; more than so many lost races are an attack, or look like one.
_RACES_MAX: Final = 8


class Rule(NamedTuple):
    name: str
    free: int
    leak_s: float
    pause_s: float
    pause_max_s: float

    @property
    def level_max(self) -> float:
        """Where the pause has reached its maximum."""
        return self.free + math.ceil(math.log2(self.pause_max_s / self.pause_s)) + 1


# Five typing errors are human; the pause then goes from 1 s to 15 minutes: some hundred guesses a day.
SIGN_IN_PAIR: Final = Rule("sign-in-account-address", 5, 600.0, 1.0, 900.0)
# 2,880 guesses a day over all addresses of the world, at passwords that are none of the 11,611 commonest.
SIGN_IN_ACCOUNT: Final = Rule("sign-in-account", 30, 60.0, 1.0, 30.0)
# An office or a mobile carrier has many people behind one address, but not a hundred wrong passwords an hour.
SIGN_IN_ADDRESS: Final = Rule("sign-in-address", 100, 36.0, 1.0, 60.0)
REGISTRATION: Final = Rule("registration", 20, 180.0, 5.0, 600.0)
# Every mail that is sent for one account holds a way in, so who keeps asking in another's name shuts nobody out.
MAIL_ACCOUNT: Final = Rule("mail-account", 3, 1200.0, 60.0, 900.0)
MAIL_ADDRESS: Final = Rule("mail-address", 20, 180.0, 5.0, 600.0)

for _rule in (SIGN_IN_PAIR, SIGN_IN_ACCOUNT, SIGN_IN_ADDRESS, REGISTRATION, MAIL_ACCOUNT, MAIL_ADDRESS):
    assert _rule.level_max * _rule.leak_s <= _KEPT_S, _rule.name


class Attempts(Struct, frozen=True, tag_field="v", tag=1):
    level: float
    at_ms: int
    next_ms: int


class Counted(NamedTuple):
    """One count: by which rule, and of whom."""

    rule: Rule
    whom: str

    @property
    def key(self) -> bytes:
        return f"throttle/{self.rule.name}/{self.whom}".encode()


class Taken(NamedTuple):
    """A count that was raised, as it was written."""

    counted: Counted
    attempts: Attempts
    revision: int
    lease: int

    @property
    def unchanged(self) -> kvstore.Compare:
        return kvstore.Compare(self.counted.key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, self.revision)

    def again(self, record: kvstore.Record | None) -> Taken | None:
        """The same with the record as it is by now; None where there is nothing left to take back."""
        if record is None:
            return None
        return Taken(self.counted, _decode(record.value), record.mod_revision, record.lease)

    def lowered(self, now_ms: int) -> kvstore.Put:
        """Takes it back, where it is unchanged."""
        level = max(0.0, _sunk(self.counted.rule, self.attempts, now_ms) - 1)
        return kvstore.Put(self.counted.key, _encode(Attempts(level, now_ms, now_ms)), lease=self.lease)


_decode = msgspec.json.Decoder(Attempts).decode
_encode = msgspec.json.Encoder().encode


class Count(NamedTuple):
    """A count as it stands, for whom it concerns."""

    rule: str
    address: str
    attempts: Attempts


async def counts_of(txn: kvstore.Transaction, email: str, user_id: int) -> list[Count]:
    """All counts of attempts at one account; those of addresses, over all accounts, are nobody's in particular."""
    name = account_name(email)
    pairs = Counted(SIGN_IN_PAIR, f"{name}/").key
    found = await txn.range(prefix=pairs, limit=_EXPORTED_MAX)
    counts = [
        Count(SIGN_IN_PAIR.name, record.key[len(pairs) :].decode(), _decode(record.value)) for record in found.records
    ]
    for counted in (
        Counted(SIGN_IN_ACCOUNT, name),
        Counted(MAIL_ACCOUNT, name),
        Counted(MAIL_ACCOUNT, f"user-{user_id}"),
    ):
        record = await txn.get(counted.key)
        if record is not None:
            counts.append(Count(counted.rule.name, "", _decode(record.value)))
    return counts


def account_name(email: str) -> str:
    """What stands for an account where its attempts are counted, whether it exists or not."""
    return hashlib.blake2b(email.encode("utf-8", "replace"), digest_size=16).hexdigest()


class Throttle:
    """One per process."""

    def __init__(self, store: kvstore.Client, clock_ms: Callable[[], int]) -> None:
        self._store = store
        self._clock_ms = clock_ms
        self._lease = SharedLease(store, _KEPT_S, _LEASE_FILLS_S)

    async def take(
        self, problem: str, counts: Sequence[Counted], seen: Sequence[kvstore.Record | None] | None = None
    ) -> list[Taken]:
        """Count one attempt in all of `counts`. `seen` are their records, where they were read before. Raises `Problem`
        with that code, and counts nothing, if one of them has to wait."""
        if not counts:
            return []
        lease = await self._lease.take(len(counts))
        for race in range(_RACES_MAX):
            records = seen if seen is not None and race == 0 else await self._read(counts)
            now = self._clock_ms()
            levels = [_level(count.rule, record, now) for count, record in zip(counts, records, strict=True)]
            wait_ms = max(_wait_ms(count.rule, record, now) for count, record in zip(counts, records, strict=True))
            if wait_ms > 0:
                raise _refusal(problem, wait_ms)
            raised = [_raised(count.rule, level, now) for count, level in zip(counts, levels, strict=True)]
            result = await self._store.txn(
                compare=[_unchanged(count, record) for count, record in zip(counts, records, strict=True)],
                success=[
                    kvstore.Put(count.key, _encode(attempts), lease=lease)
                    for count, attempts in zip(counts, raised, strict=True)
                ],
            )
            if result.succeeded:
                return [
                    Taken(count, attempts, result.revision, lease)
                    for count, attempts in zip(counts, raised, strict=True)
                ]
            await self._store.wait_for_others(race + 1)
        raise _refusal(problem, 1000)

    async def take_back(self, taken: Sequence[Taken]) -> None:
        """The attempt was right. If others count at the same moment it may stay counted: that errs on the safe side,
        and by one."""
        if not taken:
            return
        now = self._clock_ms()
        result = await self._store.txn(
            compare=[one.unchanged for one in taken], success=[one.lowered(now) for one in taken]
        )
        if result.succeeded:
            return
        records = await self._read([one.counted for one in taken])
        for one, record in zip(taken, records, strict=True):
            again = one.again(record)
            if again is not None:
                await self._store.txn(compare=[again.unchanged], success=[again.lowered(now)])

    async def _read(self, counts: Sequence[Counted]) -> list[kvstore.Record | None]:
        found = await self._store.txn(success=[kvstore.Range(count.key) for count in counts])
        return [record_of(one) for one in found.results]


def record_of(found: object) -> kvstore.Record | None:
    """What the read of one key found."""
    assert isinstance(found, kvstore.RangeResult)
    return found.records[0] if found.records else None


def _level(rule: Rule, record: kvstore.Record | None, now: int) -> float:
    if record is None:
        return 0.0
    return _sunk(rule, _decode(record.value), now)


def _sunk(rule: Rule, attempts: Attempts, now: int) -> float:
    return max(0.0, attempts.level - max(0, now - attempts.at_ms) / 1000 / rule.leak_s)


def _wait_ms(rule: Rule, record: kvstore.Record | None, now: int) -> int:
    """0 or less: now. Never longer than a pause can be, whatever clocks say."""
    return 0 if record is None else min(int(rule.pause_max_s * 1000), _decode(record.value).next_ms - now)


def _raised(rule: Rule, level: float, now: int) -> Attempts:
    level = min(level + 1, rule.level_max)
    above = level - rule.free
    pause_s = min(rule.pause_max_s, rule.pause_s * 2 ** (above - 1)) if above > 0 else 0.0
    return Attempts(level, now, now + int(pause_s * 1000))


def _unchanged(count: Counted, record: kvstore.Record | None) -> kvstore.Compare:
    revision = 0 if record is None else record.mod_revision
    return kvstore.Compare(count.key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, revision)


def _refusal(problem: str, wait_ms: int) -> Problem:
    wait_s = math.ceil(wait_ms / 1000)
    return Problem(problem, f"Wait {wait_s} s, then try again", headers={"Retry-After": str(wait_s)})
