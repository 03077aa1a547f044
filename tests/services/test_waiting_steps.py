"""Steps that failed and wait: staff see them, and have one tried now."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

import kvstore
from services.sandbox_psp.process import API_KEY
from services.web.ids import now_ms
from services.work import steps
from services.work.steps import Step, decode_step
from services.work.waiting import run_now
from tests.cluster.harness import until
from tests.services.paid_shop import PaidShop
from tests.services.shop import Person, Shop, problem

LIST = "/v1/waiting-steps"
RUN = "/v1/waiting-steps/{}/{}/run"
IN_FOUR_MINUTES_MS = 240_000


def failed(subject: str, in_ms: int = IN_FOUR_MINUTES_MS, **more: Any) -> Step:
    now = now_ms()
    return Step("payment", subject, now + in_ms, now - 1000, **{"attempt": 9, "code": "provider_unknown", **more})


async def put(store: kvstore.Client, *several: Step) -> None:
    await store.txn(success=[kvstore.Put(step.key, msgspec.json.encode(step)) for step in several])


async def all_steps(store: kvstore.Client) -> list[Step]:
    return [decode_step(record.value) for record in (await store.range(prefix=steps.STEPS)).records]


async def pages(shop: Shop, staff: Person, limit: int) -> list[list[str]]:
    """The subjects of each page."""
    found, query = [], f"?limit={limit}"
    while True:
        answer = await shop.orders.get(LIST + query, headers=staff.headers)
        assert answer.status == 200, await answer.text()
        page = await answer.json()
        found.append([step["subject"] for step in page["data"]])
        if not page["has_more"]:
            assert page["next_cursor"] is None
            return found
        query = f"?limit={limit}&starting_after={page['next_cursor']}"


async def test_staff_see_what_failed_and_when_it_comes_again(shop: Shop) -> None:
    staff = await shop.staff()
    expiry = Step("expire", "7", now_ms() + 60_000, now_ms())
    later, soon = failed("12-1"), failed("13-1", 1000, attempt=2, arguments={"n": 1})
    await put(shop.store, later, expiry, soon)
    await shop.store.put(steps.step_key("payment", "bad", now_ms() + 2000), b"nonsense")
    page = await (await shop.orders.get(LIST, headers=staff.headers)).json()
    assert [(one["kind"], one["subject"], one["attempts"], one["code"]) for one in page["data"]] == [
        ("payment", "13-1", 2, "provider_unknown"),
        ("payment", "12-1", 9, "provider_unknown"),
    ]
    assert page["data"][0]["arguments"] == {"n": 1}
    assert page["data"][0]["due_at"] < page["data"][1]["due_at"]
    assert not page["has_more"]
    buyer = await shop.customer()
    await problem(await shop.orders.get(LIST, headers=buyer.headers), 403, "forbidden")


async def test_pages_of_waiting_steps_are_complete(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.work.waiting._LOOKED_AT_MAX", 3)
    staff = await shop.staff()
    now = now_ms()
    expiries = [Step("expire", str(n), now + 10_000 + n, now) for n in range(7)]
    await put(shop.store, *expiries, *(failed(f"{n}-1", 20_000 + n) for n in range(4)), failed("9-1", 1))
    for limit in (1, 2, 3, 100):
        found = await pages(shop, staff, limit)
        assert [subject for page in found for subject in page] == ["9-1", "0-1", "1-1", "2-1", "3-1"]
        assert all(len(page) <= limit for page in found)
    assert [] in await pages(shop, staff, 100)  # three that were looked at wait for their own time
    # A forged cursor leads nowhere.
    answer = await shop.orders.get(f"{LIST}?starting_after=OTk5", headers=staff.headers)
    assert (answer.status, (await answer.json())["data"]) == (200, [])


async def test_a_waiting_step_is_due_at_once_and_stays_the_attempt_that_it_was(shop: Shop) -> None:
    staff = await shop.staff()
    step, other = failed("12-1"), failed("112-1")
    await put(shop.store, step, other)
    before = now_ms()
    answer = await shop.orders.post(RUN.format("payment", "12-1"), headers=staff.once())
    assert answer.status == 200, await answer.text()
    assert (await answer.json())["attempts"] == 9
    moved, kept = await all_steps(shop.store)
    assert kept == other
    assert before <= moved.due_ms <= now_ms()
    assert moved == msgspec.structs.replace(step, due_ms=moved.due_ms)


async def test_copies_of_a_run_move_a_step_once(shop: Shop) -> None:
    staff = await shop.staff()
    await put(shop.store, failed("12-1"))
    once, path = staff.once(), RUN.format("payment", "12-1")
    answers = await asyncio.gather(*(shop.orders.post(path, headers=once) for _ in range(5)))
    assert [answer.status for answer in answers] == [200] * 5
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 4
    [moved] = await all_steps(shop.store)
    # It has failed again meanwhile: a late copy does not have it tried once more.
    again = failed("12-1", attempt=10)
    await shop.store.txn(success=[kvstore.Delete(moved.key), kvstore.Put(again.key, msgspec.json.encode(again))])
    assert (await shop.orders.post(path, headers=once)).status == 200
    assert await all_steps(shop.store) == [again]


async def test_what_has_not_failed_is_not_to_be_hurried(shop: Shop) -> None:
    """An order's expiry has its own time; what is parked is given back; the rest is nothing."""
    staff = await shop.staff()
    expiry = Step("expire", "7", now_ms() + 60_000, now_ms())
    parked = steps.ParkedStep(failed("8-1"), "provider_unknown", "no answer", 1)
    await put(shop.store, expiry)
    await shop.store.put(steps.PARKED + b"payment/8-1", msgspec.json.encode(parked))
    once = staff.once()
    await problem(await shop.orders.post(RUN.format("expire", "7"), headers=once), 404, "not_found")
    for subject in ("8-1", "9-1"):
        await problem(await shop.orders.post(RUN.format("payment", subject), headers=staff.once()), 404, "not_found")
    assert await all_steps(shop.store) == [expiry]
    await put(shop.store, msgspec.structs.replace(expiry, due_ms=expiry.due_ms + 1, attempt=1))
    again = await shop.orders.post(RUN.format("expire", "7"), headers=once)  # as it was answered
    await problem(again, 404, "not_found")
    assert again.headers["Idempotent-Replayed"] == "true"
    buyer = await shop.customer()
    await problem(await shop.orders.post(RUN.format("expire", "7"), headers=buyer.once()), 403, "forbidden")


