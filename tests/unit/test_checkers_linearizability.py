"""The search for an order: good histories have one, and each kind of bad history has none."""

from __future__ import annotations

import itertools

import pytest

from tests.checkers.history import Entry, History, Outcome
from tests.checkers.linearizability import STEPS_MAX, check, find_order
from tests.checkers.models import Add, Delete, Get, Put, Refusal, RegisterModel, Seen, Sum, Swap, Swapped, Wrote
from tests.checkers.scenario import failed, ok, unknown
from tests.checkers.verdict import CheckBudgetExceeded, Inconsistent

K = b"k"
DONE = Wrote()
ABSENT = Seen(None)


def put(value: bytes) -> Put:
    return Put(K, value)


def good(*entries: Entry) -> None:
    check(RegisterModel(), entries)


def bad(*entries: Entry) -> str:
    with pytest.raises(Inconsistent) as caught:
        check(RegisterModel(), entries)
    assert caught.value.rule == "linearizability"
    return caught.value.message


GET = Get(K)


# --- plain histories --------------------------------------------------------------------------------------------------


def test_reads_see_the_last_write() -> None:
    good(ok(1, 2, put(b"a"), DONE), ok(3, 4, GET, Seen(b"a")), ok(5, 6, Delete(K), DONE), ok(7, 8, GET, ABSENT))


def test_a_stale_read() -> None:
    bad(ok(1, 2, put(b"a"), DONE), ok(3, 4, put(b"b"), DONE), ok(5, 6, GET, Seen(b"a")))


def test_a_lost_write() -> None:
    bad(ok(1, 2, put(b"a"), DONE), ok(3, 4, GET, ABSENT))


def test_a_read_of_what_was_never_written() -> None:
    bad(ok(1, 2, put(b"a"), DONE), ok(3, 4, GET, Seen(b"b")))


def test_a_read_before_the_write_was_called() -> None:
    bad(ok(1, 2, GET, Seen(b"a")), ok(3, 4, put(b"a"), DONE))


def test_a_write_that_surely_failed_and_is_seen() -> None:
    bad(failed(1, 2, put(b"a")), ok(3, 4, GET, Seen(b"a")))


def test_concurrent_reads_may_disagree_only_in_one_direction() -> None:
    writes = [ok(1, 2, put(b"a"), DONE), ok(3, 10, put(b"b"), DONE)]
    good(*writes, ok(4, 5, GET, Seen(b"a")), ok(6, 7, GET, Seen(b"b")))
    bad(*writes, ok(4, 5, GET, Seen(b"b")), ok(6, 7, GET, Seen(b"a")))


def test_keys_are_judged_apart() -> None:
    other = Put(b"other", b"x")
    good(ok(1, 2, put(b"a"), DONE), ok(3, 4, other, DONE), ok(5, 6, GET, Seen(b"a")))
    message = bad(ok(1, 2, other, DONE), ok(3, 4, GET, Seen(b"x")))
    assert "b'k'" in message


def test_a_write_acknowledged_with_a_wrong_before() -> None:
    good(ok(1, 2, put(b"a"), Wrote(before=ABSENT)), ok(3, 4, put(b"b"), Wrote(before=Seen(b"a"))))
    bad(ok(1, 2, put(b"a"), Wrote(before=ABSENT)), ok(3, 4, put(b"b"), Wrote(before=ABSENT)))
    bad(ok(1, 2, put(b"a"), DONE), ok(3, 4, Delete(K), Wrote(before=Seen(b"b"))))


# --- unknown outcomes -------------------------------------------------------------------------------------------------


def test_an_unknown_write_may_take_effect_late_or_never() -> None:
    base = [ok(1, 2, put(b"a"), DONE), unknown(3, put(b"b")), ok(4, 5, GET, Seen(b"a"))]
    good(*base)
    good(*base, ok(6, 7, GET, Seen(b"b")))
    good(*base, ok(6, 7, put(b"c"), DONE), ok(8, 9, GET, Seen(b"b")))


def test_an_unknown_write_takes_effect_once() -> None:
    bad(
        ok(1, 2, put(b"a"), DONE),
        unknown(3, put(b"b")),
        ok(4, 5, GET, Seen(b"b")),
        ok(6, 7, put(b"c"), DONE),
        ok(8, 9, GET, Seen(b"b")),
    )


