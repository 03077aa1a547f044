"""Postal addresses of a user: a bounded list, each with an ETag of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Struct

import kvstore
from services.users.audit import Action, AuditLog, Origin
from services.users.credentials import read_user
from services.users.records import Address, address_key, addresses_of, decode_address, encode
from services.web.addresses import AddressInput, check_country
from services.web.ids import Ids, Timestamp, timestamp
from services.web.paging import Page, PageQuery, page_of
from services.web.problems import Problem

ADDRESSES_MAX: Final = 20  # homes, offices, relatives


class AddressBody(Struct, frozen=True):
    id: int
    name: str
    line1: str
    line2: str
    postal_code: str
    city: str
    region: str
    country: str
    phone: str
    created_at: Timestamp


class StoredAddress(Struct, frozen=True):
    address: Address
    revision: int


class PostalAddresses:
    """One per process."""

    def __init__(self, store: kvstore.Client, audit: AuditLog, clock_ms: Callable[[], int]) -> None:
        self._store = store
        self._audit = audit
        self._clock_ms = clock_ms
        self._ids = Ids(clock_ms)

    async def page(self, user_id: int, query: PageQuery) -> Page[AddressBody]:
        async def read(records: list[kvstore.Record]) -> list[AddressBody]:
            return [address_body(decode_address(record.value)) for record in records]

        return await page_of(self._store, addresses_of(user_id), query, read)

    async def read(self, user_id: int, address_id: int) -> StoredAddress:
        """Raises `Problem` `not_found`."""
        return _stored(await self._store.get(address_key(user_id, address_id)))

    async def add(self, user_id: int, given: AddressInput, origin: Origin) -> Address:
        """Of two at once for the last place one is refused. Raises `Problem`: `too_many_addresses`, `invalid_body`."""
        check_country(given)

        async def body(txn: kvstore.Transaction) -> Address:
            await read_user(txn, user_id)  # so that none is added while the account is erased
            found = await txn.range(prefix=addresses_of(user_id), keys_only=True)
            if found.count >= ADDRESSES_MAX:
                raise Problem("too_many_addresses", f"An account has {ADDRESSES_MAX} addresses at most; delete one")
            address = new_address(self._ids.next(), given, self._clock_ms())
            key = address_key(user_id, address.id)
            if await txn.get(key) is not None:
                raise Problem("contended", "Try again")  # another process drew the same id in this millisecond
            txn.put(key, encode(address))
            await self._write(txn, Action.ADDRESS_ADDED, user_id, address.id, origin)
            return address

        return await self._store.run_transaction(body)

    async def change(
        self, user_id: int, address_id: int, given: AddressInput, origin: Origin, check: Callable[[int], None]
    ) -> Address:
        """`check` refuses by the revision that is there. Raises `Problem`: `not_found`, `invalid_body`."""
        check_country(given)

        async def body(txn: kvstore.Transaction) -> Address:
            stored = _stored(await txn.get(address_key(user_id, address_id)))
            check(stored.revision)
            address = new_address(address_id, given, stored.address.created_ms)
            txn.put(address_key(user_id, address_id), encode(address))
            await self._write(txn, Action.ADDRESS_CHANGED, user_id, address_id, origin)
            return address

        return await self._store.run_transaction(body)

    async def delete(self, user_id: int, address_id: int, origin: Origin, check: Callable[[int], None]) -> None:
        async def body(txn: kvstore.Transaction) -> None:
            stored = _stored(await txn.get(address_key(user_id, address_id)))
            check(stored.revision)
            txn.delete(address_key(user_id, address_id))
            await self._write(txn, Action.ADDRESS_DELETED, user_id, address_id, origin)

        await self._store.run_transaction(body)

    async def _write(
        self, txn: kvstore.Transaction, action: Action, user_id: int, address_id: int, origin: Origin
    ) -> None:
        details = {"address": str(address_id)}
        await self._audit.write(txn, action, origin, actor=user_id, subject=user_id, details=details)


def address_body(address: Address) -> AddressBody:
    fields = msgspec.structs.asdict(address)
    return AddressBody(created_at=timestamp(fields.pop("created_ms")), **fields)


def new_address(address_id: int, given: AddressInput, created_ms: int) -> Address:
    return Address(id=address_id, created_ms=created_ms, **msgspec.structs.asdict(given))


def _stored(record: kvstore.Record | None) -> StoredAddress:
    if record is None:
        raise Problem("not_found", "You have no such address")
    return StoredAddress(decode_address(record.value), record.mod_revision)
