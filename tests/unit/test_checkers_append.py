"""The list-append checker: one history for each thing that must not be, and good ones beside it."""

from __future__ import annotations

import pytest

from tests.checkers.append import Append, Lists, Read, Steps, check_append
from tests.checkers.graph import Graph
from tests.checkers.history import Entry
from tests.checkers.scenario import failed, ok, unknown
from tests.checkers.verdict import Inconsistent


def txn(text: str) -> tuple[Steps, Lists]:
    """`a+1 b?12 c?` appends 1 to a, reads b as [1 2] and c as empty. Elements are digits."""
    steps: list[Append | Read] = []
    lists: list[tuple[int, ...] | None] = []
    for word in text.split():
        if word[1] == "+":
            steps.append(Append(word[0], int(word[2:])))
            lists.append(None)
        else:
            steps.append(Read(word[0]))
            lists.append(tuple(map(int, word[2:])))
    return Steps(tuple(steps)), Lists(tuple(lists))


def did(called: int, returned: int, text: str) -> Entry:
    return ok(called, returned, *txn(text))


def maybe(called: int, text: str) -> Entry:
    return unknown(called, txn(text)[0])


def bad(rule: str, *entries: Entry) -> str:
    with pytest.raises(Inconsistent) as caught:
        check_append(entries)
    assert caught.value.rule == rule, caught.value
    return caught.value.message


def test_a_serial_history_is_good() -> None:
    check_append([did(1, 2, "a+1 b+2"), did(3, 4, "a?1 b?2 a+3 a?13"), did(5, 6, "a?13 b?2 c?")])


def test_concurrent_transactions_may_take_any_order() -> None:
    check_append([did(1, 10, "a+1"), did(2, 9, "a+2"), did(3, 8, "a?21"), did(11, 12, "a?21")])


def test_an_unknown_append_may_be_there_or_not() -> None:
    check_append([maybe(1, "a+1"), did(2, 3, "a?"), did(4, 5, "a?1"), maybe(6, "a+2"), did(7, 8, "a?1")])


def test_a_lost_append() -> None:
    bad("lost_append", did(1, 2, "a+1"), did(3, 4, "a?"))
    bad("lost_append", did(1, 2, "a+1"), did(3, 4, "a+2"), did(5, 6, "a?2"))


def test_an_append_that_is_there_and_then_gone() -> None:
    bad("cycle", did(1, 2, "a+1"), did(3, 4, "a?1"), did(5, 6, "a?"), did(7, 8, "a?1"))


def test_an_append_applied_twice() -> None:
    bad("duplicate_append", maybe(1, "a+1"), did(2, 3, "a+2"), did(4, 5, "a?121"))


def test_an_append_that_surely_failed_and_is_seen() -> None:
    bad("failed_append_seen", failed(1, 2, txn("a+1")[0]), did(3, 4, "a?1"))


def test_an_element_of_nobody_of_another_key_or_of_later() -> None:
    bad("unwritten_element", did(1, 2, "a?1"))
    bad("unwritten_element", did(1, 2, "b+1"), did(3, 4, "a?1"))
    bad("unwritten_element", did(1, 2, "a?1"), did(3, 4, "a+1"))


def test_a_read_in_the_midst_of_a_transaction() -> None:
    bad("intermediate_read", did(1, 6, "a+1 a+2"), did(2, 3, "a?1"), did(7, 8, "a?12"))
    bad("intermediate_read", did(1, 6, "a+1 a+2"), did(2, 5, "a+3"), did(7, 8, "a?132"))
    bad("intermediate_read", maybe(1, "a+1 a+2"), did(7, 8, "a?2"))


def test_a_transaction_that_contradicts_itself() -> None:
    bad("own_writes", did(1, 2, "a+1 a?"))
    bad("own_writes", did(1, 6, "a+1"), did(2, 5, "a? b? a?1"))


def test_reads_that_disagree_on_the_order() -> None:
    bad("incompatible_orders", did(1, 9, "a+1"), did(2, 8, "a+2"), did(3, 4, "a?1"), did(5, 6, "a?21"))


def test_g0_writes_in_a_circle() -> None:
    message = bad("cycle", did(1, 9, "a+1 b+2"), did(2, 8, "a+3 b+4"), did(10, 11, "a?13"), did(12, 13, "b?42"))
    assert message.startswith("G0:")


def test_g1c_information_in_a_circle() -> None:
    message = bad("cycle", did(1, 9, "a+1 b?2"), did(2, 8, "b+2 a?1"))
    assert message.startswith("G1c:")


def test_g_single_a_torn_read() -> None:
    message = bad("cycle", did(1, 9, "a+1 b+2"), did(2, 8, "a?1 b?"), did(10, 11, "b?2"))
    assert message.startswith("G-single:")


def test_a_lost_update() -> None:
    message = bad("cycle", did(1, 9, "a? a+1"), did(2, 8, "a? a+2"), did(10, 11, "a?12"))
    assert message.startswith("G-single:")


def test_g2_write_skew() -> None:
    message = bad("cycle", did(1, 9, "a? b+1"), did(2, 8, "b? a+2"), did(10, 11, "a?2 b?1"))
    assert message.startswith("G2:")
    assert message.count("rw on") == 2


def test_a_stale_read_violates_real_time() -> None:
    message = bad("cycle", did(1, 2, "a+1"), did(3, 4, "a?"), did(5, 6, "a?1"))
    assert message.startswith("G-single-realtime:")
    assert "was answered before the next one was called" in message
    # The same answers are good if they were concurrent.
    check_append([did(1, 4, "a+1"), did(2, 5, "a?"), did(6, 7, "a?1")])


def test_real_time_over_keys_and_workers() -> None:
    """Every key is fine by itself: only together do they contradict real time."""
    message = bad("cycle", did(1, 2, "a+1"), did(3, 4, "b+2"), did(0, 9, "b?2 a?"), did(10, 11, "a?1 b?2"))
    assert "-realtime" in message
    assert message.splitlines()[0].startswith("G-single-realtime")


def test_an_unknown_transaction_that_took_effect_took_all_of_it() -> None:
    lines = [maybe(1, "a+1 b+2"), did(2, 3, "a?1")]
    check_append(lines)
    bad("cycle", *lines, did(4, 5, "b?"), did(6, 7, "b?2"))


def test_a_cycle_through_many_is_told_as_the_shortest() -> None:
    entries = [did(2 * number, 2 * number + 1, f"a?{'1' if number else ''}") for number in range(1, 40)]
    entries.insert(0, did(0, 1, "a+1"))
    message = bad("cycle", *entries, did(100, 101, "a?"), did(102, 103, "a?1"))
    # The writer and one reader that missed it.
    assert message.count("worker") == 2


def test_the_graph_finds_a_shortest_cycle() -> None:
    graph = Graph(5)
    for source, target in ((0, 1), (1, 2), (2, 3), (3, 0), (2, 1), (4, 0)):
        graph.add(source, target, f"{source}{target}")
    assert graph.cycle() == [(1, "12"), (2, "21")]
    graph = Graph(3)
    graph.add(0, 1, "")
    graph.add(1, 2, "")
    graph.add(0, 2, "")
    assert graph.cycle() == []


def test_ways_through_helpers_are_short() -> None:
    graph = Graph(3, 3)
    for source, target in ((0, 3), (3, 4), (4, 5), (5, 1), (1, 0), (0, 2), (2, 1)):
        graph.add(source, target, f"{source}{target}")
    assert [node for node, _ in graph.cycle()] == [0, 3, 4, 5, 1]
