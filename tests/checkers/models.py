"""A register, sequentially: put, get, delete, compare-and-put and bounded addition on one key.

A state is the value and what is known of its mod_revision. A write's revision is known from its answer; one of unknown
outcome leaves only a bound (later than what was there), until somebody reads it. Revisions make the model strict: the
same value at another revision is another write.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from msgspec import Struct

from kvstore.model import INT64_MAX, INT64_MIN
from tests.checkers.history import Entry
from tests.checkers.linearizability import UNKNOWN

# A revision that was not asked for.
UNSEEN = -1


# --- operations -------------------------------------------------------------------------------------------------------


class Get(Struct, frozen=True, gc=False):
    key: bytes

    def __str__(self) -> str:
        return f"get {_text(self.key)}"


class Put(Struct, frozen=True, gc=False):
    key: bytes
    value: bytes

    def __str__(self) -> str:
        return f"put {_text(self.key)} = {_text(self.value)}"


class Delete(Struct, frozen=True, gc=False):
    key: bytes

    def __str__(self) -> str:
        return f"delete {_text(self.key)}"


class Swap(Struct, frozen=True, gc=False):
    """Put `value` if the key holds `expected` (never true of an absent key), or, where that is None, if its
    mod_revision is `expected_revision` (0: absent)."""

    key: bytes
    value: bytes
    expected: bytes | None
    expected_revision: int = 0

    def __str__(self) -> str:
        held = f"revision {self.expected_revision}" if self.expected is None else _text(self.expected)
        return f"swap {_text(self.key)} from {held} to {_text(self.value)}"


class Add(Struct, frozen=True, gc=False):
    key: bytes
    delta: int
    min: int | None = None
    max: int | None = None

    def __str__(self) -> str:
        bounds = "" if self.min is None and self.max is None else f" within [{self.min}, {self.max}]"
        return f"add {self.delta} to {_text(self.key)}{bounds}"


# --- results ----------------------------------------------------------------------------------------------------------


class Seen(Struct, frozen=True, gc=False):
    """A record as an answer showed it. `value` None: absent. `revision` is its mod_revision; UNSEEN if not shown."""

    value: bytes | None
    revision: int = UNSEEN

    def __str__(self) -> str:
        if self.value is None:
            return "absent"
        return _text(self.value) + (f" of revision {self.revision}" if self.revision != UNSEEN else "")


class Wrote(Struct, frozen=True, gc=False):
    """A put or delete was done. `before`: what was there, where that was asked for. `revision` UNSEEN: not shown, or
    (of a delete) nothing was there."""

    revision: int = UNSEEN
    before: Seen | None = None

    def __str__(self) -> str:
        return "done" + (f", before: {self.before}" if self.before is not None else "")


class Swapped(Struct, frozen=True, gc=False):
    """Did the compare hold; what was there, where that was asked for; the revision made if it held."""

    succeeded: bool
    seen: Seen | None = None
    revision: int = UNSEEN

    def __str__(self) -> str:
        return ("swapped" if self.succeeded else "not swapped") + (
            f", was {self.seen}" if self.seen is not None else ""
        )


class Sum(Struct, frozen=True, gc=False):
    value: int
    revision: int = UNSEEN

    def __str__(self) -> str:
        return f"now {self.value}"


class Refusal(Struct, frozen=True, gc=False):
    """An addition that the store refused after looking at the value: `out_of_range`, `overflow` or `not_a_number`.
    It changed nothing, and says something about what was there."""

    code: str

    def __str__(self) -> str:
        return self.code


# --- the model --------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    value: bytes | None
    revision: int  # the last change's, deletions included; or the last known one before it
    is_exact: bool  # False: the change's revision is some later one than `revision`


_CANNOT: tuple[bool, State] = (False, State(None, 0, True))


class RegisterModel:
    """See the module's docstring. A key is absent at first."""

    initial = State(None, 0, True)

    def key(self, operation: Any) -> Hashable:
        key: bytes = operation.key
        return key

    def describe(self, state: State) -> str:
        if state.value is None:
            return "an absent record"
        return f"{_text(state.value)} of {'revision' if state.is_exact else 'a revision after'} {state.revision}"

    def step(self, state: State, operation: Any, result: Any) -> tuple[bool, State]:
        if result is UNKNOWN:
            return self._attempt(state, operation)
        kind = type(operation)
        if kind is Get:
            seen = _matched(state, result)
            return (True, seen) if seen is not None else _CANNOT
        if kind is Put or kind is Delete:
            if result.before is not None:
                met = _matched(state, result.before)
                if met is None:
                    return _CANNOT
                state = met
            if kind is Put:
                return _written(state, operation.value, result.revision)
            if state.value is None:
                return (True, state) if result.revision == UNSEEN else _CANNOT
            return _written(state, None, result.revision)
        if kind is Swap:
            if result.seen is not None:
                met = _matched(state, result.seen)
                if met is None:
                    return _CANNOT
                state = met
            holds = _compare(state, operation)
            if holds is not None and holds is not result.succeeded:
                return _CANNOT
            return _written(state, operation.value, result.revision) if result.succeeded else (True, state)
        assert kind is Add
        code, total = _sum(state, operation)
        if type(result) is Refusal:
            return (True, state) if code == result.code else _CANNOT
        if code or total != result.value:
            return _CANNOT
        return _written(state, b"%d" % total, result.revision)

    def _attempt(self, state: State, operation: Any) -> tuple[bool, State]:
        kind = type(operation)
        if kind is Put:
            value = operation.value
        elif kind is Delete and state.value is not None:
            value = None
        elif kind is Swap and _compare(state, operation) is not False:
            value = operation.value
        elif kind is Add:
            code, total = _sum(state, operation)
            if code:
                return _CANNOT
            value = b"%d" % total
        else:
            return _CANNOT
        return True, State(value, state.revision, False)

    def useful(self, unknown: list[Entry], known: list[Entry]) -> list[Entry]:
        """Reads are dropped, and, where each answer of a known operation shows the whole state before it or does not
        depend on it (a plain put), so are writes of values that nobody has shown.

        Sound: take an order that explains the known operations and has such a write U of value v in it. Up to the next
        write in effect, every known operation shows v (nobody does, so there is none) or does not depend on it (a
        put, which is that next write). Other operations of unknown outcome there can be left out like U, unless a
        known operation needs them: that is a swap which expects v and whose own value is shown, directly or
        through more such swaps; then v counts as shown. So the order without U explains the rest as well. Additions
        turn one value into another by themselves, so on a key that has them everything is kept.
        """
        useful = [entry for entry in unknown if type(entry.operation) is not Get]
        shown: set[bytes | None] = set()
        for entry in known:
            if type(entry.operation) is Put and entry.result.before is None:
                continue
            seen = _shown(entry)
            if seen is None:
                return useful
            shown.add(seen.value)
        if any(type(entry.operation) is Add for entry in useful):
            return useful
        kept: list[Entry] = []
        rest = useful
        while True:
            found = [entry for entry in rest if _value_of(entry.operation) in shown]
            if not found:
                return sorted(kept, key=lambda entry: entry.called)
            kept += found
            rest = [entry for entry in rest if _value_of(entry.operation) not in shown]
            for entry in found:
                if type(entry.operation) is Swap:
                    if entry.operation.expected is None and entry.operation.expected_revision:
                        return useful  # it expects a revision, and nobody knows whose that is
                    shown.add(entry.operation.expected)


