"""The blocking client's thread: how it begins, how it ends, and whom it leaves waiting. The store is embedded."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest

import kvstore
from kvstore import Client, Put, StartupError, SyncClient, Unavailable
from kvstore.client.lock import Election, lock_prefix
from kvstore.client.sync import SyncElection, SyncTransaction, SyncWatch
from kvstore.client.transaction import Transaction
from kvstore.client.watch import Watch

WITHIN_S = 5.0
# Nobody listens there.
NOWHERE = ("127.0.0.1:1",)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "kvstore-client"]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come to hold"
        time.sleep(0.002)


@pytest.fixture
def kv(tmp_path: Path) -> Iterator[SyncClient]:
    with SyncClient(lambda: kvstore.open_embedded(tmp_path / "data")) as kv:
        yield kv
    assert threads() == []


class FailingClient(Client):
    closed = 0

    async def start(self) -> None:
        await super().start()
        raise Unavailable("nothing is there", code="unavailable")

    async def close(self) -> None:
        FailingClient.closed += 1
        await super().close()


@pytest.mark.parametrize(
    ("make_client", "error"),
    [
        (lambda: Client(NOWHERE, timeout_s=-1.0), ValueError),
        (lambda: FailingClient(NOWHERE), Unavailable),
        (lambda: kvstore.open_embedded("/proc/nowhere"), StartupError),
    ],
)
def test_a_start_that_fails_leaves_no_thread(make_client: Callable[[], Client], error: type[Exception]) -> None:
    kv = SyncClient(make_client)
    FailingClient.closed = 0
    for _ in range(3):
        with pytest.raises(error):
            kv.get(b"a")
        assert threads() == []
    assert FailingClient.closed == (3 if error is Unavailable else 0), "what had begun to connect is closed"
    with pytest.raises(error), kv:
        pass
    kv.close()


def test_a_close_that_fails_ends_the_thread() -> None:
    class Stubborn(Client):
        async def close(self) -> None:
            await super().close()
            raise OSError("cannot")

    kv = SyncClient(lambda: Stubborn(NOWHERE))
    with pytest.raises(OSError, match="cannot"), kv:
        assert threads() == ["kvstore-client"]
    assert threads() == []


def test_no_thread_waits_for_ever_while_another_closes() -> None:
    for number in range(40):
        kv = SyncClient(lambda: Client(NOWHERE))
        kv._thread()

        def call(kv: SyncClient = kv) -> str:
            while True:
                try:
                    kv._run(lambda _client: asyncio.sleep(0))
                except Unavailable as error:
                    return error.code

        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(call) for _ in range(4)]
            time.sleep(number / 40_000)
            kv.close()
            assert [call.result(WITHIN_S) for call in calls] == ["closed"] * 4
    assert threads() == []


def test_leaving_what_ended_with_its_client_raises_nothing_of_its_own(kv: SyncClient) -> None:
    for number in range(3):
        kv.put(b"%d" % number, b"")
    scan = kv.scan(prefix=b"", page_records=1)
    next(scan)
    watch = kv.watch(prefix=b"")
    with kv.lock("a"), kv.lease(5.0), kv.watch(prefix=b"", from_revision=1) as other:
        next(other)
        kv.close()
        with pytest.raises(Unavailable) as caught:
            next(other)
        assert caught.value.code == "closed"
    scan.close()  # type: ignore[attr-defined]
    watch.close()
    watch.close()


def test_the_body_s_own_error_passes_when_the_client_was_closed_in_it(kv: SyncClient) -> None:
    error = ZeroDivisionError("mine")
    with (  # noqa: PT012  # the block is what is tested
        pytest.raises(ZeroDivisionError) as caught,
        kv.lock("a"),
        kv.lease(5.0),
        kv.transaction() as txn,
    ):
        txn.put(b"a", b"")
        kv.close()
        raise error
    assert caught.value is error


def test_a_transaction_that_cannot_commit_says_so(kv: SyncClient) -> None:
    with pytest.raises(Unavailable) as caught, kv.transaction() as txn:  # noqa: PT012  # its end raises
        txn.put(b"a", b"")
        kv.close()
    assert caught.value.code == "closed"


def test_a_callback_cannot_close_its_own_client_and_breaks_nothing(kv: SyncClient) -> None:
    told: list[RuntimeError] = []
    heard = threading.Event()

    def lost() -> None:
        try:
            kv.close()
        except RuntimeError as error:
            told.append(error)
        heard.set()

    with kv.lease(1.0, on_lost=lost) as lease:
        kv.revoke_lease(lease.id)
        assert heard.wait(WITHIN_S)
    assert "must not wait" in str(told[0])
    kv.put(b"a", b"")


def test_a_generator_that_is_collected_on_the_client_s_thread(kv: SyncClient) -> None:
    for number in range(3):
        kv.put(b"%d" % number, b"")
    kept = [kv.scan(prefix=b"", page_records=1)]
    next(kept[0])

    async def drop(_client: Client) -> None:
        kept.clear()
        gc.collect()

    kv._run(drop)
    assert kv.get(b"1") is not None


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Who runs the tests in the background has Ctrl-C ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_it_waits_for_a_lock(kv: SyncClient) -> None:
    queue = lock_prefix("a")
    with kv.lock("a"):
        for delay_s in (0.0, 0.002, 0.01, 0.1):
            interrupt = threading.Timer(delay_s, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # it may come at any moment
                interrupt.start()
                with kv.lock("a"):
                    raise AssertionError("it is held")
            interrupt.join()
            until(lambda: kv.range(prefix=queue, count_only=True).count == 1)
    assert kv.range(prefix=queue, count_only=True).count == 0


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_it_reads(kv: SyncClient) -> None:
    kv.txn(success=[Put(b"%d" % number, b"") for number in range(200)])
    watch = kv.watch(prefix=b"k")

    def scan() -> None:
        while True:
            for _ in kv.scan(prefix=b"", page_records=10):
                pass

    for number in range(30):
        for read in (lambda: next(watch), lambda: next(watch.revisions()), scan):
            interrupt = threading.Timer(number / 3000, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # it may come at any moment
                interrupt.start()
                read()
            interrupt.join()
        kv.put(b"k", b"%d" % number)
        record = next(watch).record
        assert record is not None
        assert record.value == b"%d" % number, "no event is lost with the one who waited for it"


@pytest.fixture
def alarm() -> Iterator[Callable[[], object]]:
    """`alarm()`: soon an exception comes out of nowhere, as from Celery's soft time limit."""

    def raising(*_: object) -> NoReturn:
        raise TimeoutError("the task has had its time")

    before = signal.signal(signal.SIGALRM, raising)
    yield lambda: signal.setitimer(signal.ITIMER_REAL, 0.1)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_signal_whose_handler_raises_ends_the_call(kv: SyncClient, alarm: Callable[[], object]) -> None:
    with kv.watch(prefix=b"k") as watch:
        with pytest.raises(TimeoutError):  # noqa: PT012  # it may come at any moment
            alarm()
            next(watch)
        kv.put(b"k", b"")
        assert next(watch).key == b"k", "nobody else waits there"
    with kv.lock("a"), pytest.raises(TimeoutError):  # noqa: PT012
        alarm()
        with kv.lock("a"):
            raise AssertionError("it is held")
    with kv.lock("a", wait_s=WITHIN_S):
        pass


