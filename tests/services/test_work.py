"""Durable steps: each is done, its effect once, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import structlog

import kvstore
from services.web.ids import now_ms
from services.work import steps
from services.work.steps import Again, ClaimLost, Park, StepRun, decode_parked, decode_step
from services.work.worker import Handler, Worker

DONE = b"done/"
SOON_S = 10.0


@asynccontextmanager
async def working(store: kvstore.Client, count: int = 1, **handlers: Handler) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(Worker(store, handlers).run()) for _ in range(count)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in ended] == [asyncio.CancelledError] * count


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SOON_S):
        while not await holds():
            await asyncio.sleep(0.01)


async def count_of(store: kvstore.Client, prefix: bytes) -> int:
    return (await store.range(prefix=prefix, count_only=True)).count


async def counted(run: StepRun) -> None:
    """Its effect is counted in the store."""
    assert await run.finish(success=[kvstore.Add(DONE + run.step.subject.encode(), 1)])


async def all_done(store: kvstore.Client) -> None:
    async def none_left() -> bool:
        return await count_of(store, steps.STEPS) == 0

    await until(none_left)


async def test_a_step_is_done_and_nothing_is_left_of_it(store: kvstore.Client) -> None:
    seen: list[object] = []

    async def handler(run: StepRun) -> None:
        seen.append((run.step.subject, run.step.arguments))
        await counted(run)

    async with working(store, kind=handler):
        await store.txn(success=[steps.put("kind", "order/1", amount=7)])
        await all_done(store)
    assert seen == [("order/1", {"amount": 7})]
    assert await store.get(DONE + b"order/1") is not None
    assert await count_of(store, steps.CLAIMS) == 0


async def test_a_step_waits_for_its_time_and_may_be_cancelled(store: kvstore.Client) -> None:
    done_at: list[int] = []

    async def handler(run: StepRun) -> None:
        done_at.append(now_ms())
        await counted(run)

    due_ms = now_ms() + 300
    async with working(store, kind=handler):
        await store.txn(
            success=[steps.put("kind", "a", due_ms=due_ms), steps.put("kind", "never", due_ms=due_ms + 100)]
        )
        await store.txn(success=[steps.cancel("kind", "never", due_ms + 100)])
        await all_done(store)
    assert len(done_at) == 1
    assert done_at[0] >= due_ms


async def test_any_number_of_workers_do_each_step_once(store: kvstore.Client) -> None:
    attempts: Counter[str] = Counter()

    async def handler(run: StepRun) -> None:
        attempts[run.step.subject] += 1
        await asyncio.sleep(0)
        await counted(run)

    for first in range(0, 200, 50):
        await store.txn(success=[steps.put("kind", f"{number:03d}") for number in range(first, first + 50)])
    async with working(store, 3, kind=handler):
        await all_done(store)
    found = await store.range(prefix=DONE)
    assert [record.value for record in found.records] == [b"1"] * 200
    assert set(attempts.values()) == {1}


async def test_a_subject_that_is_due_twice_is_done_by_one_at_a_time(store: kvstore.Client) -> None:
    """As where a webhook asks for what is asked for already."""
    at_once: list[int] = []
    ended: list[str] = []

    async def handler(run: StepRun) -> None:
        at_once.append(len(at_once) - len(ended) + 1)
        await store.get(b"something")  # others have time to begin
        assert await run.finish()
        ended.append(run.step.subject)

    now = now_ms()
    await store.txn(success=[steps.put("kind", "a", due_ms=now - earlier) for earlier in range(5)])
    async with working(store, kind=handler):
        await all_done(store)
    assert at_once == [1] * 5
    assert ended == ["a"] * 5


async def test_what_fails_is_tried_again_later(store: kvstore.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "BACKOFF_MIN_S", 0.01)
    seen: list[tuple[int, str]] = []

    async def handler(run: StepRun) -> None:
        seen.append((run.step.attempt, run.step.code))
        if run.step.attempt == 0:
            raise Again("provider_timeout")
        if run.step.attempt == 1:
            raise Again("provider_busy", after_s=0.0)
        if run.step.attempt == 2:
            raise RuntimeError("a mistake of ours")
        if run.step.attempt == 3:
            return  # another: it forgets to end it
        await counted(run)

    async with working(store, kind=handler):
        await store.txn(success=[steps.put("kind", "a")])
        await all_done(store)
    assert seen == [(0, ""), (1, "provider_timeout"), (2, "provider_busy"), (3, "internal"), (4, "internal")]


async def test_too_many_attempts_and_what_cannot_succeed_are_parked(
    store: kvstore.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "BACKOFF_MIN_S", 0.001)
    monkeypatch.setattr(steps, "ATTEMPTS_MAX", 3)
    may_succeed = False

    async def stubborn(run: StepRun) -> None:
        if not may_succeed:
            raise Again("provider_timeout")
        await counted(run)

    async def hopeless(run: StepRun) -> None:
        raise Park("charge_unknown", "the provider knows no such charge")

    async with working(store, stubborn=stubborn, hopeless=hopeless):
        await store.txn(success=[steps.put("stubborn", "a"), steps.put("hopeless", "b"), steps.put("unheard-of", "c")])
        await all_done(store)
        parked = [decode_parked(record.value) for record in (await store.range(prefix=steps.PARKED)).records]
        assert [(one.step.kind, one.code, one.step.attempt) for one in parked] == [
            ("hopeless", "charge_unknown", 0),
            ("stubborn", "provider_timeout", 2),
            ("unheard-of", "unknown_kind", 0),
        ]
        may_succeed = True
        assert await steps.unpark(store, "stubborn", "a")
        assert not await steps.unpark(store, "stubborn", "a")
        await all_done(store)
    assert await store.get(DONE + b"a") is not None


async def test_what_the_store_refuses_is_no_outage(store: kvstore.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was tried again for ever, without an attempt being counted."""
    monkeypatch.setattr(steps, "BACKOFF_MIN_S", 0.001)
    monkeypatch.setattr(steps, "ATTEMPTS_MAX", 3)

    async def below_zero(run: StepRun) -> None:
        await run.finish(success=[kvstore.Add(DONE, -1, min=0)])

    async with working(store, kind=below_zero):
        await store.txn(success=[steps.put("kind", "a")])
        await all_done(store)
    [record] = (await store.range(prefix=steps.PARKED)).records
    parked = decode_parked(record.value)
    assert (parked.code, parked.step.attempt) == ("store_refused", 2)
    assert "out_of_range" in parked.detail
    assert await count_of(store, steps.CLAIMS) == 0


