"""The write-ahead log against a model, over random operations, power losses, kills, failing syncs and full disks.

The model keeps the log's state after each change since the last sync that returned. After any crash the log must be
exactly one of these states; and what it then holds must survive the next power loss.

Opening may bring back entries that had been dropped from the head: a segment is removed only as a whole. They must be
the ones that were dropped.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.raft.wal import Wal
from tests.fake_files import FaultyFiles, Keep, Stopped, keep_everything, keep_nothing, keep_prefix, keep_random

DIRECTORY = "data/wal"


Entry = tuple[bytes, int, int]


class State(NamedTuple):
    """What the log holds, as the model believes."""

    entries: tuple[Entry, ...]  # those that were dropped from the head included
    dropped: int  # how many of them were
    term: int
    voted_for: str | None

    @property
    def last_index(self) -> int:
        return self.entries[-1][1] if self.entries else 0

    def agrees(self, wal: Wal, dropped_may_be_back: bool = False) -> bool:
        found = tuple(wal.entries)
        missing = len(self.entries) - len(found)
        return (
            (wal.term, wal.voted_for) == (self.term, self.voted_for)
            and (0 <= missing <= self.dropped if dropped_may_be_back else missing == self.dropped)
            and found == self.entries[missing:]
        )


class WalMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.wal: Wal
        self.states: list[State] = [State((), 0, 0, None)]  # the last durable one, and those after each change since
        self.in_flight = 0  # how many of them the sync under way covers; 0: none is
        self.appended = 0  # makes each payload unlike the others

    @initialize(seed=st.integers(0, 2**32), segment_bytes=st.sampled_from([300, 700, 1 << 14]))
    def create(self, seed: int, segment_bytes: int) -> None:
        self.files = FaultyFiles(random.Random(seed))
        self.files.make_dirs("data")
        self.segment_bytes = segment_bytes
        self.open()

    def open(self) -> None:
        self.wal = Wal.open(self.files, DIRECTORY, node_id="node-a", segment_bytes=self.segment_bytes)
        self.in_flight = 0

    # --- changes ----------------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 5), size_bytes=st.sampled_from([0, 1, 30, 200, 1500]), term_step=st.integers(0, 1))
    def append(self, count: int, size_bytes: int, term_step: int) -> None:
        term = self.wal.last_term + term_step
        for _ in range(count):
            state = self.states[-1]
            self.appended += 1
            payload = (str(self.appended).encode() * size_bytes)[:size_bytes]
            entry = (payload, state.last_index + 1, term)
            self.wal.append(*entry)
            self.states.append(state._replace(entries=(*state.entries, entry)))

    @rule(back=st.integers(0, 6))
    def truncate(self, back: int) -> None:
        state = self.states[-1]
        index = state.last_index - back
        self.wal.truncate_from(index)
        left = tuple(entry for entry in state.entries if entry[1] < index)
        if len(left) <= state.dropped:
            state = state._replace(dropped=0)  # nothing is left in memory: the log starts anew
            left = ()
        self.states.append(state._replace(entries=left))

    @rule(step=st.integers(0, 2), voted_for=st.sampled_from([None, "n1", "n2"]))
    def set_term(self, step: int, voted_for: str | None) -> None:
        term = self.wal.term + step
        self.wal.set_term(term, voted_for)
        self.states.append(self.states[-1]._replace(term=term, voted_for=voted_for))

    @rule(ahead=st.integers(1, 50), term=st.integers(1, 9))
    def reset(self, ahead: int, term: int) -> None:
        index = self.wal.last_index + ahead
        if term > self.states[-1].term:  # it is recorded first, as a record of its own
            self.states.append(self.states[-1]._replace(term=term, voted_for=None))
        self.wal.reset(index, term)
        self.states.append(self.states[-1]._replace(entries=((b"\x01", index, term),), dropped=0))

    @rule(part=st.floats(0, 1.2), keep_bytes=st.sampled_from([0, 0, 100, 2000]))
    def drop(self, part: float, keep_bytes: int) -> None:
        state = self.states[-1]
        in_memory = state.entries[state.dropped :]
        index = self.wal.first_index + int(part * len(in_memory))
        self.wal.drop_before(index, keep_bytes)
        count = 0
        while (
            count + 1 < len(in_memory)
            and in_memory[count][1] < index
            and sum(len(entry[0]) for entry in in_memory[count + 1 :]) >= keep_bytes
        ):
            count += 1
        # No change that a crash could undo: the entries may be back after it, or not.
        self.states[-1] = state._replace(dropped=state.dropped + count)

    # --- syncs ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.in_flight)
    @rule()
    def sync(self) -> None:
        syncs = self.files.sync_count
        self.wal.sync()
        assert self.files.sync_count <= syncs + 1
        assert self.wal.synced_position == self.wal.position
        assert self.wal.durable_index == self.wal.last_index
        del self.states[:-1]

    @precondition(lambda self: not self.in_flight)
    @rule()
    def start_sync(self) -> None:
        work = self.wal.start_sync()
        if work is not None:
            work()
            self.in_flight = len(self.states)

    @precondition(lambda self: self.in_flight)
    @rule()
    def finish_sync(self) -> None:
        self.wal.finish_sync()
        del self.states[: self.in_flight - 1]
        self.in_flight = 0

    # --- ends -------------------------------------------------------------------------------------------------------

    def crash(self, keep: Keep) -> None:
        self.files.crash(keep)
        self.recover()

    def recover(self) -> None:
        """Open again; the log must be in one of the states that it may be in, and stay in it."""
        self.open()
        found = State(tuple(self.wal.entries), 0, self.wal.term, self.wal.voted_for)
        assert any(state.agrees(self.wal, dropped_may_be_back=True) for state in self.states), (found, self.states)
        assert self.wal.durable_index == self.wal.last_index
        assert self.wal.position == self.wal.synced_position
        self.states = [found]
        self.files.crash(keep_nothing)
        self.open()
        assert found.agrees(self.wal)

    @rule(how=st.sampled_from(["nothing", "everything", "random", "prefix"]), prefix_bytes=st.integers(0, 4000))
    def lose_power(self, how: str, prefix_bytes: int) -> None:
        keeps = {
            "nothing": keep_nothing,
            "everything": keep_everything,
            "random": keep_random(self.files.chance),
            "prefix": keep_prefix(prefix_bytes),
        }
        self.crash(keeps[how])

    @precondition(lambda self: not self.in_flight)
    @rule(operations=st.integers(0, 7), only_the_process=st.booleans())
    def stop_during_a_sync(self, operations: int, only_the_process: bool) -> None:
        self.files.stop_after = self.files.operation_count + operations
        try:
            self.wal.sync()
            del self.states[:-1]
        except Stopped:
            pass
        if only_the_process:
            self.kill()
        else:
            self.crash(keep_random(self.files.chance))

    @rule(operations=st.integers(0, 9))
    def lose_power_while_opening(self, operations: int) -> None:
        self.files.crash(keep_random(self.files.chance))
        self.files.stop_after = self.files.operation_count + operations
        try:
            self.open()
        except Stopped:
            self.files.crash(keep_random(self.files.chance))
        else:
            self.files.kill()
        self.recover()

    @rule()
    def kill(self) -> None:
        self.files.kill()
        self.recover()

    @precondition(lambda self: not self.in_flight)
    @rule(dies=st.booleans())
    def fail_a_sync(self, dies: bool) -> None:
        self.files.fail_sync()
        try:
            self.wal.sync()
        except OSError:
            assert self.wal.failed is not None
        self.files.fail_sync(0)
        if dies:
            self.kill()
        else:
            self.crash(keep_random(self.files.chance))

    @precondition(lambda self: not self.in_flight)
    @rule(free_bytes=st.integers(0, 900))
    def fill_the_disk(self, free_bytes: int) -> None:
        used_bytes = sum(len(data) for data in self.files.image().values())
        self.files.capacity_bytes = used_bytes + free_bytes
        try:
            self.wal.sync()
            del self.states[:-1]
        except OSError:
            assert self.wal.failed is not None
        self.files.capacity_bytes = None
        self.crash(keep_random(self.files.chance))

    @precondition(lambda self: not self.in_flight)
    @rule()
    def close(self) -> None:
        self.wal.close()
        del self.states[:-1]
        self.crash(keep_nothing)

    # --- always -----------------------------------------------------------------------------------------------------

    @invariant()
    def agrees_with_itself(self) -> None:
        if not hasattr(self, "wal"):
            return
        wal = self.wal
        assert self.states[-1].agrees(wal)
        assert wal.size_bytes == sum(len(entry[0]) for entry in wal.entries)
        assert [entry[1] for entry in wal.entries] == list(range(wal.first_index, wal.first_index + len(wal.entries)))
        assert 0 <= wal.durable_index <= wal.last_index
        assert wal.synced_position <= wal.position


WalMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestWalMachine = WalMachine.TestCase
