"""Accounts in the store: `user/{id}`, and `user-email/{normalised}` which makes an email unique.

Both are created in one transaction under absent-compares, so two people cannot register one email at the same moment,
whichever processes they met. Password hashing happens before and outside of any transaction.
"""

from __future__ import annotations

import unicodedata
from typing import Final

import msgspec
import structlog
from msgspec import Struct

import kvstore
from services.users.passwords import Passwords, check_password
from services.web.ids import Ids, now_ms
from services.web.problems import Problem, field_problem
from services.web.tokens import Role

EMAIL_CHARS_MAX: Final = 254
# An attempt fails only where two processes drew one id, or changed one account, at the same time; never eight times.
_ATTEMPTS_MAX: Final = 8

log = structlog.get_logger("services.users")


class User(Struct, frozen=True, tag_field="v", tag=1):
    """The record of an account. The hash never leaves the service."""

    id: int
    email: str
    name: str
    age: int
    role: Role
    password_hash: str
    created_ms: int


class StoredUser(Struct, frozen=True):
    user: User
    revision: int


_decode = msgspec.json.Decoder(User).decode
_encode = msgspec.json.Encoder().encode


def normalise_email(email: str) -> str:
    """One spelling for all spellings of an email that we hold to be the same. Raises `Problem` if it is none."""
    text = unicodedata.normalize("NFKC", email.strip()).casefold()
    local, at, domain = text.rpartition("@")
    labels = domain.split(".")
    if (
        not at
        or not 1 <= len(local) <= 64
        or len(text) > EMAIL_CHARS_MAX
        or "@" in local
        or len(labels) < 2
        or not all(labels)
        or not text.isprintable()
        or any(character.isspace() for character in text)
    ):
        raise field_problem("/email", "invalid_value", "This is no email address")
    return text


def user_key(user_id: int) -> bytes:
    return b"user/%d" % user_id


def _email_key(normalised: str) -> bytes:
    return b"user-email/" + normalised.encode()


def _absent(key: bytes) -> kvstore.Compare:
    return kvstore.Compare(key, kvstore.Target.VERSION, kvstore.Relation.EQUAL, 0)


class Accounts:
    """What can be done with accounts. One per process."""

    def __init__(self, store: kvstore.Client, passwords: Passwords) -> None:
        self._store = store
        self._passwords = passwords
        self._ids = Ids()

    async def register(self, email: str, password: str, name: str, age: int, role: Role = Role.CUSTOMER) -> User:
        """Create an account. Raises `Problem`: `email_taken`, `common_password`, `invalid_body`."""
        normalised = normalise_email(email)
        check_password(password, normalised)
        # Also where the email is taken: so the answer's time tells no more than the answer.
        password_hash = await self._passwords.hash(password)
        email_key = _email_key(normalised)
        for _ in range(_ATTEMPTS_MAX):
            user = User(self._ids.next(), email.strip(), name, age, role, password_hash, now_ms())
            key = user_key(user.id)
            result = await self._store.txn(
                compare=[_absent(email_key), _absent(key)],
                success=[kvstore.Put(key, _encode(user)), kvstore.Put(email_key, b"%d" % user.id)],
                failure=[kvstore.Range(email_key)],
            )
            if result.succeeded:
                return user
            found = result.results[0]
            assert isinstance(found, kvstore.RangeResult)
            if found.records:
                raise Problem("email_taken", "Sign in, or register with another email")
        raise RuntimeError(f"no free user id after {_ATTEMPTS_MAX} draws")

    async def sign_in(self, email: str, password: str) -> User:
        """The account with these credentials. Raises `Problem` `wrong_credentials`, the same and as late whichever
        of the two is wrong."""
        stored = await self._find(email)
        if stored is None:
            await self._passwords.verify_nobody(password)
            raise _wrong_credentials()
        if not await self._passwords.verify(stored.user.password_hash, password):
            raise _wrong_credentials()
        if self._passwords.outdated(stored.user.password_hash):
            await self._rehash(stored, password)
        return stored.user

    async def read(self, user_id: int) -> StoredUser | None:
        record = await self._store.get(user_key(user_id))
        return None if record is None else StoredUser(_decode(record.value), record.mod_revision)

    async def ensure(self, email: str, password: str, name: str, age: int, role: Role) -> User:
        """The account with this email, with this password and role from now on; created if need be. For operators."""
        try:
            return await self.register(email, password, name, age, role)
        except Problem as problem:
            if problem.code != "email_taken":
                raise
        password_hash = await self._passwords.hash(password)
        for _ in range(_ATTEMPTS_MAX):
            stored = await self._find(email)
            assert stored is not None  # accounts are never removed
            user = msgspec.structs.replace(stored.user, password_hash=password_hash, name=name, age=age, role=role)
            if await self._replace(stored, user):
                return user
        raise RuntimeError(f"account {email} kept changing")

    async def _find(self, email: str) -> StoredUser | None:
        try:
            normalised = normalise_email(email)
        except Problem:
            return None
        record = await self._store.get(_email_key(normalised))
        # User 0 never exists: an unknown email costs the same two reads as a known one.
        return await self.read(0 if record is None else int(record.value))

    async def _rehash(self, stored: StoredUser, password: str) -> None:
        """Today's parameters for a password that was hashed with older ones. If the record has changed meanwhile,
        the next sign-in will do it."""
        password_hash = await self._passwords.hash(password)
        if await self._replace(stored, msgspec.structs.replace(stored.user, password_hash=password_hash)):
            log.info("rehashed", user=stored.user.id)

    async def _replace(self, stored: StoredUser, user: User) -> bool:
        key = user_key(user.id)
        unchanged = kvstore.Compare(key, kvstore.Target.MOD_REVISION, kvstore.Relation.EQUAL, stored.revision)
        result = await self._store.txn(compare=[unchanged], success=[kvstore.Put(key, _encode(user))])
        return result.succeeded


def _wrong_credentials() -> Problem:
    return Problem(
        "wrong_credentials",
        "Check both, or register",
        headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
    )
