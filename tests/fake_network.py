"""A network and a clock of their own: nodes in one process, in virtual time, with everything that can happen on a wire.

`VirtualTime` is clock and scheduler: nothing happens but when `advance` or `run_until` is called, and then in an order
that depends on nothing but the calls made. `FakeNetwork.host(name)` is the `Network` of one node.

What it does as TCP does: bytes of one direction arrive in order and unchanged or not at all; what is sent while the
wire is cut arrives after it heals, if both ends still wait; a closed stream's last bytes still arrive; a stream that is
aborted, or whose host crashed, is lost at the other side. What it does not do: slow start, windows, reordering
across one stream.
"""

from __future__ import annotations

import asyncio
import errno
import heapq
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


class _Timer:
    __slots__ = ("args", "callback")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args

    def cancel(self) -> None:
        self.callback, self.args = None, ()


class VirtualTime:
    """`Clock` and `Scheduler`. `run_in_thread` runs the work at once and reports after `thread_s`."""

    def __init__(self, wall_ms: int = 1_700_000_000_000, thread_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.thread_s = thread_s
        self._wall_ms = wall_ms
        self._due: list[tuple[float, int, _Timer]] = []
        self._count = 0

    def monotonic(self) -> float:
        return self.now_s

    def wall_ms(self) -> int:
        return self._wall_ms + int(self.now_s * 1000)

    def call_soon(self, callback: Callable[..., object], *args: Any) -> _Timer:
        return self.call_later(0.0, callback, *args)

    def call_later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> _Timer:
        timer = _Timer(callback, args)
        self._count += 1
        heapq.heappush(self._due, (self.now_s + max(0.0, delay_s), self._count, timer))
        return timer

    def run_in_thread(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        try:
            result, error = work(), None
        except Exception as raised:
            result, error = None, raised
        self.call_later(self.thread_s, done, result, error)

    def _step(self, until_s: float) -> bool:
        if not self._due or self._due[0][0] > until_s:
            return False
        at_s, _, timer = heapq.heappop(self._due)
        self.now_s = max(self.now_s, at_s)
        if timer.callback is not None:
            timer.callback(*timer.args)
        return True

    def advance(self, delay_s: float) -> None:
        """Let everything happen that is due within `delay_s` from now."""
        until_s = self.now_s + delay_s
        while self._step(until_s):
            pass
        self.now_s = until_s

    def run_until(self, condition: Callable[[], object], within_s: float = 10.0) -> float:
        """Let things happen until the condition holds; returns how long that took. AssertionError past the limit."""
        began_s = self.now_s
        while not condition():
            assert self._step(began_s + within_s), f"not so within {within_s} virtual seconds"
        return self.now_s - began_s


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("the coroutine waits for something")


class _Stream(asyncio.Transport):
    """One end of a stream. Bytes wait in `_outbox` until the wire takes them."""

    def __init__(self, network: FakeNetwork, host: str, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.network = network
        self.host = host
        self.protocol = protocol
        self.other: _Stream
        self.is_lost = False
        self._outbox: list[bytes] = []
        self._outbox_bytes = 0
        self._inbox: list[bytes] = []
        self._inbox_bytes = 0
        self._is_closing = self._is_reading_paused = self._is_writing_paused = self._is_pumping = False
        self._has_ended = False  # the other side closed: the end comes after what is in the inbox
        self._high, self._low = 64 * 1024, 16 * 1024

    def write(self, data: bytes | bytearray | memoryview[int]) -> None:
        if self._is_closing or not data:
            return
        self._outbox.append(bytes(data))
        self._outbox_bytes += len(data)
        if self._outbox_bytes > self._high and not self._is_writing_paused:
            self._is_writing_paused = True
            self.protocol.pause_writing()
        self.pump()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[int]]) -> None:
        self.write(b"".join(list_of_data))

    def pump(self) -> None:
        """Put what waits onto the wire, when the wire next takes something."""
        if not self._is_pumping and (self._outbox or self._is_closing) and not self.is_lost:
            self._is_pumping = True
            self.network.time.call_later(self.network.latency_s, self._deliver)

    def _deliver(self) -> None:
        self._is_pumping = False
        if self.is_lost:
            return
        if self.network.is_cut(self.host, self.other.host):
            self.network.waiting.append(self)
            return
        if self.other.is_lost:
            self._lose(ConnectionResetError(errno.ECONNRESET, "connection reset"))
            return
        # No more than the other side has room for: a reader that stands still fills its window, then ours.
        while self._outbox and self.other._inbox_bytes < self.network.window_bytes:
            data = self._outbox.pop(0)
            self._outbox_bytes -= len(data)
            self.other._inbox.append(data)
            self.other._inbox_bytes += len(data)
        self.other.deliver_inbox()
        if self.is_lost:
            return
        if self._is_writing_paused and self._outbox_bytes <= self._low:
            self._is_writing_paused = False
            self.protocol.resume_writing()
        if self._is_closing and not self._outbox:
            self._lose(None)
            self.other._has_ended = True
            self.other.deliver_inbox()

    def deliver_inbox(self) -> None:
        while self._inbox and not self._is_reading_paused and not self.is_lost:
            data = self._inbox.pop(0)
            self._inbox_bytes -= len(data)
            if not self._is_closing:
                self.protocol.data_received(self.network.corrupt(self.other.host, self.host, data))
        if self._has_ended and not self._inbox and not self.is_lost:
            self.lose_soon(None)

    def _lose(self, error: Exception | None) -> None:
        if not self.is_lost:
            self.is_lost = self._is_closing = True
            self.network.streams.pop(self, None)
            self.protocol.connection_lost(error)

    def lose_soon(self, error: Exception | None) -> None:
        self._is_closing = True
        self.network.time.call_soon(self._lose, error)

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self.pump()

    def abort(self) -> None:
        if not self.is_lost:
            self.lose_soon(None)
            self.network.reset(self)

    def is_closing(self) -> bool:
        return self._is_closing

    def get_write_buffer_size(self) -> int:
        return self._outbox_bytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high if high is not None else 64 * 1024
        self._low = low if low is not None else self._high // 4

    def pause_reading(self) -> None:
        self._is_reading_paused = True

    def resume_reading(self) -> None:
        self._is_reading_paused = False
        self.network.time.call_soon(self._read_again)

    def _read_again(self) -> None:
        self.deliver_inbox()
        self.other.pump()


class _Listener:
    def __init__(self, network: FakeNetwork, address: str) -> None:
        self._network = network
        self.address = address

    def close(self) -> None:
        self._network.listeners.pop(self.address, None)


class _HostNetwork:
    """The `Network` of one host."""

    def __init__(self, network: FakeNetwork, host: str) -> None:
        self._network = network
        self._host = host

    async def listen(self, address: str, factory: Callable[[], asyncio.Protocol]) -> _Listener:
        if address in self._network.listeners:
            raise OSError(errno.EADDRINUSE, "address already in use")
        self._network.listeners[address] = (self._host, factory)
        return _Listener(self._network, address)

    def connect(
        self,
        address: str,
        factory: Callable[[], asyncio.Protocol],
        failed: Callable[[OSError], None],
        timeout_s: float,
    ) -> None:
        network, time = self._network, self._network.time
        there, accept = network.listeners.get(address, ("", None))
        if there and (network.is_cut(self._host, there) or network.is_cut(there, self._host)):
            time.call_later(timeout_s, failed, TimeoutError("the connection attempt timed out"))
        elif accept is None:
            time.call_soon(failed, ConnectionRefusedError(errno.ECONNREFUSED, "connection refused"))
        else:
            time.call_later(network.latency_s, self._connected, address, factory, failed)

    def _connected(
        self, address: str, factory: Callable[[], asyncio.Protocol], failed: Callable[[OSError], None]
    ) -> None:
        there, accept = self._network.listeners.get(address, ("", None))
        if accept is None:
            failed(ConnectionRefusedError(errno.ECONNREFUSED, "connection refused"))
            return
        ours = _Stream(self._network, self._host, factory())
        theirs = _Stream(self._network, there, accept())
        ours.other, theirs.other = theirs, ours
        self._network.streams.update({ours: None, theirs: None})
        theirs.protocol.connection_made(theirs)
        ours.protocol.connection_made(ours)


class FakeNetwork:
    """All hosts and the wires between them. `latency_s` holds for every wire."""

    def __init__(self, time: VirtualTime, latency_s: float = 0.0005, window_bytes: int = 256 * 1024) -> None:
        self.time = time
        self.latency_s = latency_s
        self.window_bytes = window_bytes
        self.listeners: dict[str, tuple[str, Callable[[], asyncio.Protocol]]] = {}
        self.streams: dict[_Stream, None] = {}  # a set would forget the order
        self.waiting: list[_Stream] = []  # ends whose bytes wait for a cut wire
        self._cuts: set[tuple[str, str]] = set()
        # May change the bytes on their way: (from host, to host, bytes) -> bytes.
        self.corrupt: Callable[[str, str, bytes], bytes] = lambda here, there, data: data

    def host(self, name: str) -> _HostNetwork:
        return _HostNetwork(self, name)

    def is_cut(self, here: str, there: str) -> bool:
        return (here, there) in self._cuts

    def cut(self, here: str, there: str, one_way: bool = False) -> None:
        """Let nothing through from `here` to `there`, and back unless `one_way`. Neither side is told."""
        self._cuts.add((here, there))
        if not one_way:
            self._cuts.add((there, here))

    def heal(self) -> None:
        """All wires work again, and deliver what waited."""
        self._cuts.clear()
        waiting, self.waiting = self.waiting, []
        for stream in waiting:
            stream.pump()

    def reset(self, stream: _Stream) -> None:
        """The other end of a stream learns that it is gone, if it can be reached."""
        if not stream.other.is_lost and not self.is_cut(stream.host, stream.other.host):
            self.time.call_later(
                self.latency_s, stream.other._lose, ConnectionResetError(errno.ECONNRESET, "connection reset")
            )

    def break_streams(self, here: str, there: str) -> int:
        """Reset every stream between two hosts, at both ends; returns how many."""
        broken = [stream for stream in self.streams if {stream.host, stream.other.host} == {here, there}]
        for stream in broken:
            stream.lose_soon(ConnectionResetError(errno.ECONNRESET, "connection reset"))
        return len(broken) // 2
