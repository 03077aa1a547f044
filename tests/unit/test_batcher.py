"""The batcher: one entry for what came together, answers by position, bounds, stamps, and the leader's chores."""

from __future__ import annotations

import pytest
from msgspec import Raw

from kvstore import codec, model, versions
from kvstore.errors import KvError, OutcomeUnknown, Unavailable
from kvstore.server import batcher as batcher_module
from kvstore.server.batcher import Batcher
from kvstore.server.chores import Chores
from kvstore.server.log_clock import LogClock
from tests.unit.server_fakes import Answers, FakeMachine, FakeRaft, FakeStatus, RecordingLog, World, virtual_environment


def put(request_id: int, key: bytes = b"k", value: bytes = b"v", session: int = 9) -> codec.Write:
    request = codec.encode_request(model.Put(key, value))
    return codec.Write(request_id, session, request_id, 1, Raw(request))


def failure(request_id: int, error: KvError) -> codec.Failure:
    return codec.Failure(request_id, error.code, error.message)


class Setup:
    def __init__(self, prompt: bool = False) -> None:
        self.world = World()
        self.env = virtual_environment(self.world)
        self.raft = FakeRaft(prompt)
        self.log_clock = LogClock(self.world, 0)
        self.log_clock.begin()
        self.pressure: list[bool] = []
        self.batcher = Batcher(self.env, self.raft, self.log_clock, failure, self.pressure.append)
        self.raft.on_leadership = self.batcher.leadership_changed
        self.raft.on_applied = lambda: self.log_clock.observe(
            self.raft.machine.log_time_ms, self.raft.machine.stamped_index
        )
        self.answers = Answers()

    def submit(self, *ids: int) -> None:
        for request_id in ids:
            self.batcher.submit(put(request_id, b"key%d" % request_id), self.answers)

    def sizes(self) -> list[int]:
        """How many requests each proposed entry holds."""
        return [len(codec.decode_batch(payload).items) for payload, _ in self.raft.proposed]


def test_what_comes_in_one_turn_travels_as_one_entry_and_is_answered_by_position() -> None:
    setup = Setup()
    setup.submit(*range(1, 6))
    assert setup.raft.proposed == []
    setup.world.turn()
    assert setup.sizes() == [5]
    setup.raft.commit()
    assert setup.answers.ids == [1, 2, 3, 4, 5]
    assert [setup.answers.result(i) for i in range(5)] == [model.PutResult(revision) for revision in range(1, 6)]
    assert [item.session for item in setup.raft.machine.batches[0].items] == [9] * 5
    assert [item.seq for item in setup.raft.machine.batches[0].items] == [1, 2, 3, 4, 5]
    assert (setup.batcher.waiting, setup.batcher.in_flight) == (0, 0)


def test_at_most_four_entries_are_under_way_and_the_rest_batches() -> None:
    setup = Setup()
    for request_id in range(1, 20):
        setup.submit(request_id)
        setup.world.turn()
    assert setup.sizes() == [1, 1, 1, 1]
    assert setup.batcher.waiting == 15
    setup.raft.commit()
    setup.world.turn()
    assert setup.sizes() == [1, 1, 1, 15]
    setup.raft.commit(4)
    assert setup.answers.ids == list(range(1, 20))


