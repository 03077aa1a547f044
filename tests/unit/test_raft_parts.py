"""Parts of a node alone: the roster, the alarm, and who gets a snapshot when."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import msgspec
import pytest

from kvstore.env import Environment
from kvstore.errors import KvError, Unavailable
from kvstore.model import Member
from kvstore.raft.alarm import SOONEST_S, Alarm
from kvstore.raft.config import RaftConfig
from kvstore.raft.fsm import Checkpoint
from kvstore.raft.members import Configuration
from kvstore.raft.messages import Message, ReadProbe
from kvstore.raft.replicas import RETRY_S, Replicas
from kvstore.raft.roster import Roster, own_identity
from kvstore.raft.transport import Identity
from tests.fake_files import FaultyFiles
from tests.fake_network import FakeNetwork, VirtualTime
from tests.raft_fixtures import Lines


def environment(time: VirtualTime) -> Environment:
    return Environment(time, random.Random(1), time, FakeNetwork(time).host("a"), FaultyFiles())


# --- roster -----------------------------------------------------------------------------------------------------------


def identity(name: str, node_id: str, address: str = "") -> Identity:
    return Identity("cluster", name, node_id, address or f"{name}:1")


def roster(*members: Member) -> Roster:
    made = Roster(identity("a", "id-a"))
    made.set_members(Configuration.of(members), (2, 10))
    return made


def test_only_a_known_name_with_another_node_id_is_refused() -> None:
    known = roster(Member("b", "b:1", "", "id-b", True), Member("c", "c:1", "", "", True))
    assert known.judge(identity("b", "id-b")) is None
    assert known.judge(identity("c", "whichever")) is None  # not recorded yet
    assert known.judge(identity("d", "id-d")) is None  # may be newer than our log
    refusal = known.judge(identity("b", "another"))
    assert refusal is not None
    assert refusal[0] == "node_identity_changed"
    assert "kvstore leave b" in refusal[1]


def test_one_that_joined_anew_under_a_known_name_is_let_in_by_a_node_that_was_away() -> None:
    """Else a node that missed the replacement would refuse the leader that alone can tell it."""
    known = roster(Member("b", "b:1", "", "id-b", True))
    replaced = identity("b", "another", "moved:1")
    for member_at, is_let_in in (((0, 0), False), ((1, 99), False), ((2, 10), False), ((2, 11), True), ((3, 1), True)):
        assert (known.judge(msgspec.structs.replace(replaced, member_at=member_at)) is None) == is_let_in
    known.note(msgspec.structs.replace(replaced, member_at=(2, 11)))
    assert known.addresses() == {"b": "moved:1"}  # it must be answered
    known.set_members(Configuration.of([Member("b", "b:2", "", "id-b", True)]), (3, 12))
    assert known.addresses() == {"b": "b:2"}  # the newer configuration has not heard of it


def test_a_node_says_where_in_the_log_it_became_a_member() -> None:
    known = roster(Member("a", "a:1", "", "id-a", True))
    assert known.own.member_at == (2, 10)
    known.set_members(Configuration.of([Member("a", "a:1", "", "", True)]), (2, 11))
    assert known.own.member_at == (0, 0)  # its id is not recorded: this may be another's name
    known.set_members(Configuration.of([Member("a", "a:1", "", "id-before", True)]), (2, 12))
    assert known.own.member_at == (0, 0)


def test_what_a_node_says_of_itself_is_news_once() -> None:
    known = roster()
    assert known.note(identity("b", "id-b"))
    assert not known.note(identity("b", "id-b"))
    assert known.note(identity("b", "id-b", "moved:1"))
    assert known.seen["b"] == Member("b", "moved:1", "", "id-b", False)


def test_a_node_is_dialled_where_it_last_said_it_is() -> None:
    known = roster(Member("a", "a:1", "", "id-a", True), Member("b", "b:1", "", "id-b", True))
    assert known.addresses() == {"b": "b:1"}
    known.note(identity("b", "id-b", "moved:1"))
    known.note(identity("d", "id-d"))  # no member yet, and answered all the same
    assert known.addresses() == {"b": "moved:1", "d": "d:1"}
    known.set_members(Configuration.of([Member("b", "new:1", "", "id-new", False)]), (2, 11))
    assert known.addresses()["b"] == "new:1"  # the one that said otherwise is another node


def test_a_node_says_the_address_that_others_reach_it_at() -> None:
    config = RaftConfig(name="a", cluster_id="cluster", listen_address="0.0.0.0:1", client_address="x:2", members=())
    assert own_identity(config, "id-a") == Identity("cluster", "a", "id-a", "0.0.0.0:1", "x:2")
    reached = RaftConfig(name="a", cluster_id="cluster", listen_address="0.0.0.0:1", peer_address="x:1", members=())
    assert own_identity(reached, "id-a").peer_address == "x:1"


# --- alarm ------------------------------------------------------------------------------------------------------------


def woken_at(set_all: Callable[[Alarm], None]) -> list[float]:
    """When an alarm that is set at 0 rings within 10 s."""
    time, rung = VirtualTime(), []
    alarm = Alarm(environment(time), lambda: rung.append(time.now_s))
    set_all(alarm)
    time.advance(10.0)
    return rung


def set_to(*dues: float) -> Callable[[Alarm], None]:
    def set_all(alarm: Alarm) -> None:
        for due in dues:
            alarm.set(due)

    return set_all


def test_an_alarm_rings_once_at_the_earliest_moment() -> None:
    assert woken_at(set_to(3.0)) == [3.0]
    assert woken_at(set_to(3.0, 5.0)) == [3.0]
    assert woken_at(set_to(3.0, 2.0)) == [2.0]
    assert woken_at(set_to(3.0, math.inf)) == [3.0]
    assert woken_at(set_to(math.inf, 3.0)) == [3.0]


def test_an_alarm_rings_never_where_there_is_no_need() -> None:
    assert woken_at(set_to()) == woken_at(set_to(math.inf)) == []

    def cancelled(alarm: Alarm) -> None:
        alarm.set(3.0)
        alarm.cancel()

    assert woken_at(cancelled) == []


def test_an_overdue_alarm_does_not_spin() -> None:
    assert woken_at(set_to(-1.0)) == [SOONEST_S]


# --- replicas ---------------------------------------------------------------------------------------------------------


class FakeEngine:
    term = 1
    is_leader = True

    def __init__(self) -> None:
        self.next: dict[str, int] = {}
        self.match: dict[str, int] = {}
        self.connected: set[str] = set()

    def match_index(self, peer: str) -> int:
        return self.match.get(peer, 0)

    def next_index(self, peer: str) -> int:
        return self.next.get(peer, 1)

    def set_next_index(self, peer: str, index: int) -> None:
        self.next[peer] = index

    def set_connected(self, peer: str, connected: bool) -> None:
        if connected:
            self.connected.add(peer)
        else:
            self.connected.discard(peer)


class FakeTransport:
    def __init__(self) -> None:
        self.gone: set[str] = set()

    def connected(self, peer: str) -> bool:
        return peer not in self.gone


class FakeSnapshots:
    """Begins what it is told, and ends it when the test says so."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.cancelled: list[str] = []
        self.finish: Callable[[KvError | None, Checkpoint | None], None]

    def send(self, peer: str, done: Callable[[KvError | None, Checkpoint | None], None]) -> None:
        self.begun.append(peer)
        self.finish = done

    def cancel(self, peer: str) -> None:
        self.cancelled.append(peer)

    def cancel_all(self) -> None:
        """Nothing of these tests is under way then."""


