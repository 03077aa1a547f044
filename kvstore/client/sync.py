"""The client for programs without asyncio: Flask, Django, scripts. Made by `kvstore.connect_sync`.

Every call is that of `Client`, with the same name, arguments, results and errors; it blocks its thread until it is
answered. One `SyncClient` serves all threads of a process: their calls share its connections and its batches.

The asyncio client runs on a loop in a thread of its own, which starts with the first call. After a fork (a server that
loads the application and then forks its workers) the child starts its own at its first call, with a session of its own;
what the parent had under way stays the parent's: a lock, lease, watch or transaction that was begun before the fork, or
before the client was closed, raises `Unavailable(closed)` where it is used, and leaving it does nothing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import itertools
import os
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from kvstore.client.client import TRANSACTION_ATTEMPTS, Client
from kvstore.client.lease import Lease
from kvstore.client.lock import LOCK_TTL_S, Election, Lock
from kvstore.client.transaction import Transaction
from kvstore.client.watch import Watch
from kvstore.errors import Refused, Unavailable
from kvstore.model import Event, Record, TxnResult

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")


class _Thread:
    """An event loop in a thread, and the client that lives on it."""

    def __init__(self, make_client: Callable[[], Client]) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._ending = False
        self._spawned: set[asyncio.Task[None]] = set()
        # What is handed over after the end would wait for ever. Reentrant: the garbage collector may come in between.
        self._submitting = threading.RLock()
        # A daemon: a program that forgets to close its client still ends.
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvstore-client", daemon=True)
        self._thread.start()
        try:
            self.client = self.run(lambda: _started(make_client))
        except BaseException:
            self._stop()
            raise

    @property
    def here(self) -> bool:
        """It is this process's, and works."""
        return not self._ending and self._pid == os.getpid()

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def check_not_current(self) -> None:
        if self.is_current:
            raise RuntimeError("a callback of this client must not wait for the client; hand the work to a thread")

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Wait for `work` on the loop."""
        self.check_not_current()
        given_up = False
        task: asyncio.Task[Any] | None = None

        async def awaited() -> T:
            nonlocal task
            task = asyncio.current_task()
            if given_up:
                raise asyncio.CancelledError
            return await work()

        def cancel() -> None:
            if task is not None:
                task.cancel()

        try:
            return self.submit(awaited).result()
        except concurrent.futures.CancelledError:
            raise Unavailable("this client was closed", code="closed") from None
        except BaseException:
            # Its own error, and then it is done; or Ctrl-C, or what else a signal's handler raises: nobody waits for it
            # any more. That may come when the loop has the call already, but there is no future here to cancel yet.
            given_up = True
            if self.here and not (task is not None and task.done()):
                with self._submitting:
                    if not self._ending:
                        self._loop.call_soon_threadsafe(cancel)
            raise

    def submit(self, work: Callable[[], Awaitable[T]]) -> concurrent.futures.Future[T]:
        if self._pid != os.getpid():
            raise Unavailable("this was begun before the fork, and stays with the parent", code="closed")

        async def awaited() -> T:
            return await work()

        with self._submitting:
            if self._ending:
                raise Unavailable("this client is closed", code="closed")
            return asyncio.run_coroutine_threadsafe(awaited(), self._loop)

    def spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        """`submit` for who is on the loop already, and must not wait: not even for who submits just now."""

        async def awaited() -> None:
            await work()

        if not self._ending:
            task = self._loop.create_task(awaited())
            self._spawned.add(task)  # the loop itself keeps no task alive
            task.add_done_callback(self._spawned.discard)

    def close(self) -> None:
        """End the client, and then what runs here and whoever waits for it."""
        try:
            self.run(self.client.close)
        finally:
            self._stop()

    def _stop(self) -> None:
        with self._submitting:
            self._ending = True
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _started(make_client: Callable[[], Client]) -> Client:
    client = make_client()
    try:
        await client.start()
    except BaseException:
        await client.close()
        raise
    return client


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _blocking(method: Callable[Concatenate[Client, P], Awaitable[T]]) -> Callable[Concatenate[SyncClient, P], T]:
    """The method of `SyncClient` that does what this one of `Client` does."""

    @functools.wraps(method)
    def call(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(lambda client: method(client, *args, **kwargs))

    return call


def _iterating(
    method: Callable[Concatenate[Client, P], AsyncIterator[Item]],
) -> Callable[Concatenate[SyncClient, P], Iterator[Item]]:
    @functools.wraps(method)
    def call(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[Item]:
        thread = self._thread()
        yield from _each(thread, method(thread.client, *args, **kwargs))

    return call


def _each(thread: _Thread, items: AsyncIterator[Item]) -> Iterator[Item]:
    under_way: asyncio.Task[Any] | None = None

    async def next_one() -> Item:
        nonlocal under_way
        under_way = asyncio.current_task()
        return await anext(items)

    async def closed() -> None:
        if under_way is not None:  # cancelled by a Ctrl-C, and perhaps not out of it yet
            await asyncio.wait([under_way])
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()

    try:
        while True:
            try:
                yield thread.run(next_one)
            except StopAsyncIteration:
                return
    finally:
        _leave(thread, closed)


def _leave(thread: _Thread, work: Callable[[], Awaitable[None]]) -> None:
    """Do what ends something, unless its client is closed, and so all of it over."""
    if not thread.here or sys.is_finalizing():  # daemon threads do not run any more when the interpreter ends
        return
    if thread.is_current:  # the garbage collector may end a forgotten generator anywhere
        thread.spawn(work)
        return
    try:
        thread.run(work)
    except Unavailable as error:
        if error.code != "closed":
            raise


def _watching(method: Callable[Concatenate[Client, P], Watch]) -> Callable[Concatenate[SyncClient, P], SyncWatch]:
    @functools.wraps(method)
    def call(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> SyncWatch:
        async def begin(client: Client) -> Watch:
            return method(client, *args, **kwargs)

        thread = self._thread()
        return SyncWatch(thread, thread.run(lambda: begin(thread.client)))

    return call


def _in_transaction(
    method: Callable[Concatenate[Transaction, P], Awaitable[T]],
) -> Callable[Concatenate[SyncTransaction, P], T]:
    @functools.wraps(method)
    def call(self: SyncTransaction, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._thread.run(lambda: method(self._txn, *args, **kwargs))

    return call


def _noting(method: Callable[Concatenate[Transaction, P], T]) -> Callable[Concatenate[SyncTransaction, P], T]:
    @functools.wraps(method)
    def call(self: SyncTransaction, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return method(self._txn, *args, **kwargs)

    return call


class SyncClient:
    """See the module. `with kvstore.connect_sync(...) as kv:`, or `kv.close()` at the end."""

    def __init__(self, make_client: Callable[[], Client]) -> None:
        self._make_client = make_client
        self._running: _Thread | None = None
        self._starting = threading.Lock()
        self._closed = False

    # --- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> SyncClient:
        self._thread()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the session, the connections and the thread. May be called twice."""
        if self._running is not None:
            self._running.check_not_current()
        with self._starting:
            self._closed = True
            running, self._running = self._running, None
        if running is not None and running.here:
            running.close()

    @property
    def revision(self) -> int:
        """As `Client.revision`."""
        return self._thread().client.revision

    # --- calls --------------------------------------------------------------------------------------------------------

    put = _blocking(Client.put)
    delete = _blocking(Client.delete)
    delete_prefix = _blocking(Client.delete_prefix)
    add = _blocking(Client.add)
    txn = _blocking(Client.txn)
    compact = _blocking(Client.compact)
    get = _blocking(Client.get)
    range = _blocking(Client.range)
    scan = _iterating(Client.scan)
    digest = _blocking(Client.digest)
    grant_lease = _blocking(Client.grant_lease)
    keep_lease = _blocking(Client.keep_lease)
    revoke_lease = _blocking(Client.revoke_lease)
    lease_status = _blocking(Client.lease_status)
    leases = _iterating(Client.leases)
    status = _blocking(Client.status)
    member_add = _blocking(Client.member_add)
    member_promote = _blocking(Client.member_promote)
    member_remove = _blocking(Client.member_remove)
    transfer_leader = _blocking(Client.transfer_leader)

    def transaction(self, *, timeout: float | None = None) -> SyncTransaction:
        """As `Client.transaction`: `with kv.transaction() as txn: ...`."""
        thread = self._thread()
        return SyncTransaction(thread, thread.client.transaction(timeout=timeout))

    def run_transaction(
        self,
        body: Callable[[SyncTransaction], T],
        *,
        attempts: int = TRANSACTION_ATTEMPTS,
        timeout: float | None = None,
    ) -> T:
        """As `Client.run_transaction`, with a `body` that is no coroutine. It runs in the calling thread."""
        for attempt in itertools.count(1):
            txn = self.transaction(timeout=timeout)
            try:
                with txn:
                    return body(txn)
            except Refused:
                if not txn.conflicted or attempt >= attempts:
                    raise
            self._run(partial(Client.wait_for_others, attempt=attempt))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def lease(self, ttl_s: float, *, on_lost: Callable[[], object] | None = None) -> Held[Lease]:
        """As `Client.lease`: `with kv.lease(10) as lease: ...`. `on_lost` is called in another thread."""
        thread = self._thread()
        return Held(thread, thread.client.lease(ttl_s, on_lost=on_lost))

    def lock(
        self,
        name: str | bytes,
        *,
        ttl_s: float = LOCK_TTL_S,
        wait_s: float | None = None,
        on_lost: Callable[[], object] | None = None,
    ) -> Held[Lock]:
        """As `Client.lock`: `with kv.lock("reports") as lock: ...`. `on_lost` is called in another thread."""
        thread = self._thread()
        return Held(thread, thread.client.lock(name, ttl_s=ttl_s, wait_s=wait_s, on_lost=on_lost))

    def election(self, name: str | bytes) -> SyncElection:
        """As `Client.election`."""
        thread = self._thread()
        return SyncElection(thread, thread.client.election(name))

    watch = _watching(Client.watch)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _thread(self) -> _Thread:
        running = self._running
        if running is not None and running.here:
            return running
        with self._starting:
            if self._closed:
                raise Unavailable("this client is closed", code="closed")
            if self._running is None or not self._running.here:
                self._running = _Thread(self._make_client)
            return self._running

    def _run(self, use: Callable[[Client], Awaitable[T]]) -> T:
        thread = self._thread()
        return thread.run(lambda: use(thread.client))


