"""When a client gives a silent stream up, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from kvstore.client.protocol import SILENT_LOOKS_MAX, ClientProtocol
from kvstore.codec import StatusRequest
from tests.fake_network import VirtualTime
from tests.simulation.loop import VirtualLoop

SILENCE_S = 2.0


class Wire(asyncio.Transport):
    """Takes `room_bytes` at once, as a system does; the rest waits, and leaves when the test says so."""

    def __init__(self, room_bytes: int = 1 << 20) -> None:
        super().__init__()
        self.room_bytes = room_bytes
        self.waiting_bytes = 0
        self.is_aborted = False

    def write(self, data: bytes | bytearray | memoryview[int]) -> None:
        taken = min(len(data), self.room_bytes)
        self.room_bytes -= taken
        self.waiting_bytes += len(data) - taken

    def get_write_buffer_size(self) -> int:
        return self.waiting_bytes

    def abort(self) -> None:
        self.is_aborted = True


class Asker:
    """Sends requests that nobody answers."""

    def __init__(self, wire: Wire) -> None:
        self.time = VirtualTime()
        self.wire = wire
        ids = itertools.count(1).__next__
        loop: Any = VirtualLoop(self.time.call_later, self.time.monotonic, self._failed)
        self.protocol = ClientProtocol(loop, ids, lambda _protocol: None, lambda *_end: None, lambda: None, SILENCE_S)
        self.protocol.connection_made(wire)

    @staticmethod
    def _failed(context: dict[str, Any]) -> None:
        raise AssertionError(context)

    def ask(self, request_id: int = 1000) -> None:
        self.protocol.send(StatusRequest(request_id), self)

    def on_frame(self, _frame: object) -> None: ...

    def on_lost(self) -> None: ...


def test_a_stream_that_brings_nothing_is_given_up_in_time() -> None:
    asker = Asker(Wire())
    asker.ask()
    asker.time.advance(SILENCE_S + 0.01)
    assert asker.wire.is_aborted


def test_neither_new_requests_nor_its_own_probe_keep_a_dead_stream_alive() -> None:
    """The system's buffer is full, or it takes all and nobody answers: what only piles up is no sign of life."""
    for room_bytes in (0, 1 << 20):
        asker = Asker(Wire(room_bytes))
        asker.wire.waiting_bytes = 10_000 if not room_bytes else 0
        for number in range(2 * SILENT_LOOKS_MAX):
            asker.ask(1000 + number)
            asker.time.advance(SILENCE_S / SILENT_LOOKS_MAX)
        assert asker.wire.is_aborted


def test_what_leaves_slowly_is_a_sign_of_life() -> None:
    asker = Asker(Wire(0))
    asker.wire.waiting_bytes = 100_000
    asker.ask()
    for _ in range(4 * SILENT_LOOKS_MAX):
        asker.wire.waiting_bytes -= 1_000
        asker.time.advance(SILENCE_S / SILENT_LOOKS_MAX)
    assert not asker.wire.is_aborted