def test_the_loop_drops_an_iterator_while_one_is_dropped_elsewhere(
    kv: SyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector may make who hands something over wait for the loop; then the loop must not wait."""
    kv.txn(success=[Put(b"%d" % number, b"") for number in range(3)])
    here, there = ([kv.scan(prefix=b"", page_records=1)] for _ in range(2))
    next(here[0]), next(there[0])
    hand_over = asyncio.run_coroutine_threadsafe

    def collecting(
        work: Coroutine[Any, Any, object], loop: asyncio.AbstractEventLoop
    ) -> concurrent.futures.Future[object]:
        monkeypatch.undo()
        loop.call_soon_threadsafe(there.clear)
        here.clear()
        return hand_over(work, loop)

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", collecting)
    assert kv.get(b"1") is not None


def test_ctrl_c_at_the_moment_at_which_it_is_held(kv: SyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    held = kv.lock("a")
    run = held._thread.run

    def interrupted(work: Callable[[], object]) -> None:
        run(work)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(held._thread, "run", interrupted)
    with pytest.raises(KeyboardInterrupt), held:
        pass
    monkeypatch.undo()
    with kv.lock("a", wait_s=WITHIN_S):
        pass


@pytest.mark.parametrize("begun", [True, False])
def test_ctrl_c_while_a_call_is_handed_over(kv: SyncClient, monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    watch = kv.watch(prefix=b"k")
    hand_over = asyncio.run_coroutine_threadsafe

    def interrupted(work: Coroutine[Any, Any, object], loop: asyncio.AbstractEventLoop) -> NoReturn:
        monkeypatch.undo()
        hand_over(work, loop)
        if begun:
            until(lambda: watch._watch._stream._waiter)
        raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(watch.revisions())
    kv.put(b"k", b"")
    assert next(watch).key == b"k", "nobody else waits there"


def test_one_watch_is_read_by_one_thread_at_a_time(kv: SyncClient) -> None:
    with kv.watch(prefix=b"") as watch, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(next, watch)
        until(lambda: watch._watch._stream._waiter)
        with pytest.raises(RuntimeError, match="one task at a time"):
            next(watch)
        kv.put(b"a", b"")
        assert reading.result(WITHIN_S).key == b"a"
        revisions = watch.revisions()
        kv.put(b"b", b"")
        assert next(revisions)[0].key == b"b"
        reading = pool.submit(next, watch)
        until(lambda: watch._watch._stream._waiter)
        watch.close()
        with pytest.raises(Unavailable) as caught:
            reading.result(WITHIN_S)
        assert caught.value.code == "closed"
    with pytest.raises(Unavailable):
        next(revisions)
    with pytest.raises(Unavailable):
        next(watch)


def test_a_script_that_ends_in_the_middle_of_everything_ends(tmp_path: Path) -> None:
    script = f"""
import kvstore
from kvstore import SyncClient
kv = SyncClient(lambda: kvstore.open_embedded({str(tmp_path / "data")!r}))
kv.put(b"a", b""), kv.put(b"b", b"")
scan = kv.scan(prefix=b"", page_records=1)
next(scan)
watch = kv.watch(prefix=b"", from_revision=1)
revisions = watch.revisions()
next(revisions)
lock = kv.lock("a")
lock.__enter__()
print("done")
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=WITHIN_S * 2, cwd=os.getcwd()
    )
    assert (run.stdout, run.stderr, run.returncode) == ("done\n", "", 0)