def parking_that(how: str, marks: list[int]) -> steps.AlsoParked:
    """What is to be written with a parked step and cannot be; `marks` has the attempt of each try."""

    async def also(step: steps.Step, code: str) -> tuple[list[kvstore.Compare], list[kvstore.Operation]]:
        marks.append(step.attempt)
        if how == "refused":
            return [], [kvstore.Add(b"stock", -1, min=0)]
        return [kvstore.Compare(b"absent", kvstore.Target.VERSION, kvstore.Relation.GREATER, 0)], []

    return also


@pytest.mark.parametrize(("how", "tries", "last"), [("refused", 1, 2), ("contended", 8, 10)])
async def test_a_parking_that_cannot_be_is_a_failure_like_any_other(
    store: kvstore.Client, monkeypatch: pytest.MonkeyPatch, how: str, tries: int, last: int
) -> None:
    """It was tried each second or more often, for ever, without an attempt being counted."""
    monkeypatch.setattr(steps, "BACKOFF_MIN_S", 0.001)
    monkeypatch.setattr(steps, "BACKOFF_MAX_S", 0.01)
    monkeypatch.setattr(steps, "ATTEMPTS_MAX", 3)
    attempts: list[tuple[int, str]] = []
    marks: list[int] = []

    async def hopeless(run: StepRun) -> None:
        attempts.append((run.step.attempt, run.step.code))
        raise Park("void_refused", "the provider says no")

    worker = asyncio.create_task(Worker(store, {"kind": hopeless}, also_parked=parking_that(how, marks)).run())
    with structlog.testing.capture_logs() as lines:
        await store.txn(success=[steps.put("kind", "a")])
        await all_done(store)
    worker.cancel()
    assert attempts == [(0, ""), *((number, "void_refused") for number in range(1, last + 1))]
    assert Counter(marks) == dict.fromkeys(range(last + 1), tries)
    [record] = (await store.range(prefix=steps.PARKED)).records
    parked = decode_parked(record.value)
    assert (parked.code, parked.detail, parked.step.attempt) == ("void_refused", "the provider says no", last)
    told = [(line["event"], line["attempt"]) for line in lines if line["event"] in ("cannot park now", "parked alone")]
    assert told == [*(("cannot park now", number) for number in range(last)), ("parked alone", last)]
    assert await count_of(store, steps.CLAIMS) == 0


