"""The blocking client against three nodes as processes: its calls, its threads, and a fork."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kvstore
from kvstore import KvError, Put, Refused, SyncClient, Unavailable
from kvstore.client.sync import SyncTransaction
from tests.cluster.harness import ClusterProcesses

WITHIN_S = 5.0


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    cluster = ClusterProcesses(tmp_path_factory.mktemp("cluster"))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, cluster.__aenter__()).result()
    yield cluster.endpoints
    cluster.kill_all()


@pytest.fixture
def kv(endpoints: str) -> Iterator[SyncClient]:
    with kvstore.connect_sync(endpoints) as kv:
        yield kv


@pytest.fixture
def p() -> bytes:
    return uuid.uuid4().hex.encode() + b"/"


def test_the_same_calls_block(kv: SyncClient, p: bytes) -> None:
    revision = kv.put(p + b"a", b"1").revision
    assert kv.revision >= revision
    record = kv.get(p + b"a")
    assert record is not None
    assert (record.value, record.mod_revision) == (b"1", revision)
    assert kv.add(p + b"n", 5).value == 5
    assert kv.txn(success=[Put(p + b"b", b"2"), Put(p + b"c", b"3")]).succeeded
    assert [found.key[len(p) :] for found in kv.scan(prefix=p, page_records=1)] == [b"a", b"b", b"c", b"n"]
    assert kv.range(prefix=p, limit=2).count == 4
    assert kv.delete(p + b"b").deleted == 1
    assert kv.delete_prefix(p).deleted == 3
    with pytest.raises(Refused) as caught:
        kv.add(p + b"n", -1, min=0)
    assert caught.value.code == "out_of_range"
    assert kv.status().role in ("leader", "follower")


def test_half_a_scan_leaves_nothing_running(kv: SyncClient, p: bytes) -> None:
    for number in range(5):
        kv.put(p + b"%d" % number, b"")
    for record in kv.scan(prefix=p, page_records=2):
        assert record.key == p + b"0"
        break
    assert kv.get(p + b"4") is not None


def test_transactions_in_the_calling_thread(kv: SyncClient, p: bytes) -> None:
    threads: set[int] = set()

    def add_one(txn: SyncTransaction) -> int:
        threads.add(threading.get_ident())
        record = txn.get(p + b"n")
        number = int(record.value) + 1 if record is not None else 1
        txn.put(p + b"n", b"%d" % number)
        return number

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: kv.run_transaction(add_one), range(40)))
    assert sorted(numbers) == list(range(1, 41)), "eight threads, and no addition lost"
    assert len(threads) > 1
    with pytest.raises(ZeroDivisionError), kv.transaction() as txn:  # noqa: PT012  # the block is what is tested
        txn.put(p + b"n", b"lost")
        _ = 1 // 0
    with kv.transaction() as txn:
        assert txn.range(prefix=p).count == 1
        txn.delete_range(prefix=p)
    assert kv.get(p + b"n") is None
    with pytest.raises(Refused) as caught, kv.transaction() as txn:  # noqa: PT012  # its end raises
        txn.get(p + b"n")
        kv.put(p + b"n", b"first")
        txn.put(p + b"n", b"second")
    assert caught.value.code == "conflict"


def test_leases_locks_and_elections(kv: SyncClient, p: bytes) -> None:
    with kv.lease(5.0) as lease:
        kv.put(p + b"a", b"", lease=lease.id)
        assert lease.id in list(kv.leases())
    assert kv.get(p + b"a") is None
    with kv.lock(p) as lock:
        assert kv.txn(compare=[lock.held], success=[Put(p + b"b", b"")]).succeeded
        with pytest.raises(Unavailable) as caught, kv.lock(p, wait_s=0):
            pass
        assert caught.value.code == "lock_held"
    with kv.election(p).campaign(b"me"):
        leader = kv.election(p).leader()
        assert leader is not None
        assert leader.value == b"me"
    assert kv.election(p).leader() is None


def test_watches(kv: SyncClient, p: bytes) -> None:
    with kv.watch(prefix=p) as watch:
        kv.put(p + b"a", b"1")
        kv.txn(success=[Put(p + b"a", b"2"), Put(p + b"b", b"3")])
        event = next(watch)
        assert (event.key, event.record and event.record.value) == (p + b"a", b"1")
        together = next(watch.revisions())
        assert [event.key for event in together] == [p + b"a", p + b"b"]
        assert watch.next_revision == together[0].revision + 1


def test_a_callback_may_not_wait_for_its_own_client(kv: SyncClient, p: bytes) -> None:
    told: list[BaseException] = []
    heard = threading.Event()

    def lost() -> None:
        try:
            kv.get(p)
        except RuntimeError as error:
            told.append(error)
        heard.set()

    with kv.lease(1.0, on_lost=lost) as lease:
        kv.revoke_lease(lease.id)
        assert heard.wait(WITHIN_S)
    assert "must not wait" in str(told[0])


def test_a_closed_client_says_so(endpoints: str) -> None:
    kv = kvstore.connect_sync(endpoints)
    kv.put(b"a", b"")
    kv.close()
    kv.close()
    with pytest.raises(Unavailable) as caught:
        kv.get(b"a")
    assert caught.value.code == "closed"
    with pytest.raises(ValueError, match="no host:port"):
        kvstore.connect_sync("nowhere")


def test_closing_ends_what_other_threads_wait_for(endpoints: str, p: bytes) -> None:
    kv = kvstore.connect_sync(endpoints)
    watch = kv.watch(prefix=p)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(next, watch), pool.submit(kv._run, lambda _client: asyncio.sleep(60.0))]
        kv.put(p, b"")
        assert waiting[0].result(WITHIN_S).key == p
        waiting[0] = pool.submit(next, watch)
        kv.get(p)
        kv.close()
        for call in waiting:
            with pytest.raises(Unavailable) as caught:
                call.result(WITHIN_S)
            assert caught.value.code == "closed"


def test_a_forked_child_has_connections_and_a_session_of_its_own(kv: SyncClient, p: bytes) -> None:
    assert kv.add(p + b"n", 1).value == 1
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for _ in range(10):
                kv.add(p + b"n", 1)
            kv.close()
            status = 0
        except KvError:
            status = 2
        finally:
            os._exit(status)
    for _ in range(10):
        kv.add(p + b"n", 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert kv.add(p + b"n", 1).value == 22


def test_a_child_that_is_forked_in_a_block_takes_nothing_from_the_parent(kv: SyncClient, p: bytes) -> None:
    kv.put(p + b"a", b"")
    held = kv.lock(p)
    with held as lock, kv.watch(prefix=p) as watch:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with kv.lock(p + b"child"):
                    next(watch)
            except Unavailable as error:
                watch.close()
                held.__exit__(None, None, None)
                kv.close()
                status = 0 if error.code == "closed" else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert kv.txn(compare=[lock.held], success=[Put(p + b"a", b"mine")]).succeeded
        assert next(watch).key == p + b"a"


def test_a_script_that_closes_nothing_ends(endpoints: str, tmp_path: Path) -> None:
    import subprocess
    import sys

    script = f"import kvstore; kvstore.connect_sync({endpoints!r}).put(b'a', b'1'); print('done')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=WITHIN_S * 2)
    assert (run.stdout, run.stderr, run.returncode) == ("done\n", "", 0)
