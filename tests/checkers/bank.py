"""Transfers between accounts: money moves, and never comes or goes.

A transfer takes from one account, gives to another and writes a ledger entry, in one transaction. Rules:

- `total`: each reading of all accounts at one moment sees the same total.
- `overdrawn`: no account is below 0.
- `balances_and_ledger`: a reading that has the ledger, too, shows the balances which that ledger makes. A transfer
  that was applied twice, or in part, shows here; one that was lost whole does not, hence:
- `lost_transfer`: the ledger holds every transfer that was acknowledged before the reading was called, as written;
- `failed_transfer`: and none that surely failed, was not yet called, or that nobody made.

A local reading may be old, so the last but one rule does not hold for it; all others do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from tests.checkers.history import Entry, told
from tests.checkers.verdict import Inconsistent


class Transfer(Struct, frozen=True, gc=False):
    id: str
    source: str
    target: str
    amount: int

    def __str__(self) -> str:
        return f"transfer {self.id}: {self.amount} from {self.source} to {self.target}"

    def text(self) -> bytes:
        """The ledger entry."""
        return f"{self.source} {self.target} {self.amount}".encode()


class ReadAccounts(Struct, frozen=True, gc=False):
    """Read all accounts at one moment, and perhaps the ledger. Its result is a `Statement`."""

    with_ledger: bool = False
    is_local: bool = False
    way: str = ""  # which of the client's calls; for display

    def __str__(self) -> str:
        return (
            f"read all accounts{' and the ledger' if self.with_ledger else ''}"
            f"{' at a replica' if self.is_local else ''}{f' by {self.way}' if self.way else ''}"
        )


class Statement(Struct, frozen=True):
    balances: Mapping[str, int]
    ledger: Mapping[str, bytes] | None = None

    def __str__(self) -> str:
        held = " ".join(f"{account}={amount}" for account, amount in sorted(self.balances.items()))
        return held if self.ledger is None else f"{held}, {len(self.ledger)} ledger entries"


def check_bank(entries: Sequence[Entry], initial: Mapping[str, int]) -> None:
    """`entries` are `Transfer` and `ReadAccounts`; every account is in `initial`. Raises `Inconsistent`."""
    transfers = {entry.operation.id: entry for entry in entries if isinstance(entry.operation, Transfer)}
    for entry in entries:
        if isinstance(entry.operation, ReadAccounts) and entry.is_ok:
            _check_balances(entry, initial)
            if entry.result.ledger is not None:
                _check_ledger(entry, initial, transfers)


def _check_balances(entry: Entry, initial: Mapping[str, int]) -> None:
    balances: Mapping[str, int] = entry.result.balances
    if sorted(balances) != sorted(initial):
        raise Inconsistent("total", f"the accounts are {', '.join(sorted(initial))}:\n{told([entry])}")
    total, expected = sum(balances.values()), sum(initial.values())
    if total != expected:
        raise Inconsistent("total", f"there is {total} instead of {expected}:\n{told([entry])}")
    for account, balance in sorted(balances.items()):
        if balance < 0:
            raise Inconsistent("overdrawn", f"{account} holds {balance}:\n{told([entry])}")


def _check_ledger(reading: Entry, initial: Mapping[str, int], transfers: Mapping[str, Entry]) -> None:
    statement: Statement = reading.result
    assert statement.ledger is not None
    made = dict(initial)
    for id, text in sorted(statement.ledger.items()):
        transfer = transfers.get(id)
        if transfer is None or transfer.is_failed or transfer.called > reading.returned:
            who = [reading] if transfer is None else [transfer, reading]
            raise Inconsistent("failed_transfer", f"ledger entry {id} cannot be there:\n{told(who)}")
        if text != transfer.operation.text():
            raise Inconsistent("lost_transfer", f"ledger entry {id} holds {text!r}:\n{told([transfer, reading])}")
        made[transfer.operation.source] -= transfer.operation.amount
        made[transfer.operation.target] += transfer.operation.amount
    if not reading.operation.is_local:
        for id, transfer in transfers.items():
            if transfer.called > reading.called:
                break  # they are in the order of their calls
            if transfer.is_ok and transfer.returned < reading.called and id not in statement.ledger:
                raise Inconsistent(
                    "lost_transfer", f"{id} was acknowledged, and is not in the ledger:\n{told([transfer, reading])}"
                )
    if made != dict(statement.balances):
        held = " ".join(f"{account}={amount}" for account, amount in sorted(made.items()))
        raise Inconsistent("balances_and_ledger", f"its ledger makes {held}:\n{told([reading])}")
