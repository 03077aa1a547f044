"""Frames over one TCP stream: bytes in, answers out to those who wait, matched by id.

No task and no future per request: an answer is a callback. What is sent during one turn of the loop leaves in one
write. While the transport is full, frames wait here; their number is bounded by who sends them (`session.py`,
`call.py`).

A stream that owes answers and brings nothing is asked for a sign of life, and its owner is told (it may know of a new
leader, and end this stream for it). If none comes for `SILENCE_S` the stream is given up, so that a stopped process or
a cut cable never costs a call's whole timeout.

After `asyncpg.protocol`: the protocol object is the connection, and callers meet it without a task in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from kvstore import codec
from kvstore.client.sinks import Sink, Sinks
from kvstore.codec import ClientFrame, Failure, ServerFrame, StatusRequest
from kvstore.errors import Refused

# How long a stream that owes answers may bring nothing before it is given up. A healthy node answers within
# milliseconds; two seconds cover a long pause of its disk or its interpreter. Giving up early would make an overloaded
# node do its work twice.
SILENCE_S = 2.0
# Looks at a stream within that time; the first that finds it silent probes it and tells its owner.
SILENT_LOOKS_MAX = 8
# Looks that find nothing come where nothing is owed, until a sign of life is asked for: once a second.
IDLE_LOOKS_MAX = 4


class _SignOfLife:
    """Sink of the probe: any frame at all was the answer."""

    def on_frame(self, frame: ServerFrame) -> None: ...

    def on_lost(self) -> None: ...


_SIGN_OF_LIFE = _SignOfLife()


class ClientProtocol(asyncio.Protocol):
    """One open stream; a `connection.Channel`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        next_id: Callable[[], int],
        made: Callable[[ClientProtocol], None],
        lost: Callable[[ClientProtocol, str, str], None],
        silent: Callable[[], None],
        silence_s: float,
    ) -> None:
        self._loop = loop
        self._next_id = next_id
        self._made = made
        self._lost = lost
        self._silent = silent
        self._silence_s = silence_s
        self._reader = codec.FrameReader()
        self._sinks = Sinks()
        self._out: list[bytes] = []
        self._flush_scheduled = False
        self._writable = True
        self._heard = False
        self._silent_looks = 0
        self._idle_looks = 0
        self._written_bytes = 0  # since the last look
        self._unsent_bytes = 0  # at the last look
        self._watch: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._reason = ""
        self._code = ""

    # --- the channel --------------------------------------------------------------------------------------------------

    def send(self, frame: ClientFrame, sink: Sink) -> None:
        if self._transport is None or self._reason:
            # Between this stream's end and its owner's hearing of it: nothing was sent, yet "lost" is never wrong.
            self._loop.call_soon(sink.on_lost)
            return
        self._sinks.add(frame, sink)
        self.tell(frame)
        if self._watch is None:
            self._heard = False
            self._idle_looks = self._silent_looks = self._unsent_bytes = self._written_bytes = 0
            self._watch = self._loop.call_later(self._silence_s / SILENT_LOOKS_MAX, self._look)

    def tell(self, frame: ClientFrame) -> None:
        if self._transport is None or self._reason:
            return
        self._out.append(codec.encode_frame(frame))
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def forget(self, frame_id: int) -> None:
        self._sinks.forget(frame_id)

    @property
    def silent(self) -> bool:
        return self._silent_looks > 0

    def close(self, reason: str) -> None:
        self._reason = self._reason or reason
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio ------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._made(self)

    def data_received(self, data: bytes) -> None:
        self._heard = True
        deliver = self._sinks.deliver
        decode = codec.decode_server_frame
        try:
            for body in self._reader.feed(data):
                frame = decode(body)
                if not deliver(frame) and frame.id == 0 and type(frame) is Failure:
                    self._code = frame.code
                    self.close(f"the node ended it: {frame.message} [{frame.code}]")
                    return
        except Refused as error:
            self.close(f"the node sent bytes that are not ours: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._out.clear()
        self._reason = self._reason or (str(error) if error else "the node closed the connection")
        self._lost(self, self._reason, self._code)
        self._sinks.lose()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._flush()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        self._flush_scheduled = False
        if not self._writable or not self._out or self._transport is None:
            return
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        self._written_bytes += len(data)
        self._transport.write(data)

    def _look(self) -> None:
        """Is this stream silent?"""
        sinks = self._sinks
        if not (sinks.calls or sinks.watches) or self._transport is None:
            self._watch = None
            return
        unsent_bytes = self._transport.get_write_buffer_size()
        # Bytes that waited and have left are a sign of life too: a large request on a slow line is no dead peer. (What
        # came to those that wait is none, nor what the system took at once: our own probe is among it.)
        waited_bytes, self._unsent_bytes = self._unsent_bytes, unsent_bytes
        written_bytes, self._written_bytes = self._written_bytes, 0
        if self._heard or (waited_bytes and unsent_bytes < waited_bytes + written_bytes):
            self._silent_looks = self._idle_looks = 0
        elif not sinks.calls:
            # Watches alone are owed nothing. Asked now and then, the node owes an answer, and the next look counts.
            self._idle_looks += 1
            if self._idle_looks >= IDLE_LOOKS_MAX:
                self._idle_looks = 0
                self.send(StatusRequest(self._next_id()), _SIGN_OF_LIFE)
        else:
            self._silent_looks += 1
            if self._silent_looks >= SILENT_LOOKS_MAX:
                self.close(f"no answer and no sign of life for {self._silence_s} s")
                return
            if self._silent_looks == 1:
                self.send(StatusRequest(self._next_id()), _SIGN_OF_LIFE)
        self._heard = False
        self._watch = self._loop.call_later(self._silence_s / SILENT_LOOKS_MAX, self._look)
        if self._silent_looks:
            self._silent()