def test_an_acknowledged_write_that_is_applied_again_after_a_later_one() -> None:
    bad(ok(1, 2, put(b"a"), DONE), ok(3, 4, put(b"b"), DONE), ok(5, 6, GET, Seen(b"b")), ok(7, 8, GET, Seen(b"a")))


def test_an_unknown_write_takes_no_effect_before_its_call() -> None:
    bad(ok(1, 2, GET, Seen(b"a")), unknown(3, put(b"a")))


def test_what_is_open_counts_as_unknown() -> None:
    history = History(lambda: 0.0)
    history.begin(1, put(b"a"))
    read = history.begin(2, GET)
    read.ok(Seen(b"a"))
    good(*history.entries)
    assert history.count(Outcome.OPEN) == 1


def test_unknown_swaps_chain() -> None:
    chain = [unknown(3, Swap(K, b"c", b"b")), unknown(4, Swap(K, b"b", b"a"))]
    good(ok(1, 2, put(b"a"), DONE), *chain, ok(5, 6, GET, Seen(b"c")))
    bad(ok(1, 2, put(b"z"), DONE), *chain, ok(5, 6, GET, Seen(b"c")))


def test_an_unknown_write_that_only_a_refused_swap_tells_of() -> None:
    swap = Swap(K, b"b", b"a")
    lines = [ok(1, 2, put(b"a"), DONE), ok(4, 5, swap, Swapped(False))]
    good(*lines, unknown(3, put(b"x")))
    bad(*lines)


# --- compare-and-put --------------------------------------------------------------------------------------------------


def test_two_swaps_from_one_value() -> None:
    first = ok(3, 8, Swap(K, b"b", b"a"), Swapped(True))
    good(ok(1, 2, put(b"a"), DONE), first, ok(4, 7, Swap(K, b"c", b"a"), Swapped(False)))
    bad(ok(1, 2, put(b"a"), DONE), first, ok(4, 7, Swap(K, b"c", b"a"), Swapped(True)))


def test_a_swap_from_an_absent_record() -> None:
    create = Swap(K, b"a", None, 0)
    good(ok(1, 2, create, Swapped(True)), ok(3, 4, create, Swapped(False)))
    bad(ok(1, 2, create, Swapped(True)), ok(3, 4, create, Swapped(True)))


def test_a_swap_that_was_refused_without_reason() -> None:
    bad(ok(1, 2, put(b"a"), DONE), ok(3, 4, Swap(K, b"b", b"a"), Swapped(False)))


# --- revisions --------------------------------------------------------------------------------------------------------


def test_the_same_value_at_another_revision_is_another_write() -> None:
    write = ok(1, 2, put(b"a"), Wrote(5))
    good(write, ok(3, 4, GET, Seen(b"a", 5)))
    bad(write, ok(3, 4, GET, Seen(b"a", 6)))


def test_revisions_tell_which_concurrent_write_was_first() -> None:
    writes = [ok(1, 9, put(b"a"), Wrote(5)), ok(2, 8, put(b"b"), Wrote(4))]
    good(*writes, ok(10, 11, GET, Seen(b"a")))
    bad(*writes, ok(10, 11, GET, Seen(b"b")))


def test_the_revision_of_an_unknown_write_is_fixed_by_who_sees_it() -> None:
    lines = [ok(1, 2, put(b"a"), Wrote(5)), unknown(3, put(b"b")), ok(4, 5, GET, Seen(b"b", 7))]
    good(*lines, ok(6, 7, GET, Seen(b"b", 7)))
    bad(*lines, ok(6, 7, GET, Seen(b"b", 8)))
    bad(*lines, ok(6, 7, put(b"c"), Wrote(7)))
    good(*lines, ok(6, 7, Swap(K, b"c", None, 7), Swapped(True, None, 8)))
    bad(*lines, ok(6, 7, Swap(K, b"c", None, 6), Swapped(True, None, 8)))


