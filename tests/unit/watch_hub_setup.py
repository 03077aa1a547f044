"""A watch hub over a real machine in virtual time, and connections that watch: what the tests of the hub begin with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvstore import codec, model
from kvstore.errors import KvError
from kvstore.model import Put
from kvstore.server import native
from kvstore.server.watch import WatchHub
from kvstore.state.machine import DATA, Machine
from kvstore.state.storage import MemoryDisk
from tests.state_model import entry
from tests.unit.server_fakes import FakeRaft, World, virtual_environment

WINDOW = model.WATCH_WINDOW_BYTES_MIN


class Asker:
    """A connection with watches: its `Gate`, and all that it was sent."""

    def __init__(self) -> None:
        self.congested = False
        self.postponed: list[Callable[[], object]] = []
        self.sent: list[Any] = []

    def postpone(self, work: Callable[[], object]) -> None:
        self.postponed.append(work)

    def push(self, frame: codec.SentFrame) -> None:
        self.sent.append(codec.decode_server_frame(codec.encode_frame(frame)[4:]))

    def relieve(self) -> None:
        self.congested = False
        postponed, self.postponed = self.postponed, []
        for work in postponed:
            work()

    def events(self, watch_id: int) -> list[model.Event]:
        frames = [frame for frame in self.sent if isinstance(frame, codec.WatchEvents) and frame.id == watch_id]
        return [event for frame in frames for event in frame.events]

    def seen(self, watch_id: int) -> list[tuple[int, bytes]]:
        return [(event.revision, event.key) for event in self.events(watch_id)]

    def check_parts(self, watch_id: int) -> None:
        """Each frame completes what it says, and no revision is left in part."""
        complete, more = 0, False
        for frame in self.sent:
            if isinstance(frame, codec.WatchEvents) and frame.id == watch_id:
                revisions = [event.revision for event in frame.events]
                assert revisions == sorted(revisions)
                assert all(complete < revision <= frame.revision for revision in revisions)
                assert revisions or more, "an empty frame completes something"
                assert not frame.more or revisions[-1] == frame.revision
                complete, more = frame.revision - frame.more, frame.more
        assert not more

    def failure(self) -> tuple[int, str]:
        frame = self.sent[-1]
        if isinstance(frame, codec.Answer):
            result = codec.decode_result(frame.result)
            assert isinstance(result, model.ErrorResult)
            return frame.id, result.code
        assert isinstance(frame, codec.Failure)
        return frame.id, frame.code


class SlowAsker(Asker):
    """One with a door in front: congested past a MiB, and closed past `native.UNREAD_BYTES_MAX`."""

    def __init__(self) -> None:
        super().__init__()
        self.unread_bytes = 0
        self.most_unread_bytes = 0

    def push(self, frame: codec.SentFrame) -> None:
        super().push(frame)
        self.unread_bytes += len(codec.encode_frame(frame))
        self.most_unread_bytes = max(self.most_unread_bytes, self.unread_bytes)
        self.congested = self.unread_bytes > native.CONGESTED_BYTES

    def read_all(self) -> None:
        self.unread_bytes, self.congested = 0, False
        while self.postponed and not self.congested:
            self.postponed.pop(0)()


class Setup:
    def __init__(self) -> None:
        self.world = World()
        self.machine = Machine(MemoryDisk().open, "state")
        self.raft = FakeRaft()
        self.asker = Asker()
        self.hub = WatchHub(
            virtual_environment(self.world),
            self.raft,
            lambda: self.machine,
            lambda request_id, error: codec.Failure(request_id, error.code, error.message),
        )
        self.hub.start()

    def apply(self, *requests: model.Mutation, told: bool = True) -> None:
        results = self.machine.apply(self.machine.applied_index + 1, 1, DATA, entry(1000, requests))
        assert not any(isinstance(codec.decode_result(result), model.ErrorResult) for result in results)
        if told:
            self.hub.applied()

    def put(self, *keys: bytes, told: bool = True) -> None:
        for key in keys:
            self.apply(Put(key, b"%d" % (self.machine.revision + 1)), told=told)

    def watch(
        self,
        watch_id: int,
        start: bytes,
        end: bytes | None,
        first: int = 0,
        asker: Asker | None = None,
        *,
        window: int = WINDOW,
        prev: bool = False,
        future: bool = False,
    ) -> None:
        """Ask, and let the barrier pass where one is needed."""
        asker = asker or self.asker
        frame = codec.Watch(watch_id, start, end, first, prev, True, True, future, window)
        self.hub.open(frame, asker.sent.append, asker)
        self.pass_barriers()

    def pass_barriers(self, error: KvError | None = None) -> None:
        while self.raft.barriers:
            self.raft.barriers.pop(0)(error)

    def credit(self, watch_id: int, size_bytes: int = WINDOW) -> None:
        self.hub.credit(codec.WatchCredit(watch_id, size_bytes), self.asker)
