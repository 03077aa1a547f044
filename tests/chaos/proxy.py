"""A TCP proxy in the path between nodes, and between clients and nodes, that does to the bytes what a bad network does.

A `Door` is a port in front of one node's port. Who comes through a door for peers is told by the first frame of their
handshake, which names the sender (see `kvstore/raft/connection.py`); nothing else is read out of the bytes. All who
come through a door for clients are one party, `CLIENTS`. So there is a rule for each ordered pair of parties, for
what the first sends to the second, on whichever connection and whoever dialled it:

| mode | what happens to bytes under way | meanwhile a new connection of the two | when the rule goes |
|---|---|---|---|
| `PASS` | they arrive; later with `delay_s` ± `jitter_s`, slower with `bytes_per_s` | is made | |
| `HOLD` | they wait, as where TCP repeats what gets no answer | finds nobody, is not refused | they arrive |
| `DROP` | they vanish, and the connection stays | finds nobody, is not refused | the connection is reset |
| `REJECT` | the connection is reset | is closed at once | |

A cut of one direction only is a rule for one of the two ordered pairs; under it no new connection comes to be either,
as no TCP handshake would. `deafen` is the half-open connection: those of the two that exist carry nothing any more,
and are not closed, while new ones work. `reset` ends the existing ones.

Rules
- Order is kept within a direction, whatever the delays.
- What is read and not yet passed on is bounded: `WAITING_BYTES_MAX` a direction, then the source is not read.
- The end of a connection travels like its bytes: behind them, and not at all through a cut.

It does not know time spans, faults or nodes' roles: `tests/chaos/network.py` runs it as a process and tells it rules.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from enum import StrEnum
from typing import cast

import msgspec

# The party that all clients are.
CLIENTS = "clients"
# As much as the kernel's own buffers on loopback hold; a proxy that read on would be a network with endless memory.
WAITING_BYTES_MAX = 1024 * 1024
# A handshake is at most 4 KiB (kvstore/raft/connection.py) and its header.
_HANDSHAKE_BYTES_MAX = 4 * 1024 + 5
_HEADER_BYTES, _PREFIX_BYTES = 5, 8
# A connection that says nothing is of no use to anybody; nodes give up a handshake after 5 s.
_HANDSHAKE_TIMEOUT_S = 30.0


class Mode(StrEnum):
    PASS = "pass"
    HOLD = "hold"
    DROP = "drop"
    REJECT = "reject"


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of the bytes from one party to another."""

    mode: Mode = Mode.PASS
    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0
    """0: as fast as it goes."""


PASS = Rule()
HOLD = Rule(mode=Mode.HOLD)
DROP = Rule(mode=Mode.DROP)
REJECT = Rule(mode=Mode.REJECT)


class Door(msgspec.Struct, frozen=True):
    """`127.0.0.1:port` leads to `127.0.0.1:target_port`, where the party `target` listens: for the other nodes, or for
    clients."""

    target: str
    port: int
    target_port: int
    for_peers: bool


class Counts(msgspec.Struct):
    """What went through so far."""

    connections: int = 0
    open_connections: int = 0
    passed_bytes: int = 0
    dropped_bytes: int = 0
    refused_connections: int = 0


def dialler_of(first_frame: bytes) -> str:
    """The name that a peer's handshake gives. Raises ValueError for what is no handshake."""
    try:
        (_, name, *_), *_ = msgspec.msgpack.decode(first_frame[_HEADER_BYTES + _PREFIX_BYTES :])
    except (msgspec.DecodeError, TypeError, ValueError) as error:
        raise ValueError(f"no peer's handshake: {error}") from None
    if not isinstance(name, str):
        raise ValueError("no peer's handshake: it gives no name")
    return name


