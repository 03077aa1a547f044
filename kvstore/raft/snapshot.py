"""Snapshots: taking them, sending them to peers, receiving them. The one thing of it all that a node talks to.

A peer whose log ends before ours begins gets a copy of the state instead: a checkpoint of the state machine, written
in a thread while the node goes on, sent file by file over a connection of its own. Peers that ask while the same
checkpoint is still being written share it.

It does not decide who needs a snapshot, who may send one, or what an installed one means for the log: the node does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvstore.env import Environment, Log
from kvstore.errors import InternalError, KvError, Unavailable
from kvstore.raft.fsm import Checkpoint, StateMachine
from kvstore.raft.snapshot_files import take
from kvstore.raft.snapshot_receiver import SnapshotHandler, SnapshotReceiver, Worker
from kvstore.raft.snapshot_sender import Pace, Sending
from kvstore.raft.snapshot_wire import Offer
from kvstore.raft.state_directory import StateDirectory
from kvstore.raft.transport import Purpose, Transport

__all__ = ["SnapshotHandler", "Snapshots", "StateDirectory"]

# Half of what one gigabit link or a modest disk carries: a snapshot takes what the requests leave.
BYTES_PER_S = 64 * 1024 * 1024

Done = Callable[[KvError | None, Checkpoint | None], None]


class _Taken:
    """A checkpoint and those that it is sent to. It is removed when the last of them is done."""

    __slots__ = ("offer", "path", "peers")

    def __init__(self, path: str) -> None:
        self.path = path
        self.offer: Offer | None = None  # None while it is being written
        self.peers: set[str] = set()


class _Order:
    """A peer that is to get a snapshot."""

    __slots__ = ("done", "sending", "taken")

    def __init__(self, done: Done, taken: _Taken) -> None:
        self.done = done
        self.taken = taken
        self.sending: Sending | None = None


class Snapshots:
    """All methods are to be called on the event loop."""

    def __init__(
        self,
        env: Environment,
        machine: StateMachine,
        directory: StateDirectory,
        transport: Transport,
        handler: SnapshotHandler,
        *,
        bytes_per_s: int = BYTES_PER_S,
        log: Log | None = None,
    ) -> None:
        self._env = env
        self._machine = machine
        self._directory = directory
        self._transport = transport
        self._pace = Pace(env, bytes_per_s)
        self._log = log
        self._worker = Worker(env)
        self._orders: dict[str, _Order] = {}
        self._taking: _Taken | None = None
        self._unfinished = 0  # also cancelled ones whose last read still runs in a thread
        self._all_finished: asyncio.Event | None = None
        self._is_stopped = False
        self._receiver = SnapshotReceiver(env, machine, directory, handler, log)
        transport.accept_streams(Purpose.SNAPSHOT, self._receiver.accept)

    def send(self, peer: str, done: Done) -> None:
        """Take a checkpoint and send it. `done(error, checkpoint)` is called once, on the loop: with an error, or with
        what the peer has installed. Codes: what the peer refused with; `closed` after `cancel`; `storage_failed`;
        `unavailable` or `timeout` if it could not be reached in many attempts. Not called after `stop`."""
        assert peer not in self._orders, f"a snapshot is on its way to {peer} already"
        assert not self._is_stopped
        taking = self._taking
        if taking is None:
            taking = self._taking = _Taken(self._directory.new_checkpoint())
            self._take(taking)
        taking.peers.add(peer)
        self._orders[peer] = _Order(done, taking)

    def sending_to(self, peer: str) -> bool:
        """True from `send` until just before its `done`."""
        return peer in self._orders

    @property
    def taking(self) -> bool:
        """True while a thread may be using the state machine."""
        return self._worker.is_busy

    @property
    def receiving_bytes(self) -> tuple[int, int]:
        """How much of a snapshot has arrived here, and how large it is; zeroes while none does."""
        return self._receiver.progress

    def cancel(self, peer: str) -> None:
        """Stop sending to a peer, if a snapshot is on its way to it. `done` follows, with code `closed`."""
        order = self._orders.pop(peer, None)
        if order is None:
            return
        error = Unavailable("the snapshot was cancelled", code="closed")
        self._env.scheduler.call_soon(self._report, order, error)
        if order.sending is None:
            self._release(order.taken, peer)
        else:
            order.sending.cancel(error)

    def cancel_all(self) -> None:
        for peer in list(self._orders):
            self.cancel(peer)

    def stop(self) -> None:
        """Send nothing more, take nothing more, and tell nobody. Threads may still be at work: see `finish`."""
        self._is_stopped = True
        self.cancel_all()
        self._receiver.stop()

    async def finish(self) -> None:
        """Stop, and wait until no thread uses the state machine or its files any more."""
        self.stop()
        while self._unfinished:
            self._all_finished = asyncio.Event()
            await self._all_finished.wait()
        await self._worker.finish()
        await self._receiver.finish()

    # --- taking -------------------------------------------------------------------------------------------------------

    def _take(self, taking: _Taken) -> None:
        snapshot_id = f"{self._env.chance.getrandbits(64):016x}"
        self._worker.run(
            lambda: take(self._env.files, self._machine, taking.path, snapshot_id),
            lambda offer, error: self._took(taking, offer, error),
        )

    def _took(self, taking: _Taken, offer: Offer | None, error: BaseException | None) -> None:
        if self._taking is taking:
            self._taking = None
        if error is not None:
            self._directory.release(taking.path)
            failure = _as_kv_error(error)
            for peer in sorted(taking.peers):
                self._report(self._orders.pop(peer), failure)
            return
        assert offer is not None
        taking.offer = offer
        if not taking.peers:
            self._remove(taking)  # all were cancelled
            return
        for peer in sorted(taking.peers):
            self._start(peer, self._orders[peer], offer)

    def _start(self, peer: str, order: _Order, offer: Offer) -> None:
        self._unfinished += 1
        order.sending = Sending(
            self._env,
            self._transport,
            self._pace,
            peer,
            order.taken.path,
            offer,
            lambda error: self._sent(peer, order, error),
        )
        order.sending.start()

    # --- done ---------------------------------------------------------------------------------------------------------

    def _sent(self, peer: str, order: _Order, error: KvError | None) -> None:
        self._unfinished -= 1
        if self._all_finished is not None:
            self._all_finished.set()
        is_current = self._orders.get(peer) is order
        if is_current:
            del self._orders[peer]
        self._release(order.taken, peer)
        if is_current:
            self._report(order, error)

    def _report(self, order: _Order, error: KvError | None) -> None:
        if self._is_stopped:
            return
        if error is not None:
            order.done(error, None)
        else:
            assert order.taken.offer is not None
            order.done(None, order.taken.offer.checkpoint)

    def _release(self, taken: _Taken, peer: str) -> None:
        taken.peers.discard(peer)
        if not taken.peers and taken.offer is not None:
            self._remove(taken)
        elif not taken.peers and self._taking is taken:
            self._taking = None  # nobody waits for it; whoever asks next gets a newer one

    def _remove(self, taken: _Taken) -> None:
        def removed(_: None, error: BaseException | None) -> None:
            self._directory.release(taken.path)
            if error is not None and self._log is not None:
                self._log.warning("a sent checkpoint stays until the next start", path=taken.path, error=str(error))

        self._worker.run(lambda: self._env.files.remove_tree(taken.path), removed)


def _as_kv_error(error: BaseException) -> KvError:
    if isinstance(error, KvError):
        return error
    if isinstance(error, OSError):
        return Unavailable(f"taking a snapshot failed: {error}", code="storage_failed")
    return InternalError(f"taking a snapshot failed: {error!r}")