def _matched(state: State, seen: Seen) -> State | None:
    """The state with what `seen` tells of it; None if that contradicts it."""
    if state.value != seen.value:
        return None
    if seen.value is None or seen.revision == UNSEEN:
        return state
    if state.is_exact:
        return state if state.revision == seen.revision else None
    return State(state.value, seen.revision, True) if seen.revision > state.revision else None


def _written(state: State, value: bytes | None, revision: int) -> tuple[bool, State]:
    if revision == UNSEEN:
        return True, State(value, state.revision, False)
    # Revisions grow with every change; after an inexact one at least two changes lie behind the bound.
    if revision <= state.revision + (0 if state.is_exact else 1):
        return _CANNOT
    return True, State(value, revision, True)


def _compare(state: State, swap: Swap) -> bool | None:
    """Does it hold? None: that depends on a revision which nobody has seen."""
    if swap.expected is not None:
        return state.value == swap.expected
    if state.value is None or not swap.expected_revision:
        return state.value is None and not swap.expected_revision
    if state.is_exact:
        return state.revision == swap.expected_revision
    return None if swap.expected_revision > state.revision else False


def _sum(state: State, add: Add) -> tuple[str, int]:
    """The code that refuses it, or "" and the sum."""
    value = state.value if state.value is not None else b"0"
    if not value.lstrip(b"-").isdigit():
        return "not_a_number", 0
    total = int(value) + add.delta
    if not INT64_MIN <= total <= INT64_MAX:
        return "overflow", 0
    if (add.min is not None and total < add.min) or (add.max is not None and total > add.max):
        return "out_of_range", 0
    return "", total


def _shown(entry: Entry) -> Seen | None:
    """What a known operation showed of the whole state before it; None if it did not."""
    kind = type(entry.operation)
    shown: Seen | None = None
    if kind is Get:
        shown = entry.result
    elif kind is Put or kind is Delete:
        shown = entry.result.before
    elif kind is Swap:
        shown = entry.result.seen
    return shown


def _value_of(operation: Any) -> bytes | None:
    return None if type(operation) is Delete else operation.value


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace") or "''"
