"""`ServerNode`: storage, state, consensus and doors, put together; and the one entry that every door uses.

`handle(frame, reply)` takes a frame of the native protocol from any asker (the native door, the embedded client, later
doors that translate into it) and gives exactly one answer through `reply`, at once or later, on the loop:

- writes: checked here, then to the batcher; on a follower `not_leader` with the leader's address;
- reads: checked here, then to `Reads`;
- watches: to the `WatchHub`, which goes on sending through the asker's gate;
- status, membership and hand-over: to consensus, whose refusals are passed on.

What is wrong with a request itself (its form, its limits) is its result, an `ErrorResult`; that it was not taken, or
that its outcome is unknown, is a `Failure`.

Start: lock the directory, open consensus (which opens log and state), then the doors; then, and not before, claim the
directory for this node and cluster, and answer. So a first start that fails leaves nothing that a corrected one would
trip over. Stop: doors stop reading, a leader hands over, what is under way is answered, doors close, consensus stops;
each step bounded.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, cast

import msgspec
from msgspec import Struct

from kvstore import codec, limits, model, versions
from kvstore.env import Environment
from kvstore.errors import KvError, Refused, StartupError, Unavailable
from kvstore.meters import Meter
from kvstore.server.batcher import Batcher
from kvstore.server.chores import Chores
from kvstore.server.failures import not_leading, refusal, shutting_down, starting
from kvstore.server.identity import DataDirectory, check_loopback, check_name
from kvstore.server.log_clock import LogClock
from kvstore.server.native import NativeDoor, NativeStats
from kvstore.server.ports import Gate, Log, Machine, Raft, Reply
from kvstore.server.quota import QUOTA, Quota
from kvstore.server.reads import Reads, Waiting
from kvstore.server.watch import WatchHub
from kvstore.state.mvcc import Retention

if TYPE_CHECKING:
    from kvstore.server.http import HttpDoor

# How long a stopping leader tries to hand over: a few election timeouts. Without it the others elect one by timeout.
HAND_OVER_S = 2.0
# How long what was proposed may take to be answered before a stopping node gives up on it.
DRAIN_S = 2.0
# Of records and kept history together. More works, but starts, backups and joins take minutes then; who wants that
# should decide so.
QUOTA_BYTES = 16 * 1024**3


class ServerOptions(Struct, frozen=True, kw_only=True):
    """What one node is told.

    `members` are the initial ones, this node among them; empty for a node that joins a running cluster, or that has
    a data directory already. `cluster_id` may be empty where the directory records it. An empty `client_listen` or
    `http_listen` opens no such door (an embedded store has none). `…_advertise` is what the others and clients are
    told; the listen address if empty. `quota_bytes` and `client_rate` 0: no quota, no limit.
    """

    name: str
    data_dir: str
    cluster_id: str = ""
    members: tuple[model.Member, ...] = ()
    peer_listen: str = ""
    client_listen: str = ""
    http_listen: str = ""
    peer_advertise: str = ""
    client_advertise: str = ""
    insecure: bool = False
    heartbeat_ms: int = 100
    election_min_ms: int = 500
    election_max_ms: int = 1000
    quota_bytes: int = QUOTA_BYTES
    client_rate: int = 0
    retention: Retention = Retention()
    version: str = ""


RaftFactory = Callable[[ServerOptions, Environment, str, Log], Raft]


class ServerNode:
    """One node. `start`, `handle` as often as you like, `stop`."""

    def __init__(self, options: ServerOptions, env: Environment, log: Log, open_raft: RaftFactory) -> None:
        """`open_raft(options, env, data_dir, log)` builds consensus; `assembly.build_node` knows the real one."""
        self.options = options
        self._env = env
        self._log = log
        self._open_raft = open_raft
        self._running = False
        self._stopped = False
        self._directory: DataDirectory
        self._raft: Raft
        self._log_clock: LogClock
        self._batcher: Batcher
        self._reads: Reads
        self._watches: WatchHub
        self._chores: Chores
        self._quota: Quota
        self.door: NativeDoor | None = None
        self.http: HttpDoor | None = None
        self.leader_changes = 0
        self.on_fatal: Callable[[KvError], None] = lambda _error: None

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises `StartupError`; nothing is left open then."""
        options = self.options
        check_name(options.name)
        self._check_listeners()
        self._directory = DataDirectory(self._env.files, options.data_dir)
        try:
            options = self.options = self._with_cluster_id(options)
            self._directory.check(options.name, options.cluster_id)
            self._raft = self._open_raft(options, self._env, options.data_dir, self._log)
            try:
                await self._raft.start()
            except OSError as error:
                raise StartupError(f"cannot open the data in {options.data_dir}: {error}") from error
            try:
                self._assemble()
                await self._open_doors()
                self._directory.claim(options.name, options.cluster_id)
            except BaseException:
                if self.door is not None:
                    self.door.stop_accepting()
                await self._close_doors()
                self.door = self.http = None
                await self._raft.stop()
                raise
        except BaseException:
            self._directory.close()
            raise
        self._running = True
        self._watches.start()
        self._chores.start()

    async def stop(self) -> None:
        """Stop cleanly, within a few seconds whatever the others do. May be called twice."""
        if not self._running:
            return
        self._running = False
        self._stopped = True
        self._chores.stop()
        self._watches.stop()
        if self.door is not None:
            self.door.stop_accepting()
        if self._raft.is_leader and sum(member.voter for member in self._raft.members) > 1:
            await self._within(HAND_OVER_S, lambda done: self._raft.transfer("", self._handed_over(done)))
        await self._within(DRAIN_S, self._batcher.stop)
        self._reads.stop()
        await self._close_doors()
        await self._raft.stop()
        self._directory.close()

    @property
    def raft(self) -> Raft:
        return self._raft

    @property
    def machine(self) -> Machine:
        """The live state machine; ask anew each time (a snapshot install replaces it)."""
        return cast(Machine, self._raft.machine)

    # --- the one entry ------------------------------------------------------------------------------------------------

    def handle(self, frame: codec.ClientFrame, reply: Reply, gate: Gate | None = None) -> None:
        """Answer `frame` through `reply`, exactly once. Never raises for anything that an asker may have done."""
        kind = type(frame)
        if not self._running:
            reply(self._failure(frame.id, self._not_running()))
        elif kind is codec.Write:
            self._write(cast(codec.Write, frame), reply)
        elif kind is codec.Read:
            self._read(cast(codec.Read, frame), reply, gate)
        elif isinstance(frame, (codec.Watch, codec.WatchCredit, codec.WatchCancel)):
            self._watch(frame, reply, gate)
        elif isinstance(frame, codec.Hello):
            reply(self._welcome(frame))
        elif isinstance(frame, codec.StatusRequest):
            reply(codec.StatusAnswer(frame.id, self.status(digest=frame.digest)))
        else:
            self._administer(frame, reply)

    def gone(self, gate: Gate) -> None:
        """An asker that had a gate is not there any more."""
        if self._running:
            self._watches.gone(gate)

    def status(self, *, digest: bool = False) -> model.NodeStatus:
        """What this node says of itself. With `digest` it hashes the whole state, in one go."""
        raft, machine = self._raft, self.machine
        status = raft.status()
        return model.NodeStatus(
            name=self.options.name,
            cluster_id=self.options.cluster_id,
            role=status.role,
            leader=raft.leader,
            leader_client_address=self._leader_address(),
            term=status.term,
            commit_index=status.commit_index,
            applied_index=status.applied_index,
            last_index=status.last_index,
            durable_index=status.durable_index,
            revision=machine.revision,
            members=raft.members,
            peers=tuple(status.peers),
            storage_error=status.storage_error,
            version=self.options.version,
            digest=machine.digest() if digest else "",
            alarms=(QUOTA,) if self._quota.exceeded else (),
            size_bytes=machine.size_bytes,
            cluster_version=machine.version,
            node_id=raft.node_id,
        )

    def _write(self, frame: codec.Write, reply: Reply) -> None:
        raft = self._raft
        if not raft.is_leader:
            reply(self._failure(frame.id, not_leading(raft)))
            return
        try:
            mutation = codec.decode_mutation(frame.request)
            limits.check_mutation(mutation, len(frame.request))
            if isinstance(mutation, (model.ExpireSessions, model.ExpireLeases, model.RaiseVersion)):
                raise Refused("only the leader itself asks for this")
            if self._quota.exceeded:
                self._quota.check(mutation)
            if (frame.session | frame.seq | frame.acked_below) >> 63:  # one of them is negative or has a 64th bit
                raise Refused("session, seq and acked_below are numbers from 0 to 2^63 - 1")
            if self._batcher.entry_version < versions.NEWEST_NEED:
                versions.check(mutation, self._batcher.entry_version)
        except Refused as error:
            reply(refusal(frame.id, error))
            return
        except Unavailable as error:
            reply(self._failure(frame.id, error))
            return
        self._batcher.submit(frame, reply)

    def _read(self, frame: codec.Read, reply: Reply, gate: Gate | None) -> None:
        try:
            request = codec.decode_read(frame.request)
            limits.check_read(request, len(frame.request))
            if frame.level not in (codec.ReadLevel.LINEARIZABLE, codec.ReadLevel.LOCAL):
                raise Refused(f"there is no read level {frame.level}")
        except Refused as error:
            reply(refusal(frame.id, error))
            return
        read = Waiting(frame.id, request, reply, gate)
        if frame.level == codec.ReadLevel.LOCAL:
            self._reads.local(read, frame.min_revision)
        else:
            self._reads.linearizable(read)

    def _watch(
        self, frame: codec.Watch | codec.WatchCredit | codec.WatchCancel, reply: Reply, gate: Gate | None
    ) -> None:
        if gate is None:
            reply(refusal(frame.id, Refused("a watch needs a connection to send its events on")))
        elif isinstance(frame, codec.Watch):
            self._watches.open(frame, reply, gate)
        elif isinstance(frame, codec.WatchCredit):
            self._watches.credit(frame, gate)
        else:
            self._watches.cancel(frame, gate)

    def _welcome(self, hello: codec.Hello) -> codec.Welcome | codec.Failure:
        if hello.protocol != codec.PROTOCOL_VERSION:
            message = f"this node speaks protocol {codec.PROTOCOL_VERSION}, not {hello.protocol}; update the older side"
            return codec.Failure(0, "version_mismatch", message)
        own = self.options.cluster_id
        if hello.cluster_id and hello.cluster_id != own:
            message = f"this is cluster {own}, not {hello.cluster_id}; check the endpoints"
            return codec.Failure(0, "wrong_cluster", message)
        return codec.Welcome(hello.id, codec.PROTOCOL_VERSION, own, self.options.name, self._leader_address())

    def _administer(self, frame: codec.ClientFrame, reply: Reply) -> None:
        raft = self._raft

        def done(error: KvError | None) -> None:
            if error is not None:
                reply(self._failure(frame.id, error))
            else:
                reply(codec.AdminAnswer(frame.id, raft.members))

        if not raft.is_leader:
            done(not_leading(raft))
        elif isinstance(frame, (codec.MemberAdd, codec.MemberPromote)) and self._version_may_rise():
            why = "the leader has first to apply what may raise the cluster's version; try again"
            done(Unavailable(why, code="membership_busy"))
        elif isinstance(frame, codec.MemberAdd):
            if frame.cluster_id != self.options.cluster_id:
                message = f"this is cluster {self.options.cluster_id}, the new node is of {frame.cluster_id}"
                done(Refused(f"{message}; join with this cluster's token", code="wrong_cluster"))
                return
            new = model.Member(frame.name, frame.peer_address, frame.client_address, frame.node_id, voter=False)
            raft.add_learner(new, done, version=self.machine.version)
        elif isinstance(frame, codec.MemberPromote):
            raft.promote(frame.name, done, version=self.machine.version)
        elif isinstance(frame, codec.MemberRemove):
            raft.remove(frame.name, done, force=frame.force)
        else:
            assert isinstance(frame, codec.TransferLeader), f"no way to handle {type(frame).__name__}"
            raft.transfer(frame.name, done)

    def _version_may_rise(self) -> bool:
        """True while a leader may not know yet which version its own log demands of a new member."""
        return self._chores.raises_version or self.machine.applied_term != self._raft.term

    # --- what it tells of itself (metrics.Observed) -------------------------------------------------------------------

    def queues(self) -> dict[str, int]:
        """How much waits, by queue."""
        batcher = self._batcher
        return {"writes": batcher.waiting, "entries_in_flight": batcher.in_flight, "reads": self._reads.waiting}

    def times(self) -> dict[str, Meter]:
        raft = self._raft
        return {"commit": self._batcher.commit_times, "fsync": raft.sync_times, "apply": raft.apply_times}

    def proposed(self) -> tuple[int, int]:
        """Entries, and requests in them."""
        return self._batcher.proposed_entries, self._batcher.proposed_requests

    def watchers(self) -> tuple[int, int]:
        """All watches, and those that lag."""
        return self._watches.count, self._watches.lagging

    def why_not_serving(self) -> str:
        """Why every request is refused here; empty while they are taken."""
        return "" if self._running else self._not_running().message

    def state(self) -> dict[str, int | str]:
        return self.machine.describe(False)

    def door_stats(self) -> NativeStats | None:
        return None if self.door is None else self.door.stats()

    # --- what consensus tells -----------------------------------------------------------------------------------------

    def _leadership_changed(self, leading: bool) -> None:
        self.leader_changes += 1
        self._log_clock.observe(self.machine.log_time_ms, self.machine.stamped_index)
        self._log_clock.forget_own()
        self._batcher.leadership_changed(leading)

    def _applied(self) -> None:
        machine, raft = self.machine, self._raft
        if machine.log_time_ms:
            self._log_clock.observe(machine.log_time_ms, machine.stamped_index)
        elif raft.is_leader and machine.applied_term == raft.term:
            self._log_clock.begin()
        self._reads.applied()
        self._watches.applied()
        self._quota.look()
        self._batcher.entry_version = machine.version

    def _failed(self, error: KvError) -> None:
        """Consensus takes no part any more. Local reads are still served; what to do is the process's to decide."""
        self.on_fatal(error)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check_listeners(self) -> None:
        options = self.options
        for what, address in (
            ("peers", options.peer_listen),
            ("clients", options.client_listen),
            ("http", options.http_listen),
        ):
            if not address:
                continue
            if self.options.insecure:
                try:
                    check_loopback(address)
                except StartupError as error:
                    if error.code != "address_not_loopback":
                        raise
                    self._log.warning(
                        "insecure_listener",
                        address=address,
                        of=what,
                        message="anyone who can reach this address can read and change everything",
                    )
            else:
                check_loopback(address)

    def _with_cluster_id(self, options: ServerOptions) -> ServerOptions:
        recorded = self._directory.belongs_to(options.name)
        if options.cluster_id:
            return options
        if not recorded:
            raise StartupError(
                f"{options.data_dir} is new, so this node cannot know its cluster: give --peers to start a cluster, "
                "or use `kvstore join` to join one"
            )
        return msgspec.structs.replace(options, cluster_id=recorded)

    def _assemble(self) -> None:
        env, raft = self._env, self._raft
        self._log_clock = LogClock(env.clock, self.machine.log_time_ms, self.machine.stamped_index)
        self._batcher = Batcher(env, raft, self._log_clock, self._failure, self._pressed)
        self._reads = Reads(env, raft, lambda: self.machine, self._failure, self._log_clock.now_ms)
        self._watches = WatchHub(env, raft, lambda: self.machine, self._failure)
        self._chores = Chores(env, raft, lambda: self.machine, self._log_clock, self._batcher, self._log)
        self._quota = Quota(self.options.quota_bytes, lambda: self.machine, self._log)
        self._quota.look()
        self._batcher.entry_version = self.machine.version
        raft.on_leadership = self._leadership_changed
        raft.on_applied = self._applied
        raft.on_fatal = self._failed

    async def _open_doors(self) -> None:
        if self.options.client_listen:
            door = NativeDoor(self._env, self, self._log, self.options.client_rate)
            await self._listen(self.options.client_listen, door.start)
            self.door = door
        if self.options.http_listen:
            # Loaded where it is used: an embedded store, and a node without it, start sooner and smaller.
            from kvstore.server.http import HttpDoor

            http = HttpDoor(self._env, self)
            await self._listen(self.options.http_listen, http.start)
            self.http = http

    @staticmethod
    async def _listen(address: str, start: Callable[[str], Awaitable[None]]) -> None:
        """Raises `StartupError`."""
        try:
            await start(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StartupError(
                    f"{address} is in use by another process; stop it or choose another port",
                    code="address_in_use",
                ) from error
            raise StartupError(f"cannot listen on {address}: {error}") from error

    async def _close_doors(self) -> None:
        if self.door is not None:
            # The door bounds this itself: it aborts what lingers.
            await self._within(DRAIN_S, self.door.close)
        if self.http is not None:
            await self.http.stop()

    def _not_running(self) -> Unavailable:
        # A door is open a moment before the directory is claimed; see `start`.
        return shutting_down() if self._stopped else starting()

    def _pressed(self, pressed: bool) -> None:
        if self.door is not None:
            self.door.press(pressed)

    def _leader_address(self) -> str:
        leader = self._raft.leader
        for member in self._raft.members:
            if member.name == leader:
                return member.client_address
        return ""

    def _failure(self, request_id: int, error: KvError) -> codec.Failure:
        leader = self._leader_address() if error.code == "not_leader" else ""
        return codec.Failure(request_id, error.code, error.message, leader)

    def _handed_over(self, done: Callable[[], None]) -> Callable[[KvError | None], None]:
        def transferred(error: KvError | None) -> None:
            if error is not None:
                self._log.warning("hand_over_failed", code=error.code, message=error.message)
            done()

        return transferred

    async def _within(self, timeout_s: float, begin: Callable[[Callable[[], None]], None]) -> None:
        """Run `begin(done)`, and wait until `done()` was called or the time is over."""
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done() -> None:
            if not over.done():
                over.set_result(None)

        timer = self._env.scheduler.call_later(timeout_s, done)
        begin(done)
        await over
        timer.cancel()
