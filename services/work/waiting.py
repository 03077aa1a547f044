"""Steps that failed and wait for their next attempt: to see them, and to have one tried now.

A step that waits for its own time (an order's expiry) is none of them: it is not late, and early it would be wrong.
The next attempt of one that failed is `BACKOFF_MAX_S` away at most, so they are looked for among what is due by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from msgspec import Struct

import kvstore
from services.web.ids import now_ms
from services.work.steps import BACKOFF_MAX_S, STEPS, Step, move, read_step

# Of a page: orders that wait to be paid have steps among them, one each; it has to be read within one result.
_LOOKED_AT_MAX: Final = 1000
# Each time the very step was tried meanwhile, and failed anew.
_RACES_MAX: Final = 8


class Found(Struct, frozen=True):
    """Some waiting steps, by when they are due, and the key of the last step looked at, if more may follow."""

    steps: list[Step]
    last: bytes


async def waiting(store: kvstore.Client, after: bytes, limit: int) -> Found:
    """At most `limit`, from the key `after` on; perhaps none, though more follow."""
    end = _end()
    if after >= end:
        return Found([], b"")
    found = await store.range(after, end, limit=_LOOKED_AT_MAX)
    steps: list[Step] = []
    for number, record in enumerate(found.records):
        step = read_step(record)
        if step is not None and step.attempt:
            steps.append(step)
            if len(steps) == limit and (found.more or number + 1 < len(found.records)):
                return Found(steps, record.key)
    return Found(steps, found.records[-1].key if found.more else b"")


async def run_now(
    store: kvstore.Client,
    kind: str,
    subject: str,
    also: Callable[[Step], kvstore.Operation],
    compare: Sequence[kvstore.Compare] = (),
) -> Step | None:
    """Have a waiting step tried as soon as a worker can, and with that write what `also` says. It is the attempt that
    would have come later: if that fails, the next pause is as long as it would have been. One that is due already
    stays as it is. The step as it is now; None, and nothing is changed, if there is none that failed, or one of
    `compare` does not hold."""
    for _ in range(_RACES_MAX):
        records = [await store.get(key) for key in await _keys(store, kind, subject)]
        if None in records:
            continue
        seen = [(read_step(record), record.mod_revision) for record in records if record is not None]
        failed = [(step, revision) for step, revision in seen if step is not None and step.attempt]
        if not failed:
            return None
        step, revision = failed[0]
        now = now_ms()
        moved, operations = move(step, now) if step.due_ms > now else (step, [])
        result = await store.txn(
            compare=[
                kvstore.Compare(step.key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, revision),
                *compare,
            ],
            success=[*operations, also(moved)],
            failure=[kvstore.Range(step.key)],
        )
        if result.succeeded:
            return moved
        [found] = result.results
        assert isinstance(found, kvstore.RangeResult)
        if found.records and found.records[0].mod_revision == revision:
            return None
    raise kvstore.Refused(f"{kind} {subject} was tried anew each time", code="conflict")


async def _keys(store: kvstore.Client, kind: str, subject: str) -> list[bytes]:
    """Keys begin with the time, so all that is due by then is looked through: for a person, now and then."""
    name = f"/{kind}/{subject}".encode()
    first = len(STEPS) + 16  # behind the time
    return [record.key async for record in store.scan(STEPS, _end(), keys_only=True) if record.key[first:] == name]


def _end() -> bytes:
    return b"%b%016d0" % (STEPS, now_ms() + int(BACKOFF_MAX_S * 1000))
