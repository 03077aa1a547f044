"""What a watch's stream does with the frames of its nodes, one after the other, in virtual time."""

from __future__ import annotations

import asyncio
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import Raw

from kvstore import codec
from kvstore.client import watch as watch_module
from kvstore.client.sinks import Sinks
from kvstore.client.watch import WINDOW_BYTES, Stream, Watch, What
from kvstore.errors import InternalError, KvError, Refused
from kvstore.model import DoneResult, ErrorResult, Event, Record
from tests.fake_network import VirtualTime
from tests.simulation.loop import VirtualLoop

TIMEOUT_S = 5.0


def event(revision: int, key: bytes = b"k") -> Event:
    return Event(key, revision, Record(key, b"", 1, revision, 1))


class FakeLink:
    """One node, which hears and says what the test wants."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel: FakeLink | None = self
        self.heard: list[Any] = []
        self.last_error = f"{address} is gone"
        self.closed = ""

    def send(self, frame: codec.ClientFrame, sink: Stream) -> None:
        self.heard.append(frame)

    def tell(self, frame: codec.ClientFrame) -> None:
        self.heard.append(frame)

    def forget(self, frame_id: int) -> None: ...

    def close(self, reason: str) -> None:
        self.closed = reason


class Setup:
    def __init__(self, from_revision: int = 0, future: bool = False) -> None:
        self.time = VirtualTime()
        self.links = [FakeLink("n1"), FakeLink("n2")]
        self.way: FakeLink | None = self.links[0]
        self.parked: list[Stream] = []
        self.failed: list[str] = []
        ids = iter(range(1, 1000))
        pool: Any = SimpleNamespace(
            choose=lambda _route: self.way,
            park=self.parked.append,
            unpark=self.parked.remove,
            next_id=lambda: next(ids),
            failed=lambda _link, code, _hint: self.failed.append(code),
            why_parked=lambda _route: SimpleNamespace(text="nobody is there"),
        )
        loop: Any = VirtualLoop(self.time.call_later, self.time.monotonic, self._wrong)
        what = What(b"k", None, from_revision, False, True, True, future)
        self.stream = Stream(loop, pool, Random(1), what, TIMEOUT_S, lambda _stream: None)
        self.stream.begin()

    @staticmethod
    def _wrong(context: dict[str, Any]) -> None:
        raise AssertionError(context)

    @property
    def asked(self) -> codec.Watch:
        """The newest request for a watch."""
        assert self.way is not None
        return next(frame for frame in reversed(self.way.heard) if isinstance(frame, codec.Watch))

    def stand(self, first: int) -> None:
        self.stream.on_frame(codec.Watching(self.asked.id, first))

    def tell(self, revision: int, *events: Event, size_bytes: int = 100, more: bool = False) -> None:
        self.stream.on_frame(codec.WatchEvents(self.asked.id, revision, events, size_bytes, more))

    def take(self) -> None:
        """What is ready first is taken by the reader."""
        _, _, size_bytes = self.stream.ready.popleft()
        self.stream.taken(size_bytes)

    @property
    def credits(self) -> list[int]:
        assert self.way is not None
        return [frame.size_bytes for frame in self.way.heard if isinstance(frame, codec.WatchCredit)]

    def lose(self) -> None:
        """The connection breaks, and another node is there."""
        self.way = self.links[1] if self.way is self.links[0] else self.links[0]
        self.stream.on_lost()
        self.time.advance(1.0)

    @property
    def ready(self) -> list[tuple[tuple[Event, ...], int]]:
        return [(events, revision) for events, revision, _ in self.stream.ready]


def test_it_resumes_behind_what_it_has() -> None:
    setup = Setup()
    assert setup.asked.from_revision == 0
    setup.stand(7)
    setup.tell(9, event(8), event(9))
    setup.lose()
    assert setup.asked.from_revision == 10
    setup.stand(10)
    setup.tell(12, event(11))
    assert setup.ready == [((event(8), event(9)), 9), ((event(11),), 12)]


def test_before_any_event_it_resumes_where_it_stood() -> None:
    setup = Setup()
    setup.lose()
    assert setup.asked.from_revision == 0, "nobody has said yet what is new"
    setup.stand(7)
    setup.lose()
    assert setup.asked.from_revision == 7


async def test_where_to_go_on_is_behind_what_was_read_not_behind_what_is_here() -> None:
    setup = Setup()
    watch = Watch(setup.stream, False)
    assert watch.next_revision == 0
    setup.stand(7)
    setup.tell(9, event(8), event(9))
    assert watch.next_revision == 7
    await anext(watch)
    assert watch.next_revision == 9
    await anext(watch)
    assert watch.next_revision == 10
    await watch.close()


def test_half_a_revision_is_asked_for_again() -> None:
    setup = Setup()
    setup.stand(7)
    setup.tell(7, event(7, b"k1"), more=True)
    setup.lose()
    assert setup.asked.from_revision == 7
    setup.stand(7)
    setup.tell(7, event(7, b"k1"), event(7, b"k2"), more=True)
    assert setup.ready == []
    setup.tell(7, event(7, b"k3"))
    assert setup.ready == [(tuple(event(7, key) for key in (b"k1", b"k2", b"k3")), 7)]


def test_a_revision_is_completed_by_a_frame_without_events() -> None:
    setup = Setup()
    setup.stand(7)
    setup.tell(7, event(7, b"k1"), more=True)
    setup.tell(8, size_bytes=0)
    assert setup.ready == [((event(7, b"k1"),), 8)]
    assert setup.stream.next == 9


def test_the_rest_of_a_revision_gets_room_when_all_before_it_is_taken() -> None:
    setup = Setup()
    setup.stand(1)
    half = WINDOW_BYTES // 2
    setup.tell(1, event(1), size_bytes=half)
    setup.tell(2, event(2), size_bytes=half, more=True)
    assert setup.credits == [], "its reader holds the first"
    setup.take()
    assert setup.credits == [half, half], "what is taken, and what the rest needs"
    setup.tell(2, event(2), size_bytes=half, more=True)
    assert setup.credits == [half, half, half]


def test_behind_a_large_revision_there_is_a_window_and_no_more() -> None:
    """However much of it the node was told to send though nothing was taken."""
    setup = Setup()
    setup.stand(1)
    part = WINDOW_BYTES // 2
    for _ in range(9):
        setup.tell(1, event(1), size_bytes=part, more=True)
    setup.tell(1, event(1), size_bytes=part)
    assert [len(events) for events, _ in setup.ready] == [10]
    assert sum(setup.credits) == 9 * part
    # The node may send as much as it was told, and the window; the reader has taken nothing.
    setup.tell(2, event(2), size_bytes=part)
    setup.tell(3, event(3), size_bytes=part, more=True)
    assert sum(setup.credits) == 9 * part, "nothing more for what comes after"
    setup.take()
    assert sum(setup.credits) == 10 * part, "all of the first is taken"
    setup.take()
    assert sum(setup.credits) == 12 * part, "also the second; and the third may go on"
    setup.lose()
    assert setup.asked.window_bytes == WINDOW_BYTES
    assert setup.asked.from_revision == 3


def test_a_large_revision_that_is_not_taken_leaves_no_room_at_the_next_node() -> None:
    setup = Setup()
    setup.stand(1)
    for _ in range(9):
        setup.tell(1, event(1), size_bytes=WINDOW_BYTES // 2, more=True)
    setup.tell(1, event(1))
    setup.lose()
    assert not setup.links[1].heard
    setup.take()
    assert (setup.asked.from_revision, setup.asked.window_bytes) == (2, WINDOW_BYTES)


async def test_a_revision_beyond_its_limit_ends_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "REVISION_BYTES_MAX", 1000)
    setup = Setup()
    setup.stand(1)
    setup.tell(1, event(1), size_bytes=600, more=True)
    setup.tell(1, event(1), size_bytes=600)
    assert setup.ready == [((event(1), event(1)), 1)], "its last part came with the window anyway"
    setup.tell(2, event(2), size_bytes=600, more=True)
    setup.tell(2, event(2), size_bytes=600, more=True)
    assert isinstance(setup.links[0].heard[-1], codec.WatchCancel)
    watch = Watch(setup.stream, False)
    assert [await anext(watch), await anext(watch)] == [event(1), event(1)]
    with pytest.raises(Refused, match="watch from 3 on") as caught:
        await anext(watch)
    assert caught.value.code == "result_too_large"
    assert watch.next_revision == 2


def test_progress_that_was_on_its_way_before_it_stood_is_not_its_own() -> None:
    setup = Setup()
    setup.stand(7)
    setup.lose()
    setup.stream.on_frame(codec.WatchProgress(0, 50, ()))
    setup.stand(7)
    assert setup.stream.next == 7
    setup.stream.on_frame(codec.WatchProgress(0, 60, (setup.asked.id,)))
    assert setup.stream.next == 7, "it is behind, says the node"
    setup.stream.on_frame(codec.WatchProgress(0, 60, ()))
    assert setup.stream.next == 61


def test_progress_within_a_revision_completes_nothing() -> None:
    setup = Setup()
    setup.stand(7)
    setup.tell(7, event(7), more=True)
    setup.stream.on_frame(codec.WatchProgress(0, 9, ()))
    assert setup.stream.next == 7


def test_a_node_that_says_no_is_left_for_another() -> None:
    setup = Setup()
    setup.stand(7)
    failure = codec.Failure(setup.asked.id, "no_leader", "I know none")
    setup.way = setup.links[1]
    setup.stream.on_frame(failure)
    setup.time.advance(1.0)
    assert setup.failed == ["no_leader"]
    assert setup.asked.from_revision == 7


@pytest.mark.parametrize("stood", [False, True])
def test_without_a_node_for_its_time_it_gives_up(stood: bool) -> None:
    setup = Setup()
    if stood:
        setup.stand(7)
        setup.time.advance(10 * TIMEOUT_S)
        assert setup.stream.error is None, "a quiet watch is a good one"
    setup.way = None
    setup.stream.on_lost()
    setup.time.advance(TIMEOUT_S - 0.1)
    assert setup.stream.error is None or not stood
    setup.time.advance(0.2)
    error = setup.stream.error
    assert isinstance(error, KvError)
    assert error.code == "timeout"
    assert "n1 is gone" in error.message
    assert setup.parked == []


def test_a_refusal_ends_it() -> None:
    setup = Setup(from_revision=3)
    result = Raw(codec.encode_result(ErrorResult("revision_compacted", "gone")))
    setup.stream.on_frame(codec.Answer(setup.asked.id, result))
    assert setup.stream.error is not None
    assert setup.stream.error.code == "revision_compacted"


@pytest.mark.parametrize("stood", [False, True])
@pytest.mark.parametrize(
    "answer",
    [
        codec.AdminAnswer(1, ()),
        codec.Welcome(1, codec.PROTOCOL_VERSION, "c", "n1", ""),
        codec.Answer(1, Raw(codec.encode_result(DoneResult(3)))),
        codec.Answer(1, Raw(b"\xc1")),
    ],
)
async def test_an_answer_that_is_none_ends_it(stood: bool, answer: codec.ServerFrame) -> None:
    setup = Setup()
    sinks = Sinks()
    sinks.add(setup.asked, setup.stream)
    if stood:
        sinks.deliver(codec.Watching(1, 7))
    sinks.deliver(answer)
    assert setup.links[0].closed
    setup.time.advance(10 * TIMEOUT_S)
    with pytest.raises(InternalError, match="n1 answered a watch with"):
        await anext(Watch(setup.stream, False))
    assert setup.parked == []


@pytest.mark.parametrize("code", ["of_a_newer_version", "internal", "outcome_unknown", "wrong_cluster"])
@pytest.mark.parametrize("stood", [False, True])
async def test_a_code_that_it_does_not_expect_ends_it(stood: bool, code: str) -> None:
    setup = Setup()
    if stood:
        setup.stand(7)
    setup.stream.on_frame(codec.Failure(setup.asked.id, code, "because"))
    setup.time.advance(10 * TIMEOUT_S)
    with pytest.raises(KvError, match="because") as caught:
        await anext(Watch(setup.stream, False))
    assert caught.value.code == code


def test_only_a_first_request_may_wait_for_the_future() -> None:
    setup = Setup(from_revision=100, future=True)
    assert setup.asked.future
    setup.stand(100)
    setup.lose()
    assert setup.asked.future, "it has seen nothing yet"
    setup.stand(100)
    setup.tell(100, event(100))
    setup.lose()
    assert (setup.asked.from_revision, setup.asked.future) == (101, False)


def test_it_asks_nobody_while_its_window_is_full() -> None:
    setup = Setup()
    setup.stand(1)
    for revision in range(1, 11):
        setup.tell(revision, event(revision), size_bytes=WINDOW_BYTES // 10)
    setup.lose()
    assert not setup.links[1].heard
    while setup.stream.ready:
        setup.take()
    assert setup.asked.from_revision == 11
    assert setup.asked.window_bytes >= WINDOW_BYTES // 4


async def test_what_is_taken_is_credited_in_portions() -> None:
    setup = Setup()
    setup.stand(1)
    for _ in range(3):
        setup.stream.taken(WINDOW_BYTES // 8)
    assert setup.credits == [WINDOW_BYTES // 4]
    setup.stream.close(KvError("enough"))
    assert isinstance(setup.links[0].heard[-1], codec.WatchCancel)
    await asyncio.sleep(0)


def test_closing_it_after_its_loop_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the garbage collector may; nothing can be sent any more, and nobody reads it."""
    setup = Setup()
    setup.stand(1)
    heard = list(setup.links[0].heard)
    monkeypatch.setattr(setup.stream.loop, "is_closed", lambda: True)
    setup.stream.close(KvError("enough"))
    assert setup.links[0].heard == heard


def test_an_ended_watch_asks_nobody_any_more() -> None:
    setup = Setup()
    setup.stand(1)
    for revision in range(1, 11):
        setup.tell(revision, event(revision), size_bytes=WINDOW_BYTES // 10)
    setup.lose()
    setup.time.advance(10 * TIMEOUT_S)
    assert setup.stream.error is None, "its reader is slow; nobody was asked in vain"
    setup.stream.close(KvError("enough"))
    setup.stream.taken(WINDOW_BYTES)
    assert not setup.links[1].heard
