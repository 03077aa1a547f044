"""The provider's books beside the store: each charge belongs to exactly one payment of one order and has its amounts,
each refund likewise, and all money that the store tells of is on the books.

Books and store are two systems that go on meanwhile, so a charge is looked at between two looks at its order: where
the order did not change in between, they must agree, as far as what is under way allows. Where it did, they are looked
at again. Charges of others who share the account have keys that are not ours, and are counted only.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Protocol, TypeVar

from msgspec import Struct

import kvstore
from services.audit.findings import Findings, declare
from services.audit.view import View, batches
from services.orders.records import Payment, Refund, decode_payment, decode_refund
from services.payments.provider import Books, Charge, ChargeEntry, RefundEntry

CHARGE_UNKNOWN: Final = declare(
    "charge_unknown", "Each charge on the provider's books is of a payment of an order, which names it."
)
CHARGE_TWICE: Final = declare("charge_twice", "No payment has two charges on the provider's books, no refund two.")
CHARGE_AMOUNTS: Final = declare(
    "charge_amounts", "Each charge has authorised, captured and refunded what its payment says."
)
CHARGE_MISSING: Final = declare(
    "charge_missing", "Each payment that authorised something, and each refund that succeeded, is on the books."
)
REFUND_UNKNOWN: Final = declare("refund_unknown", "Each refund on the provider's books is one of an order.")
REFUND_AMOUNTS: Final = declare("refund_amounts_on_books", "Each refund on the books is as its order says.")

_KEY: Final = re.compile(r"([0-9]{1,16}):([0-9]{1,6}):(authorise|refund)(?:-([0-9]{1,6}))?")
_ORDERS_AT_ONCE: Final = (
    10  # three ranges each, whose results fit 1 MiB together: parts of an order have some 500 bytes
)
# Between two looks lies one request; an order that moves again and again in that time is at a test, not in a shop.
_LOOKS_MAX: Final = 8

NONE: Final = range(1)
# How a refund may stand on the books, if not as its order says: what it gives back otherwise, it does not give back.
_ON_BOOKS: Final[dict[str, tuple[str, ...]]] = {
    "pending": ("pending", "succeeded", "failed"), "settled_outside": ("failed",),
}  # fmt: skip


class Whole(Struct, frozen=True):
    revision: int
    payments: dict[int, Payment]
    refunds: dict[int, Refund]


class Entry(Protocol):
    @property
    def key(self) -> str: ...


E = TypeVar("E", bound=Entry)


class BooksPass:
    """`charged` and `refunded` are what an earlier pass over the store found: `order:attempt`, `order:number`."""

    def __init__(
        self, store: kvstore.Client, books: Books, findings: Findings, charged: Iterable[str], refunded: Iterable[str]
    ) -> None:
        self._view = View(store, 0, findings)
        self._books = books
        self._findings = findings
        self._charged, self._refunded = set(charged), set(refunded)
        self.charges = self.refunds = self.foreign = self.unsettled = 0

    async def run(self) -> None:
        """Raises `ProviderUnknown`."""
        seen: set[str] = set()

        def charge(entry: ChargeEntry, whole: Whole | None) -> None:
            order, attempt, _ = _parsed(entry.key)
            self._charged.discard(f"{order}:{attempt}")
            self._compare_charge(entry, whole.payments.get(attempt) if whole is not None else None, whole)

        def refund(entry: RefundEntry, whole: Whole | None) -> None:
            order, _, number = _parsed(entry.key)
            self._refunded.discard(f"{order}:{number}")
            self._compare_refund(entry, whole)

        self.charges = await self._walk(self._books.charges, lambda entry: entry.charge.id, charge, seen)
        self.refunds = await self._walk(self._books.refunds, lambda entry: entry.id, refund, seen)
        for name in sorted(self._charged):
            self._findings.add(CHARGE_MISSING, b"payment/" + name.encode(), "a charge on the books", "none")
        for name in sorted(self._refunded):
            self._findings.add(CHARGE_MISSING, b"refund/" + name.encode(), "a refund on the books", "none")

    async def _walk(
        self,
        read: Callable[[str], Awaitable[list[E]]],
        id_of: Callable[[E], str],
        compare: Callable[[E, Whole | None], None],
        seen: set[str],
    ) -> int:
        count, after = 0, ""
        while entries := await read(after):
            count += len(entries)
            ours = {id_of(entry): entry for entry in entries if _KEY.fullmatch(entry.key)}
            self.foreign += len(entries) - len(ours)
            for name, entry in ours.items():
                if entry.key in seen:
                    self._findings.add(CHARGE_TWICE, entry.key.encode(), "one on the books", f"{name} as well")
                seen.add(entry.key)
            await self._page(ours, after, read, id_of, compare)
            after = id_of(entries[-1])
        return count

    async def _page(
        self,
        ours: dict[str, E],
        after: str,
        read: Callable[[str], Awaitable[list[E]]],
        id_of: Callable[[E], str],
        compare: Callable[[E, Whole | None], None],
    ) -> None:
        waiting = dict(ours)
        for _ in range(_LOOKS_MAX):
            if not waiting:
                return
            ids = sorted({_parsed(entry.key)[0] for entry in waiting.values()})
            before = await self._orders(ids)
            fresh = {id_of(entry): entry for entry in await read(after)}
            now = dict(zip(ids, await self._revisions(ids), strict=True))
            for name, entry in list(waiting.items()):
                order_id = _parsed(entry.key)[0]
                whole = before[order_id]
                if name in fresh and now[order_id] == (whole.revision if whole is not None else 0):
                    compare(fresh[name], whole)
                    del waiting[name]
        self.unsettled += len(waiting)

    async def _orders(self, ids: list[int]) -> dict[int, Whole | None]:
        found: dict[int, Whole | None] = {}
        for some in batches(ids, _ORDERS_AT_ONCE):
            ranges: list[kvstore.Range] = []
            for order_id in some:
                ranges.append(kvstore.Range(b"order/%d" % order_id, keys_only=True))
                for prefix in (b"payment/%d/" % order_id, b"refund/%d/" % order_id):
                    ranges.append(kvstore.Range(prefix, kvstore.prefix_end(prefix)))
            records = await self._view.read(ranges)
            for at, order_id in enumerate(some):
                orders, payments, refunds = records[3 * at : 3 * at + 3]
                found[order_id] = self._whole(orders[0].mod_revision, payments, refunds) if orders else None
        return found

    def _whole(self, revision: int, payments: tuple[kvstore.Record, ...], refunds: tuple[kvstore.Record, ...]) -> Whole:
        paid = [payment for record in payments if (payment := self._view.decode(decode_payment, record)) is not None]
        back = [refund for record in refunds if (refund := self._view.decode(decode_refund, record)) is not None]
        return Whole(revision, {one.attempt: one for one in paid}, {one.number: one for one in back})

    async def _revisions(self, ids: list[int]) -> list[int]:
        found = await self._view.get([b"order/%d" % order_id for order_id in ids], keys_only=True)
        return [record.mod_revision if record is not None else 0 for record in found]

    # --- what must be on the books ------------------------------------------------------------------------------------

    def _compare_charge(self, entry: ChargeEntry, payment: Payment | None, whole: Whole | None) -> None:
        key, charge = entry.key.encode(), entry.charge
        if payment is None or whole is None:
            self._findings.add(CHARGE_UNKNOWN, key, "a payment that asked for it", "there is none")
            return
        if payment.charge not in ("", charge.id):
            self._findings.add(CHARGE_UNKNOWN, key, f"{payment.charge}, as its payment says", charge.id)
        if payment.state == "created" or payment.failure == "withdrawn":
            self._findings.add(CHARGE_UNKNOWN, key, f"no charge of a payment that is {payment.state}", charge.id)
            return
        back = [one for one in whole.refunds.values() if one.attempt == payment.attempt]
        sure = sum(one.amount for one in back if one.state == "succeeded")
        pending = sum(one.amount for one in back if one.state == "pending")
        authorised, captured = _expected(payment, charge)
        is_right = (
            charge.authorised in authorised
            and charge.captured in captured
            and sure <= charge.refunded <= sure + pending
            and charge.currency == payment.currency
            and _may_be_voided(payment, charge)
        )
        if not is_right:
            expected = (
                f"{payment.state}: authorised {_words(authorised)}, captured {_words(captured)},"
                f" refunded {sure} to {sure + pending} {payment.currency}"
            )
            found = (
                f"authorised {charge.authorised}, captured {charge.captured}, refunded {charge.refunded}"
                f" {charge.currency}{', voided' if charge.is_voided else ''}"
            )
            self._findings.add(CHARGE_AMOUNTS, key, expected, found)

    def _compare_refund(self, entry: RefundEntry, whole: Whole | None) -> None:
        _, attempt, number = _parsed(entry.key)
        refund = whole.refunds.get(number) if whole is not None else None
        key = entry.key.encode()
        if refund is None or whole is None or refund.attempt != attempt:
            self._findings.add(REFUND_UNKNOWN, key, "a refund that asked for it", "there is none")
            return
        payment = whole.payments.get(attempt)
        states = _ON_BOOKS.get(refund.state, (refund.state,))
        expected = (refund.amount, refund.currency, payment.charge if payment is not None else "")
        if (entry.amount, entry.currency, entry.charge_id) != expected or entry.status not in states:
            found = f"{entry.amount} {entry.currency} of {entry.charge_id}, {entry.status}"
            self._findings.add(REFUND_AMOUNTS, key, f"{expected}, {' or '.join(states)}", found)


def _expected(payment: Payment, charge: Charge) -> tuple[range, range]:
    """What may be authorised and captured by now."""
    held, taken = payment.authorised, payment.captured
    match str(payment.state):
        case "authorising" | "unknown" | "requires_action":
            return range(payment.amount + 1), NONE
        case "voiding" | "voided":  # perhaps the customer said yes, before it was given up
            return range(payment.amount + 1), NONE
        case "failed":  # what was given up at the provider, by somebody else, is as good as declined
            return range(payment.amount + 1) if charge.is_voided else NONE, NONE
        case "capturing":
            return range(held, held + 1), range(taken, taken + payment.capture_amount + 1)
        case _:
            return range(held, held + 1), range(taken, taken + 1)


def _may_be_voided(payment: Payment, charge: Charge) -> bool:
    if payment.state == "voided":  # and what was never authorised holds nothing
        return charge.is_voided or charge.authorised == 0
    return not charge.is_voided or payment.state in ("voiding", "failed", "requires_action", "authorising", "unknown")


def _words(amounts: range) -> str:
    return str(amounts[0]) if len(amounts) == 1 else f"{amounts[0]} to {amounts[-1]}"


def _parsed(key: str) -> tuple[int, int, int]:
    """Order, attempt and number of a key that is ours."""
    match = _KEY.fullmatch(key)
    assert match is not None, key
    return int(match[1]), int(match[2]), int(match[4] or 1)
