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

Cost: one read and one write for an attempt, one small read and write more to take it back. Records go by themselves.
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


_decode = msgspec.json.Decoder(Attempts).decode
_encode = msgspec.json.Encoder().encode


def account_name(email: str) -> str:
    """What stands for an account where its attempts are counted, whether it exists or not."""
    return hashlib.blake2b(email.encode("utf-8", "replace"), digest_size=16).hexdigest()


class Throttle:
    """One per process."""

    def __init__(self, store: kvstore.Client, clock_ms: Callable[[], int]) -> None:
        self._store = store
        self._clock_ms = clock_ms
        self._lease = SharedLease(store, _KEPT_S, _LEASE_FILLS_S)

    async def take(self, problem: str, counts: Sequence[Counted]) -> None:
        """Count one attempt in all of `counts`. Raises `Problem` with that code, and counts nothing, if one of them has
        to wait."""
        if not counts:
            return
        lease = await self._lease.take(len(counts))
        for race in range(_RACES_MAX):
            records = await self._read(counts)
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
                return
            await self._store.wait_for_others(race + 1)
        raise _refusal(problem, 1000)

    async def take_back(self, counts: Sequence[Counted]) -> None:
        """The attempt was right. If others count at the same moment it may stay counted: that errs on the safe side,
        and by one."""
        if not counts:
            return
        records = await self._read(counts)
        now = self._clock_ms()
        for count, record in zip(counts, records, strict=True):
            if record is None:
                continue
            lowered = Attempts(max(0.0, _level(count.rule, record, now) - 1), now, now)
            await self._store.txn(
                compare=[_unchanged(count, record)],
                success=[kvstore.Put(count.key, _encode(lowered), lease=record.lease)],
            )

    async def _read(self, counts: Sequence[Counted]) -> list[kvstore.Record | None]:
        found = await self._store.txn(success=[kvstore.Range(count.key) for count in counts])
        records: list[kvstore.Record | None] = []
        for one in found.results:
            assert isinstance(one, kvstore.RangeResult)
            records.append(one.records[0] if one.records else None)
        return records


def _level(rule: Rule, record: kvstore.Record | None, now: int) -> float:
    if record is None:
        return 0.0
    attempts = _decode(record.value)
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
