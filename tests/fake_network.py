"""A network and a clock of their own: nodes in one process, in virtual time, with everything that can happen on a wire.

`FakeNetwork.host(name)` is the `Network` of one host; the clock is `virtual_time.VirtualTime`.

What it does as TCP does: bytes of one direction arrive in order and unchanged or not at all; what is sent while the
wire is cut arrives after it heals, if both ends still wait; a closed stream's last bytes still arrive; a stream that is
aborted, or whose host crashed, is lost at the other side; bytes for a stream that its host no longer knows are answered
by a reset. Each direction between two hosts has its conditions (`set_link`): latency, jitter, bytes per second.

A host is a kernel, and a process on it that may be slow, dead, or die at any moment:

- Every call into the code of a host goes through `enter`, which may decide not to call. (But `pause_writing`, which
  happens inside a call of that code to `write`.)
- Nothing reaches a host's code, and nothing that it writes departs, before `ready_at` says so.
- `kill` ends its process: it hears nothing any more. Its kernel tells the other ends, unless the power went with it;
  then they hear nothing until there is a kernel again (`revive`), which answers what still comes for dead streams.

What it does not do: slow start, reordering, loss of single packets (TCP has mended all that before a process sees it).
A stream that is closed is let go of at once where the kernel would take what it still has to send.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from random import Random
from typing import Any, Final, Protocol, TypeVar

from tests.virtual_time import VirtualTime

__all__ = ["FakeNetwork", "VirtualTime", "run"]

T = TypeVar("T")
Failed = Callable[[OSError], None]
Factory = Callable[[], asyncio.Protocol]
Enter = Callable[..., None]


class _Chance(Protocol):
    def random(self) -> float: ...


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("the coroutine waits for something")


def _always_ready(host: str) -> float:
    return 0.0


def _just_call(host: str, callback: Callable[..., object], *args: Any) -> None:
    callback(*args)


def _as_it_is(here: str, there: str, data: bytes) -> bytes:
    return data


def _reset() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "connection reset")


class _Mark:
    """What travels on a wire beside bytes."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


_END: Final = _Mark("end")  # the other side closed
_RESET: Final = _Mark("reset")  # the other side's process died; its kernel says so until it is heard


class _Link:
    """One direction between two hosts."""

    __slots__ = ("bytes_per_s", "free_at_s", "jitter_s", "latency_s")

    def __init__(self) -> None:
        self.latency_s: float | None = None
        self.jitter_s = 0.0
        self.bytes_per_s: float | None = None
        self.free_at_s = 0.0  # when it has put everything onto the wire that it was given so far

    def arrival_s(self, departs_s: float, size_bytes: int, network: FakeNetwork) -> float:
        """When something that departs then arrives; to be asked once for each thing that is sent."""
        if self.bytes_per_s is not None:
            departs_s = max(departs_s, self.free_at_s) + size_bytes / self.bytes_per_s
            self.free_at_s = departs_s
        if self.jitter_s:
            departs_s += self.jitter_s * network.chance.random()
        return departs_s + (network.latency_s if self.latency_s is None else self.latency_s)


