"""A server's surroundings in virtual time: a Raft that commits when told, a machine that remembers.

No real time passes and no thread runs, so a test says exactly what happens in which order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from kvstore import codec, model, versions
from kvstore.env import Environment, Files, Network
from kvstore.errors import KvError, Unavailable
from kvstore.meters import Meter
from tests.fake_network import VirtualTime


class World(VirtualTime):
    """Virtual time whose wall clock can be set apart from it."""

    def __init__(self) -> None:
        super().__init__()
        self.jumped_ms = 0

    def wall_ms(self) -> int:
        return super().wall_ms() + self.jumped_ms

    def turn(self) -> None:
        """Let happen what is due now."""
        self.advance(0.0)


def virtual_environment(world: World, network: Network | None = None, files: Files | None = None) -> Environment:
    missing = cast(Any, None)  # what needs a thing that is not there fails at once
    return Environment(world, random.Random(7), world, network or missing, files or missing)


class FakeMachine:
    """Applies Put and answers it; keeps every batch."""

    def __init__(self) -> None:
        self.revision = 0
        self.log_time_ms = 1  # known, as it is once a leader has applied its first entry
        self.stamped_index = 0
        self.applied_term = 1
        self.batches: list[codec.Batch] = []
        self.records: dict[bytes, model.Record] = {}
        self.expiry_from_ms = 0
        self.leases_due = 0  # ExpireLeases that are needed
        self.compaction: int | None = None

    def apply(self, payload: bytes) -> list[bytes]:
        batch = codec.decode_batch(payload)
        self.batches.append(batch)
        self.log_time_ms = max(self.log_time_ms, batch.log_time_ms)
        self.stamped_index += 1
        return [codec.encode_result(self._apply(item.request)) for item in batch.items]

    def _apply(self, request: model.Mutation) -> model.Result:
        if isinstance(request, model.Put):
            self.revision += 1
            self.records[request.key] = model.Record(request.key, request.value, self.revision, self.revision, 1)
            return model.PutResult(self.revision)
        if isinstance(request, model.Compact):
            self.compaction = None
        elif isinstance(request, model.ExpireSessions):
            self.expiry_from_ms = 0
        elif isinstance(request, model.ExpireLeases):
            self.leases_due -= 1
        return model.DoneResult(self.revision)

    def prefetch(self, requests: Iterable[model.Read]) -> None:
        pass

    def read(self, request: model.Read, log_time_ms: int = 0) -> bytes:
        assert isinstance(request, model.Range)
        record = self.records.get(request.start)
        records = (record,) if record else ()
        return codec.encode_result(model.RangeResult(self.revision, records, len(records)))

    def expiry_due(self, log_time_ms: int) -> bool:
        return 0 < self.expiry_from_ms <= log_time_ms

    def lease_expiry_due(self, log_time_ms: int) -> bool:
        return self.leases_due > 0

    def stamp_due(self, log_time_ms: int) -> bool:
        return False

    def compaction_due(self, log_time_ms: int) -> int | None:
        return self.compaction

    @property
    def size_bytes(self) -> int:
        return 0

    @property
    def version(self) -> int:
        return versions.VERSION

    def digest(self) -> str:
        return f"digest-{self.revision}"


class FakeStatus:
    role = "leader"
    term = 1
    commit_index = applied_index = last_index = durable_index = 7
    peers: tuple[model.PeerStatus, ...] = ()
    storage_error = ""
    common_version = versions.VERSION
    receiving_bytes = (0, 0)


class FakeRaft:
    """Commits and confirms when told to, or at once with `prompt`. `calls` lists what was administered."""

    def __init__(self, prompt: bool = False) -> None:
        self.machine = FakeMachine()
        self.prompt = prompt
        self.is_leader = True
        self.term = 1
        self.accepting = True
        self.leader = "n1"
        self.members: tuple[model.Member, ...] = (
            model.Member("n1", "127.0.0.1:1", "127.0.0.1:11", "a", True),
            model.Member("n2", "127.0.0.1:2", "127.0.0.1:12", "b", True),
        )
        self.proposed: list[tuple[bytes, Callable[[Any, KvError | None], None]]] = []
        self.barriers: list[Callable[[KvError | None], None]] = []
        self.calls: list[tuple[object, ...]] = []
        self.asked_version = 0
        self.admin_error: KvError | None = None
        self.on_leadership: Callable[[bool], None] = lambda leading: None
        self.on_applied: Callable[[], None] = lambda: None
        self.on_fatal: Callable[[KvError], None] = lambda error: None
        self.failure: KvError | None = None
        self.apply_times, self.sync_times = Meter(), Meter()
        self.node_id = "a"
        self.running = False
        self.started = False
        self.data_dir = ""

    async def start(self) -> None:
        """Where it has a place, it makes a log there if there is none."""
        self.running = self.started = True
        if self.data_dir:
            wal = Path(self.data_dir) / "wal"
            wal.mkdir(exist_ok=True)
            (wal / f"{0:020d}.wal").touch()

    async def stop(self) -> None:
        self.running = False

    def propose(self, payload: bytes, done: Callable[[Any, KvError | None], None]) -> None:
        if not self.accepting:
            done(None, Unavailable("not now", code="not_leader"))
            return
        self.proposed.append((payload, done))
        if self.prompt:
            self.commit()

    def commit(self, count: int = 1) -> None:
        """Apply the oldest proposals."""
        for _ in range(count):
            payload, done = self.proposed.pop(0)
            done(self.machine.apply(payload), None)
        self.on_applied()

    def lose_leadership(self, to: str = "n2") -> None:
        self.is_leader = self.accepting = False
        self.leader = to
        self.on_leadership(False)

    def read_index(self, done: Callable[[KvError | None], None]) -> None:
        self.barriers.append(done)
        if self.prompt:
            self.confirm()

    def confirm(self, error: KvError | None = None) -> None:
        """Let the oldest barrier pass, or fail."""
        self.barriers.pop(0)(error)

    def status(self) -> FakeStatus:
        return FakeStatus()

    def add_learner(self, member: model.Member, done: Callable[[KvError | None], None], *, version: int = 0) -> None:
        self.asked_version = version
        self._administer(done, "add_learner", member)

    def promote(self, name: str, done: Callable[[KvError | None], None], *, version: int = 0) -> None:
        self.asked_version = version
        self._administer(done, "promote", name)

    def remove(self, name: str, done: Callable[[KvError | None], None], *, force: bool = False) -> None:
        self._administer(done, "remove", name, *(["force"] if force else []))

    def transfer(self, name: str, done: Callable[[KvError | None], None]) -> None:
        self._administer(done, "transfer", name)

    def _administer(self, done: Callable[[KvError | None], None], *call: object) -> None:
        self.calls.append(call)
        done(self.admin_error)


class Answers:
    """A `Reply` that keeps what it was given."""

    def __init__(self) -> None:
        self.frames: list[codec.ServerFrame] = []

    def __call__(self, frame: codec.ServerFrame) -> None:
        self.frames.append(frame)

    @property
    def ids(self) -> list[int]:
        return [frame.id for frame in self.frames]

    def result(self, position: int = -1) -> model.Result:
        frame = self.frames[position]
        assert isinstance(frame, codec.Answer), frame
        return codec.decode_result(frame.result)

    def failure(self, position: int = -1) -> codec.Failure:
        frame = self.frames[position]
        assert isinstance(frame, codec.Failure), frame
        return frame


class RecordingLog:
    """A log that a test can read."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, dict[str, Any]]] = []

    def info(self, event: str, /, **fields: Any) -> None:
        self.events.append(("info", event, fields))

    def warning(self, event: str, /, **fields: Any) -> None:
        self.events.append(("warning", event, fields))

    def error(self, event: str, /, **fields: Any) -> None:
        self.events.append(("error", event, fields))

    def names(self) -> list[str]:
        return [event for _, event, _ in self.events]
