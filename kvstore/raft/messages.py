"""What nodes say to each other, and its wire format (msgpack arrays, tag first, typed and checked by msgspec).

Every message carries `term`: the sender's term when the message was made. The engine itself stamps only some of its
messages (fault 3); the guard needs it on all. An entry travels as `(term, payload)`; its index follows from its place.

A wrong byte raises `MalformedMessage`, never anything else.
"""

from __future__ import annotations

from typing import Any, Union

import msgspec
from msgspec import Struct

NUMBER_MAX = 1 << 62  # at a million entries a second it takes 146,000 years to get there


class MalformedMessage(Exception):
    """Bytes that are no message of ours."""


class AppendEntries(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, tag=1):
    """The leader's entries after `(prev_index, prev_term)`; none for a heartbeat."""

    term: int
    commit_index: int
    prev_index: int
    prev_term: int
    entries: tuple[tuple[int, bytes], ...]


class AppendReply(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=2):
    """`success`: the follower holds, durably, all that precedes `next_index`. Otherwise: send from `next_index` on."""

    term: int
    next_index: int
    success: bool


class RequestVote(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=3):
    """`transfer`: the leader itself asked for this election, so loyalty to it must not stop it."""

    term: int
    last_log_index: int
    last_log_term: int
    transfer: bool = False


class VoteReply(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=4):
    """A vote granted in `term`. A refusal is silence, or a `TermNotice`."""

    term: int


class PreVote(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=5):
    """Would you vote for me in `next_term`? Changes nothing at either side (Ongaro's thesis, 9.6)."""

    term: int
    next_term: int
    last_log_index: int
    last_log_term: int


class PreVoteReply(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=6):
    """`removed`: the asking node is no longer a member, and should stop asking."""

    term: int
    next_term: int
    granted: bool
    removed: bool = False


class TermNotice(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=7):
    """There is a newer term than the one you spoke in."""

    term: int


class TimeoutNow(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=8):
    """Hand-over: you have everything, start an election at once (thesis, 3.10)."""

    term: int


class ReadProbe(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=9):
    """Am I still your leader? Round 0 is a bare sign of life for a peer that is receiving a snapshot."""

    term: int
    round: int


class ReadAck(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=10):
    term: int
    round: int


class ReadRequest(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=11):
    """A follower asks its leader for a read index."""

    term: int
    id: int


class ReadReply(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False, tag=12):
    """Serve read `id` once you have applied `index`; 0: I cannot tell, ask again."""

    term: int
    id: int
    index: int


Message = Union[
    AppendEntries,
    AppendReply,
    RequestVote,
    VoteReply,
    PreVote,
    PreVoteReply,
    TermNotice,
    TimeoutNow,
    ReadProbe,
    ReadAck,
    ReadRequest,
    ReadReply,
]

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(body: bytes) -> Message:
    """Raises `MalformedMessage`, also for a number that can be no index, term or id (there is one more after each)."""
    try:
        message: Message = _decoder.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedMessage(str(error)) from None
    if any(isinstance(value, int) and not 0 <= value < NUMBER_MAX for value in msgspec.structs.astuple(message)):
        raise MalformedMessage("a number out of range")
    return message