@pytest.mark.parametrize("how", ["refused", "contended"])
async def test_a_step_that_cannot_be_parked_waits_as_long_as_after_other_failures(
    store: kvstore.Client, how: str
) -> None:
    await store.put(steps.step_key("kind", "a", 1), msgspec.json.encode(steps.Step("kind", "a", 1, 1, attempt=20)))
    [record] = (await store.range(prefix=steps.STEPS)).records
    run = await StepRun.claim(
        store, decode_step(record.value), record.mod_revision, (await store.grant_lease(60.0)).lease
    )
    assert run is not None
    run.also_parked, run.chance = parking_that(how, []), lambda: 0.0
    before = now_ms()
    assert await run.park("void_refused", "no") is steps.Ending.RETRIED
    [record] = (await store.range(prefix=steps.STEPS)).records
    later = decode_step(record.value)
    assert before + 300_000 <= later.due_ms <= now_ms() + 300_000
    assert (later.attempt, later.code) == (21, "void_refused")


async def test_an_unread_step_whose_parking_is_refused_stops_nobody(store: kvstore.Client) -> None:
    """Its worker gave its lease back and began anew each second, and did nothing else."""
    too_large = b"[" * (900 * 1024)  # as it is kept when it is parked, it is larger than a value may be
    await store.put(steps.step_key("kind", "bad", 1), too_large)
    await store.put(steps.step_key("kind", "small", 1), b"nonsense")
    worker = asyncio.create_task(Worker(store, {"kind": counted}, also_parked=parking_that("refused", [])).run())
    with structlog.testing.capture_logs() as lines:
        await store.txn(success=[steps.put("kind", "good")])

        async def done() -> bool:
            return await count_of(store, DONE) == 1 and await count_of(store, steps.PARKED) == 1

        await until(done)
    assert not worker.done()
    worker.cancel()
    assert not [line for line in lines if line["event"] == "worker waits for the store"]
    [left] = (await store.range(prefix=steps.STEPS)).records
    assert left.value == too_large


def test_pauses_grow_to_five_minutes_and_chance_takes_a_quarter_at_most() -> None:
    assert [steps.backoff_s(attempt) for attempt in range(12)] == [
        0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 300.0, 300.0,
    ]  # fmt: skip
    assert steps.backoff_s(100_000) == 300.0
    for attempt in (0, 5, 33):
        assert steps.backoff_s(attempt, 1.0) == steps.backoff_s(attempt) * 0.75
        assert steps.backoff_s(attempt, 0.5) == steps.backoff_s(attempt) * 0.875
    hours = [sum(steps.backoff_s(n, chance) for n in range(steps.ATTEMPTS_MAX - 1)) / 3600 for chance in (0.0, 1.0)]
    assert (round(hours[0], 1), round(hours[1], 1)) == (2.1, 1.5)


