"""Faults 8, 9 and 10 of pysyncobj 0.3.17: commands that raise, reads, and what the network may say. Stock fails, ours
holds."""

from __future__ import annotations

import asyncio
import logging
import pickle
import socket
import struct
import zlib
from typing import Any

import pysyncobj.pickle
import pytest
from pysyncobj.poller import POLL_EVENT_TYPE
from pysyncobj.tcp_connection import CONNECTION_STATE, TcpConnection

from kvstore.errors import InternalError, OutcomeUnknown, StartupError
from kvstore.raft import messages
from kvstore.raft.messages import AppendReply, MalformedMessage
from tests.raft_cluster import Cluster, ScriptedPeer
from tests.raft_fixtures import ELECTION_MIN_S, Answer, append, data
from tests.stock import Stock

# --- 8: a command that raises -----------------------------------------------------------------------------------------


def test_fault_08_stock_stalls_for_good() -> None:
    stock = Stock("a", "")
    stock.campaign()
    stock.tick()
    answers: list[Any] = []
    stock.explode(callback=lambda result, error: answers.append((result, error)))
    stock.store("after", callback=lambda result, error: answers.append((result, error)))
    stock.tick()
    raised = 0
    for _ in range(10):
        try:
            stock.tick()
        except ValueError:
            raised += 1
    assert raised == 10
    assert stock.raftCommitIndex == stock.end
    assert stock.stored == []
    assert answers == []


def test_fault_08_ours_stops_the_node_that_differs_and_the_others_go_on() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.lead("a")
    cluster.machine("a").raises_at = lambda _index, payload: payload == b"poison"
    fatal: list[Any] = []
    leader.on_fatal = fatal.append
    poison, after = cluster.propose(leader, "poison"), cluster.propose(leader, "after")
    cluster.wait(poison, after)
    for answer in (poison, after):
        assert isinstance(answer.error, OutcomeUnknown)
    assert isinstance(leader.failure, InternalError)
    assert fatal == [leader.failure]
    index = cluster.machine("a").applied_index + 1
    assert f"entry {index} " in leader.failure.message
    (line,) = [fields for event, fields in cluster.logs["a"].lines if event == "node stops taking part"]
    assert f"entry {index} " in line["reason"]
    # It stopped before the entry, so it has not diverged; the others agree and lead on.
    cluster.until(lambda: cluster.leader is not None)
    answer = cluster.propose(cluster.elect(), "the rest goes on")
    cluster.wait(answer)
    assert answer.is_ok
    cluster.time.advance(1.0)
    assert cluster.machine("b").payloads == cluster.machine("c").payloads == [b"poison", b"after", b"the rest goes on"]
    assert cluster.machine("a").payloads == []


def test_fault_08_ours_says_of_a_newer_entry_that_it_is_newer_and_no_bug() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    cluster.lead("a")

    def apply(*_entry: object) -> None:
        raise StartupError("entry 2 is of version 9: run a newer program", code="data_format_newer")

    cluster.machine("b").apply = apply  # type: ignore[method-assign]
    fatal: list[Any] = []
    cluster.nodes["b"].on_fatal = fatal.append
    cluster.wait(cluster.propose(cluster.nodes["a"], "new"))
    cluster.until(lambda: fatal)
    assert fatal == [cluster.nodes["b"].failure]
    assert (type(fatal[0]), fatal[0].code) == (StartupError, "data_format_newer")


# --- 9: no linearizable read ------------------------------------------------------------------------------------------


def deliver(nodes: dict[str, Stock], *links: tuple[str, str]) -> None:
    """Carry what stock nodes have sent over these links until nothing is left."""
    while any(node.wire.sent for node in nodes.values()):
        for name, node in nodes.items():
            sent, node.wire.sent = node.wire.sent, []
            for to, message in sent:
                if (name, to) in links or (to, name) in links:
                    nodes[to].receive(name, **message)


def test_fault_09_stock_serves_a_value_that_was_overwritten() -> None:
    nodes = {name: Stock(name, set("abc") - {name}) for name in "abc"}
    for node in nodes.values():
        node.connect()
    everywhere = [("a", "b"), ("a", "c"), ("b", "c")]
    nodes["a"].campaign()
    deliver(nodes, *everywhere)
    nodes["a"].store("old")
    for _ in range(3):
        nodes["a"].heartbeat()
        deliver(nodes, *everywhere)
    assert nodes["a"].stored == ["old"]
    # a is cut off; b is elected and commits a newer value with c.
    nodes["b"].campaign()
    deliver(nodes, ("b", "c"))
    assert nodes["b"]._isLeader()
    nodes["b"].store("new")
    for _ in range(3):
        nodes["b"].heartbeat()
        deliver(nodes, ("b", "c"))
    assert nodes["b"].stored == ["old", "new"]
    nodes["a"].tick()
    assert nodes["a"]._isLeader()  # and so it goes on serving reads
    assert nodes["a"].stored == ["old"]


