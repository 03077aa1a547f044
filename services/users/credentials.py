"""Who knows the password: every check of one, throttled, recorded, and as late for an account that does not exist."""

from __future__ import annotations

import unicodedata
from typing import Final

import kvstore
from services.users.audit import Action, AuditLog, Origin
from services.users.passwords import Passwords
from services.users.records import (
    NOBODY,
    KnownAddresses,
    StoredUser,
    decode_known,
    decode_user,
    email_key,
    encode,
    known_key,
    user_key,
)
from services.users.throttle import (
    SIGN_IN_ACCOUNT,
    SIGN_IN_ADDRESS,
    SIGN_IN_PAIR,
    Counted,
    Throttle,
    account_name,
)
from services.web.clients import counted_address
from services.web.problems import Problem, field_problem

EMAIL_BYTES_MAX: Final = 254  # of RFC 5321's path, without its brackets
_KNOWN_MAX: Final = 20  # homes, offices and carriers of the last months


def normalise_email(email: str, pointer: str = "/email") -> str:
    """One spelling for all spellings of an email that we hold to be the same. Raises `Problem` if it is none."""
    text = unicodedata.normalize("NFKC", email.strip()).casefold()
    local, at, domain = text.rpartition("@")
    labels = domain.split(".")
    if (
        not at
        or not 1 <= len(local) <= 64
        or "@" in local
        or len(labels) < 2
        or not all(labels)
        or not text.isprintable()
        or len(text.encode()) > EMAIL_BYTES_MAX
        or any(character.isspace() for character in text)
    ):
        raise field_problem(pointer, "invalid_value", "This is no email address")
    return text


def email_or_none(email: str) -> str | None:
    try:
        return normalise_email(email)
    except Problem:
        return None


class Checked(StoredUser, frozen=True):
    """An account whose password was given. `pair` is the count to be forgotten when something comes of it."""

    pair: Counted | None = None


class Credentials:
    """One per process."""

    def __init__(self, store: kvstore.Client, passwords: Passwords, throttle: Throttle, audit: AuditLog) -> None:
        self._store = store
        self._passwords = passwords
        self._throttle = throttle
        self._audit = audit

    async def check(self, email: str, password: str, origin: Origin) -> Checked:
        """The account with this email and password. Raises `Problem`: `sign_in_throttled`, and `wrong_credentials`,
        the same and as late whichever of the two is wrong."""
        normalised = email_or_none(email)
        found = await self._store.get(email_key(normalised or ""))
        stored, known = await self._read(NOBODY if found is None else int(found.value))
        # An email as it was typed is counted by itself where it is none: it is wrong every time.
        counts = _counts(account_name(normalised or email), origin, known)
        await self._throttle.take("sign_in_throttled", counts)
        if stored is None:
            await self._passwords.verify_nobody(password)
        if stored is None or not await self._passwords.verify(stored.user.password_hash, password):
            subject = NOBODY if stored is None else stored.user.id
            await self._audit.append(Action.SIGN_IN_FAILED, origin, actor=NOBODY, subject=subject)
            raise _wrong_credentials()
        return await self._right(stored, counts)

    async def confirm(self, user_id: int, password: str, origin: Origin, pointer: str) -> Checked:
        """Who is signed in gives the password again, for what an access token alone must not do. Counted like a
        sign-in. Raises `Problem`: `sign_in_throttled`, `wrong_password`, `not_found`."""
        stored, known = await self._read(user_id)
        if stored is None:
            raise no_account()
        counts = _counts(account_name(normalise_email(stored.user.email)), origin, known)
        await self._throttle.take("sign_in_throttled", counts)
        if not await self._passwords.verify(stored.user.password_hash, password):
            await self._audit.append(Action.PASSWORD_WRONG, origin, actor=user_id, subject=user_id)
            raise wrong_password(pointer)
        return await self._right(stored, counts)

    def still_holds(self, txn: kvstore.Transaction, checked: Checked, now: StoredUser) -> bool:
        """Within the transaction that uses it: the password is the one that was checked. Forgets failed attempts."""
        if now.user.password_hash != checked.user.password_hash:
            return False
        if checked.pair is not None:
            txn.delete(checked.pair.key)
        return True

    async def _right(self, stored: StoredUser, counts: list[Counted]) -> Checked:
        pairs = [count for count in counts if count.rule is SIGN_IN_PAIR]
        await self._throttle.take_back([count for count in counts if count.rule is not SIGN_IN_PAIR])
        return Checked(stored.user, stored.revision, pairs[0] if pairs else None)

    async def _read(self, user_id: int) -> tuple[StoredUser | None, KnownAddresses]:
        result = await self._store.txn(success=[kvstore.Range(user_key(user_id)), kvstore.Range(known_key(user_id))])
        users, known = result.results
        assert isinstance(users, kvstore.RangeResult)
        assert isinstance(known, kvstore.RangeResult)
        addresses = decode_known(known.records[0].value) if known.records else KnownAddresses()
        if not users.records:
            return None, addresses
        return StoredUser(decode_user(users.records[0].value), users.records[0].mod_revision), addresses


async def read_user(txn: kvstore.Transaction, user_id: int) -> StoredUser:
    """Raises `Problem` `not_found`."""
    record = await txn.get(user_key(user_id))
    if record is None:
        raise no_account()
    return StoredUser(decode_user(record.value), record.mod_revision)


async def learn_address(txn: kvstore.Transaction, user_id: int, origin: Origin) -> None:
    """The password was right from there, or a mail to the account's address was read there."""
    address = counted_address(origin.address)
    if address is None:
        return
    record = await txn.get(known_key(user_id))
    known = decode_known(record.value).addresses if record is not None else ()
    if known[:1] == (address,):
        return
    others = [one for one in known if one != address]
    txn.put(known_key(user_id), encode(KnownAddresses((address, *others[: _KNOWN_MAX - 1]))))


def _counts(name: str, origin: Origin, known: KnownAddresses) -> list[Counted]:
    address = counted_address(origin.address)
    if address is None:
        return [Counted(SIGN_IN_ACCOUNT, name)]
    counts = [Counted(SIGN_IN_PAIR, f"{name}/{address}"), Counted(SIGN_IN_ADDRESS, address)]
    if address not in known.addresses:
        counts.append(Counted(SIGN_IN_ACCOUNT, name))
    return counts


def no_account() -> Problem:
    return Problem("not_found", "The account is no longer there")


def wrong_password(pointer: str) -> Problem:
    return field_problem(pointer, "wrong_password", "This is not the account's password", problem="wrong_password")


def _wrong_credentials() -> Problem:
    return Problem(
        "wrong_credentials",
        "Check both, or register",
        headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
    )