async def test_steps_that_failed_together_do_not_come_again_together(store: kvstore.Client) -> None:
    failed = 0

    async def fails(run: StepRun) -> None:
        nonlocal failed
        failed += 1
        raise Again("provider_unknown")

    first = [msgspec.structs.replace(steps.Step("kind", str(n), 1, 1), attempt=20) for n in range(20)]
    await store.txn(success=[kvstore.Put(step.key, msgspec.json.encode(step)) for step in first])

    async def all_failed() -> bool:
        return failed == 20 and await count_of(store, steps.CLAIMS) == 0

    before = now_ms()
    async with working(store, kind=fails):
        await until(all_failed)
    due = [decode_step(record.value).due_ms for record in (await store.range(prefix=steps.STEPS)).records]
    assert before + 225_000 <= min(due)
    assert max(due) <= now_ms() + 300_000
    # Twenty draws from 75 s lie closer than 10 s together once in 10^16 times.
    assert max(due) - min(due) > 10_000 + now_ms() - before


@pytest.mark.parametrize("value", [b'{"v":2,"kind":"kind"}', b"nonsense", b'{"v":1,"kind":"x\xff"}', b"[" * 5000])
async def test_a_step_that_cannot_be_read_is_parked_and_given_back_as_it_was(
    store: kvstore.Client, value: bytes
) -> None:
    """It ended the worker, and each one that followed."""
    key = steps.step_key("kind", "bad", 1)
    await store.put(key, value)
    async with working(store, kind=counted):
        await store.txn(success=[steps.put("kind", "good")])
        await all_done(store)
    assert await count_of(store, DONE) == 1
    [record] = (await store.range(prefix=steps.PARKED)).records
    parked = decode_parked(record.value)
    assert (parked.code, parked.step.kind, parked.step.subject) == ("unreadable", "kind", "bad")
    assert await steps.unpark(store, "kind", "bad")
    given_back = await store.get(key)
    assert given_back is not None
    assert given_back.value == value
    assert await count_of(store, steps.PARKED) == 0


async def test_what_cannot_be_said_of_a_parked_step_stops_nobody(store: kvstore.Client) -> None:
    """As where the order that it is about cannot be read."""

    async def hopeless(run: StepRun) -> None:
        raise Park("charge_unknown", "the provider knows no such charge")

    async def fails(step: steps.Step, code: str) -> tuple[list[kvstore.Compare], list[kvstore.Operation]]:
        if step.subject == "c":
            return [], [kvstore.Put(b"flag", code.encode())]
        raise ValueError(step.subject)

    await store.put(steps.step_key("kind", "b", 1), b"nonsense")
    await store.put(steps.step_key("kind", "c", 1), b"nonsense")
    worker = asyncio.create_task(Worker(store, {"kind": hopeless}, also_parked=fails).run())
    await store.txn(success=[steps.put("kind", "a")])
    await all_done(store)
    assert not worker.done()
    worker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await worker
    assert await count_of(store, steps.PARKED) == 3
    flag = await store.get(b"flag")
    assert flag is not None
    assert flag.value == b"unreadable"


async def test_a_step_that_a_newer_worker_is_at_is_left_to_it(store: kvstore.Client) -> None:
    key = steps.step_key("kind", "bad", 1)
    await store.put(key, b'{"v":2}')
    record = await store.get(key)
    assert record is not None
    said = steps.step_at(key)
    assert said is not None
    await store.put(steps.CLAIMS + b"kind/bad", b"")
    assert not await steps.park_unread(store, record, said)
    assert await store.get(key) == record


async def test_keys_that_are_none_of_a_step_stop_nobody(store: kvstore.Client) -> None:
    await store.put(b"step/0000000000000001", b"")
    await store.put(b"step/0/kind/a", b"")
    async with working(store, kind=counted):
        await store.txn(success=[steps.put("kind", "good")])

        async def done() -> bool:
            return await count_of(store, DONE) == 1

        await until(done)
    assert await count_of(store, steps.STEPS) == 2


async def test_what_is_parked_and_cannot_be_read_is_shown_and_stays(store: kvstore.Client) -> None:
    await store.put(steps.PARKED + b"kind/a", b'{"v":2}')
    [record] = (await store.range(prefix=steps.PARKED)).records
    parked = steps.read_parked(record)
    assert (parked.code, parked.step.kind, parked.step.subject) == ("unreadable", "kind", "a")
    assert await steps.unpark(store, "kind", "a") is None
    assert await count_of(store, steps.PARKED) == 1