def test_fault_09_ours_reads_nothing_at_a_leader_that_is_cut_off() -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    old = cluster.lead("a")
    cluster.commit("old")
    cluster.isolate("a")
    # Reads that come all the while, until long after it has stepped down.
    answers: list[Answer] = []
    while cluster.time.now_s < 20.0:
        answers.append(Answer())
        old.read_index(answers[-1])
        cluster.time.advance(ELECTION_MIN_S / 10)
        new = cluster.leader
        if new is not None and new is not old and len(cluster.machine(new.config.name).payloads) == 1:
            cluster.propose(new, "new")
    assert cluster.leader is not old
    assert [answer.is_ok for answer in answers] == [False] * len(answers)
    assert all(answer.error and answer.error.code == "no_leader" for answer in answers[:-50])
    assert cluster.machine("a").payloads == [b"old"]


@pytest.mark.parametrize("reader", ["a", "b", "c"])
def test_fault_09_ours_sees_every_acknowledged_write_at_every_node(reader: str) -> None:
    cluster = Cluster()
    cluster.start("a", "b", "c")
    leader = cluster.lead("a")
    for number in range(20):
        write, read = cluster.propose(leader, number), Answer()
        cluster.wait(write)
        cluster.nodes[reader].read_index(read)
        cluster.wait(read)
        assert read.is_ok
        assert cluster.machine(reader).payloads[-1] == str(number).encode()


# --- 10: pickle from the network --------------------------------------------------------------------------------------

ran: list[str] = []


def run_by_pickle(what: str) -> str:
    ran.append(what)
    return what


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return run_by_pickle, ("code of a stranger",)


class FakePoller:
    def __init__(self) -> None:
        self.callback: Any = None

    def subscribe(self, _fd: int, callback: Any, _events: int) -> None:
        self.callback = callback

    def unsubscribe(self, _fd: int) -> None:
        return


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    ran.clear()


def test_fault_10_stock_runs_what_a_stranger_sends() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        poller = FakePoller()
        connection = TcpConnection(poller, onMessageReceived=lambda _message: None, socket=ours)
        body = zlib.compress(pickle.dumps(Evil()))
        theirs.sendall(struct.pack("i", len(body)) + body)
        poller.callback(ours.fileno(), POLL_EVENT_TYPE.READ)
        assert ran == ["code of a stranger"]
        # And it buffers whatever is announced: two gigabytes, here.
        theirs.sendall(struct.pack("i", 2**31 - 1))
        for _ in range(20):
            theirs.sendall(bytes(64 * 1024))
            poller.callback(ours.fileno(), POLL_EVENT_TYPE.READ)
        assert connection.state == CONNECTION_STATE.CONNECTED
        assert len(connection._TcpConnection__readBuffer) > 2**20
        connection.disconnect()


def test_fault_10_stock_runs_what_stands_in_a_log_entry() -> None:
    stock = Stock("b", "ac")
    entry = b"\x02" + pysyncobj.pickle.dumps(Evil())
    try:
        stock.append("a", 1, (1, 0), (entry, 2, 1))
    except Exception:
        logging.getLogger(__name__).debug("it ran before anything was wrong with it", exc_info=True)
    assert ran == ["code of a stranger"]


class Stranger(asyncio.Protocol):
    def __init__(self) -> None:
        self.is_lost = False
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack("i", 40) + zlib.compress(pickle.dumps(Evil())),
        pickle.dumps(Evil()),
        struct.pack(">IB", 2**31, 0) + bytes(2**16),
        bytes(range(256)),
    ],
)
def test_fault_10_ours_closes_on_a_stranger(sent: bytes) -> None:
    cluster = Cluster()
    (node,) = cluster.start("b")
    stranger = Stranger()
    cluster.network.host("x").connect("b:1", lambda: stranger, lambda error: None, 1.0)
    cluster.time.advance(0.01)
    stranger.transport.write(sent)
    cluster.time.advance(0.01)
    assert stranger.is_lost
    assert ran == []
    assert sum(node._transport.refused.values()) == 1
    assert node.failure is None


def test_fault_10_ours_unpickles_no_message() -> None:
    with pytest.raises(MalformedMessage):
        messages.decode(pickle.dumps(Evil()))
    assert ran == []


@pytest.mark.parametrize("kind", [0, 2, 3])
def test_fault_10_ours_unpickles_no_entry(kind: int) -> None:
    """A member that was taken over sends entries of the engine's own kinds, and commits them."""
    cluster = Cluster()
    (node,) = cluster.start("b")
    leader = ScriptedPeer(cluster, "a", "b")
    entry = bytes([kind]) + pickle.dumps(Evil())
    leader.say("b", append(1, (1, 0), (1, data("x")), (1, entry), commit=3))
    cluster.time.advance(0.1)
    leader.say("b", append(1, (1, 0), (1, data("x")), (1, entry), commit=3))
    cluster.time.advance(0.1)
    assert ran == []
    assert leader.heard(AppendReply) == []
    assert node.failure is None