class World:
    """A leader's `Replicas`, with one peer `b` whose log ends before ours begins."""

    def __init__(self) -> None:
        self.time = VirtualTime()
        self.engine = FakeEngine()
        self.transport = FakeTransport()
        self.snapshots = FakeSnapshots()
        self.said: list[tuple[str, Message]] = []
        self.replicas = Replicas(
            self.engine,
            environment(self.time),
            self.transport,
            self.snapshots,
            lambda peer, message: self.said.append((peer, message)),
            lambda: None,
            Lines(),
            heartbeat_s=0.1,
        )
        self.replicas.connect("b")

    def ask(self) -> None:
        """What the engine does while it takes the peer for connected."""
        if "b" in self.engine.connected:
            self.replicas.needs_snapshot("b")
        self.replicas.step(self.time.now_s)

    def refused(self) -> World:
        self.ask()
        self.snapshots.finish(Unavailable("the disk is full", code="unavailable"), None)
        return self


def test_a_refused_snapshot_is_begun_again_after_a_pause() -> None:
    world = World().refused()
    while world.time.now_s < RETRY_S - 0.1:
        world.ask()
        assert "b" not in world.engine.connected
        world.time.advance(0.1)
    assert world.snapshots.begun == ["b"]
    assert len(world.said) >= RETRY_S / 0.1 - 5  # signs of life
    assert set(world.said) == {("b", ReadProbe(1, 0))}
    world.time.advance(0.2)
    world.ask()
    assert world.snapshots.begun == ["b", "b"]