@pytest.mark.parametrize(
    ("of", "sync", "left_out"),
    [
        # `with` and the first call start it; who backs off without asyncio does so in `run_transaction`.
        (Client, SyncClient, {"start", "wait_for_others"}),
        (Election, SyncElection, set()),
        (Watch, SyncWatch, {"standing"}),  # `with` waits for it
        (Transaction, SyncTransaction, set()),
    ],
)
def test_every_call_is_there_with_the_same_arguments(of: type, sync: type, left_out: set[str]) -> None:
    def public(kind: type) -> dict[str, object]:
        return {name: inspect.getattr_static(kind, name) for name in dir(kind) if not name.startswith("_")}

    def arguments(call: object) -> list[tuple[str, object, object]]:
        assert callable(call)
        parameters = inspect.signature(call).parameters.values()
        return [(each.name, each.kind, each.default) for each in parameters if each.name != "self"]

    theirs, ours = public(of), public(sync)
    assert set(theirs) - set(ours) == left_out
    assert set(ours) <= set(theirs)
    for name, call in theirs.items():
        if name not in left_out and inspect.isfunction(call):
            assert arguments(ours[name]) == arguments(call), name


def test_digests_and_who_leads(kv: SyncClient) -> None:
    revision = kv.put(b"a", b"1").revision
    whole = kv.digest(revision=revision)
    assert whole.count == 1
    assert kv.digest(b"b", revision=revision).count == 0
    leaders = kv.election("e").observe()
    assert next(leaders) is None
    with kv.election("e").campaign(b"me"):
        leader = next(leaders)
        assert leader is not None
        assert leader.value == b"me"
    assert next(leaders) is None
    leaders.close()  # type: ignore[attr-defined]
    assert kv.get(b"a") is not None