def test_an_entry_closes_at_its_size_and_a_larger_request_travels_alone() -> None:
    setup = Setup()
    half = b"x" * (batcher_module.ENTRY_BYTES_MAX // 2 - 1000)
    values = [half, half, half, b"x" * (batcher_module.ENTRY_BYTES_MAX + 1), b"small"]
    for position, value in enumerate(values):
        setup.batcher.submit(put(position + 1, b"k%d" % position, value), setup.answers)
    setup.world.turn()
    assert setup.sizes() == [2, 1, 1, 1]
    assert all(len(payload) <= batcher_module.ENTRY_BYTES_MAX for payload, _ in setup.raft.proposed[:2])
    setup.raft.commit(4)
    assert setup.answers.ids == [1, 2, 3, 4, 5]


def test_an_entry_closes_at_its_count() -> None:
    setup = Setup()
    count = batcher_module.ENTRY_REQUESTS_MAX + 3
    setup.submit(*range(1, count + 1))
    setup.world.turn()
    assert setup.sizes() == [batcher_module.ENTRY_REQUESTS_MAX, 3]


def test_pressure_is_told_at_the_high_mark_and_taken_back_at_the_low_one() -> None:
    setup = Setup()
    for request_id in range(1, 5):  # fill what may be under way
        setup.submit(request_id)
        setup.world.turn()
    large = b"x" * (batcher_module.ENTRY_BYTES_MAX - 1000)
    request_id = 5
    while not setup.pressure:
        setup.batcher.submit(put(request_id, b"k", large), setup.answers)
        request_id += 1
    assert setup.pressure == [True]
    assert request_id - 5 == 17  # just past 16 MiB
    while setup.pressure == [True]:
        setup.raft.commit()
        setup.world.turn()
    assert setup.pressure == [True, False]
    assert setup.batcher.waiting == 8


def test_past_the_hard_bound_requests_are_refused_as_overloaded() -> None:
    setup = Setup()
    large = b"x" * (batcher_module.ENTRY_BYTES_MAX - 1000)
    for request_id in range(1, 70):
        setup.batcher.submit(put(request_id, b"k", large), setup.answers)
    refused = [frame for frame in setup.answers.frames if isinstance(frame, codec.Failure)]
    assert [frame.code for frame in refused] == ["overloaded"] * len(refused)
    assert refused[0].id == 65
    setup.world.turn()
    while setup.raft.proposed:
        setup.raft.commit()
        setup.world.turn()
    assert sorted(setup.answers.ids) == list(range(1, 70)), "each request has exactly one answer"


def test_losing_leadership_refuses_what_waits_and_leaves_the_rest_to_consensus() -> None:
    setup = Setup()
    for request_id in range(1, 5):
        setup.submit(request_id)
        setup.world.turn()
    setup.submit(5, 6)
    proposed = list(setup.raft.proposed)
    setup.raft.lose_leadership()
    assert setup.answers.ids == [5, 6]
    assert {frame.code for frame in setup.answers.frames if isinstance(frame, codec.Failure)} == {"not_leader"}
    for _, done in proposed:
        done(None, OutcomeUnknown("leadership was lost", code="outcome_unknown"))
    assert setup.answers.ids == [5, 6, 1, 2, 3, 4]
    assert setup.answers.failure().code == "outcome_unknown"
    assert setup.batcher.in_flight == 0


def test_a_leader_that_cannot_propose_for_a_moment_keeps_what_waits() -> None:
    setup = Setup(prompt=True)
    setup.raft.accepting = False
    setup.submit(1, 2)
    setup.world.advance(1.0)
    assert setup.answers.frames == []
    setup.raft.accepting = True
    setup.world.advance(0.1)
    assert setup.answers.ids == [1, 2]
    assert setup.answers.result() == model.PutResult(2)


def test_a_leader_that_cannot_propose_for_long_says_so() -> None:
    setup = Setup()
    setup.raft.accepting = False
    setup.submit(1)
    setup.world.advance(4.0)
    assert setup.answers.failure().code == "unavailable"
    assert setup.batcher.waiting == 0


def test_a_refused_proposal_answers_each_of_its_requests() -> None:
    setup = Setup()
    setup.submit(1, 2, 3)
    setup.world.turn()
    _, done = setup.raft.proposed.pop()
    done(None, Unavailable("the disk is full", code="storage_failed"))
    assert [frame.code for frame in setup.answers.frames if isinstance(frame, codec.Failure)] == ["storage_failed"] * 3


def test_stopping_refuses_what_waits_and_waits_for_what_is_under_way() -> None:
    setup = Setup()
    for request_id in range(1, 6):
        setup.submit(request_id)
        setup.world.turn()
    idle: list[bool] = []
    setup.batcher.stop(lambda: idle.append(True))
    assert setup.answers.ids == [5]
    assert setup.answers.failure().code == "shutting_down"
    setup.submit(6)
    assert setup.answers.failure().code == "shutting_down"
    assert idle == []
    setup.raft.commit(4)
    assert idle == [True]


# --- log time ---------------------------------------------------------------------------------------------------------


def test_log_time_follows_the_wall_clock_under_steady_pipelined_load() -> None:
    setup = Setup()
    start = setup.world.wall_ms()
    for request_id in range(1, 2001):  # always three entries under way, each applied 3 ms after it was stamped
        setup.submit(request_id)
        setup.world.advance(0.001)
        if request_id > 3:
            setup.raft.commit()
    passed = setup.world.wall_ms() - start
    assert passed - 5 <= setup.raft.machine.log_time_ms - start <= passed


def test_a_wall_clock_that_jumps_ahead_moves_log_time_by_one_percent_at_most() -> None:
    world = World()
    clock = LogClock(world, 0)
    clock.begin()
    first = clock.stamp()
    world.jumped_ms += 3_600_000
    world.advance(10.0)
    assert first + 10_000 <= clock.stamp() <= first + 10_100


def test_writes_wait_until_log_time_is_known() -> None:
    """The first entry of a leader would else be stamped before its time, and its session expire at once."""
    setup = Setup()
    setup.log_clock.forget_own()
    setup.submit(1)
    setup.world.advance(0.02)
    assert setup.raft.proposed == []
    setup.log_clock.begin()
    setup.world.advance(0.02)
    assert setup.sizes() == [1]


def test_a_state_that_is_not_replayed_yet_knows_no_log_time() -> None:
    world = World()
    world.jumped_ms += 3_600_000
    clock = LogClock(world, 0)
    assert not clock.is_known  # the log behind it may hold any log time
    assert clock.now_ms() == 0
    clock.observe(5_000, 1)
    assert clock.is_known
    world.advance(1.0)
    assert clock.stamp() == 6_010
    clock.forget_own()
    assert clock.now_ms() == 6_010


def test_a_successor_with_a_clock_ahead_counts_from_the_applied_log_time() -> None:
    world = World()
    world.jumped_ms += 3_600_000
    clock = LogClock(world, 5_000)
    world.advance(1.0)
    clock.observe(6_000, 1)
    world.advance(2.0)
    clock.forget_own()
    world.advance(1.0)
    # Also what passed before it led: a change of leaders makes no lease last longer.
    assert clock.stamp() == 9_030


def test_a_log_time_that_stood_still_leaps_by_nothing() -> None:
    """A lease that was granted at its end would else lose all that passed since its beginning."""
    world = World()
    clock = LogClock(world, 5_000)
    clock.observe(6_000, 1)
    world.advance(10.0)
    clock.observe(6_000, 2)  # the wall clock of who leads is behind
    world.advance(1.0)
    clock.observe(6_000, 2)  # what was applied since says nothing about time
    assert clock.now_ms() == 7_010
    clock.forget_own()
    assert clock.now_ms() == 7_010


def test_a_leader_whose_clock_was_behind_goes_on_from_log_time_once_it_is_right() -> None:
    """Its own stamps were below it all the while; counted from them, log time would stand still for as long again."""
    world = World()
    clock = LogClock(world, world.wall_ms())
    start_ms = world.wall_ms()
    world.jumped_ms -= 100_000
    for index in range(1, 11):
        world.advance(1.0)
        clock.stamp()
        clock.observe(start_ms, index)  # an entry with a lower stamp leaves log time where it is
    world.jumped_ms += 100_000
    world.advance(1.0)
    assert start_ms + 1_000 <= clock.stamp() <= start_ms + 1_020


def test_a_wall_clock_that_jumps_back_never_takes_log_time_back() -> None:
    world = World()
    clock = LogClock(world, 0)
    clock.begin()
    first = clock.stamp()
    world.jumped_ms -= 3_600_000
    world.advance(5.0)
    assert clock.stamp() == first


def test_stamps_of_a_lost_leadership_count_no_more() -> None:
    world = World()
    clock = LogClock(world, 1_000)
    world.advance(100.0)
    assert clock.stamp() == 102_000
    world.advance(1.0)
    assert clock.stamp() == 103_010
    clock.forget_own()
    assert clock.stamp() == 1_000 + 102_010


# --- chores -----------------------------------------------------------------------------------------------------------


def chores_of(setup: Setup) -> tuple[Chores, RecordingLog]:
    log = RecordingLog()
    chores = Chores(setup.env, setup.raft, lambda: setup.raft.machine, setup.log_clock, setup.batcher, log)
    chores.start()
    return chores, log


def test_the_leader_ends_sessions_and_compacts_one_of_each_at_a_time() -> None:
    setup = Setup()
    chores, log = chores_of(setup)
    setup.raft.machine.expiry_from_ms = 1
    setup.raft.machine.compaction = 42
    setup.world.advance(5.5)
    requests = [item.request for payload, _ in setup.raft.proposed for item in codec.decode_batch(payload).items]
    assert requests == [model.ExpireSessions(), model.Compact(42)]
    setup.raft.commit(len(setup.raft.proposed))
    setup.world.advance(5.0)
    assert setup.raft.proposed == []
    setup.raft.machine.expiry_from_ms = 1
    setup.world.advance(1.0)
    assert setup.sizes() == [1]
    chores.stop()
    assert log.events == []


def test_leases_that_one_entry_does_not_end_follow_at_once() -> None:
    setup = Setup()
    setup.raft.prompt = True
    chores, _ = chores_of(setup)
    setup.raft.machine.leases_due = 3
    setup.world.advance(1.1)
    assert setup.raft.machine.leases_due == 0
    requests = [item.request for batch in setup.raft.machine.batches for item in batch.items]
    assert requests == [model.ExpireLeases()] * 3
    chores.stop()


def test_a_follower_does_no_chores_and_a_failed_chore_is_logged() -> None:
    setup = Setup()
    chores, log = chores_of(setup)
    setup.raft.machine.compaction = 42
    setup.raft.accepting = setup.raft.is_leader = False
    setup.world.advance(3.0)
    assert setup.raft.proposed == []
    setup.raft.accepting = setup.raft.is_leader = True
    setup.world.advance(1.0)
    _, done = setup.raft.proposed.pop()
    done(None, OutcomeUnknown("lost"))
    assert log.names() == ["chore_failed"]
    setup.world.advance(1.0)
    assert setup.sizes() == [1], "it is tried again"
    chores.stop()


def test_the_leader_raises_the_version_once_all_members_understand_more(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup()
    monkeypatch.setattr(versions, "VERSION", 3)
    monkeypatch.setattr(FakeMachine, "version", 2)
    monkeypatch.setattr(FakeStatus, "common_version", 0)
    chores, _ = chores_of(setup)
    setup.world.advance(2.0)
    assert setup.raft.proposed == [], "not all were heard, or one knows no more"
    assert not chores.raises_version
    monkeypatch.setattr(FakeStatus, "common_version", 4)
    setup.raft.is_leader = setup.raft.accepting = False
    setup.world.advance(2.0)
    assert setup.raft.proposed == [], "it does not lead"
    setup.raft.is_leader = setup.raft.accepting = True
    setup.world.advance(0.15)
    ((payload, done),) = setup.raft.proposed
    assert [item.request for item in codec.decode_batch(payload).items] == [model.RaiseVersion(3)]
    setup.world.advance(1.0)
    assert len(setup.raft.proposed) == 1, "one at a time"
    assert chores.raises_version
    monkeypatch.setattr(FakeMachine, "version", 3)
    done([codec.encode_result(model.DoneResult(0))], None)
    assert not chores.raises_version
