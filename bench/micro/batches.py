"""What several of the micro-benchmarks are fed with: encoded requests, batches of them, log entries for a machine."""

from __future__ import annotations

from itertools import islice

from msgspec import Raw

from bench import workloads
from bench.workloads import Kind
from kvstore import codec, versions
from kvstore.model import OpenSession, SessionResult
from kvstore.state.machine import DATA, Machine

PUTS_A_BATCH = 256
ORDERS_A_BATCH = 64


def encoded_requests(kind: Kind, count: int) -> list[bytes]:
    return list(islice(workloads.requests(kind, 2000, 1, 1), count))


def encoded_batch(kind: Kind, count: int) -> bytes:
    """A log entry's payload of `count` requests, each of another session."""
    items = [
        codec.RawBatchItem(1000 + turn, 5, 5, Raw(request))
        for turn, request in enumerate(encoded_requests(kind, count))
    ]
    return codec.encode_batch(1_700_000_000_000, items)


class Entries:
    """Log entries one after another, for a machine: each has its index, and its requests the next sequence number."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._index = 0
        self._log_time_ms = 1_700_000_000_000

    def apply(self, items: list[codec.RawBatchItem]) -> list[bytes]:
        return self.machine.apply(*self.entry(items))

    def entry(self, items: list[codec.RawBatchItem]) -> tuple[int, int, int, bytes]:
        self._index += 1
        self._log_time_ms += 1
        return self._index, 1, DATA, codec.encode_batch(self._log_time_ms, items, versions.VERSION)

    def open_sessions(self, number: int) -> list[int]:
        opening = codec.RawBatchItem(0, 0, 0, Raw(codec.encode_request(OpenSession())))
        results = [codec.decode_result(result) for result in self.apply([opening] * number)]
        return [result.session for result in results if isinstance(result, SessionResult)]
