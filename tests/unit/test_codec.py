"""Requests as they come from strangers: what is accepted once is accepted by every replica, at every depth."""

from __future__ import annotations

import msgspec
import pytest
from msgspec import Raw

from kvstore import codec, limits
from kvstore.errors import Refused
from kvstore.model import Put, Txn


def with_tail(depth: int) -> bytes:
    """A Put with one field more than it has: arrays within arrays."""
    put = msgspec.msgpack.encode([1, b"k", b"v", 0, False])
    return bytes([put[0] + 1]) + put[1:] + b"\x91" * depth + b"\xc0"


@pytest.mark.parametrize("depth", [0, 1, 10, *range(900, 1100, 7)])
def test_a_field_that_we_do_not_know_is_refused(depth: int) -> None:
    """If it were skipped instead, its depth could pass here and fail where the batch is decoded, deeper in the stack:
    an entry that no replica can apply."""
    with pytest.raises(Refused) as caught:
        codec.decode_mutation(with_tail(depth))
    assert caught.value.code == "invalid_request"


def nested(depth: int) -> bytes:
    body = msgspec.msgpack.encode([5, [], [], []])
    for _ in range(depth - 1):
        body = bytes([0x94, 5, 0x90, 0x91]) + body + b"\x90"
    return body


@pytest.mark.parametrize("depth", [1, 8, 9, 100, *range(900, 1100, 11), 5000])
def test_what_is_accepted_decodes_in_a_batch_too(depth: int) -> None:
    encoded = nested(depth)
    try:
        request = codec.decode_mutation(encoded)
        limits.check_mutation(request, len(encoded))
    except Refused:
        assert depth > 8
        return
    batch = codec.decode_batch(codec.encode_batch(1, [codec.RawBatchItem(0, 0, 0, Raw(encoded))]))
    assert isinstance(batch.items[0].request, Txn)


@pytest.mark.parametrize("junk", [b"", b"\xc1", b"\x91\x01", b"\x95\x01\xa1k\xa1v\x00\xc2", b"\x91\x63", bytes(64)])
def test_junk_is_refused_with_a_code(junk: bytes) -> None:
    for decode in (codec.decode_mutation, codec.decode_read, codec.decode_client_frame, codec.decode_result):
        with pytest.raises(Refused):
            decode(junk)  # type: ignore[operator]


def test_frames_are_cut_wherever_the_stream_is() -> None:
    frames = [codec.encode_frame(codec.Write(number, 1, 1, 1, Raw(codec.encode_request(Put(b"k", b"v" * number)))))
              for number in range(1, 20)]  # fmt: skip
    stream = b"".join(frames)
    for size in (1, 3, 7, 50, len(stream)):
        reader = codec.FrameReader()
        bodies = [body for at in range(0, len(stream), size) for body in reader.feed(stream[at : at + size])]
        assert bodies == [frame[4:] for frame in frames]


def test_a_frame_over_the_cap_is_refused_by_its_length_alone() -> None:
    reader = codec.FrameReader()
    with pytest.raises(Refused) as caught:
        list(reader.feed((codec.FRAME_BYTES_MAX + 1).to_bytes(4, "big")))
    assert caught.value.code == "frame_too_large"
