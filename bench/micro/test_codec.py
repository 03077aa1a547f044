"""What the codec costs per frame and per batch. One order is a Txn of an Add and three Puts."""

from __future__ import annotations

from msgspec import Raw
from pytest_benchmark.fixture import BenchmarkFixture

from bench.micro.batches import ORDERS_A_BATCH, PUTS_A_BATCH, encoded_batch, encoded_requests
from bench.workloads import Kind
from kvstore import codec, model


def test_decode_write_frame(benchmark: BenchmarkFixture) -> None:
    (request,) = encoded_requests(Kind.PUT, 1)
    body = codec.encode_frame(codec.Write(70_000, 123_456, 77, 76, Raw(request)))[4:]
    frame = benchmark(codec.decode_client_frame, body)
    assert isinstance(frame, codec.Write)


def test_decode_put(benchmark: BenchmarkFixture) -> None:
    (request,) = encoded_requests(Kind.PUT, 1)
    assert isinstance(benchmark(codec.decode_mutation, request), model.Put)


def test_decode_order(benchmark: BenchmarkFixture) -> None:
    (request,) = encoded_requests(Kind.ORDER_HOT, 1)
    assert isinstance(benchmark(codec.decode_mutation, request), model.Txn)


def test_encode_answer(benchmark: BenchmarkFixture) -> None:
    result = codec.encode_result(model.PutResult(123_456))
    assert benchmark(lambda: codec.encode_frame(codec.Answer(70_000, Raw(result))))


def test_cut_frames(benchmark: BenchmarkFixture) -> None:
    """16 frames out of one read of a socket."""
    (request,) = encoded_requests(Kind.PUT, 1)
    data = codec.encode_frame(codec.Write(70_000, 123_456, 77, 76, Raw(request))) * 16
    reader = codec.FrameReader()
    assert len(benchmark(lambda: list(reader.feed(data)))) == 16


def test_encode_batch_of_puts(benchmark: BenchmarkFixture) -> None:
    items = [
        codec.RawBatchItem(1000 + turn, 5, 5, Raw(one))
        for turn, one in enumerate(encoded_requests(Kind.PUT, PUTS_A_BATCH))
    ]
    assert benchmark(codec.encode_batch, 1_700_000_000_000, items)


def test_decode_batch_of_puts(benchmark: BenchmarkFixture) -> None:
    batch = benchmark(codec.decode_batch, encoded_batch(Kind.PUT, PUTS_A_BATCH))
    assert len(batch.items) == PUTS_A_BATCH


def test_decode_batch_of_orders(benchmark: BenchmarkFixture) -> None:
    batch = benchmark(codec.decode_batch, encoded_batch(Kind.ORDER_HOT, ORDERS_A_BATCH))
    assert len(batch.items) == ORDERS_A_BATCH
