"""Faults that lay a hand where chance alone seldom does: inside a start, inside an install, between two readings of a
clock, at two changes at once.

Each exists because a rule matters only there (`docs/raft.md` lists them), and a run of a minute would hardly ever get
there by itself. They are kinds of fault like all others (`faults.py`), chosen by the seed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, cast

import msgspec
from msgspec import Raw

from kvstore import codec
from kvstore.errors import KvError
from kvstore.model import Member, Range, RangeResult
from kvstore.raft import messages
from kvstore.raft.fsm import EntryKind

if TYPE_CHECKING:
    from kvstore.client.protocol import ClientProtocol
    from tests.simulation.machine import Machine
    from tests.simulation.world import World

RARE_FAULTS: dict[str, float] = {
    "echo": 1,
    "late request": 2,
    "stall": 2,
    "stop in its start": 1,
    "stop in an install": 1,
    "stop behind a rename": 1,
    "loss behind a removal": 1,
    "flip in a snapshot": 1,
    "hasty removal": 1,
    "rivals": 1,
    "needless snapshot": 1,
    "lonely leader": 4,
    "burst of reads": 2,
    "deposed and back": 5,
    "mute successor": 1,
    "junk message": 1,
    "cut in a revision": 2,
}
# Old requests of clients that may come again.
KEPT_REQUESTS = 16
# Time for an election or two, in which messages overtake those of other links.
ECHOES_S, ECHO_JITTER_S = 3.0, 0.3
# Longer than the others wait for a leader, shorter than this one waits for a quorum and an election.
MAROONED_S = 1.3
# A sync that runs in a thread, and how long disks stay slow after such a leader is back.
SLOW_SYNC_S, SLOW_AFTER_S = 0.2, 2.0
# How often somebody tries to make a deposed leader the leader again, and how many times.
CALL_BACK_S, CALL_BACKS_MAX = 0.03, 120
# Some hundred a second at each node, against writes of all clients.
BURST_READS, BURST_S = 600, 1.0
# What it heard before comes again within this time.
SLEEPS_S = 0.5
# What a node heard last.
KEPT_HEARD = 40
# A few that cannot be read, and a few that can; within a moment, in which the leader says true things as well.
JUNK_MESSAGES, JUNK_S = 12, 0.5
# An install is eight operations on files; a start is some twenty, and those of a first one are more.
INSTALL_OPERATIONS, START_OPERATIONS = 10, 40
# What a machine is up for that is to lose power again; the time until a removal's consequences are on the disk.
REPRIEVE_S, MOMENT_S = 1.0, 0.01
# Of so many readings of its clock, which are those of a few busy seconds, a process stalls at this share, for so long:
# the engine takes commands for 0.1 s of its clock in one tick.
STALL_READINGS, STALL_SHARE, STALL_S = 400, 0.02, 0.15
# Few revisions come in parts, to few clients.
CUTS = 3
# Well framed, and no message: not msgpack, cut short, no array, of no kind, of kinds that the engine alone knows, with
# fields of wrong types, too few, too many, or numbers that can be no index or term.
UNREADABLE: tuple[bytes, ...] = (
    b"\xc1",
    b"\xdc",
    b"\x91" * 3000,
    messages.encode(messages.AppendEntries(1, 1, 1, 1, ((1, b"\x01"),)))[:-1],
    *(
        msgspec.msgpack.encode(words)
        for words in (
            None,
            {"type": "apply_command", "command": b"\x00"},
            {"type": "append_entries", "transmission": "start", "data": b""},
            [],
            [0, 1],
            [99, 1, 1, 1],
            ["apply_command", b"\x00"],
            [b"apply_command_response", 1, None, 0],
            [1, 1, 1, 1, 1, "entries"],
            [1, 1, 1, 1, 1, [[1, 7]]],
            [1, "2", 1, 1, 1, []],
            [1, 1, 1, 1],
            [2, 1, 1, True, "more"],
            [2, 1, -1, True],
            [2, 1, 1 << 62, True],
            [2, 1 << 63, 1, True],
            [3, 1.5, 1, 1, False],
            [4, None],
            [7, [1]],
            [8, True],
            [10, 1],
        )
    ),
)


class _CutSinks:
    """In place of a client's own: once a stream is cut, nothing that had arrived behind the cut is delivered."""

    def __init__(self, sinks: Any, may_cut: Callable[[], bool]) -> None:
        self._sinks = sinks
        self._may_cut = may_cut
        self._is_cut = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sinks, name)

    def deliver(self, frame: codec.ServerFrame) -> bool:
        if self._is_cut:
            return True
        is_known: bool = self._sinks.deliver(frame)
        self._is_cut = isinstance(frame, codec.WatchEvents) and frame.more and self._may_cut()
        return is_known


