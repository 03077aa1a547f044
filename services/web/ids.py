"""Time, and ids: integers below 2^53 (exact in JavaScript), ordered by time; and an order's number.

An id is 41 bits of milliseconds since 2025 (enough until 2094) and 12 bits that start at random in each millisecond
and count up. Within a process ids never repeat; two processes may draw the same one, so whoever creates a record
compares that it is absent and draws again if it is not (two processes at 500 ids a second each: once in ten
seconds or so). An id is no secret: every read checks who asks.

An order's number is its id in 11 characters of Crockford's base 32 and a check digit, as `0A2C-4E6G-8HJK`. The check
digit is Damm's, over the field of 32 elements: it catches every single wrong character and every swap of two
neighbours.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

from msgspec import Meta

ID_MAX: Final = 2**53 - 1
Id = Annotated[int, Meta(ge=1, le=ID_MAX)]
# What `timestamp` gives, for the document.
Timestamp = Annotated[str, Meta(examples=["2026-01-31T12:34:56.789Z"], extra_json_schema={"format": "date-time"})]
# A moment that a client gives. What the pattern cannot say (a February has no 30th), `parse_moment` does.
Moment = Annotated[
    str,
    Meta(
        max_length=40,
        pattern=r"\A(?!0000)[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
        r"[Tt]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])\Z",
        examples=["2026-01-31T12:34:56.789Z", "2026-01-31T13:34:56+01:00"],
        extra_json_schema={"format": "date-time"},
    ),
]
_UNIX_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_MS: Final = 1_735_689_600_000  # 2025-01-01T00:00:00Z
_CHANCE_BITS: Final = 12
_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_VALUES: Final = {character: value for value, character in enumerate(_ALPHABET)}
_DIGITS: Final = 11  # 55 bits, for 53


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def timestamp(moment_ms: int) -> str:
    """RFC 3339, in UTC, with milliseconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment_ms // 1000)) + f".{moment_ms % 1000:03d}Z"


def parse_moment(text: str) -> int | None:
    """The first millisecond (since 1970) that is not before the moment, or None where there is no such day. `text` is a
    `Moment`."""
    try:
        moment = datetime.fromisoformat(text.upper())
    except ValueError:
        return None
    return -((_UNIX_EPOCH - moment) // timedelta(milliseconds=1))


def first_id(moment_ms: int) -> int:
    """No id that was drawn at that moment or later is smaller. What it gives may be no id: years before 2025 or far
    ahead have none."""
    return (moment_ms - _EPOCH_MS) << _CHANCE_BITS


class Ids:
    """Draws ids. One per process and kind of record."""

    __slots__ = ("_chance", "_clock_ms", "_last")

    def __init__(self, clock_ms: Callable[[], int] = now_ms, chance: Callable[[int], int] = secrets.randbits) -> None:
        self._clock_ms = clock_ms
        self._chance = chance
        self._last = 0

    def next(self) -> int:
        """A new id, greater than all before it from here, also if the clock goes back."""
        moment = (self._clock_ms() - _EPOCH_MS) << _CHANCE_BITS
        if moment > self._last:
            # Half of the range is left to count up in; past it the counting runs into the next milliseconds.
            self._last = moment | self._chance(_CHANCE_BITS - 1)
        else:
            self._last += 1
        assert 0 < self._last <= ID_MAX, self._last
        return self._last


def parse_id(text: str) -> int | None:
    """The id that a path names, or None if it can be no id. One id has one spelling."""
    if not text.isascii() or not text.isdigit() or len(text) > 16 or text[0] == "0":
        return None
    value = int(text)
    return value if value <= ID_MAX else None


def order_number(order_id: int) -> str:
    assert 0 < order_id <= ID_MAX, order_id
    digits = [(order_id >> (5 * place)) & 31 for place in range(_DIGITS - 1, -1, -1)]
    digits.append(_check_digit(digits))
    text = "".join([_ALPHABET[digit] for digit in digits])
    return f"{text[:4]}-{text[4:8]}-{text[8:]}"


def parse_order_number(text: str) -> int | None:
    """The id behind an order's number as a person may have typed it, or None if it is no order's number."""
    plain = text.upper().replace("-", "").replace(" ", "").replace("O", "0").replace("I", "1").replace("L", "1")
    if len(plain) != _DIGITS + 1 or any(character not in _VALUES for character in plain):
        return None
    digits = [_VALUES[character] for character in plain]
    value = 0
    for digit in digits[:-1]:
        value = value << 5 | digit
    return value if _check_digit(digits) == 0 and 0 < value <= ID_MAX else None


def _check_digit(digits: list[int]) -> int:
    """Damm's check digit with x ∘ y = α·(x + y) in GF(2^5), modulus x^5 + x^2 + 1. Over digits that already end in
    theirs it is 0."""
    interim = 0
    for digit in digits:
        interim = (interim ^ digit) << 1
        if interim & 32:
            interim ^= 0b100101
    return interim
