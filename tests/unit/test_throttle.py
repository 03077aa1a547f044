"""Whose turn it is on a throttled connection, and who waited too long."""

from __future__ import annotations

from random import Random

import pytest
from msgspec import Raw

from kvstore import codec, model
from kvstore.server import throttle as throttle_module
from kvstore.server.throttle import (
    HELD_BYTES_MAX,
    HOLD_S,
    SIGNS_PER_S,
    TURN_MAX_S,
    TURN_MIN_S,
    Throttle,
    is_sign_of_life,
)


def write(request: model.Mutation) -> codec.Write:
    return codec.Write(1, 1, 1, 1, Raw(codec.encode_request(request)))


def all_now(throttle: Throttle, now: float) -> list[bytes]:
    return list(iter(lambda: throttle.next(now), None))


@pytest.mark.parametrize("rate", [1, 3, 20, 1000])
def test_however_it_is_asked_no_stretch_of_time_has_more_than_its_share(rate: int) -> None:
    chance = Random(rate)
    throttle, now = Throttle(rate, 0.0), 0.0
    others: list[float] = []
    signs: list[float] = []
    for _ in range(3000):
        for _ in range(chance.randrange(4)):
            is_sign = chance.random() < 0.2
            throttle.add(b"s" if is_sign else b"o", is_sign, now)
        for body in all_now(throttle, now):
            (signs if body == b"s" else others).append(now)
        now += chance.choice([0.0, 0.0001, 0.5 / rate, 2.0 / rate, 0.3, 4.0 * (chance.random() < 0.01)])
    assert len(others) > 100
    for times, most in ((others, rate), (sorted(others + signs), rate + SIGNS_PER_S)):
        for first in range(0, len(times), 7):
            for last in range(first, len(times), 5):
                assert last - first + 1 <= most * (times[last] - times[first] + 1) + 1e-6


def test_a_new_connection_has_one_token_and_an_idle_one_a_seconds_worth() -> None:
    throttle = Throttle(20, 100.0)
    for number in range(100):
        throttle.add(b"%d" % number, False, 100.0)
    assert all_now(throttle, 100.0) == [b"0"]
    assert throttle.turn_in_s(100.0) == pytest.approx(0.05)
    assert all_now(throttle, 100.0501) == [b"1"]
    assert all_now(throttle, 3600.0) == [b"%d" % number for number in range(2, 22)]


def test_signs_of_life_go_first_and_the_rest_still_goes_on() -> None:
    throttle = Throttle(1, 0.0)
    assert all_now(throttle, 0.0) == []
    throttle.add(b"first", False, 0.0)
    throttle.add(b"second", False, 0.0)
    throttle.add(b"sign", True, 0.0)
    assert all_now(throttle, 0.0) == [b"sign", b"first"]
    # Four of them a second, for ever: as many as a client sends to a node that it finds slow.
    had: list[bytes] = []
    for quarter in range(1, 41):
        throttle.add(b"sign", True, quarter / 4)
        had += all_now(throttle, quarter / 4)
        throttle.add(b"next", False, quarter / 4)
    assert had.count(b"sign") == 40
    assert len(had) - 40 == 10
    # Past their own tokens they take those of the rest.
    for _ in range(100):
        throttle.add(b"sign", True, 20.0)
    assert all_now(throttle, 20.0) == [b"sign"] * (SIGNS_PER_S + 1)


def test_what_waited_too_long_is_late_and_pays_nothing() -> None:
    throttle = Throttle(1, 0.0)
    for body, is_sign, at in ((b"a", False, 0.0), (b"b", False, 0.0), (b"c", False, 1.5), (b"d", True, 0.0)):
        throttle.add(body, is_sign, at)
    assert all_now(throttle, 0.0) == [b"d", b"a"]
    assert throttle.late(HOLD_S - 0.01) is None
    assert throttle.late(HOLD_S) == b"b"
    assert throttle.late(HOLD_S) is None
    assert throttle.next(HOLD_S) == b"c"
    assert not throttle.waiting


def test_what_waits_is_counted_in_bytes() -> None:
    throttle = Throttle(1000, 0.0)
    for _ in range(8):
        assert not throttle.full
        throttle.add(bytes(1024 * 1024), False, 0.0)
    assert throttle.full
    throttle.next(0.0)
    assert not throttle.full
    assert len(throttle.leave()) == 7
    assert not throttle.waiting
    count = 0
    while not throttle.full:
        throttle.add(b"", True, 0.0)
        count += 1
    # All that one of our clients may have under way (reads, writes) fits in.
    assert 17_500 < count <= HELD_BYTES_MAX // 200
    while throttle.late(HOLD_S) is not None:
        count -= 1
    assert count == 0
    assert not throttle.full


def test_turns_come_neither_too_often_nor_too_seldom() -> None:
    assert Throttle(1_000_000, 0.0).turn_in_s(0.0) == TURN_MAX_S, "it is its turn, and something else holds it up"
    for rate, turn_s in ((1, TURN_MAX_S), (40, 0.025), (1_000_000, TURN_MIN_S)):
        throttle = Throttle(rate, 0.0)
        throttle.add(b"", False, 0.0)
        throttle.next(0.0)
        assert throttle.turn_in_s(0.0) == pytest.approx(turn_s)


def test_what_is_a_sign_of_life() -> None:
    keeps = (model.KeepLease(7), model.KeepLease(2**62), model.KeepSession())
    assert all(is_sign_of_life(write(request)) for request in keeps)
    assert is_sign_of_life(codec.StatusRequest(1))
    others = (model.Put(b"k", b""), model.GrantLease(1000), model.RevokeLease(7), model.OpenSession(), model.Txn())
    assert not any(is_sign_of_life(write(request)) for request in others)
    odd = (b"", b"\xc0", b"\x92", b"\x00\x17")
    assert [is_sign_of_life(codec.Write(1, 1, 1, 1, Raw(data))) for data in odd] == [False, False, False, True]
    assert not is_sign_of_life(codec.StatusRequest(1, digest=True))
    assert not is_sign_of_life(codec.WatchCredit(1, 5))
    assert not is_sign_of_life(codec.Read(1, 0, 0, Raw(codec.encode_request(model.Range(b"k")))))


def test_its_bounds_fit_those_of_our_client() -> None:
    """What it may have under way is read, so that its signs of life are; and it hears a refusal before it gives up."""
    from kvstore import Client
    from kvstore.client.call import READS_MAX
    from kvstore.client.protocol import SILENCE_S
    from kvstore.client.session import KEEPS, WINDOW

    overhead = throttle_module._HELD_OVERHEAD_BYTES
    assert (READS_MAX + WINDOW + KEEPS) * (overhead + 200) < HELD_BYTES_MAX
    assert Client(["127.0.0.1:1"])._timeout_s > 2 * HOLD_S
    assert 1.0 + TURN_MAX_S < SILENCE_S, "a rate of one a second still answers in time"
