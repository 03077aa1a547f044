"""What the guard costs per message: the follower's append, and the leader's acknowledgement."""

from __future__ import annotations

import random

from pytest_benchmark.fixture import BenchmarkFixture

from kvstore.model import Member
from kvstore.raft.elections import Elections
from kvstore.raft.fsm import EntryKind
from kvstore.raft.guard import Guard
from kvstore.raft.members import Configuration
from kvstore.raft.messages import AppendEntries, AppendReply


class _Engine:
    """A node that is up to date in term 3."""

    term = 3
    commit_index = 999
    is_candidate = False

    def __init__(self, is_leader: bool) -> None:
        self.is_leader = is_leader

    def match_index(self, peer: str) -> int:
        return 999


class _Log:
    """1,000 entries of term 3, all durable."""

    first_index = 1
    last_index = 1000
    last_term = 3
    durable_index = 1000

    def term_at(self, index: int) -> int | None:
        return 3 if 1 <= index <= 1000 else None


def _guard(is_leader: bool) -> Guard:
    guard = Guard("n1", _Engine(is_leader), _Log(), Elections(random.SystemRandom(), 0.5, 1.0, 0.0))
    guard.members = Configuration.of(Member(name, "", "", "", voter=True) for name in ("n1", "n2", "n3"))
    return guard


def test_guard_append(benchmark: BenchmarkFixture) -> None:
    guard = _guard(is_leader=False)
    entry = bytes([EntryKind.DATA]) + bytes(32_768)
    message = AppendEntries(3, 999, 1000, 3, ((3, entry),))
    assert len(benchmark(guard.receive, "n2", message, 1.0)) == 2
    assert not guard.dropped


def test_guard_heartbeat(benchmark: BenchmarkFixture) -> None:
    guard = _guard(is_leader=False)
    assert len(benchmark(guard.receive, "n2", AppendEntries(3, 999, 1000, 3, ()), 1.0)) == 2
    assert not guard.dropped


def test_guard_acknowledgement(benchmark: BenchmarkFixture) -> None:
    guard = _guard(is_leader=True)
    assert len(benchmark(guard.receive, "n2", AppendReply(3, 1001, True), 1.0)) == 1
    assert not guard.dropped
