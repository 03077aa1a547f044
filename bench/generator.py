"""The load: one process, many connections on raw asyncio protocols, each with its own session, in a closed loop.

A connection keeps `pipeline` requests under way and sends the next when an answer comes. It opens a session first and
numbers its writes, so exactly-once costs here what it costs a real client. It is not the client library: requests
are encoded beforehand, and an answer is read by one fixed-layout unpacking, since this process shares its cores with
the nodes that it measures. Whatever does not have that layout goes the long way through the codec, and everything
that is no success ends the run with its code and message.

Runs as a child of `bench.load`: `python -m bench.generator SPEC` connects, prints `ready`, reads the line
`START_NS END_NS` (CLOCK_MONOTONIC, as the parent sees it too), counts the answers that come between these, writes
their latencies in nanoseconds to `spec.samples` as native 64-bit integers, and prints an `Outcome`.
"""

from __future__ import annotations

import asyncio
import gc
import struct
import sys
import time
from array import array
from collections.abc import Awaitable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import uvloop
from msgspec import Raw, Struct

from bench import workloads
from bench.results import BenchError
from bench.workloads import Kind
from kvstore import codec
from kvstore.env import split_address
from kvstore.errors import Refused
from kvstore.model import CloseSession, ErrorResult, OpenSession, SessionResult

# A request that gets no answer for this long means that the cluster is not serving; no percentile would show it.
ANSWER_S = 10.0
# The first request id. From here on ids always take five bytes, so that an answer's fields stand at fixed places.
_FIRST_ID = 0x10000
# length, array(6) and tag 2, uint32 id, uint64 session, uint32 seq, uint32 acked_below; the request follows.
_WRITE = struct.Struct(">IHBIBQBIBI")
_WRITE_BODY_BYTES = _WRITE.size - 4
# length, array(5) and tag 3, uint32 id, level, min_revision 0; the request follows.
_READ = struct.Struct(">IHBIBB")
_READ_BODY_BYTES = _READ.size - 4
# length, array(3) and tag 2, uint32 id, the result's array header and its tag.
_ANSWER = struct.Struct(">IHBIBB")
_ANSWER_HEAD = 0x9302
_UINT32, _UINT64 = 0xCE, 0xCF

_now = time.monotonic_ns


class Spec(Struct, frozen=True, kw_only=True):
    """What one generator process does. `first_connection` numbers its connections among all generators."""

    address: str
    kind: Kind
    connections: int
    pipeline: int
    keys: int
    run: int
    first_connection: int = 0
    samples: str


class Outcome(Struct, frozen=True, kw_only=True):
    operations: int
    error: str = ""