class _Stream(asyncio.Transport):
    """One end of a stream. What it sends waits in `_outbox` until the other end takes it."""

    def __init__(self, network: FakeNetwork, host: str, there: str) -> None:
        super().__init__()
        self.network = network
        self.host = host
        self.protocol: Any = None  # none until its process has accepted the stream
        self.other: _Stream
        self.is_lost = False
        self._link = network.link(host, there)
        self._outbox: deque[tuple[float, float, bytes | _Mark]] = deque()  # (arrives, departs, what)
        self._outbox_bytes = 0  # in `_outbox`
        self._last_arrival_s = 0.0
        self._inbox: deque[bytes] = deque()  # arrived while its reader paused
        self._inbox_bytes = 0
        self._is_closing = self._is_reading_paused = self._is_writing_paused = False
        self._is_scheduled = False  # a delivery is due
        self._is_waiting = False  # for a wire or a kernel
        self._is_mute = False  # its kernel is gone: nothing is sent again
        self._has_ended = False  # the other side closed: the end comes after what is in the inbox
        self._high, self._low = 64 * 1024, 16 * 1024

    # --- what its process calls ---------------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview[int]) -> None:
        if self._is_closing or not data:
            return
        self._outbox_bytes += len(data)
        self._send(data if type(data) is bytes else bytes(data), len(data))
        if self._outbox_bytes > self._high and not self._is_writing_paused:
            self._is_writing_paused = True
            self.protocol.pause_writing()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview[int]]) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._send(_END, 0)
            if self._outbox_bytes <= self._high:
                self.lose_soon(None)  # else when the other end has taken enough of it

    def abort(self) -> None:
        if not self.is_lost:
            self._drop_sent()
            self.network.reset(self)
            self.lose_soon(None)

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

    # --- sending ------------------------------------------------------------------------------------------------------

    def _send(self, what: bytes | _Mark, size_bytes: int) -> None:
        network = self.network
        departs_s = network.time.now_s
        if (ready_s := network.ready_at(self.host)) > departs_s:
            departs_s = ready_s
        self._put_on_the_wire(what, size_bytes, departs_s)

    def _put_on_the_wire(self, what: bytes | _Mark, size_bytes: int, departs_s: float) -> None:
        arrives_s = self._link.arrival_s(departs_s, size_bytes, self.network)
        if arrives_s < self._last_arrival_s:
            arrives_s = self._last_arrival_s
        else:
            self._last_arrival_s = arrives_s
        self._outbox.append((arrives_s, departs_s, what))
        if not self._is_scheduled and not self._is_waiting:
            self._is_scheduled = True
            self.network.time.call_at(arrives_s, self._deliver)

    def deliver_at(self, at_s: float) -> None:
        if self._outbox and not self._is_scheduled:
            self._is_scheduled = True
            self.network.time.call_at(at_s, self._deliver)

    def send_again(self) -> None:
        """What waited for a wire or a kernel is sent again."""
        self._is_waiting = False
        self.deliver_at(self.network.time.now_s + self.network.latency_of(self._link))

    def _deliver(self) -> None:
        """Hand to the other end what has arrived by now."""
        self._is_scheduled = False
        sent, target, network = self._outbox, self.other, self.network
        here, there, now_s = self.host, target.host, network.time.now_s
        ready_at, enter = network.ready_at, network.enter
        if not sent:
            return
        if there in network.down or network.is_cut(here, there):
            self._cannot_be_delivered()
            return
        while sent and sent[0][0] <= now_s:
            if target.is_lost:
                if there in network.down:  # since a moment ago
                    self._cannot_be_delivered()
                    return
                self._is_unknown()
                break
            if target.protocol is None:
                return  # `accepted` comes here again
            if (ready_s := ready_at(there)) > now_s:
                self.deliver_at(ready_s)
                return
            what = sent[0][2]
            if type(what) is not bytes:
                sent.popleft()
                if what is _END:
                    target._has_ended = True
                    target._read()
                else:
                    target.lose(_reset())
            elif target._is_reading_paused or target._inbox:
                # No more than there is room for: a reader that stands still fills its window, then our outbox.
                if target._inbox_bytes >= network.window_bytes:
                    if self._is_mute:
                        self._drop_sent()
                    break  # `_read_again` of the other end comes here again
                sent.popleft()
                self._outbox_bytes -= len(what)
                target._inbox.append(what)
                target._inbox_bytes += len(what)
            else:
                sent.popleft()
                self._outbox_bytes -= len(what)
                if not target._is_closing:
                    if network.corrupt is not _as_it_is:
                        what = network.corrupt(here, there, what)
                    enter(there, target.protocol.data_received, what)
        else:
            if sent:
                self.deliver_at(sent[0][0])
        if self._is_closing or self._is_writing_paused:
            self._has_room()

    def _has_room(self) -> None:
        """The other end took something."""
        if self.is_lost:
            if not self._outbox:
                self.network.lingering.pop(self, None)
        elif self._outbox_bytes <= self._low and self._is_writing_paused:
            self.network.call(self.host, self._resume_writing)
        elif self._outbox_bytes <= self._high and self._is_closing:
            self.lose_soon(None)

    def _resume_writing(self) -> None:
        if self._is_writing_paused and self._outbox_bytes <= self._low and not self.is_lost:
            self._is_writing_paused = False
            self.protocol.resume_writing()
            if self._is_closing:
                self.lose_soon(None)

    def _cannot_be_delivered(self) -> None:
        """The wire is cut, or the other host is off: what has a kernel behind it is sent again until it arrives."""
        if self._is_mute:
            self._drop_arrived()
            self.deliver_at(self._outbox[0][0] if self._outbox else 0.0)
        elif not self._is_waiting:
            self._is_waiting = True
            self.network.waiting.append(self)

    def _is_unknown(self) -> None:
        """The other host knows of no such stream, and says so where it was sent more than a reset."""
        expects_an_answer = any(what is not _RESET for _, _, what in self._outbox)
        self._drop_sent()
        if expects_an_answer and not self.is_lost:
            self.network.reset(self.other)

    def _drop_sent(self) -> None:
        self._outbox.clear()
        self._outbox_bytes = 0

    def _drop_arrived(self) -> None:
        """Of a host that cannot send it again: what would have arrived by now is lost."""
        now_s, sent = self.network.time.now_s, self._outbox
        while sent and sent[0][0] <= now_s:
            sent.popleft()
        if not sent:
            self.network.lingering.pop(self, None)

    # --- receiving ----------------------------------------------------------------------------------------------------

    def accepted(self) -> None:
        """It has its protocol now: what came before that can be read."""
        self.other.deliver_at(0.0)

    def _read(self) -> None:
        """Give to the process what is in the inbox, and then the end."""
        network, here, there = self.network, self.host, self.other.host
        while self._inbox and not self._is_reading_paused and not self.is_lost:
            if (ready_s := network.ready_at(here)) > network.time.now_s:
                network.time.call_at(ready_s, self._read_again)
                return
            data = self._inbox.popleft()
            self._inbox_bytes -= len(data)
            if not self._is_closing:
                network.enter(here, self.protocol.data_received, network.corrupt(there, here, data))
        if self._has_ended and not self._inbox and not self.is_lost:
            self._has_ended = False
            network.call(here, self._end)

    def _end(self) -> None:
        """In its process: the other side closed, and so does this one, as asyncio does, unless its protocol objects."""
        if not self._is_closing and not self.is_lost and not self.protocol.eof_received():
            self.close()

    def _read_again(self) -> None:
        self._read()
        if not self._is_reading_paused:
            self.other.deliver_at(0.0)

    # --- its end ------------------------------------------------------------------------------------------------------

    def lose(self, error: Exception | None) -> None:
        if self.is_lost:
            return
        network = self.network
        if (ready_s := network.ready_at(self.host)) > network.time.now_s:
            network.time.call_at(ready_s, self.lose, error)
            return
        self._forget()
        if error is not None:
            self._drop_sent()
        if self._outbox:
            network.lingering[self] = None
        if self.protocol is not None:
            network.enter(self.host, self.protocol.connection_lost, error)

    def lose_soon(self, error: Exception | None) -> None:
        self._is_closing = True
        self.network.time.call_soon(self.lose, error)

    def vanish(self, silently: bool) -> None:
        """Its process is gone, and maybe its kernel too. Nobody here is told."""
        now_s, sent = self.network.time.now_s, self._outbox
        knew_it = not self.is_lost
        self._forget()
        self.protocol = None
        self._inbox.clear()
        self._inbox_bytes = 0
        while sent and sent[-1][1] > now_s:  # it never came to send this
            knew_it = True
            what = sent.pop()[2]
            self._outbox_bytes -= len(what) if type(what) is bytes else 0
        self._last_arrival_s = sent[-1][0] if sent else 0.0
        if silently:
            self._is_mute = True
            # What would have to be sent again is lost.
            if self.other.host in self.network.down or self.network.is_cut(self.host, self.other.host):
                self._cannot_be_delivered()
            elif self.other._inbox_bytes >= self.network.window_bytes:
                self._drop_sent()
        elif knew_it:
            self._put_on_the_wire(_RESET, 0, now_s)
        if sent:
            self.network.lingering[self] = None
        else:
            self.network.lingering.pop(self, None)

    def _forget(self) -> None:
        self.is_lost = self._is_closing = True
        self.network.streams.pop(self, None)


