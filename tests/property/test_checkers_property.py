"""The checkers against the plainest ones: try every order of a small history.

Histories come from a run that really happened in some order, with calls, returns and outcomes around it drawn at
random; then, often, one answer is changed. So both verdicts are common, and what happened as it should is never
accused.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkers.append import Append, Lists, Read, Steps, check_append
from tests.checkers.history import NEVER, Entry, History, Outcome
from tests.checkers.linearizability import STEPS_MAX, check, find_order, shorten
from tests.checkers.models import Add, Delete, Get, Put, Refusal, RegisterModel, Seen, Sum, Swap, Swapped, Wrote
from tests.checkers.revisions import check_revisions
from tests.checkers.verdict import Inconsistent
from tests.workloads.register import DELTAS, OPERATIONS_PER_KEY

K = b"k"
HISTORIES = 3_000
_HISTORY = History(lambda: 0.0)
Orders = Generator[list[Entry], bool, None]


class Happened:
    """Operations that took effect one after the other, within calls and returns that overlap.

    A real store, in its simplest form: `value` and `revision` of one register.
    """

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.value: bytes | None = None
        self.revision = 0
        self.mod_revision = 0
        self.entries: list[Entry] = []

    def run(self, operations: Sequence[Any], apply: Callable[[Any], Any], unknown_share: float) -> list[Entry]:
        """Operation n takes effect at time n, is called up to `reach` before and answered up to `reach` after it."""
        moments: list[tuple[float, str, int]] = []
        answers: list[Any] = []
        for number, operation in enumerate(operations):
            reach = self.chance.choice((0.4, 4.0))
            moments.append((number - self.chance.random() * reach, "call", number))
            moments.append((number + self.chance.random() * reach, "return", number))
            is_unknown = self.chance.random() < unknown_share
            takes_effect = not is_unknown or self.chance.random() < 0.5
            answer = apply(operation) if takes_effect else None
            answers.append(None if is_unknown else answer)
        moments.sort()
        called: dict[int, int] = {}
        for event, (_, what, number) in enumerate(moments):
            if what == "call":
                called[number] = event
                continue
            operation = operations[number]
            if answers[number] is None:
                entry = Entry(_HISTORY, 0, operation, called[number], 0.0, Outcome.UNKNOWN)
            else:
                result, revision, changed = answers[number]
                entry = Entry(_HISTORY, 0, operation, called[number], 0.0, Outcome.OK, result, event)
                entry.revision, entry.changed = revision, changed
            self.entries.append(entry)
        self.entries.sort(key=lambda entry: entry.called)
        return self.entries

    # --- the register -------------------------------------------------------------------------------------------------

    def apply(self, operation: Any) -> tuple[Any, int, bool]:
        before = self.seen()
        result = self._do(operation, before)
        changed = self.seen() != before
        return result, self.revision, changed

    def seen(self) -> Seen:
        return Seen(self.value, self.mod_revision if self.value is not None else 0)

    def _set(self, value: bytes | None) -> int:
        self.revision += 1
        self.value, self.mod_revision = value, self.revision
        return self.revision

    def _do(self, operation: Any, before: Seen) -> Any:
        shows = self.chance.random() < 0.5
        if isinstance(operation, Get):
            return before
        if isinstance(operation, Put):
            return Wrote(self._set(operation.value), before if shows else None)
        if isinstance(operation, Delete):
            if self.value is None:
                return Wrote(before=before)
            return Wrote(self._set(None), before if shows else None)
        if isinstance(operation, Swap):
            if operation.expected is not None:
                holds = self.value == operation.expected
            else:
                holds = before.revision == operation.expected_revision
            seen = before if shows else None
            return Swapped(True, seen, self._set(operation.value)) if holds else Swapped(False, seen)
        value = int(self.value or b"0")
        if operation.min is not None and value + operation.delta < operation.min:
            return Refusal("out_of_range")
        return Sum(value + operation.delta, self._set(b"%d" % (value + operation.delta)))


def draw_operation(chance: Random, *, numbers: bool) -> Any:
    kind = chance.randrange(7)
    value = chance.choice((b"1", b"2", b"3"))
    if kind < 2:
        return Get(K)
    if kind == 2 and numbers:
        return Add(K, chance.choice((1, 1, -1, 2)), chance.choice((None, 0)))
    if kind == 3:
        return Delete(K)
    if kind == 4:
        return Swap(K, value, chance.choice((b"1", b"2", None)), chance.choice((0, 1, 2)))
    return Put(K, value)


def draw_register(chance: Random, size: int) -> list[Entry]:
    numbers = chance.random() < 0.5
    operations = [draw_operation(chance, numbers=numbers) for _ in range(chance.randint(2, size))]
    happened = Happened(chance)
    return happened.run(operations, happened.apply, chance.choice((0.0, 0.4)))


def spoil(chance: Random, entries: list[Entry]) -> None:
    """Change one answer, or let two operations no longer overlap."""
    known = [entry for entry in entries if entry.is_ok]
    if not known:
        return
    entry = chance.choice(known)
    result = entry.result
    if isinstance(result, Seen):
        entry.result = Seen(chance.choice((None, b"1", b"2", b"3")))
    elif isinstance(result, Swapped):
        entry.result = Swapped(not result.succeeded)
    elif isinstance(result, Sum):
        entry.result = Sum(result.value + chance.choice((-1, 1)))
    elif isinstance(result, Wrote):
        entry.outcome = Outcome.FAILED


def without_revisions(entries: list[Entry]) -> None:
    """For comparison with every order: what values alone tell."""
    for entry in entries:
        result = entry.result
        if isinstance(result, Seen):
            entry.result = Seen(result.value)
        elif isinstance(result, Wrote):
            entry.result = Wrote(before=Seen(result.before.value) if result.before is not None else None)
        elif isinstance(result, Swapped):
            entry.result = Swapped(result.succeeded, Seen(result.seen.value) if result.seen is not None else None)
        elif isinstance(result, Sum):
            entry.result = Sum(result.value)


def has_swap_by_revision(entries: list[Entry]) -> bool:
    return any(isinstance(entry.operation, Swap) and entry.operation.expected is None for entry in entries)


def every_order(entries: list[Entry]) -> Orders:
    """Every order of all known operations and some unknown ones that respects real time; but only prefixes that the
    caller has not rejected: it sends True to go on with the order just given."""
    known = [entry for entry in entries if entry.is_ok]
    usable = [entry for entry in entries if not entry.is_failed]

    def extend(order: list[Entry]) -> Orders:
        go_on = yield order
        if not go_on:
            return
        left = [entry for entry in usable if entry not in order]
        bound = min((entry.returned for entry in left), default=NEVER)
        for entry in left:
            if entry.called <= bound:
                yield from extend([*order, entry])

    assert all(entry.returned != NEVER for entry in known)
    return extend([])


def some_order(entries: list[Entry], explains: Callable[[list[Entry]], bool]) -> bool:
    known = sum(1 for entry in entries if entry.is_ok)
    orders = every_order(entries)
    order = next(orders)
    while True:
        good = explains(order)
        if good and sum(1 for entry in order if entry.is_ok) == known:
            return True
        try:
            order = orders.send(good)
        except StopIteration:
            return False


def explains_register(order: list[Entry]) -> bool:
    """Does a plain register, doing these one after the other, answer as they were answered?"""
    store = Happened(Random(0))
    for entry in order:
        before = store.value
        answer = store.apply(entry.operation)[0]
        result = entry.result
        if not entry.is_ok:
            continue
        if isinstance(result, Seen) and result.value != before:
            return False
        if isinstance(result, Wrote) and result.before is not None and result.before.value != before:
            return False
        if isinstance(result, Swapped):  # noqa: SIM102
            if result.succeeded != answer.succeeded or (result.seen is not None and result.seen.value != before):
                return False
        if isinstance(result, Sum) and (not isinstance(answer, Sum) or answer.value != result.value):
            return False
        if isinstance(result, Refusal) and not isinstance(answer, Refusal):
            return False
    return True


def compare_register(chance: Random) -> bool:
    entries = draw_register(chance, 6)
    while has_swap_by_revision(entries):
        entries = draw_register(chance, 6)
    if chance.random() < 0.6:
        spoil(chance, entries)
    without_revisions(entries)
    expected = some_order(entries, explains_register)
    possible = [entry for entry in entries if not entry.is_failed]
    found = find_order(RegisterModel(), possible)
    assert found.complete is expected, "\n".join(map(str, entries))
    if not expected:
        core = shorten(RegisterModel(), possible, found.steps)
        assert not some_order(core, explains_register), "the shortened part must still be inexplicable"
    return expected


def test_both_verdicts_on_registers_agree_with_trying_every_order() -> None:
    verdicts = [compare_register(Random(seed)) for seed in range(HISTORIES)]
    assert HISTORIES / 10 < sum(verdicts) < HISTORIES * 9 / 10


@given(st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_registers_agree_with_trying_every_order(chance: Random) -> None:
    compare_register(chance)


@pytest.mark.parametrize("seed", range(20))
def test_what_happened_is_never_accused(seed: int) -> None:
    """Long histories, revisions and all, with a third of the outcomes unknown."""
    chance = Random(seed)
    for _ in range(20):
        entries = draw_register(chance, 80)
        check(RegisterModel(), entries)
        check_revisions(entries)


def draw_as_the_workload(chance: Random, size: int, *, numbers: bool) -> Iterator[Any]:
    """Operations on one key in the shares and kinds of `workloads.register`: values are unique."""
    for number in range(size):
        kind = chance.random()
        value = b"v%d" % number
        if kind < 0.45:
            yield Get(K)
        elif kind < 0.52:
            yield Delete(K)
        elif numbers:
            delta = chance.choice(DELTAS)
            yield Add(K, delta, 0 if delta < 0 else None)
        elif kind < 0.76:
            yield Put(K, value)
        elif chance.random() < 0.5:
            yield Swap(K, value, b"v%d" % max(0, number - chance.randint(1, 8)))
        else:
            yield Swap(K, value, None, chance.randint(0, number))


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("unknown_share", [0.3, 0.5, 0.7, 0.9])
def test_many_unknown_outcomes_take_few_steps(numbers: bool, unknown_share: float) -> None:
    for seed in range(40):
        happened = Happened(Random(seed))
        operations = list(draw_as_the_workload(happened.chance, OPERATIONS_PER_KEY, numbers=numbers))
        entries = happened.run(operations, happened.apply, unknown_share)
        assert check(RegisterModel(), entries) < STEPS_MAX / 10


# --- list-append ------------------------------------------------------------------------------------------------------


class Listed:
    """A store of lists, doing transactions one after the other."""

    def __init__(self) -> None:
        self.lists: dict[str, tuple[int, ...]] = {}

    def apply(self, operation: Steps) -> tuple[Any, int, bool]:
        told: list[tuple[int, ...] | None] = []
        for step in operation.steps:
            held = self.lists.get(step.key, ())
            if isinstance(step, Append):
                self.lists[step.key] = (*held, step.element)
                told.append(None)
            else:
                told.append(held)
        return Lists(tuple(told)), 0, False


def draw_append(chance: Random) -> list[Entry]:
    elements = iter(range(1, 100))
    operations = []
    for _ in range(chance.randint(2, 5)):
        steps: list[Append | Read] = []
        for _ in range(chance.randint(1, 3)):
            key = chance.choice("ab")
            steps.append(Append(key, next(elements)) if chance.random() < 0.5 else Read(key))
        operations.append(Steps(tuple(steps)))
    return Happened(chance).run(operations, Listed().apply, chance.choice((0.0, 0.4)))


def spoil_append(chance: Random, entries: list[Entry]) -> None:
    known = [entry for entry in entries if entry.is_ok]
    if not known:
        return
    entry = chance.choice(known)
    if chance.random() < 0.1:
        entry.outcome = Outcome.FAILED
        return
    lists = list(entry.result.lists)
    for place, seen in enumerate(lists):
        if seen is None or chance.random() < 0.5:
            continue
        changed = list(seen)
        kind = chance.randrange(4)
        if kind == 0 and changed:
            changed.pop()
        elif kind == 1 and changed:
            changed.pop(chance.randrange(len(changed)))
        elif kind == 2:
            chance.shuffle(changed)
        else:
            changed.append(chance.randint(1, 8))
        lists[place] = tuple(changed)
    entry.result = Lists(tuple(lists))


def explains_append(order: list[Entry]) -> bool:
    store = Listed()
    return all(not entry.is_ok or told == entry.result for entry in order for told in [store.apply(entry.operation)[0]])


def compare_append(chance: Random) -> bool:
    entries = draw_append(chance)
    if chance.random() < 0.6:
        spoil_append(chance, entries)
    expected = some_order(entries, explains_append)
    try:
        check_append(entries)
        verdict = ""
    except Inconsistent as error:
        verdict = str(error)
    assert (verdict == "") is expected, f"{verdict}\n" + "\n".join(map(str, entries))
    return expected


def test_both_verdicts_on_lists_agree_with_trying_every_order() -> None:
    verdicts = [compare_append(Random(seed)) for seed in range(HISTORIES)]
    assert HISTORIES / 10 < sum(verdicts) < HISTORIES * 9 / 10


@given(st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_lists_agree_with_trying_every_order(chance: Random) -> None:
    compare_append(chance)
