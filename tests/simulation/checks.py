"""What must hold after every step of a simulated cluster. `RULES` lists it; a test shows of each that it can fail.

`Checks` is told when a process has started (`booted`), after each callback of its code (`observe`), when it is gone
(`crashed`), and when all is over (`at_end`). It raises `Violation` from these, and from nowhere else.

- `watch.py` listens to one process, so that nothing escapes between two callbacks;
- `ledger.py` holds the truth about the whole run: entries, leaders, votes, commits, results;
- `answers.py` judges exactly-once, entry by entry;
- `conduct.py` judges what it does to the others, beyond safety;
- `disk_log.py` reads what a node's log would be after a power loss from the fake disk itself.

What it takes from the product is the log in memory, the engine's state, what is sent and what is applied. What it never
takes is a claim about durability or about the configuration: those it finds out by itself.

An `observe` after which nothing has changed costs a few attribute reads; an entry costs O(its size) on each node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvstore.raft.node import RaftNode
from tests.simulation import conduct
from tests.simulation.answers import Answers
from tests.simulation.conduct import Conduct
from tests.simulation.disk_log import DurableLog
from tests.simulation.ledger import Broken, Ledger, describe_members, shortened, text
from tests.simulation.outcome import Violation
from tests.simulation.watch import Watch

if TYPE_CHECKING:
    from kvstore.raft.members import Configuration
    from tests.simulation.machine import Machine
    from tests.simulation.world import World

RULES = {
    "election safety": "a term has one leader at most, and the votes of a majority made it one",
    "one vote": "a node, known by the id of its disk, votes for one candidate in a term, over all restarts",
    "terms": "a node's term never goes back",
    "log matching": "an entry of one index and term has the same payload and the same entries before it on every node; "
    "only the leader of its term makes it, once",
    "leader append-only": "a leader removes nothing from its log",
    "leader completeness": "a leader holds all that is committed; a vote goes to no log that is older than the voter's",
    "no needless truncation": "what matches the leader's log, or a snapshot, is not removed",
    "commit safety": "what is committed stays so; a leader commits by counting only in its own term; nobody takes for "
    "committed what no leader has committed",
    "commit durability": "a commit is on the disks of a majority of the voters at that moment, by the disks themselves",
    "promises are durable": "votes, terms and acknowledgements are on the disk before a peer is told of them",
    "acknowledged is proven": "what a node acknowledges is what its leader has there; what a leader believes of a peer "
    "in its term is on that peer's disk",
    "nothing durable is lost": "a restart finds the term, the vote and the entries that were on the disk",
    "state machine safety": "what a node applies, or installs, is what is committed there, each entry as it was made",
    "replicas equal": "an entry has the same results on every node; after the same entry all have the same state",
    "exactly once": "a request of a session executes once; its repetitions get the same answer",
    "log time": "log time never goes back, nor runs more than 1 % ahead of real time, whatever clocks say",
    "answers": "a result is given to the entry that was proposed; what was refused for good is never made",
    "linearizable reads": "a read passes when all is applied that was acknowledged before it was asked",
    "configuration": "a node and its engine work with the newest configuration of its log; one change at a time, "
    "of one voter at most",
    "node stopped": "no node stops taking part but for a fault that was injected, or its removal",
    "whole at the end": "once all is healed, every member has applied the same, and all that was acknowledged",
    **conduct.RULES,
}

# The first node to reach a digest makes the next one due so much later: some microseconds an entry where a state has a
# thousand records.
DIGEST_ENTRIES = 128
_REMOVED = "removed_from_cluster"


class Checks:
    """One for each `World`. Public for reports: `ledger`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ledger = Ledger(world.counts)
        self.answers = Answers()
        self.watches: dict[str, Watch] = {}  # by machine name; of processes that are gone, too
        self._disks: dict[str, DurableLog] = {}  # by node id
        self._newest: dict[str, str] = {}  # name -> node id of the last node of that name
        self._next_digest = DIGEST_ENTRIES
        self._found: Violation | None = None

    # --- called by the world ------------------------------------------------------------------------------------------

    def booted(self, machine: Machine) -> None:
        """A process has started on this machine. May be called late or twice."""
        watch = self.watches.get(machine.name)
        if machine.node is None or (watch is not None and watch.node is machine.node):
            return
        if watch is not None and watch.alive:
            self._gone(watch)
        raft: Any = machine.node.raft
        assert isinstance(raft, RaftNode)
        name, node_id = raft.config.name, raft.node_id
        disk = self._disks.get(node_id)
        if disk is None:
            disk = DurableLog(machine.files, f"{raft._data_dir}/wal", name, node_id, self._found_on_disk)
            self._disks[node_id] = disk
        disk.is_frozen = False
        self._newest[name] = node_id
        watch = self.watches[machine.name] = Watch(self, machine, machine.node, raft, disk)
        try:
            watch.begin()
            Conduct(watch)
        except Broken as broken:
            self.note(broken)
        self._raise_found()

    def observe(self, machine: Machine) -> None:
        """A callback of this machine's code is over."""
        if self._found is not None:
            raise self._found
        watch = self.watches.get(machine.name)
        if watch is None or watch.node is not machine.node:
            if machine.node is None:
                return
            self.booted(machine)
            watch = self.watches[machine.name]
        raft = watch.raft
        if raft._failure is not watch.failure_seen:
            self._check_failure(watch)
        if raft._members is not watch.members_seen or watch.core._SyncObj__otherNodes is not watch.voting_seen:
            try:
                watch.check_members()
            except Broken as broken:
                self.note(broken)
            self._raise_found()

    def crashed(self, machine: Machine) -> None:
        """The process on this machine is gone, however it ended; its disk is as the process left it."""
        watch = self.watches.get(machine.name)
        if watch is not None and watch.alive:
            self._gone(watch)
        self._raise_found()

    def at_end(self) -> None:
        """All is healed and quiet."""
        self._raise_found()
        try:
            self._check_end()
        except Broken as broken:
            self.note(broken)
        self._raise_found()

    def is_in_doubt(self, machine: Machine, path: str, offset_bytes: int) -> bool:
        """Would damage at this place of the disk of a machine that is down be taken for a torn tail?"""
        watch = self.watches.get(machine.name)
        return watch is not None and watch.disk.is_in_doubt(path, offset_bytes)

    def uncommitted_configurations(self) -> list[Configuration]:
        """Those on any member's disk past the newest committed one, whether its process lives or not."""
        found: list[Configuration] = []
        try:
            for node_id in self._newest.values():
                found += self._disks[node_id].configurations_after(self.ledger.configuration_index)
        except Broken as broken:
            self.note(broken)
        self._raise_found()
        return found

    # --- called by watches --------------------------------------------------------------------------------------------

    def note(self, broken: Broken) -> None:
        """Keep the first violation until the product's code is left."""
        if self._found is None:
            message = "\n".join([broken.message, *self._entries_at(broken.at), *self._nodes_at(broken.at)])
            self._found = Violation(broken.rule, message)

    def leader_of(self, term: int) -> Watch | None:
        """The process that leads this term, if it still does."""
        for watch in self.watches.values():
            if watch.alive and watch.led_term == term and watch.engine.is_leader and watch.engine.term == term:
                return watch
        return None

    def watch_of(self, name: str) -> Watch | None:
        """The living process of the member of this name."""
        for watch in self.watches.values():
            if watch.alive and watch.name == name:
                return watch
        return None

    def disk_of(self, name: str, node_id: str) -> DurableLog | None:
        return self._disks.get(node_id or self._newest.get(name, ""))

    def newest_id(self, name: str) -> str:
        return self._newest.get(name, "")

    def committed(self, by: Watch, index: int) -> None:
        """A leader has committed further. One that was elected after it must hold that already."""
        term = self.ledger.committed[index]
        for watch in self.watches.values():
            if watch.alive and watch.led_term > by.led_term and watch.engine.is_leader:
                held = watch.wal.term_at(index)
                if held != term and index >= watch.wal.first_index:
                    message = f"{by.name} commits entry {index} of term {term}; {watch.name}, leader of the later term"
                    message = f"{message} {watch.led_term}, holds {held} there"
                    raise Broken("leader completeness", message, index)

    def is_digest_due(self, index: int) -> bool:
        if index >= self._next_digest:
            self._next_digest = index + DIGEST_ENTRIES
            return True
        return index in self.ledger.digests

    # --- inside -------------------------------------------------------------------------------------------------------

    def _raise_found(self) -> None:
        if self._found is not None:
            raise self._found

    def _gone(self, watch: Watch) -> None:
        watch.alive = False
        disk, wal = watch.disk, watch.wal
        try:
            disk.refresh()
        except Broken as broken:
            self.note(broken)
        disk.is_frozen = True
        # What the disk and the memory agree on can only have been added to: whatever becomes of what is not synced,
        # the next process finds it.
        index = min(disk.last, wal.last_index)
        while index >= max(disk.first, wal.first_index, 1) and disk.term_at(index) != wal.term_at(index):
            index -= 1
        term = disk.term_at(index)
        disk.must_hold = (index, term) if index and term is not None else None

    def _found_on_disk(self, index: int, term: int, payload: bytes) -> None:
        known = self.ledger.entries.get((index, term))
        if known is None or known[0] != payload:
            told = "nothing" if known is None else text(known[0])
            message = f"entry {index} of term {term} is on a disk as {text(payload)}, and was made as {told}"
            raise Broken("log matching", message, index)

    def _check_failure(self, watch: Watch) -> None:
        watch.failure_seen = failure = watch.raft._failure
        if failure is None:
            return
        expected: set[str] = getattr(watch.machine, "expected_failures", set())
        if failure.code == _REMOVED:
            # It may not have heard that it was taken in again.
            knows = watch.node_id not in self.ledger.removed or watch.configuration().holds(watch.name, watch.node_id)
            if knows and self.ledger.is_member(watch.name, watch.node_id):
                message = f"{watch.name} takes itself for removed, and is a member: {failure.message}"
                self.note(Broken("node stopped", message, self.ledger.configuration_index))
        elif failure.code not in expected:
            self.note(Broken("node stopped", f"{watch.name} takes no part any more: {failure.code}: {failure.message}"))
        self._raise_found()

    def _check_end(self) -> None:
        ledger = self.ledger
        applied: dict[str, int] = {}
        for machine in self.world.machines.values():
            watch = self.watches.get(machine.name)
            if watch is None or not ledger.is_member(watch.name, watch.node_id):
                continue
            if not watch.alive or watch.raft.failure is not None:
                raise Broken("whole at the end", f"{watch.name} is a member, and takes no part")
            applied[watch.name] = watch.raft.machine.applied_index
        indexes = sorted(set(applied.values()))
        if len(indexes) != 1:
            raise Broken("whole at the end", f"members have applied differently far: {applied}", *indexes)
        if indexes[0] < ledger.acknowledged:
            message = f"all members have applied up to {indexes[0]}; {ledger.acknowledged} was acknowledged"
            raise Broken("whole at the end", message, ledger.acknowledged)
        for watch in self.watches.values():
            if watch.alive and watch.name in applied:
                watch.digest(watch.raft.machine, indexes[0])

    # --- telling ------------------------------------------------------------------------------------------------------

    def _entries_at(self, indexes: tuple[int, ...]) -> list[str]:
        """All entries that were ever made at these places."""
        lines = []
        for index in sorted(set(indexes)):
            terms = sorted(term for at, term in self.ledger.entries if at == index)
            for term in terms:
                committed = "  committed" if self.ledger.is_committed(index, term) else ""
                payload = self.ledger.entries[index, term][0]
                lines.append(f"    entry {index} of term {term}: {shortened(text(payload))}{committed}")
        return lines

    def _nodes_at(self, indexes: tuple[int, ...]) -> list[str]:
        """One line for each node that ever was: where it stands, and what it has at these places."""
        lines = []
        for watch in self.watches.values():
            raft, wal, disk = watch.raft, watch.wal, watch.disk
            role = "down" if not watch.alive else "leader" if watch.engine.is_leader else "follower"
            if watch.alive and raft._failure is not None:
                role = f"failed ({raft._failure.code})"
            held = "".join(
                f"; at {index} {_term(wal.term_at(index), disk.term_at(index))}" for index in sorted(set(indexes))
            )
            lines.append(
                f"    {watch.name} {role}, term {watch.engine.term}, log {wal.first_index} to {wal.last_index} "
                f"(on disk {disk.first} to {disk.last}), commit {raft.committed}, applied {raft.machine.applied_index}"
                f"{held}"
            )
        if self.ledger.configuration is not None:
            lines.append(f"    committed configuration: {describe_members(self.ledger.configuration)}")
        return lines


def _term(in_memory: int | None, on_disk: int | None) -> str:
    told = "nothing" if in_memory is None else f"term {in_memory}"
    if on_disk == in_memory:
        return told
    return f"{told} (on disk {'nothing' if on_disk is None else f'term {on_disk}'})"