class RareFaults:
    """The part of `Nemesis` that they are; what they need of it stands first."""

    world: World
    chance: Random
    kinds: list[str]
    _task: asyncio.Task[None] | None
    _stops: dict[str, str]

    def _tell(self, event: str, **fields: Any) -> None:
        raise NotImplementedError

    def _victim(self) -> Machine | None:
        raise NotImplementedError

    def _some_time_s(self) -> float:
        raise NotImplementedError

    def _boot(self, machine: Machine) -> None:
        raise NotImplementedError

    def _stop_soon(self, victim: Machine, operations_max: int, kind: str) -> None:
        raise NotImplementedError

    def _struck(self, kind: str) -> None:
        raise NotImplementedError

    def _again(self, sender: str, receiver: str, body: bytes) -> None:
        raise NotImplementedError

    def _may_break(self, victim: Machine) -> bool:
        raise NotImplementedError

    def _replaced(self, victim: Machine) -> None:
        raise NotImplementedError

    def __init__(self) -> None:
        self._echoes_until_s = 0.0
        self._requests: list[codec.Write] = []
        self._flips_due = 0
        self._doomed: set[str] = set()  # machines that lose power soon after they are up again
        self._stops_due: dict[str, int] = {}  # machine -> after how many operations its next start stops
        self._ghosts = 0
        self._revision_read = 0  # the newest that a read of a burst has shown
        self._heard: dict[str, deque[tuple[str, bytes]]] = {}
        self._cuts_due = 0  # of streams in the middle of a revision that is watched

    def booted_rare(self, machine: Machine) -> None:
        """A process is up: listen where a fault of this run needs it."""
        if machine.name in self._doomed:
            self._doomed.discard(machine.name)
            self.world.later(REPRIEVE_S * self.chance.random(), self._lose_power, machine)
        if "echo" in self.kinds or "deposed and back" in self.kinds:
            self._listen_for_messages(machine)
        if {"late request", "deposed and back", "lonely leader"} & set(self.kinds):
            self._listen_for_requests(machine)
        if "flip in a snapshot" in self.kinds:
            self._listen_for_snapshots(machine)

    # --- again --------------------------------------------------------------------------------------------------------

    def _echo(self) -> None:
        """For a while, messages between nodes take more or less long and arrive twice, one shortly after the other; the
        leader is cut off, so that the others elect another meanwhile."""
        world, until_s = self.world, self.world.time.now_s + ECHOES_S
        self._echoes_until_s = until_s
        self._tell("messages arrive twice", until_s=f"{until_s:.2f}")
        names = list(world.machines)
        for here in names:
            for there in names:
                if here != there:
                    world.network.set_link(here, there, jitter_s=ECHO_JITTER_S)
                    world.later(ECHOES_S, world.network.clear_link, here, there)
        leader = world.leader()
        if leader is not None:
            self._maroon(leader, ECHOES_S, 0)

    def _listen_for_messages(self, machine: Machine) -> None:
        assert machine.node is not None
        raft: Any = machine.node.raft
        received, world, name = raft.received, self.world, machine.name
        heard = self._heard[name] = deque(maxlen=KEPT_HEARD)

        def hearing(sender: str, body: bytes) -> None:
            received(sender, body)
            heard.append((sender, body))
            if world.time.now_s < self._echoes_until_s and self.chance.random() < 0.5:
                world.later(0.003 * self.chance.random(), self._again, sender, name, body)

        raft.received = hearing

    def _late_request(self) -> bool:
        """A copy of a mutation that was in the log before, or may have been, comes to the leader now; nobody waits for
        its answer. (One that was refused for good must not come again: its client knows that it has no effect.)"""
        leader = self.world.leader()
        if leader is None or leader.process is None or leader.node is None or not self._requests:
            return False
        frame = self.chance.choice(self._requests)
        self._tell("an old request comes again", name=leader.name, session=frame.session, seq=frame.seq)
        leader.process.run(leader.node.handle, frame, lambda _answer: None)
        return True

    def _listen_for_requests(self, machine: Machine) -> None:
        assert machine.node is not None
        door: Any = machine.node.door
        if door is None:
            return
        handle, kept = door.handle, self._requests

        def handling(frame: codec.ClientFrame, reply: Callable[[codec.ServerFrame], None], *rest: Any) -> None:
            def answered(answer: codec.ServerFrame) -> None:
                reply(answer)
                if isinstance(answer, codec.Answer) or getattr(answer, "code", "") == "outcome_unknown":
                    kept.append(write)
                    if len(kept) > KEPT_REQUESTS:
                        del kept[self.chance.randrange(KEPT_REQUESTS)]

            if type(frame) is codec.Write and frame.session:
                write = frame
                handle(frame, answered, *rest)
            else:
                handle(frame, reply, *rest)

        door.handle = handling

    # --- a leader that is deposed -------------------------------------------------------------------------------------

    def _lonely_leader(self) -> bool:
        """The leader is cut off from all other nodes, or all but one, but not from clients: what it takes meanwhile
        nobody may ever have."""
        leader = self.world.leader()
        if leader is None:
            return False
        self._maroon(leader, self._some_time_s(), self.chance.choice([0, 1, 1]))
        return True

    def _maroon(self, leader: Machine, for_s: float, with_it: int) -> list[str]:
        """Gives those that are cut off with it."""
        world = self.world
        others = [name for name in world.machines if name != leader.name]
        company = self.chance.sample(others, with_it if len(others) > 2 else 0)
        here = [leader.name, *company]
        pairs = [(one, other) for one in here for other in others if other not in company]
        self._tell("the leader is cut off from nodes", name=leader.name, company=company)
        for one, other in pairs:
            world.network.cut(one, other)

        marooned = [world.machines[name] for name in here]
        slow = self.chance.random() < 0.5
        restart = not slow and self.chance.random() < 0.7
        if self.chance.random() < 0.5 and leader.process is not None and leader.node is not None:
            # A change of the configuration that is in its log alone.
            self._ghosts += 1
            ghost = Member(f"ghost{self._ghosts}", "127.0.1.9:7410", "127.0.1.9:7420", f"{self._ghosts}", voter=False)
            leader.process.run(leader.node.raft.add_learner, ghost, lambda _error: None)
        if self.chance.random() < 0.5:
            self._propose_many(leader, 1)
        for machine in marooned if slow else []:
            machine.files.sync_takes = lambda: SLOW_SYNC_S * self.chance.random()

        def heal() -> None:
            self._tell("the leader is back", name=leader.name)
            for one, other in pairs:
                world.network.uncut(one, other)
                world.network.break_streams(one, other)  # else it takes seconds until they notice, and dial again
            for machine in marooned if restart else []:
                # It forgets what it knew to be committed.
                if machine.is_up and not world.is_over:
                    machine.kill()
                    world.later(0.05, self._boot, machine)

        def fast() -> None:
            for machine in marooned:
                machine.files.sync_takes = None

        if self.chance.random() < 0.5:
            # Others lead one after the other meanwhile: where the last one's log begins to differ lies further back.
            world.later((0.3 + 0.6 * self.chance.random()) * for_s, self._hand_over_among_others, leader)
        world.later(for_s, heal)
        if slow:
            world.later(for_s + SLOW_AFTER_S, fast)
        return company

    def _hand_over_among_others(self, marooned: Machine) -> None:
        leader = self.world.leader()
        if leader is not None and leader is not marooned and leader.process is not None and leader.node is not None:
            leader.process.run(leader.node.raft.transfer, "", lambda _error: None)

    def _propose_many(self, leader: Machine, times: int) -> None:
        """Entries one by one, more than the batcher would have under way, copies of requests that came before."""
        process, node = leader.process, leader.node
        if process is None or node is None:
            return
        raft: Any = node.raft
        for frame in self._requests * times:
            item = codec.RawBatchItem(frame.session, frame.seq, frame.acked_below, frame.request)
            entry = codec.encode_batch(0, [item])  # log time stays as it is
            self.world.later(0.3 * self.chance.random(), process.run, raft.propose, entry, lambda _result, _error: None)

    def _deposed_and_back(self) -> bool:
        """A leader that is cut off with one other takes many requests, is deposed, comes back, and is made the leader
        again at once; and then it hears again what it was answered in its first time, while the other sleeps."""
        world, leader = self.world, self.world.leader()
        if leader is None or leader.process is None or leader.node is None or len(world.machines) < 4:
            return False
        company = self._maroon(leader, MAROONED_S, 1)
        self._propose_many(leader, 4)
        name, old = leader.name, []

        def collect() -> None:
            old.extend((sender, body) for sender, body in self._heard.get(name, ()))

        def call_back(tries: int) -> None:
            successor = world.leader()
            if successor is leader or tries == 0 or world.is_over:
                return
            raft: Any = successor.node.raft if successor is not None and successor.node is not None else None
            if successor is not None and successor.process is not None and raft is not None and name in raft.alive():
                successor.process.run(raft.transfer, name, lambda _error: None)
            world.later(CALL_BACK_S, call_back, tries - 1)

        def again(machine: Machine) -> None:
            if machine is leader:
                for sleeper in company:
                    if sleeper in world.machines:
                        world.machines[sleeper].block(SLEEPS_S)
                for sender, body in old:
                    world.later(SLEEPS_S * self.chance.random(), self._again, sender, name, body)

        world.later(MAROONED_S * 0.9, collect)
        world.later(MAROONED_S + CALL_BACK_S, call_back, CALL_BACKS_MAX)
        world.later(MAROONED_S, world.ambush, "leads", again)
        self._tell("deposed, and called back", name=name)
        return True

    def _mute_successor(self) -> bool:
        """Leadership is handed to a node that hears, and is not heard: it raises its term alone."""
        world, leader = self.world, self.world.leader()
        others = [machine for machine in world.machines.values() if machine.is_up and machine is not leader]
        if leader is None or leader.process is None or leader.node is None or not others:
            return False
        name = self.chance.choice(others).name
        names = [other for other in world.machines if other != name]
        self._tell("leadership goes to one that is not heard", name=leader.name, to=name)
        for other in names:
            world.network.cut(name, other, one_way=True)
        raft: Any = leader.node.raft
        leader.process.run(raft.transfer, name, lambda _error: None)

        def heal() -> None:
            for other in names:
                world.network.uncut(name, other, one_way=True)
                world.network.break_streams(name, other)  # what it said is lost, not late

        world.later(0.5 + self.chance.random(), heal)
        return True

    # --- what no node of ours says ------------------------------------------------------------------------------------

    def _junk_message(self) -> bool:
        """A node gets messages over its connection with a peer, often the leader, that no peer sends: what cannot be
        read, and appends that no leader makes. They must change nothing. (Forged acknowledgements, votes and terms are
        not among them: a peer that says with its own name what could be true is believed.)"""
        world = self.world
        sender = self._victim()
        others = [machine for machine in world.machines.values() if machine.is_up and machine is not sender]
        if sender is None or not others:
            return False
        receiver = self.chance.choice(others)
        self._tell("junk", sender=sender.name, to=receiver.name, messages=JUNK_MESSAGES)
        for _ in range(JUNK_MESSAGES):
            world.later(JUNK_S * self.chance.random(), self._send_junk, sender, receiver)
        return True

    def _send_junk(self, sender: Machine, receiver: Machine) -> None:
        if sender.process is None or sender.node is None or receiver.node is None or self.world.is_over:
            return
        theirs, ours = cast("Any", sender.node.raft), cast("Any", receiver.node.raft)
        if self.chance.random() < 0.5:
            body = self.chance.choice(UNREADABLE)
        else:
            wal = ours._wal
            body = messages.encode(self._forged(max(theirs._engine.term, 1), wal.last_index, wal.last_term))
        # Not by the node's own `transport.send`, at which its promises are judged: this is none of its own.
        transport = theirs._transport
        sender.process.run(type(transport).send, transport, receiver.name, body)

    def _forged(self, term: int, last_index: int, last_term: int) -> messages.AppendEntries:
        """An append behind the receiver's last entry, in the sender's term, with an entry that no leader makes."""
        chance = self.chance
        good = (term, bytes([EntryKind.NOOP]))
        entries = chance.choice(
            [
                [(term, b"")],
                *([(term, bytes([kind]) + b"junk")] for kind in (0, 2, 3, 255)),
                [good, (term, b"\x00command")],
                [(term, bytes([EntryKind.MEMBERS]) + b"\xc1")],
                [(term + 1, good[1])],  # of a later term than its leader's
                [good, (max(term - 1, 0), good[1])],  # of an earlier one than the entry before it
            ]
        )
        return messages.AppendEntries(term, last_index + chance.randrange(3), last_index, last_term, tuple(entries))

    # --- watches ------------------------------------------------------------------------------------------------------

    def _cut_in_a_revision(self) -> bool:
        """The next clients that get a part of a watched revision lose the stream, and with it the other parts."""
        self._cuts_due += CUTS
        return False

    def opened(self, host: str, protocol: ClientProtocol) -> None:
        """A client is connected: listen where a fault of this run needs it."""
        if "cut in a revision" not in self.kinds:
            return
        sinks: Any = protocol._sinks
        protocol._sinks = cast("Any", _CutSinks(sinks, lambda: self._may_cut(host, protocol)))

    def _may_cut(self, host: str, protocol: ClientProtocol) -> bool:
        if not self._cuts_due or self.world.is_over:
            return False
        self._cuts_due -= 1
        self._tell("cut in a revision", client=host)
        self._struck("cut in a revision")
        protocol.close("cut in a revision")
        return True

    # --- many reads ---------------------------------------------------------------------------------------------------

    def _burst_of_reads(self) -> None:
        """For a moment, linearizable reads at every node, many of them at a time: one that begins when another has
        ended must not see an older revision."""
        self._tell("many reads")
        for _ in range(BURST_READS):
            self.world.later(BURST_S * self.chance.random(), self._read_somewhere)

    def _read_somewhere(self) -> None:
        world = self.world
        up = [
            machine for machine in world.machines.values() if machine.process is not None and machine.node is not None
        ]
        if not up:
            return
        machine, least = self.chance.choice(up), self._revision_read
        assert machine.process is not None
        assert machine.node is not None

        def answered(answer: codec.ServerFrame) -> None:
            result = codec.decode_result(answer.result) if isinstance(answer, codec.Answer) else None
            if isinstance(result, RangeResult):
                if result.revision < least:
                    message = f"a read at {machine.name} gave revision {result.revision}, and began after one had given"
                    world.violation("linearizable reads", f"{message} {least}")
                self._revision_read = max(self._revision_read, result.revision)

        frame = codec.Read(0, codec.ReadLevel.LINEARIZABLE, 0, Raw(codec.encode_request(Range(b"probe"))))
        machine.process.run(machine.node.handle, frame, answered)

    # --- in the middle of something -----------------------------------------------------------------------------------

    def _stall(self) -> bool:
        """For a while, the process stands still now and then between two readings of its clock, within a turn."""
        victim = self._victim()
        if victim is None:
            return False
        victim.clock.stalls(STALL_READINGS, STALL_SHARE, STALL_S)
        self._tell("stalls now and then", name=victim.name, readings=STALL_READINGS)
        return True

    def _stop_in_its_start(self) -> bool:
        """A node dies, and dies again while it starts."""
        victim = self._victim()
        if victim is None:
            return False
        self._stops_due[victim.name] = self.chance.randrange(START_OPERATIONS)
        if self.chance.random() < 0.5:
            victim.lose_power()
        else:
            victim.kill()
        self.world.later(self._some_time_s(), self._boot, victim)
        return False

    def booting(self, machine: Machine) -> None:
        """A process is about to start."""
        operations = self._stops_due.pop(machine.name, None)
        if operations is None and "stop in its start" in self.kinds and not machine.files.exists("/data/META"):
            operations = self.chance.randrange(START_OPERATIONS)  # a new machine's first start
        if operations is None or self.world.is_over or self._task is None:
            return
        machine.stops_by_power_loss = self.chance.random() < 0.6
        self._stops[machine.name] = "stop in its start"
        self._tell("will stop in a file operation of its start", name=machine.name, operations=operations)
        machine.files.stop_after = machine.files.operation_count + operations

    def _stop_in_an_install(self) -> bool:
        """Whoever installs the next snapshot stops in the middle of it."""
        self._tell("lies in ambush", moment="installing a snapshot", how="stop inside")
        kind = "stop in an install"
        self.world.ambush("installing a snapshot", lambda machine: self._stop_soon(machine, INSTALL_OPERATIONS, kind))
        return False

    def _stop_behind_a_rename(self) -> bool:
        """A process dies between a rename and the sync of its directory, is up again at once, and finds the new name;
        soon after, the machine loses power, and may lose the name."""

        def lie_in_wait(machine: Machine) -> None:
            def renamed(path: str) -> None:
                machine.files.on_renamed = None
                if self.world.is_over:
                    return
                self._tell("stops behind a rename", name=machine.name, path=path)
                self._struck("stop behind a rename")
                machine.stops_by_power_loss = False
                machine.files.stop_after = machine.files.operation_count
                self._doomed.add(machine.name)

            machine.files.on_renamed = renamed

        if self.chance.random() < 0.3:
            victim = self._victim()
            if victim is None:
                return False
            lie_in_wait(victim)
        else:
            self.world.ambush("installing a snapshot", lie_in_wait)
        return False

    def _loss_behind_a_removal(self) -> bool:
        """A machine loses power when it has just removed a segment of its log."""
        victim = self._victim()
        if victim is None:
            return False

        def removed(path: str) -> None:
            if path.endswith(".wal") and not self.world.is_over:
                victim.files.on_removed = None
                self._struck("loss behind a removal")
                self.world.later(MOMENT_S * self.chance.random(), self._lose_power, victim)

        victim.files.on_removed = removed
        return False

    def _lose_power(self, machine: Machine) -> None:
        if machine.is_up and not self.world.is_over:
            machine.lose_power()
            self.world.later(self._some_time_s(), self._boot, machine)

    def _flip_in_a_snapshot(self) -> bool:
        """A bit of the next snapshot that is received rots before it is read back."""
        self._flips_due += 1
        return False

    def _listen_for_snapshots(self, machine: Machine) -> None:
        assert machine.node is not None
        receiver: Any = machine.node.raft._snapshots._receiver  # type: ignore[attr-defined]
        verify = receiver._verify

        def verifying(partial: Any) -> list[int]:
            if self._flips_due:
                self._flips_due -= 1
                self._flip_received(machine, partial)
                self._struck("flip in a snapshot")
            bad: list[int] = verify(partial)
            return bad

        receiver._verify = verifying

    def _flip_received(self, machine: Machine, partial: Any) -> None:
        sizes = [info.size_bytes for info in partial.offer.files]
        number = self.chance.choices(range(len(sizes)), sizes)[0]
        path, offset = f"{partial.path}/{partial.offer.files[number].name}", self.chance.randrange(sizes[number])
        self._tell("a bit of a received snapshot flips", name=machine.name, path=path, offset=offset)
        file = machine.files.open(path)
        (byte,) = file.read_at(offset, 1)
        file.write_at(offset, [bytes([byte ^ 1 << self.chance.randrange(8)])])
        file.close()

    # --- the operators ------------------------------------------------------------------------------------------------

    def _hasty_removal(self) -> bool:
        """A disk is lost, and somebody removes a member that lives, by mistake, before the lost one is replaced."""
        world = self.world
        victim = self._victim()
        if victim is None or not self._may_break(victim):
            return False
        self._tell("the disk is lost", name=victim.name)
        victim.kill()
        victim.wipe()
        victim.expected_failures.add("node_identity_changed")
        if self.chance.random() < 0.5:
            victim.boot()
        # A leader notices within an election timeout; before that, it is the operator's misfortune.
        world.later(1.5, self._remove_one_that_lives)
        world.later(3.5 + self._some_time_s(), self._replaced, victim)
        return True

    def _remove_one_that_lives(self) -> None:
        world = self.world
        living = [machine for machine in world.machines.values() if machine.is_up and not machine.is_removed]
        if living and not world.operator.is_busy and not world.is_over:
            world.operator.begin("leave", self.chance.choice(living).name)

    def _rivals(self) -> bool:
        """Two people change the configuration at the same time: each adds a learner that there is no machine for, and
        removes it again."""
        if self.world.operator.client.revision == 0:
            return False
        self._ghosts += 2
        names = [f"ghost{self._ghosts - 1}", f"ghost{self._ghosts}"]
        self._tell("two change the configuration at once", names=names)
        self.world.spawn(self._haunt(names))
        return True

    async def _haunt(self, names: list[str]) -> None:
        client, world = self.world.operator.client, self.world
        await asyncio.gather(
            *(
                client.member_add(name, f"127.0.1.{number}:7410", f"127.0.1.{number}:7420", name, world.cluster_id)
                for number, name in enumerate(names, 1)
            ),
            return_exceptions=True,
        )
        for name in names:
            try:
                await client.member_remove(name)
            except KvError as error:
                world.story.tell("operator", "ghost not removed", name=name, code=error.code)

    def _needless_snapshot(self) -> bool:
        """A leader takes a follower for one that needs a snapshot, though it needs none."""
        leader = self.world.leader()
        if leader is None or leader.process is None or leader.node is None:
            return False
        raft: Any = leader.node.raft
        others = [member.name for member in raft.members if member.name != leader.name]
        if not others:
            return False
        peer = self.chance.choice(others)
        self._tell("takes a peer for one that needs a snapshot", name=leader.name, peer=peer)

        def want() -> None:
            if raft.is_leader:
                raft._replicas.needs_snapshot(peer)
                raft._wake()

        leader.process.run(want)
        return True