class Proxy:
    """See the module. To be used on one event loop."""

    def __init__(self, chance: random.Random | None = None) -> None:
        self.chance = chance or random.Random()  # only jitter is drawn from it
        self.counts = Counts()
        self._servers: dict[int, asyncio.Server] = {}
        self._rules: dict[tuple[str, str], Rule] = {}
        self._wires: dict[_Wire, None] = {}
        self._dialling: set[asyncio.Task[None]] = set()

    # --- doors --------------------------------------------------------------------------------------------------------

    async def open(self, door: Door) -> None:
        loop = asyncio.get_running_loop()
        assert door.port not in self._servers, f"there is a door at port {door.port}"
        self._servers[door.port] = await loop.create_server(lambda: _Wire(self, door).near, "127.0.0.1", door.port)

    async def close(self) -> None:
        """Close all doors and connections."""
        for server in self._servers.values():
            server.close()
        self._servers.clear()
        for task in self._dialling:
            task.cancel()
        await asyncio.gather(*self._dialling, return_exceptions=True)
        for wire in list(self._wires):
            wire.abort()
        while self._wires:  # their ends are told by the loop's next turns
            await asyncio.sleep(0)

    # --- rules --------------------------------------------------------------------------------------------------------

    def rule(self, source: str, target: str) -> Rule:
        return self._rules.get((source, target), PASS)

    def set_rule(self, source: str, target: str, rule: Rule) -> None:
        """From now on, for what `source` sends to `target`."""
        before = self.rule(source, target)
        if rule == PASS:
            self._rules.pop((source, target), None)
        else:
            self._rules[source, target] = rule
        for wire in self._between(source, target):
            wire.rule_changed(source, before)

    def heal(self) -> None:
        """All rules go, and what was made deaf is reset."""
        for source, target in list(self._rules):
            self.set_rule(source, target, PASS)
        for wire in list(self._wires):
            if wire.is_deaf:
                wire.abort()

    def reset(self, one: str, other: str) -> int:
        """End the connections of two parties that exist now; how many there were."""
        found = self._between(one, other)
        for wire in found:
            wire.abort()
        return len(found)

    def deafen(self, one: str, other: str) -> int:
        """The connections of two parties that exist now carry nothing from now on; how many there were."""
        found = self._between(one, other)
        for wire in found:
            wire.deafen()
        return len(found)

    def _between(self, one: str, other: str) -> list[_Wire]:
        return [wire for wire in self._wires if {wire.dialler, wire.door.target} == {one, other}]

    # --- wires call these ---------------------------------------------------------------------------------------------

    def added(self, wire: _Wire) -> None:
        self._wires[wire] = None
        self.counts.connections += 1
        self.counts.open_connections += 1

    def removed(self, wire: _Wire) -> None:
        if self._wires.pop(wire, wire) is None:
            self.counts.open_connections -= 1

    def dial(self, wire: _Wire) -> None:
        task = asyncio.get_running_loop().create_task(self._dial(wire))
        self._dialling.add(task)
        task.add_done_callback(self._dialling.discard)

    async def _dial(self, wire: _Wire) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: wire.far, "127.0.0.1", wire.door.target_port)
        except OSError:
            wire.abort()  # as near as a proxy comes to "connection refused"


