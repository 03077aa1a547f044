"""Durable steps: what is to be done, kept in the store until it is done.

| key | holds |
|---|---|
| `step/{due, 16 digits of milliseconds}/{kind}/{subject}` | `Step`: to be done from then on |
| `step-{queue}/{due}/{kind}/{subject}` | the same, of a service whose workers are its own |
| `claim/{kind}/{subject}` | who is at it, under that worker's lease: it goes when the worker does |
| `parked/{kind}/{subject}` | `ParkedStep`: needs a person |

A step is written by the transaction that makes it necessary (`put`), so it is there if and only if its cause is. It is
named by its kind and subject (`expire`, `order/12`), so that the same cause cannot ask for it twice. One that asks to
look at once at what is due anyway (a webhook does) is tried once (`once`): it has a key of its own, however often it is
asked for, and if it fails nothing comes of it. Workers look at one queue, so that those of one service neither park nor
wait for what only another's can do; kinds are unique among all queues.

Doing it
1. A worker creates the claim, in a transaction that compares that there is none and that the step is as it was seen.
   The revision of that transaction is the claim's fencing token.
2. It calls the handler of the kind, which may talk to the world. What it does there must bear being done twice: a
   worker that is cut off may still be at it when its lease has ended and another one begins.
3. The handler ends it (`StepRun.finish`): what has changed, the end of the step and that of the claim are one
   transaction, which compares the fencing token. A worker that has lost its claim changes nothing any more.

While a handler runs, its context is the trace of the request that the step follows from: what it logs has it, steps
that it writes remember it, and `tracing.traceparent()` is to be passed on to whom it calls.

A handler that fails says how: `Again` (later, with backoff) or `Park` (no attempt will help). Too many attempts park a
step as well; `unpark` gives it back. What else changes when a step is parked, its worker's owner says (`AlsoParked`):
that is the same transaction. Where that cannot be (others keep changing what it changes, or the store refuses it), the
attempt has failed like any other: the step is put off, and counted. Past its attempts it is parked alone.

What this version cannot read (a newer one wrote it, or it is damaged) is parked as it is (`park_unread`), and given
back as it was: whoever can read it then does it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from typing import Any, Final

import msgspec
import structlog
from msgspec import Struct

import kvstore
from services.web import tracing
from services.web.ids import now_ms

STEPS: Final = b"step/"
CLAIMS: Final = b"claim/"
PARKED: Final = b"parked/"

# The first attempts follow soon, because what failed is often a restart; then every five minutes, for some two hours.
BACKOFF_MIN_S: Final = 0.5
BACKOFF_MAX_S: Final = 300.0
ATTEMPTS_MAX: Final = 34
# What is taken off a pause, at most and by chance: a provider that was away must not meet all that waited for it at
# once. No more, so that two hours stay some two hours.
JITTER: Final = 0.25
_DOUBLINGS_MAX: Final = 32  # far past `BACKOFF_MAX_S`, and far from the largest float
# How often a step's parking is tried at once against others who change what is to change with it: a customer, staff.
# And so many attempts past `ATTEMPTS_MAX` it is put off for that, before it is parked alone.
_PARKINGS_MAX: Final = 8
# Each time somebody else parked the very step anew meanwhile, after an attempt at it.
_UNPARK_RACES_MAX: Final = 8
_DETAIL_CHARS_MAX: Final = 2000  # staff read it in a list; others wrote it, and the worker's log has all of it

UNREADABLE: Final = "unreadable"
_AFTER_QUEUE: Final = re.compile(rb"([0-9]{16})/([!-.0-~]+)/([!-~]+)\Z")
_NAME: Final = re.compile(rb"parked/([!-.0-~]+)/([!-~]+)\Z")


class Step(Struct, frozen=True, tag_field="v", tag=1):
    """`arguments` are what its handler needs beside the subject. `code` says why the last attempt failed;
    `traceparent` is that of the request that it follows from. `once`: it is neither put off nor parked, since another
    one for the same subject is."""

    kind: str
    subject: str
    due_ms: int
    created_ms: int
    arguments: dict[str, Any] = {}
    attempt: int = 0
    code: str = ""
    queue: str = ""
    traceparent: str = ""
    once: bool = False

    @property
    def key(self) -> bytes:
        return step_key(self.kind, self.subject, self.due_ms, self.queue)


class ParkedStep(Struct, frozen=True, tag_field="v", tag=1):
    """`unread` is the step's record where it could not be read: of `step` only what the key says is true then."""

    step: Step
    code: str
    detail: str
    parked_ms: int
    unread: bytes = b""


