"""Ids and order numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.web.ids import ID_MAX, Ids, order_number, parse_id, parse_order_number, timestamp

ids = st.integers(min_value=1, max_value=ID_MAX)
NOW_MS = 1_800_000_000_000


def test_ids_grow_and_never_repeat_when_the_clock_stands_or_goes_back() -> None:
    moments = iter([NOW_MS, NOW_MS, NOW_MS, NOW_MS - 5000, NOW_MS + 1, NOW_MS + 1])
    source = Ids(clock_ms=lambda: next(moments), chance=lambda bits: (1 << bits) - 1)
    drawn = [source.next() for _ in range(6)]
    assert drawn == sorted(set(drawn))
    assert all(0 < one <= ID_MAX for one in drawn)


def test_ids_of_a_later_millisecond_are_larger() -> None:
    for low, high in ((0, 0), (2047, 0)):
        first = Ids(clock_ms=lambda: NOW_MS, chance=lambda bits, low=low: low).next()  # type: ignore[misc]
        second = Ids(clock_ms=lambda: NOW_MS + 1, chance=lambda bits, high=high: high).next()  # type: ignore[misc]
        assert first < second


def test_ids_last_until_2094() -> None:
    assert Ids(clock_ms=lambda: 3_900_000_000_000, chance=lambda bits: (1 << bits) - 1).next() <= ID_MAX


@given(ids)
def test_an_order_number_reads_back(order_id: int) -> None:
    number = order_number(order_id)
    assert len(number) == 14
    assert parse_order_number(number) == order_id
    assert parse_order_number(number.lower().replace("-", " ").replace("0", "o").replace("1", "l")) == order_id


@given(ids, st.integers(0, 11), st.integers(1, 31))
def test_one_wrong_character_is_noticed(order_id: int, position: int, shift: int) -> None:
    alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    text = list(order_number(order_id).replace("-", ""))
    text[position] = alphabet[(alphabet.index(text[position]) + shift) % 32]
    assert parse_order_number("".join(text)) is None


@given(ids, st.integers(0, 10))
def test_two_swapped_neighbours_are_noticed(order_id: int, position: int) -> None:
    text = list(order_number(order_id).replace("-", ""))
    text[position], text[position + 1] = text[position + 1], text[position]
    if text[position] != text[position + 1]:
        assert parse_order_number("".join(text)) is None


@pytest.mark.parametrize("text", ["", "ABC", "0000-0000-0000", "!!!!-!!!!-!!!!", "U000-0000-0000", "Z" * 12])
def test_what_is_no_order_number(text: str) -> None:
    assert parse_order_number(text) is None


@pytest.mark.parametrize("text", ["0", "01", "-1", "+1", "1.0", "1e3", "", "x", "²", "١", str(2**53), "9" * 400])
def test_what_is_no_id(text: str) -> None:
    assert parse_id(text) is None


def test_an_id_reads_back() -> None:
    assert parse_id("1") == 1
    assert parse_id(str(ID_MAX)) == ID_MAX


def test_timestamps_are_utc_with_milliseconds() -> None:
    assert timestamp(1_735_689_600_007) == "2025-01-01T00:00:00.007Z"
