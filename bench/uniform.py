"""Uniform random reads and writes over the records that `bulk` loads, by the core benchmark's generator.

`measure` runs this module as a child process: the generator's connections, sessions and clock, but each request names
a record drawn at random, encoded when it is sent. (The core benchmark encodes all of its requests beforehand: with
millions of keys that would be the generator's own measurement of memory.)
"""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

import msgspec
import uvloop
from msgspec import Struct

from bench import bulk
from bench.generator import ANSWER_S, Connection, Generator, Spec
from bench.processes import run_tool
from bench.results import BenchError, percentile
from bench.workloads import Kind
from kvstore import codec
from kvstore.env import split_address
from kvstore.model import Put, Range

# Different values, so that nothing is the same twice in a row; made once.
_VALUES = 1000


class UniformSpec(Struct, frozen=True, kw_only=True):
    address: str
    kind: Kind
    connections: int
    pipeline: int
    records: int
    value_bytes: int
    seed: int
    warmup_s: float
    window_s: float


class Round(Struct, frozen=True, kw_only=True):
    """What one window measured."""

    kind: Kind
    connections: int
    pipeline: int
    records: int
    operations: int
    per_second: float
    p50_ms: float
    p99_ms: float


class _Answer(Struct, frozen=True, kw_only=True):
    """What the child says: a round, or why there is none."""

    round: Round | None = None
    error: str = ""


class UniformGenerator(Generator):
    """The generator, with requests of its own kind."""

    def __init__(self, spec: UniformSpec) -> None:
        super().__init__(
            Spec(
                address=spec.address,
                kind=spec.kind,
                connections=spec.connections,
                pipeline=spec.pipeline,
                keys=spec.records,
                run=spec.seed,
                samples="",
            )
        )
        self._requests = requests(spec)

    async def connect(self) -> None:
        host, port = split_address(self.spec.address)
        loop = asyncio.get_running_loop()
        for _ in range(self.spec.connections):
            _, connection = await loop.create_connection(partial(Connection, self, self._requests), host, port)
            self._open.append(connection)
        await self._or_failure(asyncio.gather(*(connection.ready for connection in self._open)), ANSWER_S)


def requests(spec: UniformSpec) -> Iterator[bytes]:
    """Encoded requests without end, for all connections together."""
    chance = random.Random(spec.seed)
    draw, records, encode, key_of = chance.random, spec.records, codec.encode_request, bulk.key_of
    if spec.kind is Kind.PUT:
        values = [chance.randbytes(spec.value_bytes) for _ in range(_VALUES)]
        while True:
            yield encode(Put(key_of(int(draw() * records)), values[int(draw() * _VALUES)]))
    assert spec.kind in (Kind.GET, Kind.GET_LOCAL), "orders have no keys to draw from"
    while True:
        yield encode(Range(key_of(int(draw() * records))))


def measure(spec: UniformSpec) -> Round:
    """Load for warm-up and window in a process of its own. Raises BenchError: refused, gone, no answer."""
    command = [sys.executable, "-m", "bench.uniform", msgspec.json.encode(spec).decode()]
    checkout = str(Path(__file__).parent.parent)
    timeout_s = spec.warmup_s + spec.window_s + 6 * ANSWER_S
    output = run_tool(["env", "-C", checkout, *command], timeout_s=timeout_s)
    answer = msgspec.json.decode(output, type=_Answer)
    if answer.round is None:
        raise BenchError(answer.error)
    return answer.round


def median_rate(rounds: list[Round]) -> float:
    return median(one.per_second for one in rounds)


async def _generate(spec: UniformSpec) -> Round:
    generator = UniformGenerator(spec)
    await generator.connect()
    # As in the generator: nothing here makes reference cycles under load.
    gc.collect()
    gc.disable()
    begin_ns = time.monotonic_ns() + int(spec.warmup_s * 1e9)
    await generator.run(begin_ns, begin_ns + int(spec.window_s * 1e9))
    await generator.close()
    latencies_ns = sorted(generator.latencies_ns)
    if not latencies_ns:
        raise BenchError(f"no {spec.kind} request was answered within {spec.window_s:.1f} s")
    return Round(
        kind=spec.kind,
        connections=spec.connections,
        pipeline=spec.pipeline,
        records=spec.records,
        operations=len(latencies_ns),
        per_second=len(latencies_ns) / spec.window_s,
        p50_ms=percentile(latencies_ns, 0.5) / 1e6,
        p99_ms=percentile(latencies_ns, 0.99) / 1e6,
    )


def main(spec: UniformSpec) -> _Answer:
    try:
        return _Answer(round=uvloop.run(_generate(spec)))
    except (BenchError, OSError) as error:
        return _Answer(error=str(error))


if __name__ == "__main__":
    print(msgspec.json.encode(main(msgspec.json.decode(sys.argv[1], type=UniformSpec))).decode(), flush=True)