class Ending(StrEnum):
    """What came of an attempt. One that asked to look `once` is dropped where it failed."""

    FINISHED = "finished"
    RETRIED = "retried"
    PARKED = "parked"
    DROPPED = "dropped"


class Again(Exception):
    """Try the step again, after `after_s` or the usual pause. `code` is stable and says why."""

    def __init__(self, code: str, after_s: float | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.after_s = after_s


class Park(Exception):
    """No attempt will help: a person has to look."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{detail} [{code}]")
        self.code = code
        self.detail = detail


class ClaimLost(Exception):
    """Another worker may be at this step by now; nothing was changed."""


# Of a step and its reason code: what must hold, and what else is written. It is called anew where that does not hold.
AlsoParked = Callable[[Step, str], Awaitable[tuple[list[kvstore.Compare], list[kvstore.Operation]]]]

log = structlog.get_logger("services.work")

decode_step = msgspec.json.Decoder(Step).decode
decode_parked = msgspec.json.Decoder(ParkedStep).decode
_encode = msgspec.json.Encoder().encode


def steps_of(queue: str) -> bytes:
    """What the keys of a queue's steps begin with."""
    return f"step-{queue}/".encode() if queue else STEPS


def step_at(key: bytes, queue: str = "") -> Step | None:
    """What the key of a step says of it; None if it is none."""
    match = _AFTER_QUEUE.match(key, len(steps_of(queue)))
    if match is None:
        return None
    due_ms = int(match[1])
    return Step(match[2].decode(), match[3].decode(), due_ms, due_ms, queue=queue)


def read_step(record: kvstore.Record) -> Step | None:
    """None if this version cannot read it, or it is not where it belongs."""
    try:
        step = decode_step(record.value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return step if step.key == record.key else None


def read_parked(record: kvstore.Record) -> ParkedStep:
    """One that this version cannot read is `UNREADABLE`, and cannot be given back."""
    try:
        return decode_parked(record.value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        match = _NAME.match(record.key)
        kind, subject = (match[1].decode(), match[2].decode()) if match is not None else ("", "")
        return ParkedStep(Step(kind, subject, 0, 0), UNREADABLE, "The record of what was parked cannot be read", 0)


def step_key(kind: str, subject: str, due_ms: int, queue: str = "") -> bytes:
    return b"%b%016d/%b" % (steps_of(queue), due_ms, _name(kind, subject))


def put(
    kind: str,
    subject: str,
    *,
    due_ms: int | None = None,
    queue: str = "",
    traceparent: str | None = None,
    once: bool = False,
    **arguments: Any,
) -> kvstore.Put:
    """For the transaction that makes the step necessary; due at once unless `due_ms` says when. It belongs to the trace
    of whatever this is called from, unless `traceparent` says otherwise. With `once` its key holds no time: it stands
    beside the step that is due, not in its place, and several are one."""
    now = now_ms()
    trace = tracing.traceparent() if traceparent is None else traceparent
    due = 0 if once else now if due_ms is None else due_ms
    return _put(Step(kind, subject, due, now, arguments, queue=queue, traceparent=trace, once=once))


def cancel(kind: str, subject: str, due_ms: int, queue: str = "") -> kvstore.Delete:
    """For the transaction that makes it needless. A worker that is at it already finds what has changed by itself."""
    return kvstore.Delete(step_key(kind, subject, due_ms, queue))


def move(step: Step, due_ms: int) -> tuple[Step, list[kvstore.Operation]]:
    """The step as it is when it is due at another time, and what makes it so: for a transaction that compares that it
    is as it was seen."""
    moved = msgspec.structs.replace(step, due_ms=due_ms)
    return moved, [kvstore.Delete(step.key), _put(moved)]


def backoff_s(attempt: int, chance: float = 0.0) -> float:
    """The pause after the attempt of this number; 0 is the first. `chance`, from 0 to 1, decides how much shorter it
    is than the longest."""
    return min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2.0 ** min(attempt, _DOUBLINGS_MAX)) * (1.0 - JITTER * chance)


def _put(step: Step) -> kvstore.Put:
    return kvstore.Put(step.key, _encode(step))


def _name(kind: str, subject: str) -> bytes:
    return f"{kind}/{subject}".encode()


class StepRun:
    """One attempt at a step by the worker that holds its claim."""

    __slots__ = ("_claim", "_revision", "_store", "_token", "also_parked", "chance", "is_ended", "step")

    def __init__(self, store: kvstore.Client, step: Step, revision: int, token: int) -> None:
        """`revision` is the step's, `token` the claim's."""
        self.also_parked: AlsoParked | None = None
        self.chance: Callable[[], float] = random.random
        self._store = store
        self._revision = revision
        self._claim = CLAIMS + _name(step.kind, step.subject)
        self._token = token
        self.step = step
        self.is_ended = False

    @classmethod
    async def claim(cls, store: kvstore.Client, step: Step, revision: int, lease: int) -> StepRun | None:
        """None where another worker is at it, or the step is not as it was seen. A claim that this worker's lease holds
        already is taken up again: the store did not answer when it was made, or when it was to end. So call it only
        for a step that this worker is not at."""
        claim = CLAIMS + _name(step.kind, step.subject)
        result = await store.txn(
            compare=[
                kvstore.Compare(claim, kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0),
                kvstore.Compare(step.key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, revision),
            ],
            success=[kvstore.Put(claim, b"", lease=lease)],
            failure=[kvstore.Range(claim), kvstore.Range(step.key)],
        )
        if result.succeeded:
            return cls(store, step, revision, result.revision)
        claims, steps = result.results
        assert isinstance(claims, kvstore.RangeResult)
        assert isinstance(steps, kvstore.RangeResult)
        if not (claims.records and steps.records):
            return None
        held, seen = claims.records[0], steps.records[0]
        if held.lease != lease or seen.mod_revision != revision:
            return None
        return cls(store, step, revision, held.create_revision)

    async def finish(
        self,
        compare: list[kvstore.Compare] | None = None,
        success: list[kvstore.Operation] | None = None,
    ) -> bool:
        """End the step, with what `success` changes; had it been parked before, it is not any more. False, and nothing
        is changed, if one of `compare` does not hold: read again, then decide anew. Raises `ClaimLost`."""
        parked = kvstore.Delete(PARKED + _name(self.step.kind, self.step.subject))
        return await self._end(compare or [], [parked, *(success or [])])

    async def again(self, code: str, after_s: float | None = None, detail: str = "") -> Ending:
        """Put it off; or park it, where that was the last attempt. Raises `ClaimLost`."""
        step = self.step
        if not step.once and step.attempt + 1 >= ATTEMPTS_MAX:
            why = f"{step.attempt + 1} attempts failed{': ' if detail else ''}{detail}"
            log.error("step parked", kind=step.kind, subject=step.subject, code=code, detail=why)
            return await self.park(code, why)
        return await self._put_off(code, after_s)

    async def park(self, code: str, detail: str) -> Ending:
        """Leave it to people; or put it off, where what is to change with that cannot be changed now. Raises
        `ClaimLost`."""
        step = self.step
        if step.once:
            return await self._put_off(code)
        key = PARKED + _name(step.kind, step.subject)
        parked = kvstore.Put(key, _encode(ParkedStep(step, code, detail[:_DETAIL_CHARS_MAX], now_ms())))
        attempts_max, why = ATTEMPTS_MAX + _PARKINGS_MAX, "others changed it each time"
        for _ in range(_PARKINGS_MAX):
            compare, also = await self.also_parked(step, code) if self.also_parked is not None else ([], [])
            try:
                if await self._end(compare, [parked, *also]):
                    return Ending.PARKED
            except kvstore.Refused as refused:
                # The same is refused the next time, unless somebody mends it: that takes no more than other failures.
                attempts_max, why = ATTEMPTS_MAX, str(refused)
                break
        if step.attempt + 1 < attempts_max:
            log.warning(
                "cannot park now", kind=step.kind, subject=step.subject, attempt=step.attempt, code=code, why=why
            )
            return await self._put_off(code)
        log.error("parked alone", kind=step.kind, subject=step.subject, attempt=step.attempt, code=code, why=why)
        await self._end([], [parked])
        return Ending.PARKED

    async def _put_off(self, code: str, after_s: float | None = None) -> Ending:
        step = self.step
        if step.once:
            await self._end([], [])
            return Ending.DROPPED
        pause_s = backoff_s(step.attempt, self.chance()) if after_s is None else after_s
        due_ms = now_ms() + int(pause_s * 1000)
        later = msgspec.structs.replace(step, due_ms=due_ms, attempt=step.attempt + 1, code=code)
        await self._end([], [_put(later)])
        return Ending.RETRIED

    async def _end(self, compare: list[kvstore.Compare], success: list[kvstore.Operation]) -> bool:
        key = self.step.key
        # A step that follows it at once may have the key that it has, and what it changes may make it needless: then
        # that is its end, since a transaction writes a key once.
        written = {
            operation.key if isinstance(operation, kvstore.Put) else operation.start
            for operation in success
            if isinstance(operation, kvstore.Put | kvstore.Delete)
        }
        ended = [] if key in written else [kvstore.Delete(key)]
        result = await self._store.txn(
            compare=[
                kvstore.Compare(self._claim, kvstore.Target.CREATE_REVISION, kvstore.Relation.EQUAL, self._token),
                kvstore.Compare(key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, self._revision),
                *compare,
            ],
            success=[*ended, kvstore.Delete(self._claim), *success],
            failure=[kvstore.Range(self._claim), kvstore.Range(key)],
        )
        if result.succeeded:
            self.is_ended = True
            return True
        claim, step = result.results
        assert isinstance(claim, kvstore.RangeResult)
        assert isinstance(step, kvstore.RangeResult)
        held = bool(claim.records) and claim.records[0].create_revision == self._token
        unchanged = bool(step.records) and step.records[0].mod_revision == self._revision
        if not (held and unchanged):
            raise ClaimLost(f"{self.step.kind} {self.step.subject}")
        return False


async def park_unread(
    store: kvstore.Client, record: kvstore.Record, step: Step, also_parked: AlsoParked | None = None
) -> bool:
    """Leave a step that cannot be read to people; `step` is what its key says. False, and nothing is changed, if it has
    changed, a worker of another version is at it, or what was to be written with it does not hold now. Raises
    `kvstore.Refused` where the store does not take it."""
    compare, also = await also_parked(step, UNREADABLE) if also_parked is not None else ([], [])
    claim = CLAIMS + _name(step.kind, step.subject)
    parked = ParkedStep(step, UNREADABLE, "This version of the worker cannot read the step", now_ms(), record.value)
    result = await store.txn(
        compare=[
            kvstore.Compare(claim, kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0),
            kvstore.Compare(record.key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, record.mod_revision),
            *compare,
        ],
        success=[
            kvstore.Delete(record.key),
            kvstore.Put(PARKED + _name(step.kind, step.subject), _encode(parked)),
            *also,
        ],
    )
    return result.succeeded


async def unpark(
    store: kvstore.Client,
    kind: str,
    subject: str,
    also: Callable[[ParkedStep], kvstore.Operation] | None = None,
    compare: Sequence[kvstore.Compare] = (),
) -> ParkedStep | None:
    """Give a parked step back to the workers, as if new, and with it write what `also` says. What was parked; None, and
    nothing is changed, if there is none (or none that can be read), or one of `compare` does not hold."""
    key = PARKED + _name(kind, subject)
    record = await store.get(key)
    for _ in range(_UNPARK_RACES_MAX):
        if record is None:
            return None
        parked = read_parked(record)
        if parked.code == UNREADABLE and not parked.unread:
            return None
        if parked.unread:
            given_back = kvstore.Put(parked.step.key, parked.unread)
        else:
            given_back = _put(msgspec.structs.replace(parked.step, due_ms=now_ms(), attempt=0))
        result = await store.txn(
            compare=[
                kvstore.Compare(key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, record.mod_revision),
                *compare,
            ],
            success=[kvstore.Delete(key), given_back, *([also(parked)] if also is not None else [])],
            failure=[kvstore.Range(key)],
        )
        if result.succeeded:
            return parked
        [found] = result.results
        assert isinstance(found, kvstore.RangeResult)
        before, record = record, found.records[0] if found.records else None
        if record is not None and record.mod_revision == before.mod_revision:
            return None
    raise kvstore.Refused(f"{kind} {subject} was parked anew each time", code="conflict")
