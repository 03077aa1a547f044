"""A number and its receipts: each transaction adds to the number and writes one receipt. Applied once, or never.

Used for counters (a receipt for each addition of 1) and for the flash sale (an order for each unit of stock). Rules,
for a number that starts at `initial` and moves by `delta` with each receipt:

- `number_and_receipts`: wherever both are seen at one moment, the number is initial + delta × receipts. An addition
  that was applied twice, or half a transaction, shows here.
- `lost_receipt`: a receipt that was acknowledged is there in every later reading; and its text is what was written.
- `failed_receipt`: one that surely failed is in none, nor is one that nobody wrote, or not yet.
- `number_given_twice`: the sums told to those who were acknowledged are different ones, and in real time they go
  one way: who was called later was told a later one. (Each is a place in the one order of additions.)
- `number_out_of_bounds`: no sum beyond what was tried by then.

`Reading` is what one moment showed. It may be a replica's (`is_local`): then it may be old, and only its own truth is
judged.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from tests.checkers.history import Entry, told
from tests.checkers.verdict import Inconsistent


class Issue(Struct, frozen=True, gc=False):
    """Add to the number and write the receipt. Its result is the sum."""

    number: str
    receipt: str

    def __str__(self) -> str:
        return f"{self.number}: issue {self.receipt}"


class Look(Struct, frozen=True, gc=False):
    """Read the number and all its receipts at one moment. Its result is a `Reading`."""

    number: str
    is_local: bool = False

    def __str__(self) -> str:
        return f"{self.number}: read all{' at a replica' if self.is_local else ''}"


class Reading(Struct, frozen=True):
    """`broken` names receipts whose text is not what was written."""

    value: int
    receipts: frozenset[str]
    broken: tuple[str, ...] = ()

    def __str__(self) -> str:
        some = ", ".join(sorted(self.receipts)[:10])
        more = f", … {len(self.receipts)} in all" if len(self.receipts) > 10 else ""
        return f"{self.value} and receipts {{{some}{more}}}" + (f", broken: {self.broken}" if self.broken else "")


def check_receipts(entries: Sequence[Entry], initial: int, delta: int) -> None:
    """Judge the operations on one number. Raises `Inconsistent` with one of the rules above."""
    issues = [entry for entry in entries if isinstance(entry.operation, Issue)]
    by_receipt = {entry.operation.receipt: entry for entry in issues}
    assert len(by_receipt) == len(issues), "the workload uses every receipt once"
    _check_sums(issues, initial, delta)
    for entry in entries:
        if isinstance(entry.operation, Look) and entry.is_ok:
            _check_reading(entry, by_receipt, initial, delta)


def _check_sums(issues: Sequence[Entry], initial: int, delta: int) -> None:
    acknowledged = [entry for entry in issues if entry.is_ok]
    tried = sum(1 for entry in issues if not entry.is_failed)
    told_to: dict[int, Entry] = {}
    for entry in acknowledged:
        other = told_to.setdefault(entry.result, entry)
        if other is not entry:
            raise Inconsistent("number_given_twice", f"two additions were told one sum:\n{told([other, entry])}")
        if not 1 <= (entry.result - initial) * delta <= tried * delta * delta:
            raise Inconsistent("number_out_of_bounds", f"{tried} additions were tried:\n{told([entry])}")
    events = sorted(
        [(entry.called, entry) for entry in acknowledged] + [(entry.returned, entry) for entry in acknowledged],
        key=lambda event: event[0],
    )
    furthest: Entry | None = None
    for event, entry in events:
        if event == entry.called:
            if furthest is not None and (entry.result - furthest.result) * delta < 0:
                raise Inconsistent(
                    "number_given_twice", f"the later addition was told the earlier sum:\n{told([furthest, entry])}"
                )
        elif furthest is None or (entry.result - furthest.result) * delta > 0:
            furthest = entry


def _check_reading(look: Entry, by_receipt: dict[str, Entry], initial: int, delta: int) -> None:
    reading: Reading = look.result
    expected = initial + delta * len(reading.receipts)
    if reading.value != expected:
        raise Inconsistent(
            "number_and_receipts",
            f"with {len(reading.receipts)} receipts the number must be {expected}:\n{told([look])}",
        )
    if reading.broken:
        raise Inconsistent("lost_receipt", f"receipts that hold something else:\n{told([look])}")
    # Sorted, so that a run tells the same story each time.
    for receipt in sorted(reading.receipts):
        issue = by_receipt.get(receipt)
        if issue is None or issue.is_failed or issue.called > look.returned:
            who = [look] if issue is None else [issue, look]
            raise Inconsistent("failed_receipt", f"receipt {receipt} cannot be there:\n{told(who)}")
    if look.operation.is_local:
        return
    for receipt, issue in by_receipt.items():
        if issue.is_ok and issue.returned < look.called and receipt not in reading.receipts:
            raise Inconsistent(
                "lost_receipt", f"{receipt} was acknowledged, and is not there afterwards:\n{told([issue, look])}"
            )
