"""What the order rules are tested on: a store that is a dict, and a bank that does what it is asked, once for each key.

Both are too simple to be wrong. The bank's customers decide how things end: they are asked for with each request.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import kvstore
from services.payments.provider import Charge


class Shelf:
    """A store: operations are done in one transaction or not at all, and ranges are read as the real one reads them."""

    def __init__(self) -> None:
        self.records: dict[bytes, kvstore.Record] = {}
        self.revision = 0

    def write(self, operations: list[kvstore.Operation]) -> None:
        written: dict[bytes, bytes | None] = {}
        for operation in operations:
            match operation:
                case kvstore.Put(key=key, value=value):
                    new: bytes | None = value
                case kvstore.Delete(start=key, end=None):
                    new = None
                case kvstore.Add(key=key, delta=delta, min=least):
                    number = self.number(key) + delta
                    assert least is None or number >= least, f"{key!r} would be {number}"
                    new = b"%d" % number
                case _:
                    raise AssertionError(f"no such operation here: {operation}")
            assert key not in written, f"{key!r} is written twice"
            written[key] = new
        self.revision += bool(written)
        for key, new in written.items():
            self.records.pop(key, None)
            if new is not None:
                self.records[key] = kvstore.Record(key, new, self.revision, self.revision, 1)

    def number(self, key: bytes) -> int:
        record = self.records.get(key)
        return int(record.value) if record is not None else 0

    def range(self, asked: kvstore.Range) -> kvstore.RangeResult:
        if asked.end is None:
            found = [self.records[asked.start]] if asked.start in self.records else []
        else:
            keys = sorted(self.records)
            found = [
                self.records[key]
                for key in keys[bisect.bisect_left(keys, asked.start) : bisect.bisect_left(keys, asked.end)]
            ]
        return kvstore.RangeResult(self.revision, tuple(found), len(found))

    def prefixed(self, prefix: bytes) -> tuple[kvstore.Record, ...]:
        return self.range(kvstore.Range(prefix, kvstore.prefix_end(prefix))).records


@dataclass
class Account:
    """A charge on the bank's books. `state` is how its customer's bank has answered so far."""

    id: str
    state: str  # pending, action, authorised, declined, voided
    authorised: int = 0
    captured: int = 0
    refunds: dict[str, tuple[int, str]] = field(default_factory=dict)  # by key: amount, and how it stands
    done: dict[str, int] = field(default_factory=dict)  # captures by key: what was captured in all by then
    by_hand: bool = False  # somebody took it at the bank, and we may not have heard of it

    @property
    def refunded(self) -> int:
        return sum(amount for amount, state in self.refunds.values() if state != "failed")

    @property
    def holds(self) -> bool:
        """Money of the customer that is neither given up nor given back."""
        return self.state == "authorised" and self.captured == 0


class Bank:
    """By request key. Asserts what no caller may ask for."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}

    def authorise(self, key: str, amount: int, outcome: str, less: int = 0) -> Account:
        """Acts once; asked again, it says what became of it."""
        if key not in self.accounts:
            account = Account(f"ch-{len(self.accounts) + 1}", outcome)
            self.accounts[key] = account
            if outcome == "authorised":
                account.authorised = max(1, amount - less)
        return self.accounts[key]

    def decide(self, account: Account, amount: int, *, yes: bool) -> None:
        """The customer, or their bank, makes up their mind."""
        account.state = "authorised" if yes else "declined"
        account.authorised = amount if yes else 0

    def take_by_hand(self, account: Account) -> None:
        """Somebody else than us, at the bank's own desk."""
        if account.holds:
            account.captured, account.by_hand = account.authorised, True

    def capture(self, key: str, account: Account, amount: int) -> Charge | None:
        """None: refused, as somebody else took it."""
        if account.by_hand and key not in account.done:
            return None
        if key not in account.done:
            assert account.state == "authorised", f"capture of a charge that is {account.state}"
            assert account.captured + amount <= account.authorised, "more is captured than is authorised"
            account.captured += amount
            account.done[key] = account.captured
        return self.charge(account, account.done[key])

    def void(self, account: Account) -> bool:
        """False: refused, as there is nothing to give up."""
        assert account.captured == 0 or account.by_hand, "what was captured is given up"
        if account.state == "declined" or account.captured:
            return False
        account.state = "voided"
        return True

    def refund(self, key: str, account: Account, amount: int, outcome: str) -> str:
        before = account.refunds.get(key)
        if before is None:
            assert account.refunded + amount <= account.captured, "more is refunded than is captured"
        else:
            assert before[0] == amount, "one key, two amounts"
        if before is None or before[1] == "pending":
            account.refunds[key] = (amount, outcome)
        return account.refunds[key][1]

    def charge(self, account: Account, captured: int | None = None) -> Charge:
        taken = account.captured if captured is None else captured
        return Charge(account.id, "EUR", account.authorised, taken, 0, account.state == "voided")
