"""A server that does nothing but answer: what the generator is measured against, to know its own ceiling.

It speaks the native door's frames, keeps nothing, and says yes to everything. No figure of it says anything about
kvstore. Tests of the generator use it too; `--refuse KIND` makes it refuse, to see that a refusal fails a run.

`python -m bench.answerer PORT` serves on loopback until it is terminated.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from functools import partial
from typing import cast

import uvloop
from msgspec import Raw

from bench import workloads
from kvstore import codec
from kvstore.model import (
    CloseSession,
    ErrorResult,
    NodeStatus,
    OpenSession,
    Put,
    PutResult,
    Range,
    RangeResult,
    Record,
    Result,
    SessionResult,
    Txn,
    TxnResult,
)

_RESULTS: dict[type, Result] = {
    OpenSession: SessionResult(7, 60_000),
    CloseSession: SessionResult(7, 60_000),
    Put: PutResult(123_456),
    Range: RangeResult(123_456, (Record(workloads.key_of(1), workloads.value_of(1), 1, 1, 1),), 1),
    Txn: TxnResult(123_456, True, tuple(PutResult(123_456) for _ in range(4))),
}
_REFUSAL = ErrorResult("out_of_range", "refused, as this server was told to")


class AnsweringConnection(asyncio.Protocol):
    def __init__(self, address: str, answers: dict[int, bytes]) -> None:
        self._address = address
        self._answers = answers
        self._reader = codec.FrameReader()
        self._status = NodeStatus("answerer", "answerer", "leader", "answerer", address, 1, 1, 1, 1, 1, 1, (), ())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        out = []
        for body in self._reader.feed(data):
            frame = codec.decode_client_frame(body)
            if isinstance(frame, (codec.Write, codec.Read)):
                # A request is an array whose first item is its tag.
                result = self._answers[bytes(frame.request)[1]]
                out.append(codec.encode_frame(codec.Answer(frame.id, Raw(result))))
            elif isinstance(frame, codec.StatusRequest):
                out.append(codec.encode_frame(codec.StatusAnswer(frame.id, self._status)))
            else:
                welcome = codec.Welcome(frame.id, codec.PROTOCOL_VERSION, "answerer", "answerer", self._address)
                out.append(codec.encode_frame(welcome))
        self._transport.write(b"".join(out))


async def serve(port: int, refuse: str) -> None:
    answers = {}
    for kind, result in _RESULTS.items():
        tag: int = kind.__struct_config__.tag  # type: ignore[attr-defined]
        answers[tag] = codec.encode_result(_REFUSAL if kind.__name__ == refuse else result)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    address = f"127.0.0.1:{port}"
    server = await loop.create_server(partial(AnsweringConnection, address, answers), "127.0.0.1", port, backlog=1024)
    await ended.wait()
    server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.answerer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--refuse", default="", choices=["", *(kind.__name__ for kind in _RESULTS)])
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.refuse))