async def one_step(store: kvstore.Client) -> tuple[steps.Step, int]:
    await store.txn(success=[steps.put("kind", "a")])
    [record] = (await store.range(prefix=steps.STEPS)).records
    return decode_step(record.value), record.mod_revision


async def test_a_worker_that_is_cut_off_changes_nothing_once_another_may_be_at_it(store: kvstore.Client) -> None:
    step, revision = await one_step(store)
    dead = (await store.grant_lease(1.0)).lease
    lost = await StepRun.claim(store, step, revision, dead)
    assert lost is not None
    living = (await store.grant_lease(60.0)).lease
    assert await StepRun.claim(store, step, revision, living) is None

    async def claimable() -> bool:
        nonlocal taken
        taken = await StepRun.claim(store, step, revision, living)
        return taken is not None

    taken: StepRun | None = None
    await until(claimable)
    assert taken is not None
    for attempt in (lost.finish(success=[kvstore.Add(DONE + b"a", 1)]), lost.again("x"), lost.park("x", "y")):
        with pytest.raises(ClaimLost):
            await attempt
    await counted(taken)
    with pytest.raises(ClaimLost):
        await lost.finish()
    record = await store.get(DONE + b"a")
    assert record is not None
    assert record.value == b"1"


async def test_a_claim_of_ones_own_is_taken_up_again(store: kvstore.Client) -> None:
    """As after an answer that never came: nobody else could take it while the lease lives."""
    step, revision = await one_step(store)
    lease = (await store.grant_lease(60.0)).lease
    first = await StepRun.claim(store, step, revision, lease)
    again = await StepRun.claim(store, step, revision, lease)
    assert first is not None
    assert again is not None
    await counted(again)
    with pytest.raises(ClaimLost):
        await first.finish()


async def test_an_effect_whose_condition_does_not_hold_leaves_the_step(store: kvstore.Client) -> None:
    step, revision = await one_step(store)
    run = await StepRun.claim(store, step, revision, (await store.grant_lease(60.0)).lease)
    assert run is not None
    absent = kvstore.Compare(b"mark", kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0)
    await store.put(b"mark", b"")
    assert not await run.finish([absent], [kvstore.Add(DONE + b"a", 1)])
    assert await store.get(DONE + b"a") is None
    assert await run.finish()
    assert await count_of(store, steps.STEPS) == await count_of(store, steps.CLAIMS) == 0


async def test_a_worker_leaves_other_queues_alone(store: kvstore.Client) -> None:
    async with working(store, kind=counted):
        await store.txn(success=[steps.put("theirs", "a", queue="theirs"), steps.put("kind", "a")])
        await all_done(store)
    assert await count_of(store, steps.PARKED) == 0
    (record,) = (await store.range(prefix=steps.steps_of("theirs"))).records
    worker = asyncio.create_task(Worker(store, {"theirs": counted}, queue="theirs").run())

    async def done() -> bool:
        return await count_of(store, steps.steps_of("theirs")) == 0

    await until(done)
    worker.cancel()
    assert decode_step(record.value).queue == "theirs"


@pytest.mark.parametrize("call", ["range", "lease"])
async def test_a_worker_sits_out_a_store_that_is_away(
    store: kvstore.Client, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Its process used to end: what a task group raises is a group, also where one thing went wrong."""
    monkeypatch.setattr("services.work.worker.PAUSE_S", 0.01)
    whole, failed = getattr(store, call), 0

    def away(*args: object, **more: object) -> object:
        nonlocal failed
        if asyncio.current_task() in workers and failed < 3:
            failed += 1
            raise kvstore.Unavailable("no leader can be reached now")
        return whole(*args, **more)

    worker = asyncio.create_task(Worker(store, {"kind": counted}).run())
    workers = {worker}
    monkeypatch.setattr(type(store), call, lambda _, *args, **more: away(*args, **more))
    await store.txn(success=[steps.put("kind", "1")])
    await all_done(store)
    assert failed == 3
    assert not worker.done()
    worker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await worker