def test_a_swap_on_the_revision_of_an_unknown_write() -> None:
    lines = [ok(1, 2, put(b"a"), Wrote(5)), unknown(3, put(b"b"))]
    good(*lines, ok(4, 5, Swap(K, b"c", None, 7), Swapped(True, None, 8)))
    bad(*lines, ok(4, 5, Swap(K, b"c", None, 4), Swapped(True, None, 8)))


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_additions_count_up() -> None:
    good(ok(1, 2, Add(K, 1), Sum(1)), ok(3, 4, Add(K, 2), Sum(3)), ok(5, 6, GET, Seen(b"3")))


def test_an_addition_applied_twice() -> None:
    bad(ok(1, 2, Add(K, 1), Sum(1)), ok(3, 4, GET, Seen(b"2")))


def test_two_additions_told_the_same_sum() -> None:
    bad(ok(1, 4, Add(K, 1), Sum(1)), ok(2, 3, Add(K, 1), Sum(1)))


def test_unknown_additions_explain_a_jump_and_no_more() -> None:
    maybe = [unknown(number, Add(K, 1)) for number in range(1, 4)]
    for jump, verdict in ((0, good), (3, good), (4, bad)):
        verdict(*maybe, ok(10, 11, Add(K, 10), Sum(10 + jump)))


def test_a_refusal_out_of_range_needs_a_value_that_is_out_of_range() -> None:
    take = Add(K, -1, 0)
    good(ok(1, 2, take, Refusal("out_of_range")))
    bad(ok(1, 2, Add(K, 1), Sum(1)), ok(3, 4, take, Refusal("out_of_range")))
    good(ok(1, 2, Add(K, 1), Sum(1)), unknown(3, take), ok(4, 5, take, Refusal("out_of_range")))
    bad(ok(1, 2, take, Sum(-1)))
    bad(ok(1, 2, Add(K, 5, None, 4), Sum(5)))


# --- the bound, and what is told --------------------------------------------------------------------------------------


def test_a_search_that_is_given_up_is_no_verdict() -> None:
    # Sums of distinct powers: every subset of the unknown additions is another state.
    maybe = [unknown(number + 1, Add(K, 2**number)) for number in range(24)]
    with pytest.raises(CheckBudgetExceeded, match="not decided"):
        check(RegisterModel(), [*maybe, ok(100, 101, GET, Seen(b"-1"))], steps_max=20_000)


def test_the_story_holds_the_shortest_part() -> None:
    events = itertools.count(1)
    entries = []
    for number in range(40):
        value = b"v%d" % number
        entries += [
            ok(next(events), next(events), put(value), DONE),
            ok(next(events), next(events), GET, Seen(value)),
        ]
    entries.append(ok(next(events), next(events), GET, Seen(b"v38")))
    # What comes later does not make it better, and is not told.
    entries.append(ok(next(events), next(events), put(b"later"), DONE))
    message = bad(*entries)
    assert "first 81 of 82 operations cannot all be true" in message
    assert "leaves v39" in message
    shortest = message.partition("No order explains even these:")[2]
    assert shortest.count("worker") == 3
    assert "put k = v38 -> done" in shortest
    assert "v39" in shortest
    assert "get k -> v38" in shortest
    assert "later" not in message
    assert "v12" not in message


def test_the_longest_order_is_told() -> None:
    found = find_order(RegisterModel(), [ok(1, 2, put(b"a"), DONE), ok(3, 4, GET, Seen(b"b"))])
    assert not found.complete
    assert [entry.called for entry in found.placed] == [1]
    assert found.state.value == b"a"


def test_many_unknown_writes_cost_little() -> None:
    """Sixty writes of unknown outcome on one key, half of them seen, ten workers at a time."""
    entries: list[Entry] = []
    event = itertools.count(1)
    for burst in range(6):
        entries += [unknown(next(event), put(b"u%d.%d" % (burst, number))) for number in range(10)]
        for number in range(0, 10, 2):
            entries.append(ok(next(event), next(event), GET, Seen(b"u%d.%d" % (burst, number))))
            value = b"k%d.%d" % (burst, number)
            calls = [next(event) for _ in range(5)]
            entries.append(ok(calls[0], next(event), put(value), DONE))
            entries += [ok(call, next(event), GET, Seen(value)) for call in calls[1:]]
    assert check(RegisterModel(), entries) < STEPS_MAX / 100
    entries.append(ok(next(event), next(event), GET, Seen(b"u0.0")))
    bad(*entries)
