"""The engine behind its seams: what it may touch, and that pickle is out of reach."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pysyncobj.syncobj
import pytest
from pysyncobj import SyncObj
from pysyncobj.node import Node

from kvstore.env import SystemClock
from kvstore.errors import StartupError
from kvstore.raft import engine as engine_module
from kvstore.raft.engine import MODULE_NAMES, PRIVATE_NAMES, PYSYNCOBJ_VERSION, Engine, PickleRefused
from kvstore.raft.wal import Wal
from tests.fake_files import FaultyFiles


def make_engine(name: str = "a", others: tuple[str, ...] = ("b", "c"), applied: int = 0) -> tuple[Engine, list[Any]]:
    sent: list[Any] = []
    wal = Wal.open(FaultyFiles(), "/wal", node_id="1")
    engine = Engine(
        name,
        wal,
        applied,
        clock=SystemClock(),
        heartbeat_s=0.1,
        quorum_timeout_s=1.0,
        emit=lambda peer, message: sent.append((peer, message)),
        members_changed=lambda: None,
    )
    engine.set_members({name, *others}, set())
    for other in others:
        engine.set_connected(other, True)
    return engine, sent


def test_every_private_name_that_we_touch_is_there() -> None:
    engine, _ = make_engine()
    missing = [name for name in PRIVATE_NAMES if not hasattr(engine._o, name)]
    assert missing == []
    assert [name for name in MODULE_NAMES if not hasattr(pysyncobj.syncobj, name)] == []


def test_every_private_name_in_the_source_is_listed() -> None:
    source = Path(engine_module.__file__).read_text(encoding="utf-8")
    touched = set(re.findall(r"_SyncObj__\w+", source))
    assert touched == {name for name in PRIVATE_NAMES if name.startswith("_SyncObj__")}


def test_another_version_of_the_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "VERSION", "0.3.18")
    with pytest.raises(StartupError) as caught:
        make_engine()
    assert caught.value.code == "engine_unsupported"
    assert PYSYNCOBJ_VERSION in caught.value.message


def test_the_process_own_pysyncobj_is_not_patched() -> None:
    before = {name: getattr(pysyncobj.syncobj, name) for name in MODULE_NAMES}
    make_engine()
    assert {name: getattr(pysyncobj.syncobj, name) for name in MODULE_NAMES} == before


def test_pickle_is_out_of_the_engines_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine()
    monkeypatch.setattr(pickle, "loads", lambda *_a, **_k: pytest.fail("pickle.loads was reached"))
    transmission = {"type": "append_entries", "term": 1, "commit_index": 1, "prevLogIdx": 1, "prevLogTerm": 0}
    with pytest.raises(PickleRefused):
        engine.deliver("b", {**transmission, "transmission": "finish", "data": ""})


def test_a_tick_raises_no_term_unless_told_to() -> None:
    engine, sent = make_engine()
    for _ in range(10):
        engine.tick()
    assert engine.term == 0
    assert sent == []
    engine.tick(campaign=True)
    assert engine.is_candidate
    assert engine.term == engine.wal.term == 1
    assert engine.wal.voted_for == "a"
    assert sorted((peer, message["type"]) for peer, message in sent) == [("b", "request_vote"), ("c", "request_vote")]


def elected() -> tuple[Engine, list[Any]]:
    engine, sent = make_engine()
    engine.tick(campaign=True)
    engine.deliver("b", {"type": "response_vote", "term": 1})
    assert engine.is_leader
    sent.clear()
    return engine, sent


def test_proposals_are_appended_sent_and_committed() -> None:
    engine, sent = elected()
    engine.queue_proposal(b"\x10one")
    engine.tick()
    assert engine.wal.entries[-1] == (b"\x10one", 3, 1)
    appended = [(peer, message["entries"]) for peer, message in sent if message["entries"]]
    assert sorted(peer for peer, _ in appended) == ["b", "c"]
    engine.deliver_ack("b", 4, True)
    engine.tick()
    assert engine.commit_index == 3


def test_an_acknowledgement_does_not_move_the_next_index_back() -> None:
    engine, _ = elected()
    for number in range(5):
        engine.queue_proposal(b"\x10%d" % number)
    engine.tick()
    assert engine.next_index("b") == 8
    engine.deliver_ack("b", 4, True)
    assert engine.match_index("b") == 3
    assert engine.next_index("b") == 8


def test_an_acknowledgement_that_is_no_news_is_no_sign_of_life() -> None:
    """A slow disk of the leader's own raises what peers acknowledged long before."""
    engine, _ = elected()
    engine.queue_proposal(b"\x10x")
    engine.tick()
    heard = engine._o._SyncObj__lastResponseTime
    before = dict(heard)
    engine.deliver_ack("b", 4, True, is_news=False)
    assert engine.match_index("b") == 3
    assert heard == before
    engine.deliver_ack("b", 4, True)
    assert heard[Node("b")] > before[Node("b")]


def test_proposals_left_over_at_a_step_down_go_nowhere() -> None:
    engine, sent = elected()
    engine.queue_proposal(b"\x10late")
    engine.adopt_term(9)
    engine.tick()
    engine.drop_proposals()
    engine.tick()
    assert not engine.is_leader
    assert engine.term == 9
    assert [message for _, message in sent if message["type"] == "apply_command"] == []
    assert engine.wal.last_index == 2


def test_adopting_a_term_grants_no_vote() -> None:
    engine, sent = elected()
    engine.adopt_term(9)
    assert engine.wal.term == 9
    assert engine.wal.voted_for is None
    assert sent == []


def test_a_learner_is_replicated_to_and_not_counted() -> None:
    engine, sent = elected()
    engine.set_members({"a", "b", "c"}, {"d"})
    engine.set_connected("d", True)
    engine.queue_proposal(b"\x10x")
    engine.tick()
    assert "d" in {peer for peer, message in sent if message["entries"]}
    engine.deliver_ack("d", 4, True)
    engine.tick()
    assert engine.commit_index == 1
    # Promotion is the same node in the other set; the engine is not rebuilt and no index is lost.
    engine.set_members({"a", "b", "c", "d"}, set())
    assert engine.match_index("d") == 3


def test_a_member_that_left_is_forgotten_and_the_rest_go_on() -> None:
    engine, _ = elected()
    engine.set_members({"a", "b"}, set())
    engine.queue_proposal(b"\x10x")
    engine.tick()
    engine.deliver_ack("b", 4, True)
    engine.tick()
    assert engine.commit_index == 3
    assert engine.match_index("c") == 0


def test_a_restarted_engine_begins_at_the_applied_index() -> None:
    files = FaultyFiles()
    wal = Wal.open(files, "/wal", node_id="1")
    wal.append(b"\x01", 1, 0)
    for index in range(2, 31):
        wal.append(b"\x10x", index, 1)
    engine = Engine(
        "a",
        wal,
        20,
        clock=SystemClock(),
        heartbeat_s=0.1,
        quorum_timeout_s=1.0,
        emit=lambda _peer, _message: None,
        members_changed=lambda: None,
    )
    engine.tick()
    assert engine.commit_index == 20
    assert wal.first_index == 1
    assert wal.last_index == 30


def test_the_stock_engine_shares_nothing_with_ours() -> None:
    engine, _ = make_engine()
    assert not isinstance(engine._o, SyncObj)
    assert isinstance(engine._node("b"), Node)
