"""What a worker tells of itself: the counts of its steps, and whether it is well and ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import kvstore
from services.web.app import STATE, bare_app
from services.web.ids import now_ms
from services.work import steps
from services.work.metrics import WorkMetrics
from services.work.steps import Again, Park, StepRun
from services.work.worker import LEASE_S, Handler, Worker
from tests.cluster.harness import ClusterProcesses, free_ports, until
from tests.services.processes import WorkerProcess, command
from tests.services.shop import problem

KINDS = ("kind", "other")
CODES = ("provider_unknown", "void_refused", "store_refused", "unreadable")


class Told:
    """A worker, and the application that tells of it."""

    def __init__(self, store: kvstore.Client, handler: Handler, lease_s: float = LEASE_S) -> None:
        self.registry = CollectorRegistry()
        handlers = dict.fromkeys(KINDS, handler)
        self.metrics = WorkMetrics(self.registry, handlers, CODES)
        self.worker = Worker(store, handlers, metrics=self.metrics, lease_s=lease_s)
        self.app = bare_app(store, registry=self.registry, why_not_ready=lambda: self.worker.why_not_working)

    def client(self) -> TestClient[aiohttp.web.Request, aiohttp.web.Application]:
        return TestClient(TestServer(self.app))

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.worker.run())
        try:
            yield
        finally:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def ended(self, outcome: str, code: str = "", kind: str = "kind") -> float:
        return self.value("steps_ended_total", kind=kind, outcome=outcome, code=code)

    async def becomes(self, holds: Callable[[], bool], what: str) -> None:
        async def so() -> bool:
            return holds()

        await until(so, 10.0, what, poll_s=0.01)


async def finish(run: StepRun) -> None:
    assert await run.finish()


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


async def test_every_ending_is_counted_with_its_reason(store: kvstore.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "BACKOFF_MIN_S", 0.001)
    monkeypatch.setattr(steps, "ATTEMPTS_MAX", 2)

    async def handler(run: StepRun) -> None:
        match run.step.subject:
            case "parked":
                raise Park("void_refused", "no")
            case "again" if run.step.attempt == 0:
                raise Again("provider_unknown")
            case "exhausted":
                raise Again("provider_unknown")
            case "dropped":
                raise Again("provider_unknown")
            case "refused":
                await run.finish(success=[kvstore.Add(b"n", -1, min=0)])
            case "unheard-of":
                raise Park("somebody's own code", "no")
            case _:
                await finish(run)

    told = Told(store, handler)
    await store.put(steps.step_key("kind", "unread", 1), b"nonsense")
    names = ("done", "parked", "again", "exhausted", "refused", "unheard-of")
    async with told.working():
        await store.txn(success=[*(steps.put("kind", name) for name in names), steps.put("kind", "dropped", once=True)])
        await store.txn(success=[steps.put("nobodys", "a")])

        async def none_left() -> bool:
            return (await store.range(prefix=steps.STEPS, count_only=True)).count == 0

        await until(none_left, 10.0, "no step", poll_s=0.01)
        await told.becomes(lambda: told.value("steps_running") == 0, "nothing running")
    assert told.ended("finished") == 2  # done, and again
    assert told.ended("retried", "provider_unknown") == 2  # again, exhausted
    assert told.ended("retried", "store_refused") == 1
    assert told.ended("parked", "void_refused") == 1
    assert told.ended("parked", "provider_unknown") == 1
    assert told.ended("parked", "store_refused") == 1
    assert told.ended("parked", "unreadable") == 1
    assert told.ended("dropped", "provider_unknown") == 1
    # Neither a code nor a kind that nobody named makes a label.
    assert told.ended("parked", "(other)") == 1
    assert told.ended("parked", "(other)", kind="(other)") == 1
    assert told.value("steps_taken_total", kind="kind") == 10
    assert told.value("steps_taken_total", kind="(other)") == 1
    text = await read(told)
    labels = [labels for name, labels, _ in samples(text) if name == "steps_ended_total"]
    assert {label["kind"] for label in labels} == {*KINDS, "(other)"}
    assert {label["code"] for label in labels} <= {*CODES, "(other)", ""}


async def read(told: Told) -> str:
    async with told.client() as client:
        answer = await client.get("/metrics")
        assert answer.status == 200
        assert answer.content_type == "text/plain"
        return await answer.text()


async def test_what_is_parked_first_is_an_increase(store: kvstore.Client) -> None:
    told = Told(store, finish)
    found = {
        (labels["kind"], labels["code"]): value
        for name, labels, value in samples(await read(told))
        if name == "steps_ended_total" and labels["outcome"] == "parked"
    }
    assert found == {(kind, code): 0.0 for kind in (*KINDS, "(other)") for code in (*CODES, "(other)")}


async def test_how_late_the_oldest_due_step_is(store: kvstore.Client) -> None:
    going_on = asyncio.Event()
    running = 0

    async def waits(run: StepRun) -> None:
        nonlocal running
        running += 1
        await going_on.wait()
        await finish(run)

    told = Told(store, waits)
    assert told.value("steps_lag_seconds") == 0.0
    due_ms = now_ms() - 60_000
    # One that asks to look at once is as old as it is, and one that is not due yet is not late.
    await store.txn(
        success=[
            steps.put("kind", "late", due_ms=due_ms),
            steps.put("kind", "at-once", once=True),
            steps.put("kind", "later", due_ms=now_ms() + 3_600_000),
        ]
    )
    async with told.working():
        await told.becomes(lambda: running == 2, "two steps running")
        assert told.value("steps_running") == 2
        lag_s = told.value("steps_lag_seconds")
        assert 0.0 <= lag_s < 60.0  # since it was written: nobody could have done it before
        going_on.set()
        await told.becomes(lambda: told.ended("finished") == 2, "both done")
        await told.becomes(lambda: told.value("steps_lag_seconds") == 0.0, "no lag")
        assert told.value("steps_running") == 0
    # What was due when the store went away is later now, though nothing is seen of it.
    told.metrics.oldest_due(due_ms)
    assert told.value("steps_lag_seconds") >= 60.0


async def test_a_lost_lease_is_counted_and_what_it_cut_off_too(store: kvstore.Client) -> None:
    began = asyncio.Event()
    may_end = False

    async def waits(run: StepRun) -> None:
        began.set()
        if not may_end:
            await asyncio.get_running_loop().create_future()
        await finish(run)

    told = Told(store, waits, lease_s=2.0)
    async with told.working():
        await store.txn(success=[steps.put("kind", "a")])
        await began.wait()
        assert told.worker.why_not_working == ""
        [claim] = (await store.range(prefix=steps.CLAIMS)).records
        assert claim.lease is not None
        may_end = True
        await store.revoke_lease(claim.lease)
        await told.becomes(lambda: told.ended("finished") == 1, "the step done under another lease")
    assert told.value("worker_leases_lost_total") == 1
    assert told.ended("interrupted") == 1
    assert told.value("steps_taken_total", kind="kind") == 2
    assert told.value("steps_running") == 0


async def test_a_worker_is_ready_while_it_has_a_lease(store: kvstore.Client) -> None:
    told = Told(store, finish)
    async with told.client() as client:

        async def ready() -> bool:
            return (await client.get("/readyz")).status == 200

        assert (await client.get("/livez")).status == 200
        await problem(await client.get("/readyz"), 503, "store_unavailable")
        async with told.working():
            await until(ready, 10.0, "a worker that is ready", poll_s=0.01)
            told.app[STATE].stopping = True
            await problem(await client.get("/readyz"), 503, "shutting_down")
            told.app[STATE].stopping = False
        await problem(await client.get("/readyz"), 503, "store_unavailable")
        await problem(await client.get("/v1/parked-steps"), 404, "not_found")
        await problem(await client.post("/metrics"), 405, "method_not_allowed")


async def test_the_process_tells_and_refuses_a_public_address_or_a_port_in_use(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    listen = ("--metrics-port", str(port))
    async with (
        ClusterProcesses(tmp_path, nodes=1) as cluster,
        WorkerProcess(cluster.endpoints, tmp_path, *listen) as worker,
        aiohttp.ClientSession() as session,
    ):

        async def ready() -> bool:
            async with session.get(f"{url}/readyz") as answer:
                return answer.status == 200

        await until(ready, 20.0, "a worker that is ready")
        async with session.get(f"{url}/metrics") as answer:
            names = {name for name, _, _ in samples(await answer.text())}
        assert {"steps_taken_total", "steps_ended_total", "steps_running", "steps_lag_seconds"} <= names
        assert {"worker_leases_lost_total", "http_request_seconds_count"} <= names
        code, output = await command("worker", "--endpoints", cluster.endpoints, *listen)
        assert (code, "[address_in_use]" in output) == (1, True), output
        public = ("--metrics-host", "0.0.0.0", *listen)
        code, output = await command("worker", "--endpoints", cluster.endpoints, *public)
        assert (code, "[address_not_loopback]" in output, "--insecure" in output) == (1, True, True), output
        assert await worker.stop() == 0


async def test_without_a_store_a_worker_lives_and_is_not_ready(tmp_path: Path) -> None:
    nobody, port = free_ports(2)
    async with (
        WorkerProcess(f"127.0.0.1:{nobody}", tmp_path, "--metrics-port", str(port)) as worker,
        aiohttp.ClientSession() as session,
    ):
        async with session.get(f"http://127.0.0.1:{port}/livez") as answer:
            assert answer.status == 200
        async with session.get(f"http://127.0.0.1:{port}/readyz") as answer:
            assert answer.status == 503
            assert (await answer.json(content_type=None))["code"] == "store_unavailable"
        assert await worker.stop() == 0
