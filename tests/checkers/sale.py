"""The flash sale: one unit of stock and one order, together or not at all; never oversold, never a lost order.

An order is one transaction that takes 1 from the stock, if there is one left, and writes the order. The rules of
`receipts.py` hold for it (stock + orders == initial at every moment, every acknowledged order present, once), and:

- `oversold`: no more orders are acknowledged than there was stock, and the stock is never seen below 0.
- `refused_too_early`: an order is refused as sold out only if by then all the stock may have been sold: as many
  orders as there was stock had been called before that refusal was answered.
- `sold_again`: once sold out is sold out: an order that was called after a refusal was answered is not acknowledged.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from tests.checkers.history import Entry, told
from tests.checkers.receipts import Issue, Look, check_receipts
from tests.checkers.verdict import Inconsistent


class SoldOut(Struct, frozen=True, gc=False):
    """The result of an order that the store refused with `out_of_range`."""

    def __str__(self) -> str:
        return "sold out"


def check_sale(entries: Sequence[Entry], stock: int) -> None:
    """Judge all operations on one product, which had `stock` units and gets none back. An order is an `Issue` whose
    result is what is left, or `SoldOut`. Raises `Inconsistent`."""
    orders = [entry for entry in entries if isinstance(entry.operation, Issue) and not entry.is_failed]
    refused = [entry for entry in orders if entry.is_ok and isinstance(entry.result, SoldOut)]
    sold = [entry for entry in orders if entry.is_ok and not isinstance(entry.result, SoldOut)]
    if len(sold) > stock:
        raise Inconsistent("oversold", f"{len(sold)} orders acknowledged of {stock} units:\n{told(sold)}")
    for entry in sold:
        if entry.result < 0:
            raise Inconsistent("oversold", f"less than nothing is left:\n{told([entry])}")
    for entry in entries:
        if isinstance(entry.operation, Look) and entry.is_ok and entry.result.value < 0:
            raise Inconsistent("oversold", f"the stock is below 0:\n{told([entry])}")
    if refused:
        first = min(refused, key=lambda entry: entry.returned)
        tried = [entry for entry in orders if entry.called < first.returned and not isinstance(entry.result, SoldOut)]
        if len(tried) < stock:
            raise Inconsistent(
                "refused_too_early",
                f"sold out, although at most {len(tried)} of {stock} units can have been sold:\n{told([first])}",
            )
        for entry in sold:
            if entry.called > first.returned:
                raise Inconsistent("sold_again", f"sold after it was sold out:\n{told([first, entry])}")
    # To the rules of receipts, an order that was refused is one that must not be seen.
    judged = [entry for entry in entries if not isinstance(entry.operation, Issue)] + sold
    judged += [entry for entry in entries if isinstance(entry.operation, Issue) and not entry.is_ok]
    never = {entry.operation.receipt: entry for entry in refused}
    for entry in entries:
        if isinstance(entry.operation, Look) and entry.is_ok:
            for receipt in sorted(entry.result.receipts & never.keys()):
                raise Inconsistent("failed_receipt", f"a refused order is there:\n{told([never[receipt], entry])}")
    check_receipts(sorted(judged, key=lambda entry: entry.called), stock, -1)