class Held(Generic[T]):
    """A lease or a lock, for a `with` block."""

    def __init__(self, thread: _Thread, held: Any) -> None:
        self._thread = thread
        self._held = held

    def __enter__(self) -> T:
        entered: list[T] = []

        async def enter() -> T:
            entered.append(await self._held.__aenter__())
            return entered[0]

        async def leave() -> None:
            if entered:
                await self._held.__aexit__(None, None, None)

        try:
            return self._thread.run(enter)
        except BaseException:  # Ctrl-C may come when it is held already, and nobody would leave it
            if self._thread.here:
                self._thread.submit(leave)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _leave(self._thread, lambda: self._held.__aexit__(kind, error, trace))


class SyncElection:
    """As `Election`."""

    def __init__(self, thread: _Thread, election: Election) -> None:
        self._thread = thread
        self._election = election

    def campaign(
        self,
        value: bytes,
        *,
        ttl_s: float = LOCK_TTL_S,
        wait_s: float | None = None,
        on_lost: Callable[[], object] | None = None,
    ) -> Held[Lock]:
        """As `Election.campaign`. `on_lost` is called in another thread."""
        return Held(self._thread, self._election.campaign(value, ttl_s=ttl_s, wait_s=wait_s, on_lost=on_lost))

    def leader(self, *, timeout: float | None = None) -> Record | None:
        """As `Election.leader`."""
        return self._thread.run(lambda: self._election.leader(timeout=timeout))

    def observe(self) -> Iterator[Record | None]:
        """As `Election.observe`: iterating blocks until somebody else leads."""
        yield from _each(self._thread, self._election.observe())