async def test_one_that_is_due_already_stays_for_who_is_at_it(store: kvstore.Client) -> None:
    step = failed("12-1", -1)
    await put(store, step)
    record = await store.get(step.key)
    found = await run_now(store, "payment", "12-1", lambda moved: kvstore.Put(b"told", moved.key))
    assert found == step
    assert await store.get(step.key) == record
    told = await store.get(b"told")
    assert told is not None
    assert told.value == step.key


@pytest.mark.parametrize("before", ["get", "txn"])
async def test_one_that_is_tried_meanwhile_is_looked_for_again(
    store: kvstore.Client, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    first, second = failed("12-1"), failed("12-1", IN_FOUR_MINUTES_MS + 1, attempt=10)
    await put(store, first)
    whole, txn, overtaken = getattr(store, before), store.txn, False

    async def overtaking(*args: Any, **more: Any) -> Any:
        nonlocal overtaken
        if not overtaken:
            overtaken = True
            await txn(success=[kvstore.Delete(first.key), kvstore.Put(second.key, msgspec.json.encode(second))])
        return await whole(*args, **more)

    monkeypatch.setattr(type(store), before, lambda _, *args, **more: overtaking(*args, **more))
    found = await run_now(store, "payment", "12-1", lambda moved: kvstore.Put(b"told", b""))
    assert found is not None
    assert found.attempt == 10
    assert await all_steps(store) == [found]


async def test_a_payment_that_waits_for_the_provider_is_made_when_staff_say_so(
    store: kvstore.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself it would be in five minutes."""
    monkeypatch.setattr(steps, "BACKOFF_MIN_S", steps.BACKOFF_MAX_S)
    async with PaidShop(store, tmp_path, rates={"error_before": 1.0}) as paid:
        await paid.shop.stock(paid.staff, "cup", 10)
        order = await paid.placed()
        await paid.paid(order)

        async def waits() -> bool:
            return bool((await paid.get(LIST, paid.staff))["data"])

        await until(waits, 20.0, "a step that waits", poll_s=0.02)
        (step,) = (await paid.get(LIST, paid.staff))["data"]
        assert (step["subject"], step["code"], step["attempts"]) == (f"{order['id']}-1", "provider_unknown", 1)
        async with paid.session.put(
            paid.psp.make_url("/control/failures"), json={"rates": {}}, headers={"Authorization": f"Bearer {API_KEY}"}
        ) as healed:
            assert healed.status == 200, await healed.text()
        await paid.did(paid.staff, RUN.format(step["kind"], step["subject"]))
        await paid.becomes(order, state="confirmed", payment_status="paid")
        assert (await paid.get(LIST, paid.staff))["data"] == []