class _Listener:
    def __init__(self, network: FakeNetwork, address: str) -> None:
        self._network = network
        self._entry = network.listeners[address]
        self.address = address

    def close(self) -> None:
        if self._network.listeners.get(self.address) is self._entry:
            del self._network.listeners[self.address]


class _HostNetwork:
    """The `Network` of one host."""

    def __init__(self, network: FakeNetwork, host: str) -> None:
        self._network = network
        self._host = host

    async def listen(self, address: str, factory: Factory) -> _Listener:
        if address in self._network.listeners:
            raise OSError(errno.EADDRINUSE, "address already in use")
        self._network.listeners[address] = (self._host, factory)
        self._network.hosts_of[address] = self._host
        return _Listener(self._network, address)

    def connect(self, address: str, factory: Factory, failed: Failed, timeout_s: float) -> None:
        attempt = _Attempt(self._network, self._host, address, factory, failed, timeout_s)
        self._network.time.call_at(attempt.arrives_s, attempt.arrived)


class _Attempt:
    """Somebody connects."""

    __slots__ = ("address", "arrives_s", "ends_s", "factory", "failed", "here", "life", "link_back", "network", "there")

    def __init__(
        self, network: FakeNetwork, here: str, address: str, factory: Factory, failed: Failed, timeout_s: float
    ) -> None:
        self.network = network
        self.here, self.there = here, network.hosts_of.get(address, address.rpartition(":")[0])
        self.life = network.lives.get(here, 0)
        self.address = address
        self.factory = factory
        self.failed = failed
        departs_s = max(network.time.now_s, network.ready_at(here))
        self.link_back = network.link(self.there, here)
        self.arrives_s = network.link(here, self.there).arrival_s(departs_s, 0, network)
        self.ends_s = departs_s + timeout_s

    def arrived(self) -> None:
        network = self.network
        answered_s = network.time.now_s + network.latency_of(self.link_back)
        is_heard = not (
            network.is_cut(self.here, self.there) or network.is_cut(self.there, self.here) or self.there in network.down
        )
        if not is_heard or answered_s > self.ends_s:
            network.time.call_at(self.ends_s, self._fail, TimeoutError("the connection attempt timed out"))
            return
        host, accept = network.listeners.get(self.address, ("", None))
        if accept is None:
            network.time.call_at(
                answered_s, self._fail, ConnectionRefusedError(errno.ECONNREFUSED, "connection refused")
            )
            return
        if self.life != network.lives.get(self.here, 0):
            return
        ours, theirs = _Stream(network, self.here, host), _Stream(network, host, self.here)
        ours.other, theirs.other = theirs, ours
        network.streams.update({ours: None, theirs: None})
        # The other side's kernel accepts at once, whatever its process is at.
        network.call(host, _made, theirs, accept, None)
        network.call(self.here, _made, ours, self.factory, self.failed)

    def _fail(self, error: OSError) -> None:
        if self.life == self.network.lives.get(self.here, 0):
            self.network.call(self.here, self.failed, error)


