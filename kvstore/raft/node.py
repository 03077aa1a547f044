"""One member of the cluster: all that the rest of kvstore may see of consensus.

A node lives on one event loop. Whatever happens (a message, a request, a timer, a sync that ended) wakes it, and one
turn of the loop, `_turn`, does all that there is to do, in this order:

    deliver inbound messages through the guard
    elections; propose what waits; tick the engine
    send what promises nothing          a leader's appends: its disk works while the followers' do
    sync the log
    send what the sync made true        acknowledgements, votes
    apply what is committed; answer     sends come before applies, so applying delays no acknowledgement

Nothing is promised before it is on disk. A node whose disk fails goes silent: it sends nothing, takes nothing, and
serves local reads until it is restarted. Proposals are bounded by the batcher (four under way), reads by the doors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from kvstore.env import Environment, Log
from kvstore.errors import InternalError, KvError, StartupError, Unavailable
from kvstore.meters import Meter
from kvstore.model import Member, PeerStatus
from kvstore.raft import guard as actions
from kvstore.raft import messages
from kvstore.raft.alarm import Alarm
from kvstore.raft.changes import Changes
from kvstore.raft.config import RaftConfig, RaftStatus, role_of
from kvstore.raft.elections import Elections
from kvstore.raft.engine import Engine
from kvstore.raft.flush import StateFlush, remover
from kvstore.raft.fsm import Checkpoint, EntryKind, StateMachine
from kvstore.raft.guard import Guard
from kvstore.raft.members import Configuration, NewerConfiguration, newest_configuration
from kvstore.raft.messages import AppendReply, Message, PreVoteReply, ReadAck, TermNotice, VoteReply
from kvstore.raft.outbox import Outbox
from kvstore.raft.proposals import Proposals, Proposed
from kvstore.raft.reads import ReadIndex
from kvstore.raft.replicas import Replicas
from kvstore.raft.roster import Roster, own_identity
from kvstore.raft.snapshot import Snapshots, StateDirectory
from kvstore.raft.sync import LogSync
from kvstore.raft.transport import Identity, Transport
from kvstore.raft.wal import Wal
from kvstore.seldom import SeldomLog

# Applying gives way to heartbeats after this long; a restart may have many entries to apply.
APPLY_SLICE_S = 0.05

Done = Callable[[KvError | None], None]


class RaftNode:
    """`machine` may be replaced inside by an installed snapshot: always read it here. `on_leadership(leads)`,
    `on_applied()` (after each turn that applied something) and `on_fatal(error)` may be set."""

    def __init__(
        self,
        config: RaftConfig,
        env: Environment,
        data_dir: str,
        open_machine: Callable[[str], StateMachine],
        log: Log,
    ) -> None:
        self.config = config
        self._env = env
        self._data_dir = data_dir
        self._open_machine = open_machine
        self._log, self._seldom = log, SeldomLog(log, env.clock)
        self.on_leadership: Callable[[bool], None] = lambda _leads: None
        self.on_applied: Callable[[], None] = lambda: None
        self.on_fatal: Callable[[KvError], None] = lambda _error: None
        self.machine: StateMachine
        self._wal: Wal
        self._sync: LogSync
        self._flush: StateFlush
        self._engine: Engine
        self._elections: Elections
        self._guard: Guard
        self._reads: ReadIndex
        self._changes: Changes
        self._replicas: Replicas
        self._transport: Transport
        self._state_directory: StateDirectory
        self._snapshots: Snapshots
        self._outbox = Outbox(lambda peer, body: self._transport.send(peer, body), env.clock.monotonic)
        self._inbox: list[tuple[str, bytes]] = []
        self._proposals = Proposals()
        self.apply_times, self.sync_times = Meter(), Meter()
        self._members = Configuration()
        self._members_stale = False
        self._sole_voter = False
        self._roster: Roster
        self._identify_due = False  # the configuration may lack what members said of themselves
        self._was_leader = False
        self._was_term = 0
        self._alarm = Alarm(env, self._wake)
        self._scheduled = False
        self._running = False
        self._failure: KvError | None = None

    # --- start and stop -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Recover state and log, then listen. Raises `StartupError`."""
        env, files, config = self._env, self._env.files, self.config
        files.make_dirs(f"{self._data_dir}/wal")
        self._state_directory = StateDirectory(files, f"{self._data_dir}/state")
        self._state_directory.sweep()
        self.machine = self._open_machine(self._state_directory.current())
        node_id = f"{env.chance.getrandbits(64):016x}"
        self._wal = Wal.open(
            files, f"{self._data_dir}/wal", node_id=node_id, log=self._log.warning, in_thread=remover(env, self._log)
        )
        self._reconcile()
        self._sync = LogSync(env, self._wal, self._wake, self._fail_storage, self.sync_times)
        self._flush = StateFlush(env, self._wal, lambda index: self._replicas.needed(index), self._fail_storage)
        self._roster = Roster(own_identity(config, self._wal.node_id))
        self._transport = Transport(env, self._roster.own, config.listen_address, self, log=self._log)
        self._snapshots = Snapshots(env, self.machine, self._state_directory, self._transport, self, log=self._log)
        election_s = config.election_min_ms / 1000, config.election_max_ms / 1000
        self._elections = Elections(env.chance, *election_s, env.clock.monotonic())
        self._build_engine()
        if config.listen_address:
            try:
                await self._transport.start()
            except StartupError:
                self._wal.close()
                self.machine.close()
                raise
        self._running = True
        self._apply_members()
        self._log.info(
            "raft started",
            node_id=self._wal.node_id,
            term=self._engine.term,
            applied=self.machine.applied_index,
            last=self._wal.last_index,
        )
        self._wake()

    def _reconcile(self) -> None:
        """Make the log begin where the state ends, where a crash left them apart."""
        applied, wal = self.machine.applied_index, self._wal
        wal.check_continues(applied)
        if applied and wal.term_at(applied) != self.machine.applied_term:
            # A snapshot was installed, or the state was flushed beyond a log that lost its unsynced end.
            self._log.info("log restarts at the state", applied=applied, log_end=wal.last_index)
            wal.reset(applied, self.machine.applied_term)
            wal.sync()

    def _build_engine(self) -> None:
        """Consensus over the log and the state as they are: at the start, and after a snapshot was installed."""
        config, env = self.config, self._env
        self._engine = engine = Engine(
            config.name,
            self._wal,
            self.machine.applied_index,
            clock=env.clock,
            heartbeat_s=config.heartbeat_ms / 1000,
            quorum_timeout_s=config.election_max_ms / 1000,
            emit=self._emit,
            members_changed=self._on_members_changed,
        )
        self._guard = Guard(config.name, engine, self._wal, self._elections)
        self._guard.applied_last = (self.machine.applied_term, self.machine.applied_index)
        heartbeat_s, timeout_s = config.heartbeat_ms / 1000, config.election_max_ms / 1000
        self._reads = ReadIndex(config.name, engine, env.chance, self._send_now, heartbeat_s, timeout_s)
        self._reads.applied(self.machine.applied_index)
        hears_within_s = config.election_max_ms / 1000
        self._changes = Changes(config.name, self, self._wal, self._send_now, self._log, hears_within_s)
        self._replicas = Replicas(
            engine,
            env,
            self._transport,
            self._snapshots,
            self._send_now,
            self._wake,
            self._log,
            heartbeat_s=heartbeat_s,
        )
        self._was_term, self._was_leader = engine.term, False
        self._members_stale = True

    async def stop(self) -> None:
        """Stop taking part, end what waits, and release everything."""
        self._running = False
        self._alarm.cancel()
        self._proposals.end("this node is stopping")
        self._reads.fail_all()
        await self._snapshots.finish()
        self._transport.stop()
        await self._sync.finish()
        await self._flush.finish()
        for part in (self._wal, self.machine):
            try:
                part.close()
            except OSError as error:
                self._log.error("what was not promised may be lost: the disk failed on stopping", error=str(error))

    # --- what the rest of kvstore sees --------------------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        return self._running and self._failure is None and self._engine.is_leader

    @property
    def leader(self) -> str:
        """The leader's name as far as this node knows; empty if it knows none."""
        if not self._running or self._failure is not None:
            return ""
        heard = self._engine.is_leader or self._elections.heard_of_late(self._env.clock.monotonic())
        return self._engine.leader if heard else ""

    @property
    def accepting(self) -> bool:
        """It leads, and takes proposals now."""
        return self.is_leader and not self._changes.handing_over

    @property
    def members(self) -> tuple[Member, ...]:
        return self._members.members

    @property
    def node_id(self) -> str:
        return self._wal.node_id

    @property
    def failure(self) -> KvError | None:
        """Why this node takes no part any more; None while it does."""
        return self._failure

    @property
    def term(self) -> int:
        return self._engine.term

    @property
    def committed(self) -> int:
        """What may be applied. A sole voter's engine commits on becoming leader before the disk has it."""
        commit = self._engine.commit_index
        return min(commit, self._wal.durable_index) if self._sole_voter else commit

    def match_index(self, peer: str) -> int:
        """What a peer is known to hold, as its leader sees it."""
        return self._engine.match_index(peer)

    def alive(self) -> set[str]:
        """This leader, and the members that it is connected with and has heard of late, in its term."""
        heard = self._guard.heard_since(self._env.clock.monotonic() - self.config.election_max_ms / 1000)
        return {self.config.name, *filter(self._transport.connected, heard)}

    def version_of(self, name: str, node_id: str) -> int:
        """What this node last said that it understands; 0 where it was not heard."""
        return self._roster.version_of(name, node_id)

    def status(self) -> RaftStatus:
        engine, wal = self._engine, self._wal
        return RaftStatus(
            role=role_of(self._failure, engine, self._members.is_voter(self.config.name)),
            leader=self.leader,
            term=engine.term,
            commit_index=self.committed,
            applied_index=self.machine.applied_index,
            last_index=wal.last_index,
            durable_index=wal.durable_index,
            peers=tuple(
                PeerStatus(member.name, self._transport.connected(member.name), engine.match_index(member.name))
                for member in self.members
                if member.name != self.config.name
            ),
            storage_error=self._failure.message if self._failure else "",
            common_version=self._roster.common_version,
            receiving_bytes=self._snapshots.receiving_bytes,
            dropped=dict(self._guard.dropped),
        )

    def propose(self, payload: bytes, done: Proposed) -> None:
        """Have `payload` committed and applied: `done(result of apply, None)`.

        On the leader only. `done(None, Unavailable)`: surely not proposed. `done(None, OutcomeUnknown)`: it may have
        been committed, or may yet be.
        """
        self.propose_entry(bytes([EntryKind.DATA]) + payload, done)

    def propose_entry(self, entry: bytes, done: Proposed) -> None:
        """`propose` for an entry that has its kind in front."""
        if not self.accepting:
            done(None, self._refusal() or Unavailable("this node does not lead now", code="not_leader"))
            return
        self._proposals.add(entry, done)
        self._wake()

    def read_index(self, done: Done) -> None:
        """A barrier: when `done(None)` runs, `machine` holds every write that was acknowledged before this call."""
        refusal = self._refusal()
        if refusal is not None:
            done(refusal)
        else:
            self._reads.request(done)
            self._wake()

    def add_learner(self, member: Member, done: Done, *, version: int = 0) -> None:
        self._changes.add_learner(member, done, version)

    def promote(self, name: str, done: Done, *, version: int = 0) -> None:
        self._changes.promote(name, done, version)

    def remove(self, name: str, done: Done, *, force: bool = False) -> None:
        self._changes.remove(name, done, force)

    def transfer(self, name: str, done: Done) -> None:
        """Hand leadership to `name`, or to the voter that holds most where it is empty; bounded to two election
        timeouts, after which this node leads on and `done` gets an error."""
        self._changes.transfer(name, self._env.clock.monotonic() + 2 * self.config.election_max_ms / 1000, done)
        self._wake()

    # --- called by the transport --------------------------------------------------------------------------------------

    def accept(self, identity: Identity) -> tuple[str, str] | None:
        refusal = self._roster.judge(identity)
        if refusal is None and self._roster.note(identity):
            self._identify_due = True
            self._set_peers()
            self._wake()
        return refusal

    def judge(self, identity: Identity) -> tuple[str, str] | None:
        return self._roster.judge(identity)

    def peer_up(self, name: str) -> None:
        self._guard.peer_up(name)
        self._replicas.up(name)
        self._wake()

    def peer_down(self, name: str) -> None:
        self._replicas.down(name)
        self._reads.leader_lost(name)
        if name == self._engine.leader:
            self._elections.lost_leader(self._env.clock.monotonic())
        self._wake()

    def peer_drained(self, name: str) -> None:
        self._replicas.up(name)
        self._wake()

    def received(self, name: str, body: bytes) -> None:
        self._inbox.append((name, body))
        self._wake()

    # --- the turn -----------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._scheduled and self._running:
            self._scheduled = True
            self._env.scheduler.call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        if not self._running or self._failure is not None:
            self._inbox.clear()
            return
        now = self._env.clock.monotonic()
        try:
            self._receive_all(now)
            self._act(self._guard.tick(now), now)
            self._propose_and_tick(now)
            self._ask(now)
            self._send()
            self._sync.run()
            self._after_sync(now)
            self._send()
            self._outbox.end_turn()
            self._apply()
        except OSError as error:
            self._fail_storage(error)
        except NewerConfiguration as error:
            self._fail(StartupError(f"{error}: install a newer kvstore on this node", code="data_format_newer"))
        except Exception as error:
            # A `SafetyViolation`, or a bug: on what the turn left half done nothing must be built.
            self._fail(InternalError(f"consensus met what it must not, and this node stops: {error!r}"))
        else:
            if self._identify_due and self._engine.is_leader:
                self._identify_due = not self._changes.identify(self._roster.seen)
            self._flush.step(self.machine)
            self._arm()

    def _receive_all(self, now: float) -> None:
        inbox, self._inbox = self._inbox, []
        for peer, body in inbox:
            try:
                message = messages.decode(body)
            except messages.MalformedMessage as error:
                self._guard.dropped["malformed"] += 1
                self._seldom.warning("malformed message", "malformed", sender=peer, error=str(error))
                continue
            self._act(self._guard.receive(peer, message, now), now)

    def _act(self, todo: list[actions.Action], now: float) -> None:
        """Carry out what the guard decided, in order."""
        for action in todo:
            if isinstance(action, actions.DeliverAck):
                self._engine.deliver_ack(action.peer, action.next_index, action.success, action.is_news)
            elif isinstance(action, actions.Deliver):
                self._engine.deliver(action.peer, action.message)
                self._after_engine(now)
            elif isinstance(action, actions.Send):
                self._send_after(action.peer, action.message)
            elif isinstance(action, actions.AdoptTerm):
                self._engine.adopt_term(action.term)
                self._after_engine(now)
            elif isinstance(action, actions.Campaign):
                self._engine.tick(campaign=True)
                self._after_engine(now)
            elif isinstance(action, actions.Pass):
                if isinstance(action.message, ReadAck):
                    self._engine.heard_from(action.peer)
                self._reads.receive(action.peer, action.message)
            else:
                assert isinstance(action, actions.Removed)
                self._on_removed()

    def _propose_and_tick(self, now: float) -> None:
        queued = self._proposals.queued
        if not queued or self._waits_for_disk():
            self._tick(now)
            return
        if self._engine.is_leader:
            for entry in queued:
                self._engine.queue_proposal(entry)
        before = self._wal.last_index
        self._tick(now)
        self._engine.drop_proposals()
        self._proposals.appended(self._wal.entries[before + 1 - self._wal.first_index :])

    def _tick(self, now: float) -> None:
        """A sole voter has nobody's acknowledgement to wait for: its engine would commit what is not on disk. So it
        does not tick while its log's end is beyond the durable index (fault 16)."""
        if not self._waits_for_disk():
            self._engine.tick()
            self._after_engine(now)

    def _waits_for_disk(self) -> bool:
        return self._sole_voter and self._wal.last_index > self._wal.durable_index

    def _after_engine(self, now: float) -> None:
        """The engine may have changed its term or its role in a call; what depended on the old ones ends here."""
        engine = self._engine
        if self._members_stale:
            self._apply_members()
        if engine.term != self._was_term:
            self._was_term = engine.term
            self._guard.term_changed()
            self._outbox.drop_other_terms(engine.term)
            self._reads.leader_lost()
        if engine.is_leader != self._was_leader:
            self._was_leader = engine.is_leader
            self._on_role_change(now)

    def _on_role_change(self, now: float) -> None:
        self._log.info("leads" if self._was_leader else "follows", term=self._engine.term)
        if not self._was_leader:
            self._elections.postpone(now)
            self._proposals.end("leadership was lost before the answer was known")
            self._reads.leadership_lost()
            self._changes.leadership_lost()
            self._replicas.leadership_lost()
        for member in self.members:
            self._replicas.connect(member.name)
        self.on_leadership(self._was_leader)

    def _after_sync(self, now: float) -> None:
        if self._sole_voter:
            # What is durable is committed; the tick says so, and takes no new proposal (there is none queued).
            if self._engine.is_leader and self._engine.commit_index < self._wal.durable_index:
                self._tick(now)
            return
        raised = self._guard.raise_acks()
        if raised:
            self._act(raised, now)
            self._tick(now)

    def _ask(self, now: float) -> None:
        """What has its own rhythm: read rounds, a hand-over, snapshots."""
        commit = self.committed
        self._reads.step(now, commit, self._wal.term_at(commit), self._transport.connected)
        if self._engine.is_leader:
            self._changes.step(now)
            self._replicas.step(now)

    def _send(self) -> None:
        if not len(self._outbox):
            return
        for peer, first_unsent in self._outbox.send_ready(self._wal.synced_position).items():
            self._replicas.took_no_more(peer, first_unsent)
        self._transport.flush()

    def _send_after(self, peer: str, message: Message) -> None:
        """Send once all that the message promises is on disk."""
        wal = self._wal
        if isinstance(message, (ReadAck, PreVoteReply, TermNotice)):
            self._outbox.add(peer, message, wal.term_position)  # they promise nothing about the log
            return
        if self._sync.running and isinstance(message, AppendReply) and message.success:
            # The disk is slow. What it holds already can be said at once, and is a sign of life.
            durable = AppendReply(message.term, min(message.next_index - 1, wal.durable_index) + 1, True)
            self._outbox.add(peer, durable, wal.term_position)
        self._outbox.add(peer, message, wal.position)

    def _send_now(self, peer: str, message: Message) -> None:
        """Send what promises nothing about the log."""
        self._outbox.add(peer, message, 0)

    def _emit(self, peer: str, m: dict[str, Any]) -> None:
        """What the engine would send. Its acknowledgements are the guard's to make; snapshots are ours."""
        kind = m["type"]
        needs = self._wal.position
        message: Message
        if kind == "append_entries":
            if "prevLogIdx" not in m:
                self._replicas.needs_snapshot(peer)
            elif not self._outbox.add_append(peer, m, needs if self._sole_voter else 0):
                self._replicas.pause(peer)
        elif kind == "request_vote":
            by_hand_over = self._elections.transfer_term == m["term"]
            message = messages.RequestVote(m["term"], m["last_log_index"], m["last_log_term"], by_hand_over)
            self._outbox.add(peer, message, needs)
        elif kind == "response_vote":
            self._elections.postpone(self._env.clock.monotonic())
            self._outbox.add(peer, VoteReply(m["term"]), needs)
        else:
            assert kind in ("next_node_idx", "apply_command"), kind

    def _apply(self) -> None:
        machine, wal = self.machine, self._wal
        applied, limit = machine.applied_index, self.committed
        if applied >= limit:
            return
        began = self._env.clock.monotonic()
        while applied < limit:
            payload, index, term = wal.entries[applied + 1 - wal.first_index]
            assert index == applied + 1
            try:
                result = machine.apply(index, term, EntryKind(payload[0]), memoryview(payload)[1:])
            except OSError:
                raise
            except StartupError as error:
                self._fail(error)  # the entry is of a newer version
                return
            except Exception as error:
                # A bug. To go on without the entry would make this replica differ.
                self._fail(InternalError(f"entry {index} of term {term} could not be applied: {error!r}"))
                return
            applied = index
            self._proposals.applied(index, term, result)
            if payload[0] == EntryKind.MEMBERS and not self._applied_members():
                return
            if applied < limit and self._env.clock.monotonic() > began + APPLY_SLICE_S:
                self._wake()
                break
        self._guard.applied_last = (machine.applied_term, applied)
        self._reads.applied(applied)
        self.apply_times.observe(self._env.clock.monotonic() - began)
        self.on_applied()

    # --- members ------------------------------------------------------------------------------------------------------

    def _on_members_changed(self) -> None:
        self._members_stale = True

    def _apply_members(self) -> None:
        """Find the configuration in force and give it to all who need it."""
        self._members_stale, self._identify_due = False, True
        at = self.machine.applied_term, self.machine.applied_index
        members, at = newest_configuration(self._wal.entries, self.machine.members, at, self.config.members)
        self._members = self._reads.members = self._changes.members = members
        self._roster.set_members(members, at)
        self._transport.identity = self._roster.own
        self._guard.set_members(members)
        self._sole_voter = members.voters == {self.config.name}
        self._engine.set_members(members.voters, members.learners)
        self._replicas.set_members(members.voters | members.learners)
        for member in members.members:
            self._replicas.connect(member.name)  # it may have been connected before it was a member
        self._guard.set_applied_members(self.machine.members, self.node_id)
        self._set_peers()

    def _applied_members(self) -> bool:
        """False if this node is to go: applied was one without it, after one with it, and no newer one has it again."""
        was_member = self._guard.was_member
        self._guard.set_applied_members(self.machine.members, self.node_id)
        if not was_member or self._guard.was_member or self._members.holds(self.config.name, self.node_id):
            return True
        self._on_removed()
        return False

    def _on_removed(self) -> None:
        self._fail(StartupError("this node was removed from the cluster", code="removed_from_cluster"))

    def _set_peers(self) -> None:
        if self._running and self._failure is None:
            self._transport.set_peers(self._roster.addresses())

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def snapshot_offered(self, peer: str, checkpoint: Checkpoint) -> KvError | None:
        """A peer would send us this; None welcomes it."""
        if not self._running or self._failure is not None or self._engine.is_leader:
            return Unavailable("this node takes no snapshot now", code="unavailable")
        return None

    def snapshot_held(self, checkpoint: Checkpoint) -> bool:
        """True where an install would bring nothing: the peer may go on from there as after one."""
        return self._running and self._failure is None and not self._engine.is_leader and self._holds(checkpoint)

    def snapshot_received(self, peer: str, checkpoint: Checkpoint, path: str, finish: Done) -> None:
        """A verified checkpoint lies in `path`: install it, unless the log has caught up with it meanwhile.

        The state is switched first, then the log is reset: a crash in between leaves a state that is ahead of its log,
        which `_reconcile` knows.
        """
        busy = self._sync.running or self._flush.running or self._snapshots.taking
        if not self._running or self._failure is not None or self._engine.is_leader or busy:
            finish(Unavailable("this node takes no snapshot now", code="unavailable"))
            return
        if not self._holds(checkpoint):
            self._log.info("installing a snapshot", index=checkpoint.index, term=checkpoint.term, sender=peer)
            try:
                self.machine.restore(path)
                self._state_directory.switch(path)
                self._wal.reset(checkpoint.index, checkpoint.term)
                self._wal.sync()
            except OSError as error:
                self._fail_storage(error)
                finish(self._failure)
                return
            except Exception as error:
                # The state may be closed by now: nothing can be applied or read here until a restart.
                self._fail(InternalError(f"the snapshot from {peer} cannot be opened: {error!r}", code="state_damaged"))
                finish(self._failure)
                return
            self._reads.fail_all()
            self._outbox.drop()
            self._build_engine()
            self._apply_members()
            for member in self.members:
                self._replicas.connect(member.name)
        finish(None)
        self._outbox.add(peer, AppendReply(self._engine.term, checkpoint.index + 1, True), self._wal.position)
        self._wake()

    def _holds(self, checkpoint: Checkpoint) -> bool:
        """A log that holds that entry, or has committed past it, loses by an install (fault 15)."""
        return self.committed >= checkpoint.index or self._wal.term_at(checkpoint.index) == checkpoint.term

    def _arm(self) -> None:
        """Wake again when the next thing is due."""
        leads = self._engine.is_leader
        parts = (self._changes, self._reads, self._replicas, self._outbox) if leads else (self._reads,)
        dues = [self._engine.next_heartbeat if leads else self._elections.deadline, *(part.due for part in parts)]
        if self._waits_for_disk():
            del dues[0]  # the sync that ends wakes it
        self._alarm.set(min((moment for moment in dues if moment is not None), default=math.inf))

    # --- endings ------------------------------------------------------------------------------------------------------

    def _refusal(self) -> KvError | None:
        if self._failure is not None:
            return Unavailable(self._failure.message, code="storage_failed")
        if not self._running:
            return Unavailable("this node is not running", code="shutting_down")
        return None

    def _fail_storage(self, error: BaseException) -> None:
        self._fail(
            Unavailable(
                f"this node's disk failed and it takes no writes: {error}. Free space or replace the disk, then "
                f"restart the node",
                code="storage_failed",
            )
        )

    def _fail(self, failure: KvError) -> None:
        """Go silent, so that another is elected. What was committed stays readable here, as a local read."""
        if self._failure is not None:
            return
        self._log.error("node stops taking part", code=failure.code, reason=failure.message)
        led, self._failure = self._engine.is_leader, failure
        self._proposals.end(failure.message)
        self._reads.fail_all()
        self._changes.leadership_lost()
        self._replicas.leadership_lost()
        self._transport.stop()
        if led:
            self.on_leadership(False)
        self.on_fatal(failure)
