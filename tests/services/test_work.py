"""Durable steps: each is done, its effect once, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

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