class Generator:
    """All connections of this process."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.begin_ns = self.end_ns = 0
        self.latencies_ns = array("q")
        self._open: list[Connection] = []
        self._loading = 0
        self._idle = asyncio.Event()
        self._failed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def connect(self) -> None:
        """Open all connections and their sessions. Raises BenchError."""
        host, port = split_address(self.spec.address)
        loop = asyncio.get_running_loop()
        for number in range(self.spec.connections):
            stream = workloads.requests(
                self.spec.kind, self.spec.keys, self.spec.first_connection + number, self.spec.run
            )
            _, connection = await loop.create_connection(partial(Connection, self, stream), host, port)
            self._open.append(connection)
        await self._or_failure(asyncio.gather(*(connection.ready for connection in self._open)), ANSWER_S)

    async def run(self, begin_ns: int, end_ns: int) -> None:
        """Load from now on; count what is answered between the two moments. Returns when all are answered."""
        self.begin_ns, self.end_ns = begin_ns, end_ns
        self._loading = len(self._open)
        for connection in self._open:
            connection.start()
        await self._or_failure(self._idle.wait(), (end_ns - _now()) / 1e9 + ANSWER_S)

    async def close(self) -> None:
        """End the sessions, so that runs one after another do not add up to a store full of them."""
        await self._or_failure(asyncio.gather(*(connection.close_session() for connection in self._open)), ANSWER_S)
        for connection in self._open:
            connection.close()

    def fail(self, message: str) -> None:
        if not self._failed.done():
            self._failed.set_exception(BenchError(message))

    def finished(self) -> None:
        """One more connection has all its answers and sends no more."""
        self._loading -= 1
        if self._loading == 0:
            self._idle.set()

    async def _or_failure(self, work: Awaitable[object], timeout_s: float) -> None:
        waiting: asyncio.Future[Any] = asyncio.ensure_future(work)
        await asyncio.wait({waiting, self._failed}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._failed.done():
            waiting.cancel()
            self._failed.result()
        if not waiting.done():
            waiting.cancel()
            raise BenchError(f"{self.spec.address} did not answer within {timeout_s:.0f} s")
        waiting.result()


class Connection(asyncio.Protocol):
    """One client: a session, its sequence numbers, and the requests under way."""

    def __init__(self, generator: Generator, requests: Iterator[bytes]) -> None:
        self._generator = generator
        self._next_request = requests.__next__
        self._level = workloads.READ_LEVELS.get(generator.spec.kind)
        self._tag = workloads.RESULT_TAGS[generator.spec.kind]
        # Request id -> when it was sent, in order of sending: the first key is the oldest that has no answer.
        self._sent: dict[int, int] = {}
        self._id = _FIRST_ID - 1
        self._session = 0
        self._rest = b""
        self._loading = False
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self._closed: asyncio.Future[None] = loop.create_future()

    # --- before and after the load ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have asyncio's methods but not its base class.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(
            codec.encode_frame(codec.Hello(1, codec.PROTOCOL_VERSION))
            + codec.encode_frame(codec.Write(2, 0, 0, 0, Raw(codec.encode_request(OpenSession()))))
        )

    def connection_lost(self, error: Exception | None) -> None:
        if not self._closed.done() or not self.ready.done():
            self._generator.fail(f"{self._generator.spec.address} closed a connection: {error or 'end of stream'}")

    def start(self) -> None:
        """Send the first `pipeline` requests; every answer brings the next."""
        self._loading = True
        self._transport.write(b"".join([self._request(_now()) for _ in range(self._generator.spec.pipeline)]))

    async def close_session(self) -> None:
        self._id += 1
        frame = codec.Write(self._id, self._session, self._id, self._id, Raw(codec.encode_request(CloseSession())))
        self._transport.write(codec.encode_frame(frame))
        await self._closed

    def close(self) -> None:
        self._transport.close()

    # --- the load ---

    def _request(self, now: int) -> bytes:
        request = self._next_request()
        self._id = number = self._id + 1
        sent = self._sent
        sent[number] = now
        if self._level is not None:
            return _READ.pack(_READ_BODY_BYTES + len(request), 0x9503, _UINT32, number, self._level, 0) + request
        # Sequence numbers are the request ids: they may start anywhere, and only have to rise.
        return (
            _WRITE.pack(
                _WRITE_BODY_BYTES + len(request),
                0x9602,
                _UINT32,
                number,
                _UINT64,
                self._session,
                _UINT32,
                number,
                _UINT32,
                next(iter(sent)),
            )
            + request
        )

    def data_received(self, data: bytes) -> None:
        now = _now()
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        answered = 0
        while end - at >= 4:
            # The shortest answer that the fixed layout fits; a shorter frame is none, and goes the long way.
            if end - at >= _ANSWER.size:
                size, head, kind, number, _, tag = _ANSWER.unpack_from(data, at)
            else:
                size, head, kind, number, tag = int.from_bytes(data[at : at + 4], "big"), 0, 0, 0, 0
            after = at + 4 + size
            if after > end:
                break
            if head != _ANSWER_HEAD or kind != _UINT32 or tag != self._tag or not self._loading:
                read = self._other_frame(data[at + 4 : after])
                if read is None:
                    at = after
                    continue
                number = read
            at = after
            sent_at = self._sent.pop(number, None)
            if sent_at is None:
                self._generator.fail(f"an answer to request {number}, which is not under way")
                return
            answered += 1
            if self._generator.begin_ns <= now < self._generator.end_ns:
                self._generator.latencies_ns.append(now - sent_at)
        self._rest = data[at:]
        if answered:
            if now < self._generator.end_ns:
                if answered == 1:
                    self._transport.write(self._request(now))
                else:
                    self._transport.write(b"".join([self._request(now) for _ in range(answered)]))
            elif not self._sent:
                self._loading = False
                self._generator.finished()

    def _other_frame(self, body: bytes) -> int | None:
        """A frame read by the codec. The id of an answered request of the load; None for session matters and for
        whatever fails the run."""
        try:
            frame = codec.decode_server_frame(body)
            if isinstance(frame, codec.Welcome):
                return None
            if isinstance(frame, codec.Answer):
                result = codec.decode_result(frame.result)
                if isinstance(result, SessionResult):
                    self._session_answer(result)
                    return None
                if isinstance(result, ErrorResult):
                    self._refused(result.code, result.message)
                    return None
                if self._loading and frame.id in self._sent and body[-len(bytes(frame.result)) + 1] == self._tag:
                    return frame.id
            if isinstance(frame, codec.Failure):
                self._refused(frame.code, frame.message)
                return None
            self._generator.fail(f"an answer that belongs to no request: {frame!r}")
        except Refused as error:
            self._generator.fail(f"{self._generator.spec.address} sent what is no frame: {error}")
        return None

    def _session_answer(self, result: SessionResult) -> None:
        if not self.ready.done():
            self._session = result.session
            self.ready.set_result(None)
        elif not self._closed.done():
            self._closed.set_result(None)

    def _refused(self, code: str, message: str) -> None:
        self._generator.fail(f"a {self._generator.spec.kind} request was refused: {message} [{code}]")


async def generate(spec: Spec) -> array[int]:
    """Do what the module's docstring says; the latencies. Raises BenchError and OSError."""
    generator = Generator(spec)
    await generator.connect()
    # Nothing here makes reference cycles under load; the collector would only pause it, at random moments.
    gc.collect()
    gc.disable()
    print("ready", flush=True)
    begin, end = sys.stdin.readline().split()
    await generator.run(int(begin), int(end))
    await generator.close()
    return generator.latencies_ns


def main(spec: Spec) -> Outcome:
    try:
        latencies_ns = uvloop.run(generate(spec))
        Path(spec.samples).write_bytes(latencies_ns.tobytes())
    except (BenchError, OSError) as error:
        return Outcome(operations=0, error=str(error))
    return Outcome(operations=len(latencies_ns))


if __name__ == "__main__":
    print(msgspec.json.encode(main(msgspec.json.decode(sys.argv[1], type=Spec))).decode(), flush=True)
