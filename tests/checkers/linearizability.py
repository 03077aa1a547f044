"""Is there an order of these operations that explains every answer and respects real time?

The search is that of Wing and Gong, "Testing and verifying concurrent objects" (1993), with Lowe's memoisation
("Testing for linearizability", 2017) as Porcupine has it: calls and returns in a linked list; whatever was called
before the first return may be next; what is placed is lifted out; a configuration (which operations are placed, and
the state they leave) that once led nowhere is never entered again. Histories are split by key first, which is sound
because linearizability is local (Herlihy and Wing, 1990).

Operations of unknown outcome are what makes this exponential: each may take effect at any later time, or never. So
they are not among the candidates at all. They are placed lazily, as a chain directly before an operation of known
outcome which that chain makes possible, or whose outcome it changes. Nothing is lost by that:
- A chain that makes no difference to the operation behind it and to the state after that one can be left out of any
  order that has it, and the order still explains everything: an unknown operation need not take effect. (Nor need one
  at the end of an order, behind the last known operation.)
- Of two configurations with the same known operations and the same state, the one that has used fewer unknown ones (a
  subset) can go on in every way in which the other can. So the memory keeps the smallest sets only.
- Of two equal unknown operations, only the one called first is tried: it can stand wherever the other can.

The search is bounded in steps of the model. Past the bound it raises `CheckBudgetExceeded` and claims nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from tests.checkers.history import NEVER, Entry, told
from tests.checkers.verdict import CheckBudgetExceeded, Inconsistent

# A key of 80 operations, as the register workload makes them, takes some hundreds of steps, with 30 to 90 % of unknown
# outcome some thousands (tests/property/test_checkers_property.py holds it to a tenth of this). A million takes about a
# second: what needs more is not going to end, and its workload should use more keys.
STEPS_MAX = 1_000_000
# The shortest telling part is found by some searches for each operation, the first of which took what it took; a long
# search is not worth repeating so often, and the message then holds more operations than it must.
SHORTEN_STEPS_MAX = 1_000_000
# So many operations tell what a reader can take in.
TAIL = 8
_LEFT_OUT = "whatever it answered later"
UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda _: "unknown"})()
"""The result of an operation that nobody knows the result of."""

_State = TypeVar("_State", bound=Hashable)


class Model(Protocol[_State]):
    """What one key is, sequentially. States are hashable values."""

    initial: _State

    def key(self, operation: Any) -> Hashable:
        """Whose state the operation reads and changes."""

    def step(self, state: _State, operation: Any, result: Any) -> tuple[bool, _State]:
        """Can `operation` answer `result` in `state`, and what is the state then? With the result UNKNOWN: whatever it
        would answer; (False, _) if it changes nothing here, or cannot."""

    def useful(self, unknown: list[Entry], known: list[Entry]) -> list[Entry]:
        """Those operations of unknown outcome on one key that may help to explain the known ones."""

    def describe(self, state: _State) -> str: ...


class Order(NamedTuple):
    """What a search found: a whole order, or the longest one that explains a part of the known operations."""

    complete: bool
    placed: tuple[Entry, ...]
    state: Any
    steps: int


def check(model: Model[Any], entries: Iterable[Entry], steps_max: int = STEPS_MAX) -> int:
    """Judge every key. Returns the steps it took. Raises `Inconsistent("linearizability")` for the first key that no
    order explains, and `CheckBudgetExceeded` where one key takes more than `steps_max` steps."""
    by_key: dict[Hashable, list[Entry]] = {}
    for entry in entries:
        if not entry.is_failed:
            by_key.setdefault(model.key(entry.operation), []).append(entry)
    steps = 0
    for key, of_key in by_key.items():
        found = find_order(model, of_key, steps_max)
        steps += found.steps
        if not found.complete:
            try:
                story = _story(model, key, of_key, found)
            except CheckBudgetExceeded:
                # That no order exists is known by now; only telling why has become too long.
                story = f"{key!r}: no order explains its {len(of_key)} operations:\n{told(of_key)}"
            raise Inconsistent("linearizability", story)
    return steps


def find_order(model: Model[Any], entries: Sequence[Entry], steps_max: int = STEPS_MAX) -> Order:
    """Search an order of the operations on one key. Those that surely failed must not be among them."""
    known = [entry for entry in entries if entry.is_ok]
    unknown = model.useful([entry for entry in entries if entry.is_unknown], known)
    return _Search(model, known, unknown, steps_max).run()


class _Move(NamedTuple):
    which: int
    chain: tuple[int, ...]  # unknown operations that are placed directly before it
    state: Any
    used: int  # bits of the unknown operations placed so far


class _Search:
    def __init__(self, model: Model[Any], known: list[Entry], unknown: list[Entry], steps_max: int) -> None:
        self._model = model
        self._known = known
        self._unknown = sorted(unknown, key=lambda entry: entry.called)
        self._operations = [(entry.operation, entry.result) for entry in known]
        self._steps = 0
        self._steps_max = steps_max
        # Only the first unused one of equal unknown operations is tried; `twins` holds the bits of those before it.
        groups: dict[Any, int] = {}
        self._twins: list[int] = []
        for number, entry in enumerate(self._unknown):
            before = groups.get(entry.operation, 0)
            self._twins.append(before)
            groups[entry.operation] = before | 1 << number
        # The linked list: node 0 is the head; a call is +which+1, a return -(which+1), in the order of events.
        events = sorted(
            [(entry.called, which + 1) for which, entry in enumerate(known)]
            + [(entry.returned, -which - 1) for which, entry in enumerate(known)]
        )
        self._event = [0, *(number for number, _ in events)]
        self._says = [0, *(says for _, says in events)]
        length = len(events) + 1
        self._next = [*range(1, length), 0]
        self._back = [length - 1, *range(length - 1)]
        self._call_at = [0] * len(known)
        self._return_at = [0] * len(known)
        for node in range(1, length):
            says = self._says[node]
            if says > 0:
                self._call_at[says - 1] = node
            else:
                self._return_at[-says - 1] = node

    def run(self) -> Order:
        failed: dict[tuple[int, Any], list[int]] = {}
        state, used, placed = self._model.initial, 0, 0
        moves: list[Iterator[_Move]] = [self._moves(state, used)]
        path: list[_Move] = []
        best: list[_Move] = []
        goal = len(self._known)
        while len(path) < goal:
            move = next(moves[-1], None)
            if move is None:
                moves.pop()
                if not path:
                    return self._order(best, complete=False)
                undone = path.pop()
                self._unlift(undone.which)
                placed &= ~(1 << undone.which)
                continue
            configuration = (placed | 1 << move.which, move.state)
            seen = failed.get(configuration)
            if seen is None:
                failed[configuration] = [move.used]
            elif any(smaller & move.used == smaller for smaller in seen):
                continue
            else:
                seen.append(move.used)
            self._lift(move.which)
            placed = configuration[0]
            path.append(move)
            if len(path) > len(best):
                best = path.copy()
            moves.append(self._moves(move.state, move.used))
        return self._order(path, complete=True)

    def _moves(self, state: Any, used: int) -> Iterator[_Move]:
        """What may be placed next: first what needs no unknown operation, then what some chain of them makes possible,
        shorter chains first."""
        step, operations, says, follows = self._model.step, self._operations, self._says, self._next
        window: list[int] = []
        node = follows[0]
        while says[node] > 0:
            window.append(says[node] - 1)
            node = follows[node]
        bound = self._event[node]  # of the first return: what was called after it cannot be next
        direct: list[tuple[bool, Any]] = []
        self._spend(len(window))
        for which in window:
            answer = step(state, *operations[which])
            direct.append(answer)
            if answer[0]:
                yield _Move(which, (), answer[1], used)
        unknown, twins = self._unknown, self._twins
        smallest: dict[Any, list[int]] = {state: [used]}
        frontier: list[tuple[Any, int, tuple[int, ...]]] = [(state, used, ())]
        while frontier:
            longer: list[tuple[Any, int, tuple[int, ...]]] = []
            for at, at_used, chain in frontier:
                for number, entry in enumerate(unknown):
                    if entry.called > bound:
                        break
                    bit = 1 << number
                    if at_used & bit or twins[number] & ~at_used:
                        continue
                    self._spend(1)
                    can, after = step(at, entry.operation, UNKNOWN)
                    if not can:
                        continue
                    after_used = at_used | bit
                    known_sets = smallest.setdefault(after, [])
                    if any(smaller & after_used == smaller for smaller in known_sets):
                        continue
                    known_sets.append(after_used)
                    after_chain = (*chain, number)
                    longer.append((after, after_used, after_chain))
                    self._spend(len(window))
                    for which, without in zip(window, direct, strict=True):
                        answer = step(after, *operations[which])
                        if answer[0] and answer != without:
                            yield _Move(which, after_chain, answer[1], after_used)
            frontier = longer

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > self._steps_max:
            raise CheckBudgetExceeded(
                f"{len(self._known)} operations of known and {len(self._unknown)} of unknown outcome on one key "
                f"took more than {self._steps_max} steps: not decided"
            )

    def _lift(self, which: int) -> None:
        follows, back = self._next, self._back
        for node in (self._call_at[which], self._return_at[which]):
            follows[back[node]] = follows[node]
            back[follows[node]] = back[node]

    def _unlift(self, which: int) -> None:
        follows, back = self._next, self._back
        for node in (self._return_at[which], self._call_at[which]):
            follows[back[node]] = node
            back[follows[node]] = node

    def _order(self, path: list[_Move], *, complete: bool) -> Order:
        placed: list[Entry] = []
        for move in path:
            placed.extend(self._unknown[number] for number in move.chain)
            placed.append(self._known[move.which])
        state = path[-1].state if path else self._model.initial
        return Order(complete, tuple(placed), state, self._steps)


# --- telling ----------------------------------------------------------------------------------------------------------


def _story(model: Model[Any], key: Hashable, entries: list[Entry], found: Order) -> str:
    """The answer that made the history inexplicable, what an order of all before it leaves, and, where that is short,
    the part that is inexplicable by itself."""
    before, culprit = _first_inexplicable(model, entries)
    order = find_order(model, before)
    placed = set(map(id, order.placed))
    beside = [entry for entry in _only_useful(model, before) if id(entry) not in placed]
    lines = [
        f"{key!r}: the answers to this key's first {len(before)} of {len(entries)} operations cannot all be true. "
        "Up to this one they can:",
        f"  {culprit}",
        f"An order that explains the others leaves {model.describe(order.state)}, and ends:",
        *(f"  {entry}" for entry in order.placed[-TAIL:]),
    ]
    if beside:
        lines += ["Not answered by then, and not needed in that order:", told(beside, TAIL)]
    core = shorten(model, [culprit if _is_same(entry, culprit) else entry for entry in before], max(found.steps, 1))
    if len(core) <= TAIL and not any(entry.reason == _LEFT_OUT for entry in core):
        lines += ["No order explains even these:", told(core)]
    return "\n".join(lines)


def _first_inexplicable(model: Model[Any], entries: list[Entry]) -> tuple[list[Entry], Entry]:
    """The first answer, in the order of returns, that no order explains together with those before it; and the history
    before it, in which whatever was not answered yet is of unknown outcome. By bisection: later answers never help."""
    answered = sorted((entry for entry in entries if entry.is_ok), key=lambda entry: entry.returned)

    def until(count: int) -> list[Entry]:
        """With the first so many answers; what was called before the next one is there, without its answer."""
        next_event = answered[count].returned if count < len(answered) else NEVER
        return [
            _without_answer(entry) if next_event <= entry.returned != NEVER else entry
            for entry in entries
            if entry.called < next_event
        ]

    good, bad = 0, len(answered)
    while bad - good > 1:
        middle = (good + bad) // 2
        if find_order(model, until(middle)).complete:
            good = middle
        else:
            bad = middle
    return until(good), answered[good]


def _is_same(entry: Entry, other: Entry) -> bool:
    return entry.called == other.called


def shorten(model: Model[Any], entries: Sequence[Entry], steps: int) -> list[Entry]:
    """A smallest part of an inexplicable history that is still inexplicable.

    An operation is left out by taking its answer away: as one of unknown outcome it may take effect whenever that
    helps, or never, so whatever the rest shows, it shows of the whole history. `steps` is what the first search took.

    First those go that then need not be told at all; what must stay as a possible write goes second.
    """
    core = _only_useful(model, list(entries))
    allowance = SHORTEN_STEPS_MAX
    for must_vanish in (True, False):
        size = max(1, len(core) // 2)
        while size:
            at = 0
            while at < len(core):
                chosen = sum(1 for entry in core[at : at + size] if entry.is_ok)
                if chosen:
                    if allowance < 4 * steps:
                        return core
                    weaker = [
                        _without_answer(entry) if at <= place < at + size and entry.is_ok else entry
                        for place, entry in enumerate(core)
                    ]
                    weaker = _only_useful(model, weaker)
                    if not must_vanish or len(weaker) <= len(core) - chosen:
                        took, still = _is_inexplicable(model, weaker, min(allowance, 4 * steps))
                        allowance -= took
                        if still:
                            core = weaker
                            continue
                at += size
            size //= 2
    return core


def _is_inexplicable(model: Model[Any], entries: Sequence[Entry], steps_max: int) -> tuple[int, bool]:
    """The steps it took, and the answer; False where that was not found within them."""
    try:
        found = find_order(model, entries, steps_max)
    except CheckBudgetExceeded:
        return steps_max, False
    return max(found.steps, 1), not found.complete


def _without_answer(entry: Entry) -> Entry:
    return Entry(entry.history, entry.worker, entry.operation, entry.called, entry.called_at_s, reason=_LEFT_OUT)


def _only_useful(model: Model[Any], entries: list[Entry]) -> list[Entry]:
    known = [entry for entry in entries if entry.is_ok]
    unknown = model.useful([entry for entry in entries if entry.is_unknown], known)
    return sorted(known + unknown, key=lambda entry: entry.called)
