"""Who sends the requests of `python -m bench http`: customers with access tokens, made once for all systems of a round.

The tokens are the product's own, made by the product's own code; every system gets the key that they are signed with
and the accounts, in whatever form it keeps them. So each does the same work for the same token.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import uvloop
from argon2 import PasswordHasher
from msgspec import Struct

import kvstore
from services.users.records import User
from services.web.ids import Ids, now_ms
from services.web.tokens import Role, SigningKey, SigningKeys, Tokens


class Customer(Struct, frozen=True):
    user: User
    token: str


class People(Struct, frozen=True):
    """`staff_token` is that of whoever puts the product on sale."""

    key: SigningKey
    customers: tuple[Customer, ...]
    staff_token: str

    def write(self, path: Path) -> None:
        """One line for each customer: id and token. wrk's script reads it."""
        path.write_text("".join(f"{one.user.id} {one.token}\n" for one in self.customers))


def make(scratch: Path, count: int) -> People:
    """`count` customers, with tokens that are good for `services.web.tokens.TOKEN_TTL_S` from now."""
    return uvloop.run(_make(scratch, count))


async def _make(scratch: Path, count: int) -> People:
    async with kvstore.open_embedded(str(scratch / "people")) as store:  # tokens are signed with a store's key
        keys = SigningKeys(store)
        tokens = Tokens(keys)
        # Nobody signs in here, so one hash will do for all: hashing two thousand takes minutes.
        password_hash = PasswordHasher().hash(secrets.token_urlsafe(16))
        ids, now = Ids(), now_ms()
        customers = []
        for number in range(count):
            email, age = f"customer{number}@example.com", 18 + number % 60
            user = User(ids.next(), email, f"Customer {number}", age, Role.CUSTOMER, password_hash, now)
            customers.append(Customer(user, await tokens.issue(user.id, user.role, secrets.token_urlsafe(16))))
        staff_token = await tokens.issue(ids.next(), Role.STAFF, secrets.token_urlsafe(16))
        return People(await keys.current(), tuple(customers), staff_token)