class _Wire:
    """One connection through a door: `near` is the end of who dialled, `far` that of the door's target."""

    def __init__(self, proxy: Proxy, door: Door) -> None:
        self.proxy = proxy
        self.door = door
        self.dialler = "" if door.for_peers else CLIENTS
        self.near, self.far = _End(self), _End(self)
        self.near.other, self.far.other = self.far, self.near
        self.is_deaf = False
        """Nothing goes through any more, in either direction, and nothing is closed."""
        self._first = b""
        self._timer: asyncio.TimerHandle | None = None

    def opened(self, end: _End) -> None:
        if end is self.near:
            self.proxy.added(self)
            if self.dialler:
                self._known()
            else:
                self._timer = asyncio.get_running_loop().call_later(_HANDSHAKE_TIMEOUT_S, self.abort)
        elif self.near.is_gone and not self.is_deaf:
            self.abort()
        else:
            self.near.release()

    def handshake(self, data: bytes) -> bytes | None:
        """Bytes of who has not said who it is; all of them so far, once it has."""
        self._first += data
        if len(self._first) < _HEADER_BYTES:
            return None
        size = int.from_bytes(self._first[:4], "big") + _HEADER_BYTES
        if size > _HANDSHAKE_BYTES_MAX:
            self.abort()
            return None
        if len(self._first) < size:
            return None
        try:
            self.dialler = dialler_of(self._first[:size])
        except ValueError:
            self.abort()
            return None
        first, self._first = self._first, b""
        self._known()
        return first

    def _known(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        there = self.proxy.rule(self.dialler, self.door.target).mode
        back = self.proxy.rule(self.door.target, self.dialler).mode
        if Mode.REJECT in (there, back):
            self.proxy.counts.refused_connections += 1
            self.abort()
        elif there is not Mode.PASS or back is not Mode.PASS:
            self.deafen()  # no handshake of TCP would have come through: nobody is dialled
        else:
            self.proxy.dial(self)

    def rule(self, source: _End) -> Rule:
        ends = (self.dialler, self.door.target)
        return self.proxy.rule(*(ends if source is self.near else reversed(ends)))

    def rule_changed(self, source: str, before: Rule) -> None:
        end = self.near if source == self.dialler else self.far
        mode = self.rule(end).mode
        if mode is Mode.REJECT:
            self.proxy.counts.refused_connections += 1
            self.abort()
        elif before.mode in (Mode.DROP, Mode.HOLD) and mode is Mode.PASS and (self.is_deaf or end.has_dropped):
            self.abort()  # a stream with a gap in it is none, and what was never connected cannot be now
        else:
            end.release()

    def deafen(self) -> None:
        self.is_deaf = True
        self.near.drop_waiting()
        self.far.drop_waiting()

    def abort(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.is_deaf = True
        self.near.abort()
        self.far.abort()

    def ended(self) -> None:
        if self.near.is_closed and self.far.is_closed:
            if self._timer is not None:
                self._timer.cancel()
            self.proxy.removed(self)


class _End(asyncio.Protocol):
    """One end of a wire: reads what its party sends, and passes that to the other end."""

    other: _End

    def __init__(self, wire: _Wire) -> None:
        self.wire = wire
        self.has_dropped = False
        self.is_gone = False
        """Its party has closed."""
        self._transport: asyncio.Transport | None = None
        self._is_aborted = False
        self._waiting: deque[tuple[float, bytes]] = deque()  # when it is due, and what
        self._waiting_bytes = 0
        self._last_due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_paused = False
        self._other_is_full = False

    @property
    def is_closed(self) -> bool:
        """True if there is no connection with its party: no more, or (of the far end) not yet and never again."""
        return self.is_gone or (self._transport is None and self._is_aborted) or self._never_connects

    @property
    def _never_connects(self) -> bool:
        return self._transport is None and self is self.wire.far and self.wire.near.is_gone and self.wire.is_deaf

    @property
    def way(self) -> asyncio.Transport | None:
        """Where to write what is for its party, if there is a connection with it now."""
        transport = self._transport
        return None if transport is None or self.is_gone or transport.is_closing() else transport

    # --- asyncio calls these ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._is_aborted:
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=WAITING_BYTES_MAX)
        self.wire.opened(self)

    def data_received(self, data: bytes) -> None:
        wire = self.wire
        if not wire.dialler:
            first = wire.handshake(data)
            if first is None:
                return
            data = first
        counts = wire.proxy.counts
        if wire.is_deaf or self.other.is_gone:
            counts.dropped_bytes += len(data)
            return
        rule = wire.rule(self)
        if rule.mode is Mode.DROP:
            self.has_dropped = True
            counts.dropped_bytes += len(data)
            return
        other = self.other.way
        if rule is PASS and not self._waiting and other is not None:
            counts.passed_bytes += len(data)
            other.write(data)
            return
        now = asyncio.get_running_loop().time()
        self._last_due = max(now + self._delay_s(rule), self._last_due)
        if rule.bytes_per_s:
            self._last_due += len(data) / rule.bytes_per_s
        self._waiting.append((self._last_due, data))
        self._waiting_bytes += len(data)
        self.release()

    def eof_received(self) -> bool:
        return False  # close: nobody here sends after the other's end

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_gone = True
        if not self._waiting:
            self._pass_on_end()
        self.wire.ended()

    def pause_writing(self) -> None:
        self.other._other_is_full = True
        self.other._pace()

    def resume_writing(self) -> None:
        self.other._other_is_full = False
        self.other._pace()

    # --- what waits ---------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Pass on what is due, if nothing holds it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        mode = self.wire.rule(self).mode
        if mode is Mode.DROP and self._waiting:
            self.has_dropped = True
            self.drop_waiting()
        if self.other.is_gone:
            self.drop_waiting()  # its party has closed, which who sends has not heard through the cut
        other = self.other.way
        if mode is Mode.PASS and other is not None and self._waiting:
            loop = asyncio.get_running_loop()
            now = loop.time()
            ready: list[bytes] = []
            while self._waiting and self._waiting[0][0] <= now:
                ready.append(self._waiting.popleft()[1])
            data = b"".join(ready)
            self._waiting_bytes -= len(data)
            self.wire.proxy.counts.passed_bytes += len(data)
            other.write(data)
            if self._waiting:
                self._timer = loop.call_at(self._waiting[0][0], self.release)
        if mode is Mode.PASS and self.is_gone and not self._waiting:
            self._pass_on_end()
        self._pace()

    def drop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.wire.proxy.counts.dropped_bytes += self._waiting_bytes
        self._waiting.clear()
        self._waiting_bytes = 0
        self._pace()

    def abort(self) -> None:
        self._is_aborted = True
        self.drop_waiting()
        if self._transport is not None:
            self._transport.abort()
        else:
            self.wire.ended()

    def _pass_on_end(self) -> None:
        """The end of the stream comes behind its bytes; through a cut it does not come at all."""
        wire = self.wire
        if wire.is_deaf or (wire.dialler and wire.rule(self).mode is not Mode.PASS):
            return
        self.other.close()

    def close(self) -> None:
        if self._transport is None:
            self.abort()
        elif not self.is_gone:
            self._transport.close()

    def _pace(self) -> None:
        """Read no more than can be passed on."""
        if self._transport is None or self.is_gone or self._is_aborted or self._transport.is_closing():
            return
        full = self._waiting_bytes >= WAITING_BYTES_MAX or (self._other_is_full and not self.wire.is_deaf)
        if full != self._is_paused:
            self._is_paused = full
            if full:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _delay_s(self, rule: Rule) -> float:
        if not rule.jitter_s:
            return rule.delay_s
        return max(0.0, rule.delay_s + self.wire.proxy.chance.uniform(-rule.jitter_s, rule.jitter_s))
