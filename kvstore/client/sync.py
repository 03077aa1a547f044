"""The client for programs without asyncio: Flask, Django, scripts. Made by `kvstore.connect_sync`.

Every call is that of `Client`, with the same name, arguments, results and errors; it blocks its thread until it is
answered. One `SyncClient` serves all threads of a process: their calls share its connections and its batches.

The asyncio client runs on a loop in a thread of its own, which starts with the first call. After a fork (a server that
loads the application and then forks its workers) the child starts its own at its first call, with a session of its own;
what the parent had under way stays the parent's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import itertools
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from kvstore.client.client import TRANSACTION_ATTEMPTS, Client
from kvstore.client.lease import Lease
from kvstore.client.lock import LOCK_TTL_S, Election, Lock
from kvstore.client.transaction import Transaction
from kvstore.client.watch import Watch
from kvstore.errors import Refused, Unavailable
from kvstore.model import Event, Record

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")


class _Thread:
    """An event loop in a thread, and the client that lives on it."""

    def __init__(self, make_client: Callable[[], Client]) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        # A daemon: a program that forgets to close its client still ends.
        self._thread = threading.Thread(target=self.loop.run_forever, name="kvstore-client", daemon=True)
        self._thread.start()
        self.client = self.run(self._start(make_client))

    @staticmethod
    async def _start(make_client: Callable[[], Client]) -> Client:
        client = make_client()
        await client.start()
        return client

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a callback of this client must not wait for the client; hand the work to a thread")
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Unavailable("this client was closed", code="closed") from None
        except BaseException:  # Ctrl-C, or a signal that ends this thread: nobody waits for it any more
            future.cancel()
            raise

    def stop(self) -> None:
        self.run(_cancel_others())  # whose threads would wait for ever
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


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
        items = method(self._thread().client, *args, **kwargs)
        try:
            while True:
                try:
                    yield self._run(lambda _: anext(items))
                except StopAsyncIteration:
                    return
        finally:
            self._run(lambda _: _closed(items))

    return call


def _watching(method: Callable[Concatenate[Client, P], Watch]) -> Callable[Concatenate[SyncClient, P], SyncWatch]:
    @functools.wraps(method)
    def call(self: SyncClient, /, *args: P.args, **kwargs: P.kwargs) -> SyncWatch:
        async def begin(client: Client) -> Watch:
            return method(client, *args, **kwargs)

        return SyncWatch(self, self._run(begin))

    return call


def _in_transaction(
    method: Callable[Concatenate[Transaction, P], Awaitable[T]],
) -> Callable[Concatenate[SyncTransaction, P], T]:
    @functools.wraps(method)
    def call(self: SyncTransaction, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._kv._run(lambda _: method(self._txn, *args, **kwargs))

    return call


async def _closed(items: AsyncIterator[Any]) -> None:
    close = getattr(items, "aclose", None)
    if close is not None:
        await close()


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
        with self._starting:
            self._closed = True
            running, self._running = self._running, None
        if running is not None and running.pid == os.getpid():
            running.run(running.client.close())
            running.stop()

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
        return SyncTransaction(self, self._thread().client.transaction(timeout=timeout))

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
        return Held(self, self._thread().client.lease(ttl_s, on_lost=on_lost))

    def lock(
        self,
        name: str | bytes,
        *,
        ttl_s: float = LOCK_TTL_S,
        wait_s: float | None = None,
        on_lost: Callable[[], object] | None = None,
    ) -> Held[Lock]:
        """As `Client.lock`: `with kv.lock("reports") as lock: ...`. `on_lost` is called in another thread."""
        return Held(self, self._thread().client.lock(name, ttl_s=ttl_s, wait_s=wait_s, on_lost=on_lost))

    def election(self, name: str | bytes) -> SyncElection:
        """As `Client.election`."""
        return SyncElection(self, self._thread().client.election(name))

    watch = _watching(Client.watch)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _thread(self) -> _Thread:
        running = self._running
        if running is not None and running.pid == os.getpid():
            return running
        with self._starting:
            if self._closed:
                raise Unavailable("this client is closed", code="closed")
            if self._running is None or self._running.pid != os.getpid():
                self._running = _Thread(self._make_client)
            return self._running

    def _run(self, use: Callable[[Client], Awaitable[T]]) -> T:
        thread = self._thread()

        async def work() -> T:
            return await use(thread.client)

        return thread.run(work())


class Held(Generic[T]):
    """A lease or a lock, for a `with` block."""

    def __init__(self, kv: SyncClient, held: Any) -> None:
        self._kv = kv
        self._held = held

    def __enter__(self) -> T:
        entered: T = self._kv._run(lambda _: self._held.__aenter__())
        return entered

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kv._run(lambda _: self._held.__aexit__(kind, error, trace))


class SyncElection:
    """As `Election`."""

    def __init__(self, kv: SyncClient, election: Election) -> None:
        self._kv = kv
        self._election = election

    def campaign(
        self,
        value: bytes,
        *,
        ttl_s: float = LOCK_TTL_S,
        wait_s: float | None = None,
        on_lost: Callable[[], object] | None = None,
    ) -> Held[Lock]:
        return Held(self._kv, self._election.campaign(value, ttl_s=ttl_s, wait_s=wait_s, on_lost=on_lost))

    def leader(self, *, timeout: float | None = None) -> Record | None:
        return self._kv._run(lambda _: self._election.leader(timeout=timeout))


class SyncWatch:
    """As `Watch`: iterating blocks until something happens. `with` waits until it stands, and closes it."""

    def __init__(self, kv: SyncClient, watch: Watch) -> None:
        self._kv = kv
        self._watch = watch

    def __enter__(self) -> SyncWatch:
        self._kv._run(lambda _: self._watch.standing())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        return self._kv._run(lambda _: anext(self._watch))

    def revisions(self) -> Iterator[tuple[Event, ...]]:
        """The events of one revision at a time."""
        revisions = self._watch.revisions()
        while True:
            yield self._kv._run(lambda _: anext(revisions))

    @property
    def next_revision(self) -> int:
        """As `Watch.next_revision`."""
        return self._watch.next_revision

    def close(self) -> None:
        self._kv._run(lambda _: self._watch.close())


class SyncTransaction:
    """As `Transaction`: reads block, writes are noted until the block ends."""

    def __init__(self, kv: SyncClient, txn: Transaction) -> None:
        self._kv = kv
        self._txn = txn
        self.put = txn.put
        self.delete = txn.delete
        self.add = txn.add

    def __enter__(self) -> SyncTransaction:
        self._kv._run(lambda _: self._txn.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kv._run(lambda _: self._txn.__aexit__(kind, error, trace))

    @property
    def revision(self) -> int | None:
        return self._txn.revision

    @property
    def conflicted(self) -> bool:
        """Its commit was refused because another writer was faster."""
        return self._txn.conflicted

    get = _in_transaction(Transaction.get)
    range = _in_transaction(Transaction.range)
    delete_range = _in_transaction(Transaction.delete_range)