class SyncWatch:
    """As `Watch`: iterating blocks until something happens. `with` waits until it stands, and closes it."""

    def __init__(self, thread: _Thread, watch: Watch) -> None:
        self._thread = thread
        self._watch = watch

    def __enter__(self) -> SyncWatch:
        self._thread.run(self._watch.standing)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        return self._thread.run(lambda: anext(self._watch))

    def revisions(self) -> Iterator[tuple[Event, ...]]:
        """The events of one revision at a time."""
        yield from _each(self._thread, self._watch.revisions())

    @property
    def next_revision(self) -> int:
        """As `Watch.next_revision`."""
        return self._watch.next_revision

    def close(self) -> None:
        """End it. May be called twice."""
        _leave(self._thread, self._watch.close)


class SyncTransaction:
    """As `Transaction`: reads block, writes are noted until the block ends."""

    def __init__(self, thread: _Thread, txn: Transaction) -> None:
        self._thread = thread
        self._txn = txn

    def __enter__(self) -> SyncTransaction:
        self._thread.run(self._txn.__aenter__)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._thread.run(lambda: self._txn.__aexit__(kind, error, trace))
        else:  # there is nothing to commit
            _leave(self._thread, lambda: self._txn.__aexit__(kind, error, trace))

    @property
    def revision(self) -> int | None:
        return self._txn.revision

    @property
    def result(self) -> TxnResult | None:
        """As `Transaction.result`: what the commit answered."""
        return self._txn.result

    @property
    def conflicted(self) -> bool:
        """Its commit was refused because another writer was faster."""
        return self._txn.conflicted

    put = _noting(Transaction.put)
    delete = _noting(Transaction.delete)
    add = _noting(Transaction.add)
    get = _in_transaction(Transaction.get)
    range = _in_transaction(Transaction.range)
    delete_range = _in_transaction(Transaction.delete_range)