def test_a_snapshot_that_this_node_cancelled_is_begun_again_at_once() -> None:
    """One that leads anew before the pause is over would let its peer wait for nothing."""
    world = World()
    world.ask()
    world.snapshots.finish(Unavailable("the snapshot was cancelled", code="closed"), None)
    world.ask()
    assert world.snapshots.begun == ["b", "b"]


def test_a_peer_that_waits_for_its_pause_to_end_stays_due() -> None:
    world = World().refused()
    world.ask()
    assert world.snapshots.begun == ["b"]
    assert world.replicas.due is not None
    world.replicas.up("b")  # a new connection changes nothing about that
    assert "b" not in world.engine.connected


def test_a_snapshot_that_arrived_ends_the_pauses() -> None:
    world = World().refused()
    world.time.advance(RETRY_S)
    world.ask()
    world.snapshots.finish(None, Checkpoint(50, 1, b""))
    assert world.engine.next == {"b": 51}
    assert world.engine.connected == {"b"}
    assert world.replicas.due is None
    world.ask()
    assert world.snapshots.begun == ["b", "b", "b"]  # the next time it is needed, at once


def test_the_log_stays_for_who_receives_a_snapshot_until_it_has_what_follows() -> None:
    world = World()
    assert world.replicas.needed(90) == 90
    world.ask()
    assert world.replicas.needed(90) == 0
    world.snapshots.finish(None, Checkpoint(50, 1, b""))
    assert world.replicas.needed(90) == 0, "it has not said yet what it holds"
    world.engine.match["b"] = 60
    assert world.replicas.needed(90) == 60
    world.engine.match["b"] = 110
    assert world.replicas.needed(110) == 110
    world.engine.match["b"] = 0  # what becomes of it now is no matter of that snapshot
    assert world.replicas.needed(120) == 120


@pytest.mark.parametrize("how", ["away", "removed", "leads no more", "lacks what is gone"])
def test_the_log_does_not_stay_for_a_peer_that_does_not_follow(how: str) -> None:
    world = World()
    world.ask()
    world.snapshots.finish(None, Checkpoint(50, 1, b""))
    if how == "away":
        world.transport.gone.add("b")
    elif how == "removed":
        world.replicas.set_members({"c"})
    elif how == "leads no more":
        world.replicas.leadership_lost()
    else:  # and it cannot take the next snapshot
        world.ask()
        world.snapshots.finish(Unavailable("the disk is full", code="unavailable"), None)
    assert world.replicas.needed(90) == 90


def test_a_member_that_left_leaves_no_pause_behind() -> None:
    world = World().refused()
    world.ask()
    world.replicas.set_members({"c"})
    assert world.replicas.due is None
    world.replicas.set_members({"b", "c"})
    world.replicas.connect("b")
    world.ask()
    assert world.snapshots.begun == ["b", "b"]


def test_a_member_that_leaves_while_it_receives_is_cancelled() -> None:
    world = World()
    world.ask()
    world.replicas.set_members({"c"})
    assert world.snapshots.cancelled == ["b"]
