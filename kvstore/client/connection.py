"""What stands between the client and a node: the seam that a TCP stream, a node in the same process and a simulated
network all fill.

A `Connector` opens channels; a `Channel` carries frames to one node and their answers back. The layers above know
nothing of sockets. The order of events is fixed:

- A `connect` ends in exactly one `on_failed`, or in one `on_open` that is followed by exactly one `on_closed`.
- Each frame sent ends in exactly one call of its sink: `on_frame` or `on_lost`, unless it was forgotten first. (A
  `Watch` gets many frames, the last of which is no `Watching` and no `WatchEvents`.)
- `on_closed` comes before the `on_lost` of the frames that were under way, so that a sink which asks for a way to
  send again is not handed the dead one.
- A sink is never called before `send` returns, so that an answer cannot overtake what its sender has yet to note down.

This module has the TCP connector; its byte handling is `protocol.py`. TLS will come in at `TcpConnector._open`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from kvstore.client.protocol import SILENCE_S, ClientProtocol
from kvstore.client.sinks import Sink
from kvstore.codec import ClientFrame

# A cluster has at most a handful of nodes; more are a mistake, or an attempt to make this process dial half the world.
ENDPOINTS_MAX = 64
# On a network fit for a cluster a connection is up within a few round trips; a dead host must not hold calls longer.
CONNECT_TIMEOUT_S = 1.0
# The loop reports the end of an aborted stream in its next turn; more than that would be a fault of the loop.
CLOSE_TIMEOUT_S = 1.0


class Channel(Protocol):
    """An open way to one node. Frame ids are the sender's, unique among those under way."""

    def send(self, frame: ClientFrame, sink: Sink) -> None:
        """Send a frame; its answer, or the channel's end, goes to `sink`."""

    def tell(self, frame: ClientFrame) -> None:
        """Send a frame that has no answer."""

    def forget(self, frame_id: int) -> None:
        """The answer to this frame is of no interest any more."""

    @property
    def silent(self) -> bool:
        """True while the node owes answers and nothing has come from it for a while."""

    def close(self, reason: str) -> None:
        """End it at once; what is under way is lost."""


class ConnectionEvents(Protocol):
    def on_open(self, channel: Channel) -> None: ...

    def on_failed(self, reason: str) -> None: ...

    def on_silent(self) -> None:
        """The channel is silent. Told again and again for as long as it is."""

    def on_closed(self, reason: str, code: str) -> None:
        """`code` is what the node gave as its reason, or empty."""


class Connector(Protocol):
    def connect(self, address: str, events: ConnectionEvents) -> None:
        """Begin to open a channel; bounded in time by the connector."""

    async def close(self) -> None:
        """Give up what is being opened (no events come of it) and wait (bounded) for what is closing."""


def parse_endpoints(text: str) -> tuple[str, ...]:
    """`"host:port,host:port"` -> its addresses, without duplicates. Raises ValueError."""
    addresses = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not addresses:
        raise ValueError("no endpoints: pass host:port (several with commas), or set KVSTORE_ENDPOINTS")
    if len(addresses) > ENDPOINTS_MAX:
        raise ValueError(f"{len(addresses)} endpoints; the limit is {ENDPOINTS_MAX}")
    for address in addresses:
        split_address(address)
    return addresses


def split_address(address: str) -> tuple[str, int]:
    """`host:port` -> (host, port); an IPv6 host stands in brackets. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) <= 65535:
        raise ValueError(f"{address!r} is no host:port")
    return host.strip("[]"), int(port)


class TcpConnector:
    """Opens channels over TCP on a running loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        next_id: Callable[[], int],
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._loop = loop
        self._next_id = next_id
        self._connect_timeout_s = connect_timeout_s
        self._silence_s = silence_s
        self._opening: set[asyncio.Task[None]] = set()
        self._open: set[ClientProtocol] = set()
        self._all_closed: asyncio.Future[None] | None = None

    def connect(self, address: str, events: ConnectionEvents) -> None:
        # One task per connection, never per request.
        task = self._loop.create_task(self._connect(address, events))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self, address: str, events: ConnectionEvents) -> None:
        opened = False

        def made(protocol: ClientProtocol) -> None:
            nonlocal opened
            opened = True
            self._open.add(protocol)
            events.on_open(protocol)

        def lost(protocol: ClientProtocol, reason: str, code: str) -> None:
            self._open.discard(protocol)
            events.on_closed(reason, code)
            if not self._open and self._all_closed is not None and not self._all_closed.done():
                self._all_closed.set_result(None)

        try:
            host, port = split_address(address)
            async with asyncio.timeout(self._connect_timeout_s):
                await self._loop.create_connection(
                    lambda: ClientProtocol(self._loop, self._next_id, made, lost, events.on_silent, self._silence_s),
                    host,
                    port,
                )
        except TimeoutError:
            reason = f"{address} did not accept a connection within {self._connect_timeout_s} s"
        except (OSError, ValueError) as error:
            reason = f"cannot connect to {address}: {error}"
        else:
            return
        # The deadline may fall between the stream's opening and this task's hearing of it: then its end is reported.
        if not opened:
            events.on_failed(reason)

    async def close(self) -> None:
        for task in tuple(self._opening):
            task.cancel()
        if self._opening:
            await asyncio.wait(tuple(self._opening))
        if not self._open:
            return
        self._all_closed = self._loop.create_future()
        for protocol in tuple(self._open):
            protocol.close("closed by this client")
        await asyncio.wait((self._all_closed,), timeout=CLOSE_TIMEOUT_S)