def _made(stream: _Stream, factory: Factory, failed: Failed | None) -> None:
    """In the process of one end: it hears of its stream."""
    if not stream.is_lost:
        stream.protocol = factory()
        stream.protocol.connection_made(stream)
        stream.accepted()
    elif failed is not None:
        failed(_reset())


class FakeNetwork:
    """All hosts and the wires between them. `latency_s` holds for every wire that has none of its own."""

    def __init__(
        self,
        time: VirtualTime,
        latency_s: float = 0.0005,
        window_bytes: int = 256 * 1024,
        chance: _Chance | None = None,
    ) -> None:
        self.time = time
        self.latency_s = latency_s
        self.window_bytes = window_bytes
        self.chance: _Chance = chance or Random(0)
        # When a host's code runs again, in virtual seconds; anything in the past means that it does.
        self.ready_at: Callable[[str], float] = _always_ready
        # Calls into a host's code: (host, callback, *args).
        self.enter: Enter = _just_call
        # May change the bytes on their way: (from host, to host, bytes) -> bytes.
        self.corrupt: Callable[[str, str, bytes], bytes] = _as_it_is
        self.listeners: dict[str, tuple[str, Factory]] = {}
        self.hosts_of: dict[str, str] = {}  # address -> the host that listened there last
        self.streams: dict[_Stream, None] = {}  # a set would forget the order
        self.lingering: dict[_Stream, None] = {}  # ends that no process has any more, with something left to deliver
        self.waiting: list[_Stream] = []  # ends whose bytes wait for a wire or a kernel
        self.down: set[str] = set()  # hosts without a kernel
        self.lives: dict[str, int] = {}  # how often each host's process was killed
        self._links: dict[tuple[str, str], _Link] = {}
        self._cuts: set[tuple[str, str]] = set()

    def host(self, name: str) -> _HostNetwork:
        return _HostNetwork(self, name)

    # --- wires --------------------------------------------------------------------------------------------------------

    def is_cut(self, here: str, there: str) -> bool:
        return bool(self._cuts) and (here, there) in self._cuts

    def cut(self, here: str, there: str, one_way: bool = False) -> None:
        """Let nothing through from `here` to `there`, and back unless `one_way`. Neither side is told."""
        self._cuts.add((here, there))
        if not one_way:
            self._cuts.add((there, here))

    def uncut(self, here: str, there: str, one_way: bool = False) -> None:
        """The wire from `here` to `there` works again, and the one back unless `one_way`, and deliver what waited."""
        self._cuts.discard((here, there))
        if not one_way:
            self._cuts.discard((there, here))
        self._send_again()

    def heal(self) -> None:
        """All wires work again, as they did at first, and deliver what waited."""
        self._cuts.clear()
        for here, there in self._links:
            self.clear_link(here, there)
        self._send_again()

    def set_link(
        self,
        here: str,
        there: str,
        *,
        latency_s: float | None = None,
        jitter_s: float | None = None,
        bytes_per_s: float | None = None,
    ) -> None:
        """The conditions from `here` to `there` from now on, for all streams together; None is what is usual. Jitter
        is added to the latency of each write, and is equally likely to be anything up to `jitter_s`."""
        link = self.link(here, there)
        link.latency_s, link.jitter_s, link.bytes_per_s = latency_s, jitter_s or 0.0, bytes_per_s
        link.free_at_s = 0.0

    def clear_link(self, here: str, there: str) -> None:
        self.set_link(here, there)

    def break_streams(self, here: str, there: str) -> int:
        """Reset every stream between two hosts, at both ends; returns how many."""
        broken = [stream for stream in self.streams if {stream.host, stream.other.host} == {here, there}]
        for stream in broken:
            stream.lose_soon(_reset())
        return len(broken) // 2

    # --- hosts --------------------------------------------------------------------------------------------------------

    def kill(self, host: str, *, silently: bool) -> None:
        """The process on `host` is gone, with its streams and listeners, and hears nothing of it. The other ends get a
        reset, or hear nothing if the power went (`silently`). What it wrote is on its way, as far as it departed."""
        self.lives[host] = self.lives.get(host, 0) + 1
        for address in [address for address, (there, _) in self.listeners.items() if there == host]:
            del self.listeners[address]
        if silently:
            self.down.add(host)
        for stream in [stream for stream in {**self.streams, **self.lingering} if stream.host == host]:
            stream.vanish(silently)

    def revive(self, host: str) -> None:
        """The machine has booted: what comes for streams that it no longer knows is answered by a reset."""
        self.down.discard(host)
        self._send_again()
        for stream in {**self.streams, **self.lingering}:
            if stream.other.host == host:  # the other kernels have been asking whether there is room now
                stream.send_again()

    # --- for streams --------------------------------------------------------------------------------------------------

    def link(self, here: str, there: str) -> _Link:
        link = self._links.get((here, there))
        if link is None:
            link = self._links[here, there] = _Link()
        return link

    def latency_of(self, link: _Link) -> float:
        return self.latency_s if link.latency_s is None else link.latency_s

    def call(self, host: str, callback: Callable[..., object], *args: Any) -> None:
        """Enter a host's code, as soon as it is ready, if it lives until then."""
        if (ready_s := self.ready_at(host)) > self.time.now_s:
            self.time.call_at(ready_s, self._call_if, self.lives.get(host, 0), host, callback, *args)
        else:
            self.enter(host, callback, *args)

    def _call_if(self, life: int, host: str, callback: Callable[..., object], *args: Any) -> None:
        if life == self.lives.get(host, 0):
            self.call(host, callback, *args)

    def reset(self, stream: _Stream) -> None:
        """The host of `stream` says, once, that it does not have it: the other end is lost if it hears that."""
        now_s = max(self.time.now_s, self.ready_at(stream.host))
        arrives_s = max(stream._link.arrival_s(now_s, 0, self), stream._last_arrival_s)
        self.time.call_at(arrives_s, self._reset_arrives, stream)

    def _reset_arrives(self, stream: _Stream) -> None:
        if not self.is_cut(stream.host, stream.other.host):
            stream.other.lose(_reset())

    def _send_again(self) -> None:
        waiting, self.waiting = self.waiting, []
        for stream in waiting:
            stream.send_again()
