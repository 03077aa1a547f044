"""Transactions against the model, many small ones in one batch: every operation after every other, nested or not."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.model import Add, Compare, Delete, Put, Range, Relation, SortBy, Target, Txn
from kvstore.state.machine import DATA, Machine
from kvstore.state.storage import MemoryDisk
from tests.state_model import Model, bare, decoded, entry

KEYS = [b"a", b"b", b"c", b"d"]
keys = st.sampled_from(KEYS)
ends = st.none() | keys | st.just(b"")
puts = st.builds(Put, keys, st.sampled_from([b"1", b"2", b"x"]), st.just(0), st.booleans())
adds = st.builds(Add, keys, st.sampled_from([-1, 1, 2]), st.sampled_from([None, 0]), st.sampled_from([None, 2]))
deletes = st.builds(Delete, keys, ends, st.booleans())
ranges = st.builds(
    Range,
    keys,
    ends,
    st.sampled_from([0, 0, 1]),
    st.sampled_from([0, 0, 0, 3, 4, 5, 6, 7]),
    st.booleans(),
    st.sampled_from([False, False, True]),
    st.booleans(),
    st.sampled_from([SortBy.KEY, SortBy.KEY, SortBy.VALUE, SortBy.VERSION]),
)
compares = st.builds(
    Compare, keys, st.just(Target.VALUE), st.sampled_from(Relation), st.sampled_from([b"1", b"x"]), ends
) | st.builds(
    Compare,
    keys,
    st.sampled_from([target for target in Target if target is not Target.VALUE]),
    st.sampled_from(Relation),
    st.integers(0, 3),
    ends,
)
single = puts | adds | deletes | ranges


def transactions(operations: st.SearchStrategy[Any], compares_max: int) -> st.SearchStrategy[Any]:
    branch = st.lists(operations, max_size=4).map(tuple)
    return st.builds(Txn, st.lists(compares, max_size=compares_max).map(tuple), branch, branch)


nested = transactions(single | transactions(single, 1), 1)


def check(batches: list[list[Any]]) -> None:
    model, machine = Model(), Machine(MemoryDisk().open, "state")
    for index, requests in enumerate(batches, 1):
        answers = decoded(machine.apply(index, 1, DATA, entry(index, requests)))
        expected = model.apply(index, requests)
        assert [bare(answer) for answer in answers] == [bare(answer) for answer in expected]
        whole = Range(b"", b"")
        assert decoded([machine.read(whole)]) == [model.operate(whole)]
    for revision in range(1, model.revision + 1):
        whole = Range(b"", b"", revision=revision)
        assert decoded([machine.read(whole)]) == [model.operate(whole)]
    machine.close()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(puts | deletes | adds, max_size=4), max_size=1), st.lists(nested, min_size=1, max_size=4))
def test_transactions_in_a_batch(before: list[list[Any]], requests: list[Any]) -> None:
    check([*before, requests])


@settings(max_examples=100, deadline=None)
@given(st.lists(transactions(single, 0).map(lambda txn: Txn((), txn.success)), min_size=1, max_size=6))
def test_plain_transactions_in_a_batch(requests: list[Any]) -> None:
    check([[Put(b"b", b"1"), Put(b"d", b"x")], requests])
