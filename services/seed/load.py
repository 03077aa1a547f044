"""Puts the products and people of a seed into the store, in transactions of many.

Each record is written as its service writes it, by the same functions (`product_operations`, `adjustment_operations`,
`account_puts`), with its places in the indexes and its entries in the audit log. What is there already is left as it
is, so the same seed can be loaded again, and an interrupted run is completed by the next: a product comes with its
stock, an account with its addresses, in one transaction or not at all.

All accounts share one password and its one hash: hashing takes some 25 ms on purpose, which is a minute for 2,000. It
makes them accounts to try things with, and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import islice
from typing import Final, TypeVar

from msgspec import Struct

import kvstore
from services.orders.api_products import product_of
from services.orders.catalogue import adjustment_operations
from services.orders.products import product_operations
from services.orders.records import Adjustment, product_key
from services.seed.people import SeedUser, user
from services.seed.products import SeedProduct, product
from services.users.accounts import account_absent, account_puts
from services.users.audit import OPERATOR, Action, AuditLog
from services.users.emails import normalise_email
from services.users.passwords import Passwords, check_length, check_password
from services.users.postal import new_address
from services.users.records import NOBODY, User, address_key, decode_user, email_key, encode, user_key
from services.web.addresses import check_country
from services.web.ids import Ids, now_ms
from services.web.problems import Problem
from services.web.tokens import Role

# A product takes some 20 operations and compares, an account with three addresses 18: well below 1,024.
_BATCH: Final = 30
_UNDER_WAY: Final = 4  # so that the store is never idle while the next batch is made
_ATTEMPTS_MAX: Final = 8  # each fails only where someone else wrote one of the batch since it was looked for

T = TypeVar("T")
Loaded = Callable[[int], None]
"""Told how many more are done."""


class Loading(Struct):
    """How many were created, and how many were there."""

    created: int = 0
    existing: int = 0


async def load_products(store: kvstore.Client, seed: int, count: int, loaded: Loaded) -> Loading:
    loading, ids = Loading(), Ids()

    async def write(batch: list[SeedProduct]) -> int:
        present = await _present(store, [product_key(each.sku) for each in batch])
        missing = [each for each, is_present in zip(batch, present, strict=True) if not is_present]
        operations = [operation for each in missing for operation in _product_operations(each, ids)]
        if missing:
            result = await store.txn([_absent(product_key(each.sku)) for each in missing], operations)
            if not result.succeeded:
                return -1
        return len(missing)

    await _load((product(seed, number) for number in range(1, count + 1)), write, loading, loaded)
    return loading


async def load_users(store: kvstore.Client, seed: int, count: int, password: str, loaded: Loaded) -> Loading:
    """Raises `Problem` where the password may not be chosen."""
    check_length(password)
    check_password(password, "")
    loading, ids, address_ids = Loading(), Ids(), Ids()
    audit = AuditLog(store, now_ms)
    password_hash = await _hash(password)

    async def write(batch: list[SeedUser]) -> int:
        present = await _present(store, [email_key(normalise_email(each.account.email)) for each in batch])
        missing = [each for each, is_present in zip(batch, present, strict=True) if not is_present]
        compares: list[kvstore.Compare] = []
        operations: list[kvstore.Operation] = []
        for each in missing:
            given, now = each.account, now_ms()
            account = User(
                ids.next(), given.email, given.name, given.age, Role.CUSTOMER, password_hash, now,
                password_changed_ms=now,
            )  # fmt: skip
            compares += account_absent(account)
            operations += account_puts(account)
            operations += await audit.puts(Action.REGISTERED, OPERATOR, actor=account.id, subject=account.id)
            for wanted in each.addresses:
                check_country(wanted)
                address = new_address(address_ids.next(), wanted, now)
                operations.append(kvstore.Put(address_key(account.id, address.id), encode(address)))
                operations += await audit.puts(
                    Action.ADDRESS_ADDED,
                    OPERATOR,
                    actor=account.id,
                    subject=account.id,
                    details={"address": str(address.id)},
                )
        if missing and not (await store.txn(compares, operations)).succeeded:
            return -1
        return len(missing)

    await _load((user(seed, number, password) for number in range(1, count + 1)), write, loading, loaded)
    return loading


async def can_sign_in(store: kvstore.Client, email: str, password: str) -> bool:
    """Whether the account with this email has this password: one that was there keeps its own."""
    found = await store.get(email_key(normalise_email(email)))
    record = await store.get(user_key(int(found.value))) if found is not None else None
    if record is None:
        return False
    account = decode_user(record.value)
    passwords = Passwords()
    try:
        return not account.is_blocked and await passwords.verify(account.password_hash, password)
    finally:
        passwords.close()


def _product_operations(each: SeedProduct, ids: Ids) -> list[kvstore.Operation]:
    now = now_ms()
    operations = product_operations(product_of(each.sku, each.product, now), None)
    if each.stock:
        adjustments = [Adjustment(ids.next(), each.sku, delta, reason, NOBODY, now) for delta, reason in each.stock]
        operations += adjustment_operations(*adjustments)
    return operations


async def _load(
    items: Iterator[T], write: Callable[[list[T]], Awaitable[int]], loading: Loading, loaded: Loaded
) -> None:
    """`write` gives how many of a batch it created, or -1 where the batch has to be looked at again."""

    async def work() -> None:
        while batch := list(islice(items, _BATCH)):
            for _ in range(_ATTEMPTS_MAX):
                created = await write(batch)
                if created >= 0:
                    break
            else:
                raise Problem("contended", "Someone else writes the same records; run this again")
            loading.created += created
            loading.existing += len(batch) - created
            loaded(len(batch))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(_UNDER_WAY):
                group.create_task(work())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None  # the others were cancelled, or failed alike


async def _present(store: kvstore.Client, keys: Sequence[bytes]) -> list[bool]:
    found = await store.txn(success=[kvstore.Range(key, keys_only=True) for key in keys])
    return [bool(one.records) for one in found.results if isinstance(one, kvstore.RangeResult)]


async def _hash(password: str) -> str:
    passwords = Passwords()
    try:
        return await passwords.hash(password)
    finally:
        passwords.close()


def _absent(key: bytes) -> kvstore.Compare:
    return kvstore.Compare(key, kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0)
