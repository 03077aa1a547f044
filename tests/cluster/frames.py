"""What is asked of one certain node, without a client that would try the others: see `ClusterProcesses.ask`."""

from __future__ import annotations

from msgspec import Raw

from kvstore import codec, model


def write_of(value: bytes) -> codec.Write:
    """A put of the key `k`, without a session."""
    return codec.Write(2, 0, 0, 0, Raw(codec.encode_request(model.Put(b"k", value))))


def read_of(level: int) -> codec.Read:
    """A read of the key `k`."""
    return codec.Read(3, level, 0, Raw(codec.encode_request(model.Range(b"k"))))


def value_in(answer: codec.Answer) -> bytes:
    result = codec.decode_result(answer.result)
    assert isinstance(result, model.RangeResult)
    (record,) = result.records
    return record.value
