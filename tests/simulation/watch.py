"""One process of a node under the checks' eyes: hears of each change as it happens, and holds it against the ledger.

`Watch` puts a listener in front of a few methods of the node's own objects, none of which it changes otherwise:

    the log        append, truncate_from, reset, set_term      what enters and leaves it
    the engine     tick, deliver, deliver_ack, adopt_term      leadership and commit, after each of its steps
    the transport  send                                        what is promised to others, and whether the disk has it
    the machine    apply, restore, checkpoint                  what becomes state
    the node       propose_entry, read_index, _build_engine    what doors are told

So a state that lasts for a moment within one callback is judged too, and a callback that changes nothing costs nothing.
The product must not see a violation (it would take it for a bug of its own and stop the node): it is noted with the
checks, which raise it as soon as the callback is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvstore.errors import KvError, OutcomeUnknown
from kvstore.model import Checkpoint
from kvstore.raft import messages
from kvstore.raft.engine import Engine
from kvstore.raft.fsm import EntryKind
from kvstore.raft.members import Configuration
from kvstore.raft.messages import AppendReply, ReadAck, RequestVote, VoteReply
from kvstore.raft.node import RaftNode
from kvstore.raft.wal_format import RESET_PAYLOAD
from kvstore.state.machine import Machine as StoreMachine
from tests.simulation.disk_log import DurableLog
from tests.simulation.ledger import Broken, check_change, describe_members, text

if TYPE_CHECKING:
    from tests.simulation.checks import Checks

_LEADER = 2
_MEMBERS, _DATA = int(EntryKind.MEMBERS), int(EntryKind.DATA)
# The second byte of a message is its tag. These promise something: AppendReply, RequestVote, VoteReply, ReadAck.
_PROMISES = frozenset({2, 3, 4, 10})


class Watch:
    """From the moment that the node has started until its process is gone (`alive`)."""

    def __init__(self, checks: Checks, machine: Any, node: Any, raft: RaftNode, disk: DurableLog) -> None:
        self.checks = checks
        self.ledger = checks.ledger
        self.machine = machine
        self.node = node
        self.raft = raft
        self.disk = disk
        self.name = raft.config.name
        self.node_id = raft.node_id
        self.alive = True
        self.wal = raft._wal
        self.entries = raft._wal.entries  # always this same list
        self.engine: Engine
        self.core: Any  # the engine's own object
        self.led_term = 0  # the last term that it led in
        self.engine_commit = 0
        self.commit = 0
        self.members_seen: Configuration | None = None  # what was last found right
        self.before_tick: Configuration | None = None  # in force as the engine's tick began that is under way
        self.voting_seen: object = None
        self.changes: list[tuple[int, Configuration]] = []  # MEMBERS entries in the log
        self.failure_seen: KvError | None = None
        self._refused: dict[int, bytes] = {}  # entries that were surely not proposed, by id()

    def begin(self) -> None:
        """Judge what the node starts with, and listen from now on."""
        try:
            self._check_log_at_start()
            self._check_disk_at_start()
            self._check_state_at_start()
        finally:
            self._listen_to_log()
            self._listen_to_engine()
            self._listen_to_transport()
            self._listen_to_machine()
            self._listen_to_node()
            self.stepped()

    def _judge(self, check: Callable[..., None], *args: Any) -> None:
        try:
            check(*args)
        except Broken as broken:
            self.checks.note(broken)

    # --- at the start -------------------------------------------------------------------------------------------------

    def _check_log_at_start(self) -> None:
        previous_term: int | None = None
        committed, known = self.ledger.committed, self.ledger.entries
        for payload, index, term in self.entries:
            if previous_term is None and payload == RESET_PAYLOAD:
                # It stands for a snapshot; what the entry held is not in this log.
                self.ledger.check_applied(self.name, index, term)
            elif (index, term) not in known:
                message = f"{self.name} starts with entry {index} of term {term}, which no leader ever made"
                raise Broken("log matching", f"{message}: {text(payload)}", index)
            else:
                self.ledger.appended(self.name, payload, index, term, previous_term)
            if payload[0] == _MEMBERS:
                self.changes.append((index, Configuration.decode(payload[1:])))
            previous_term = term
        assert len(committed) > 1

    def _check_disk_at_start(self) -> None:
        """What was on the disk at the end of the last process is in the log that the new one read."""
        disk, wal = self.disk, self.wal
        if wal.term < disk.term or (wal.term == disk.term and disk.voted_for not in (None, wal.voted_for)):
            was, now = (disk.term, disk.voted_for), (wal.term, wal.voted_for)
            raise Broken(
                "nothing durable is lost", f"{self.name} had term and vote {was} on its disk, and starts with {now}"
            )
        must_hold, disk.must_hold = disk.must_hold, None
        if must_hold is not None:
            index, term = must_hold
            if wal.term_at(index) != term and not self._may_miss(index, term):
                message = f"entry {index} of term {term} was on the disk of {self.name}, and is not in its log after a"
                raise Broken("nothing durable is lost", f"{message} restart", index)
        disk.refresh()
        disk.removals_made = disk.removals

    def _check_state_at_start(self) -> None:
        """The state is that after a committed entry, where the log goes on; no more than that counts as committed."""
        machine, wal = self.raft.machine, self.wal
        applied, term = machine.applied_index, machine.applied_term
        self.ledger.check_applied(self.name, applied, term)
        if applied and wal.term_at(applied) != term:
            message = f"the state of {self.name} ends with entry {applied} of term {term}; its log has"
            raise Broken("state machine safety", f"{message} {wal.term_at(applied)} there", applied)
        if committed_at_start := self.raft.committed:  # 0: a sole voter whose disk holds nothing yet
            self.ledger.check_follower_commit(self.name, committed_at_start, wal.term_at(committed_at_start))

    def _may_miss(self, index: int, term: int) -> bool:
        """An entry that the state covers, or that conflicts with what is committed, need not be in the log any more."""
        ledger = self.ledger
        if self.raft.machine.applied_index >= index and ledger.is_committed(index, term):
            return True
        upto = min(index, ledger.commit)
        held = self.disk.term_at(upto)
        return held is not None and held != ledger.committed[upto]

    # --- the log ------------------------------------------------------------------------------------------------------

    def _listen_to_log(self) -> None:
        wal: Any = self.wal
        append, truncate, reset, set_term = wal.append, wal.truncate_from, wal.reset, wal.set_term

        def appending(payload: bytes, index: int, term: int) -> None:
            append(payload, index, term)
            self._judge(self.appended, payload, index, term)

        def truncating(index: int) -> None:
            if self.entries and index <= self.entries[-1][1]:
                self._judge(self.truncating, index)
            truncate(index)

        def resetting(index: int, term: int) -> None:
            self._judge(self.resetting, index, term)
            reset(index, term)

        def setting_term(term: int, voted_for: str | None) -> None:
            self._judge(self.setting_term, term, voted_for)
            set_term(term, voted_for)

        wal.append, wal.truncate_from, wal.reset, wal.set_term = appending, truncating, resetting, setting_term

    def appended(self, payload: bytes, index: int, term: int) -> None:
        entries = self.entries
        previous_term = entries[-2][2] if len(entries) > 1 else None
        if self.core._SyncObj__raftState == _LEADER:
            if self.led_term != self.core._SyncObj__raftCurrentTerm:
                self._elected(before=index)  # this is its first entry, made in the act
            if term != self.led_term:
                raise Broken(
                    "log matching", f"{self.name} leads term {self.led_term} and makes an entry of {term}", index
                )
            if self._refused and id(payload) in self._refused:
                raise Broken("answers", f"{self.name} refused entry {index} for good, and makes it all the same", index)
            if self.ledger.appended(self.name, payload, index, term, previous_term):
                raise Broken("log matching", f"{self.name} makes entry {index} of term {term} a second time", index)
            if payload[0] == _MEMBERS and self.wal.term_at(self.raft.committed) != term:
                message = f"{self.name} makes configuration {index} before it has committed anything in its term {term}"
                raise Broken("configuration", message, index)
            if payload[0] == _MEMBERS and self.changes and self.changes[-1][0] > self.raft.committed:
                message = f"{self.name} makes configuration {index} while {self.changes[-1][0]} is not committed"
                raise Broken("configuration", message, self.changes[-1][0], index)
        elif not self.ledger.appended(self.name, payload, index, term, previous_term):
            message = f"{self.name} takes entry {index} of term {term}, which no leader ever made: {text(payload)}"
            raise Broken("log matching", message, index)
        if payload[0] == _MEMBERS:
            # One that joins begins with the cluster's present configuration, and then hears of how it came about.
            has_joined = bool(self.changes or self.raft.machine.members)
            before, after = self.configuration(), Configuration.decode(payload[1:])
            if self.core._SyncObj__raftState == _LEADER and not after.is_voter(self.name):
                message = f"{self.name} leads, and makes configuration {index} without itself"
                raise Broken("configuration", message, index)
            self.changes.append((index, after))
            self.members_seen = None
            if has_joined or self.core._SyncObj__raftState == _LEADER:
                check_change(self.name, before, after, index)

    def truncating(self, index: int) -> None:
        self.disk.removals_made += 1
        self._forget_changes(index)
        if self.core._SyncObj__raftState == _LEADER:
            raise Broken("leader append-only", f"{self.name} leads, and removes its log from entry {index} on", index)
        own = self.wal.term_at(index)
        if own is not None and self.ledger.is_committed(index, own):
            raise Broken("commit safety", f"{self.name} removes entry {index} of term {own}, which is committed", index)
        if index <= max(self.commit, self.raft.machine.applied_index):
            message = f"{self.name} removes entry {index}, having taken {self.commit} for committed"
            raise Broken("commit safety", f"{message} and applied {self.raft.machine.applied_index}", index)
        leader = self.checks.leader_of(self.core._SyncObj__raftCurrentTerm)
        if leader is not None and own is not None and leader.wal.term_at(index) == own:
            message = f"{self.name} removes entry {index} of term {own}, which its leader {leader.name} holds too"
            raise Broken("no needless truncation", message, index)

    def resetting(self, index: int, term: int) -> None:
        """A snapshot was installed."""
        self.disk.removals_made += 1
        self.changes.clear()
        self.members_seen = None
        wal = self.wal
        if self.core._SyncObj__raftState == _LEADER:
            raise Broken(
                "leader append-only", f"{self.name} leads, and replaces its log by a snapshot at {index}", index
            )
        if index < self.commit:
            raise Broken(
                "commit safety", f"{self.name} goes back from entry {self.commit} to {index} by a snapshot", index
            )
        if wal.term_at(index) == term and wal.last_index > index:
            message = (
                f"{self.name} drops entries {index + 1} to {wal.last_index} for a snapshot of entry {index}, which it"
            )
            raise Broken("no needless truncation", f"{message} holds", index, wal.last_index)
        self.ledger.check_applied(self.name, index, term)

    def _forget_changes(self, index: int) -> None:
        while self.changes and self.changes[-1][0] >= index:
            self.changes.pop()
            self.members_seen = None

    def setting_term(self, term: int, voted_for: str | None) -> None:
        wal = self.wal
        if term < wal.term:
            raise Broken("terms", f"{self.name} goes back from term {wal.term} to {term}")
        if term == wal.term and wal.voted_for not in (None, voted_for):
            raise Broken("one vote", f"{self.name} voted for {wal.voted_for} in term {term}, and now for {voted_for}")

    # --- the engine ---------------------------------------------------------------------------------------------------

    def _listen_to_engine(self) -> None:
        engine: Any = self.raft._engine
        self.engine, self.core = engine, engine._o
        self.engine_commit = 0
        self.commit = self.raft.committed
        tick, deliver, adopt_term, stepped = engine.tick, engine.deliver, engine.adopt_term, self.stepped
        deliver_ack = engine.deliver_ack
        matched: dict[str, tuple[int, int]] = {}  # peer -> (term led, index): what was looked at last

        def ticking(*, campaign: bool = False) -> None:
            self.before_tick = self.configuration()
            tick(campaign=campaign)
            stepped()
            self.before_tick = None

        def delivering(peer: str, message: dict[str, Any]) -> None:
            deliver(peer, message)
            stepped()

        def delivering_ack(peer: str, next_index: int, success: bool, is_news: bool = True) -> None:
            deliver_ack(peer, next_index, success, is_news)
            match = (self.led_term, engine.match_index(peer))
            if match != matched.get(peer):
                matched[peer] = match
                self._judge(self.matches, peer, match[1])

        def adopting(term: int) -> None:
            adopt_term(term)
            stepped()

        engine.tick, engine.deliver, engine.deliver_ack = ticking, delivering, delivering_ack
        engine.adopt_term = adopting

    def stepped(self) -> None:
        """The engine did something: did it become leader, has it committed?"""
        core = self.core
        if core._SyncObj__raftState == _LEADER and self.led_term != core._SyncObj__raftCurrentTerm:
            self._judge(self._elected)
        if core._SyncObj__raftCommitIndex != self.engine_commit:
            self.engine_commit = core._SyncObj__raftCommitIndex
            self._judge(self.commit_moved)

    def _elected(self, before: int = 0) -> None:
        """`before`: an entry of its own term that is in its log already."""
        ledger, term = self.ledger, self.core._SyncObj__raftCurrentTerm
        self.led_term = term
        ledger.elected(self.name, self.node_id, term)
        if self.raft._elections.transfer_term == term:
            ledger.counts.hand_overs += 1
        configuration = self.configuration()
        votes = [self.name] if configuration.is_voter(self.name) else []
        for member in configuration.members:
            if member.voter and member.name != self.name:
                node_id = member.node_id or self.checks.newest_id(member.name)
                if ledger.votes.get((node_id, term)) == self.name:
                    votes.append(member.name)
        if len(votes) < configuration.quorum:
            message = f"{self.name} became leader of term {term} with the votes of {votes} in configuration"
            raise Broken("election safety", f"{message} {describe_members(configuration)}")
        # What was committed in a later term, by votes that came sooner than this one's, it need not hold.
        index, wal = ledger.committed_before(term), self.wal
        last = before - 1 if before else wal.last_index
        if last < index or (index >= wal.first_index and wal.term_at(index) != ledger.committed[index]):
            held = wal.term_at(index) if index <= last else None
            message = (
                f"{self.name} became leader of term {term} without entry {index} of term {ledger.committed[index]}"
            )
            raise Broken("leader completeness", f"{message}, which is committed; it holds {held} there", index)

    def commit_moved(self) -> None:
        """What this node takes for committed may have changed."""
        commit = self.raft.committed
        if commit in (self.commit, 0):
            return  # 0: a sole voter whose disk holds nothing yet
        if commit < self.commit:
            raise Broken("commit safety", f"{self.name} takes back its commit from {self.commit} to {commit}", commit)
        self.commit = commit
        ledger, term = self.ledger, self.wal.term_at(commit)
        # It may have stepped down in the same step, after it committed.
        if commit > ledger.commit and self.led_term == self.core._SyncObj__raftCurrentTerm:
            self._check_quorum(commit, term)
            ledger.commits(self.entries, commit, self.led_term)
            self.checks.committed(self, commit)
        ledger.check_follower_commit(self.name, commit, term)

    def _check_quorum(self, commit: int, term: int | None) -> None:
        """A leader commits: is that on the disks of a majority, at this moment?"""
        if term is None or self.wal.first_index > self.ledger.commit + 1:
            raise Broken("commit safety", f"{self.name} commits entry {commit}, which it does not hold", commit)
        configuration = self.configuration()
        if self.before_tick is not None and self.changes and self.changes[-1][0] > commit:
            # A leader that makes a configuration in the same tick counted with the one before. What a majority of that
            # holds is safe: a majority of either shares a voter with it.
            configuration = self.before_tick
        voters = [member for member in configuration.members if member.voter]
        if term != self.led_term and len(voters) > 1:
            message = f"{self.name} commits entry {commit} of term {term} by counting, in its term {self.led_term}"
            raise Broken("commit safety", f"{message} (figure 8 of the Raft paper)", commit)
        holders = []
        for member in voters:
            disk = self.checks.disk_of(member.name, member.node_id)
            if disk is not None and disk.holds(commit, term):
                holders.append(member.name)
        if 2 * len(holders) <= len(voters):
            message = f"{self.name} commits entry {commit} of term {term}, which is on the disks of {holders} only"
            raise Broken("commit durability", f"{message}; voters are {describe_members(configuration)}", commit)

    def matches(self, peer: str, index: int) -> None:
        """A leader believes that a peer holds its log up to here. A peer that has gone on to a later term may have
        removed it since: that leader will not get its majority. One that has not holds it on its disk."""
        term, member = self.wal.term_at(index), self.configuration().get(peer)
        if term is None or member is None or self.core._SyncObj__raftState != _LEADER:
            return
        disk, there = self.checks.disk_of(peer, member.node_id), self.checks.watch_of(peer)
        if disk is None or (disk.term if there is None else there.wal.term) > self.led_term:
            return
        if not disk.holds(index, term):
            message = f"{self.name} believes that {peer} holds entry {index} of term {term}, which its disk does not"
            raise Broken("acknowledged is proven", message, index)

    # --- what it promises ---------------------------------------------------------------------------------------------

    def _listen_to_transport(self) -> None:
        transport: Any = self.raft._transport
        send = transport.send
        last: tuple[str, bytes, int] = ("", b"", 0)

        def sending(peer: str, body: bytes) -> bool:
            nonlocal last
            if body[1] in _PROMISES and last != (said := (peer, body, self.disk.removals_made)):
                last = said  # the answers to heartbeats are all the same
                self._judge(self.promising, peer, messages.decode(body))
            return send(peer, body)  # type: ignore[no-any-return]

        transport.send = sending

    def promising(self, peer: str, message: messages.Message) -> None:
        """It is about to say this to a peer."""
        disk, term = self.disk, message.term
        if isinstance(message, RequestVote | VoteReply):
            candidate = peer if isinstance(message, VoteReply) else self.name
            self.ledger.voted(self.name, self.node_id, term, candidate)
            if disk.term < term or (disk.term == term and disk.voted_for != candidate):
                disk.refresh()
            if disk.term < term or (disk.term == term and disk.voted_for != candidate):
                message_text = f"{self.name} tells of its vote for {candidate} in term {term}; on its disk stands"
                raise Broken("promises are durable", f"{message_text} {disk.voted_for} in term {disk.term}")
            if isinstance(message, VoteReply):
                self._check_up_to_date(peer, term)
            return
        if disk.term < term:
            disk.refresh()
            if disk.term < term:
                told = f"{self.name} answers {peer} in term {term}; on its disk is term {disk.term}"
                raise Broken("promises are durable", told)
        if isinstance(message, AppendReply) and message.success:
            self._check_acknowledged(peer, term, message.next_index - 1)
        else:
            assert isinstance(message, AppendReply | ReadAck)

    def _check_acknowledged(self, peer: str, term: int, index: int) -> None:
        held = self.disk.reaches(index)
        if held is None:
            message = f"{self.name} acknowledges up to entry {index} to {peer}; its disk holds up to {self.disk.last}"
            raise Broken("promises are durable", message, index)
        leader = self.checks.leader_of(term)
        if held and leader is not None and index >= leader.wal.first_index and leader.wal.term_at(index) != held:
            message = f"{self.name} acknowledges entry {index}, which is of term {held} on its disk; its leader"
            raise Broken("acknowledged is proven", f"{message} {leader.name} has {leader.wal.term_at(index)}", index)

    def _check_up_to_date(self, candidate: str, term: int) -> None:
        asking = self.checks.watch_of(candidate)
        if asking is None or not asking.engine.is_candidate or asking.engine.term != term:
            return
        if self.wal.last_term == term:
            return  # the vote waited for the disk; meanwhile another was elected, whose entries came after it
        theirs, ours = (asking.wal.last_term, asking.wal.last_index), (self.wal.last_term, self.wal.last_index)
        if theirs < ours:
            message = (
                f"{self.name} (last term and index {ours}) votes in term {term} for {candidate}, which ends at {theirs}"
            )
            raise Broken("leader completeness", message, ours[1])

    # --- state --------------------------------------------------------------------------------------------------------

    def _listen_to_machine(self) -> None:
        """`Machine` has slots, so its methods cannot be covered one by one: it becomes an instance of a subclass that
        differs in nothing but that it tells."""
        watch = self
        machine: Any = self.raft.machine
        plain: Any = type(machine)
        is_store = isinstance(machine, StoreMachine)

        class Watched(plain):  # type: ignore[misc]
            __slots__ = ()

            def apply(self, index: int, term: int, kind: EntryKind, payload: Any) -> Any:
                watch._judge(watch.applying, index, term, kind, payload)
                result = plain.apply(self, index, term, kind, payload)
                watch._judge(watch.applied, self, index, kind, payload, result, is_store)
                return result

            def restore(self, path: str) -> None:
                plain.restore(self, path)
                watch._judge(watch.restored, self)

            def checkpoint(self, path: str) -> Checkpoint:
                made: Checkpoint = plain.checkpoint(self, path)
                if made.index == self.applied_index:
                    watch._judge(watch.digest, self, made.index)
                return made

        machine.__class__ = Watched

    def applying(self, index: int, term: int, kind: EntryKind, payload: Any) -> None:
        if index > self.ledger.commit:
            self.commit_moved()  # a sole voter's moves with its disk, without its engine
        self.ledger.check_applied(self.name, index, term)
        whole: Any = payload.obj if isinstance(payload, memoryview) else bytes([kind]) + payload
        known = self.ledger.entries[index, term][0]
        if whole is not known and whole != known:
            message = f"{self.name} applies {text(whole)} as entry {index} of term {term}, which is {text(known)}"
            raise Broken("state machine safety", message, index)

    def applied(self, machine: Any, index: int, kind: EntryKind, payload: Any, result: Any, is_store: bool) -> None:
        if not self.ledger.has_applied(self.name, index, result) and is_store and kind == _DATA:
            self.checks.answers.applied(index, payload, result)
            self.ledger.stamped(self.name, index, machine.log_time_ms, self.checks.world.time.now_s)
        if self.checks.is_digest_due(index):
            self.digest(machine, index)

    def restored(self, machine: Any) -> None:
        self.ledger.counts.snapshot_installs += 1
        self.ledger.check_applied(self.name, machine.applied_index, machine.applied_term)
        self.digest(machine, machine.applied_index)

    def digest(self, machine: Any, index: int) -> None:
        if hasattr(machine, "digest"):
            self.ledger.digested(self.name, index, machine.digest())

    # --- what doors are told ------------------------------------------------------------------------------------------

    def _listen_to_node(self) -> None:
        raft: Any = self.raft
        propose, read_index, build_engine = raft.propose_entry, raft.read_index, raft._build_engine

        def proposing(entry: bytes, done: Callable[[Any, KvError | None], None]) -> None:
            def answered(result: Any, error: KvError | None) -> None:
                self._judge(self.answered, entry, result, error)
                done(result, error)

            propose(entry, answered)

        def reading(done: Callable[[KvError | None], None]) -> None:
            needed = self.ledger.acknowledged

            def passed(error: KvError | None) -> None:
                if error is None and raft.machine.applied_index < needed:
                    self._judge(self.read_too_early, needed)
                done(error)

            read_index(passed)

        def building() -> None:
            build_engine()
            self._listen_to_engine()
            self.stepped()

        raft.propose_entry, raft.read_index, raft._build_engine = proposing, reading, building

    def answered(self, entry: bytes, result: Any, error: KvError | None) -> None:
        """A door hears what became of an entry that it proposed here."""
        if error is None:
            ledger, index = self.ledger, self.raft.machine.applied_index
            ledger.acknowledged = max(ledger.acknowledged, index)
            committed = ledger.committed[index] if index <= ledger.commit else None
            known = ledger.entries.get((index, committed)) if committed is not None else None
            if known is None or (known[0] is not entry and known[0] != entry):
                message = f"{self.name} answers a request as entry {index}, which is another one"
                raise Broken("answers", f"{message}: proposed was {text(entry)}", index)
            ledger.has_applied(self.name, index, result)
        elif not isinstance(error, OutcomeUnknown):
            # Surely not in the log, and never to be: the entry is kept here, so that its id is not used again.
            self._refused[id(entry)] = entry
            if any(held[0] is entry for held in self.entries[-16:]):
                raise Broken("answers", f"{self.name} refuses an entry for good that is in its log: {text(entry)}")

    def read_too_early(self, needed: int) -> None:
        applied = self.raft.machine.applied_index
        message = f"{self.name} lets a read pass at entry {applied}; {needed} had been acknowledged before it was asked"
        raise Broken("linearizable reads", message, needed)

    # --- the configuration --------------------------------------------------------------------------------------------

    def configuration(self) -> Configuration:
        """In force, by the node's own log and state: the newest, committed or not."""
        first = self.entries[0][1] if self.entries else 0
        if self.changes and self.changes[-1][0] >= first:
            return self.changes[-1][1]
        members = self.raft.machine.members
        return Configuration.decode(members) if members else Configuration.of(self.raft.config.members)

    def check_members(self) -> None:
        """After a callback in which something of this may have changed."""
        raft, core = self.raft, self.core
        self.members_seen, self.voting_seen = raft._members, core._SyncObj__otherNodes
        due = self.configuration()
        if raft._members.members != due.members:
            message = f"{self.name} works with {describe_members(raft._members)}; its log says {describe_members(due)}"
            raise Broken("configuration", message)
        voting = {node.id for node in core._SyncObj__otherNodes}
        learning = {node.id for node in core._SyncObj__readonlyNodes}
        if voting != due.voters - {self.name} or learning != due.learners - {self.name}:
            message = f"the engine of {self.name} has voters {sorted(voting)} and learners {sorted(learning)}"
            raise Broken("configuration", f"{message} beside itself; its log says {describe_members(due)}")
