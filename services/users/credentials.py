"""Who knows the password: every check of one, throttled, recorded, and as late for an account that does not exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

import kvstore
from services.users.audit import Action, AuditLog, Origin
from services.users.emails import email_or_none, normalise_email
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
    sessions_of,
    user_key,
)
from services.users.throttle import (
    SIGN_IN_ACCOUNT,
    SIGN_IN_ADDRESS,
    SIGN_IN_PAIR,
    Counted,
    Taken,
    Throttle,
    account_name,
    record_of,
)
from services.web.clients import counted_address
from services.web.problems import Problem, field_problem

_KNOWN_MAX: Final = 20  # homes, offices and carriers of the last months


class Seen(Struct, frozen=True):
    """An account as it was read, with what else signing in looks at: the addresses that are known, and sessions."""

    stored: StoredUser | None
    known: kvstore.Record | None
    sessions: kvstore.RangeResult

    @classmethod
    def of(cls, found: Sequence[object]) -> Seen:
        """What the reads of `ranges_of` found."""
        account, known, sessions = found
        assert isinstance(sessions, kvstore.RangeResult)
        record = record_of(account)
        stored = StoredUser(decode_user(record.value), record.mod_revision) if record is not None else None
        return cls(stored, record_of(known), sessions)

    def unchanged(self, user_id: int) -> list[kvstore.Compare]:
        """That all of it is as it was."""
        equal, mod_revision = kvstore.Relation.EQUAL, kvstore.Target.MOD_REVISION
        start = sessions_of(user_id)
        end, count, newer = kvstore.prefix_end(start), len(self.sessions.records), self.sessions.revision + 1
        return [
            kvstore.Compare(user_key(user_id), mod_revision, equal, self.stored.revision if self.stored else 0),
            kvstore.Compare(known_key(user_id), mod_revision, equal, self.known.mod_revision if self.known else 0),
            # As many sessions, and none of them written since.
            kvstore.Compare(start, kvstore.Target.COUNT, equal, count, end),
            kvstore.Compare(start, mod_revision, kvstore.Relation.LESS, newer, end),
        ]

    @property
    def addresses(self) -> tuple[str, ...]:
        return decode_known(self.known.value).addresses if self.known is not None else ()


class Checked(StoredUser, frozen=True):
    """An account whose password was given. `pair` is the count to be forgotten when something comes of it; `taken`,
    from `check`, are those to be taken back."""

    seen: Seen
    pair: Counted | None = None
    taken: tuple[Taken, ...] = ()


class Credentials:
    """One per process."""

    def __init__(self, store: kvstore.Client, passwords: Passwords, throttle: Throttle, audit: AuditLog) -> None:
        self._store = store
        self._passwords = passwords
        self._throttle = throttle
        self._audit = audit

    async def check(self, email: str, password: str, origin: Origin) -> Checked:
        """The account with this email and password; the caller takes back `taken`. Raises `Problem`:
        `sign_in_throttled`, and `wrong_credentials`, the same and as late whichever of the two is wrong.

        Three round trips to the store: the email with the counts, the account, and the counts raised; as many for
        an email that nobody has."""
        normalised = email_or_none(email)
        # An email as it was typed is counted by itself where it is none: it is wrong every time.
        name = account_name(normalised or email)
        possible = _counts(name, origin, ())
        found, *records = await self._records(email_key(normalised or ""), *(count.key for count in possible))
        seen = await self._read(NOBODY if found is None else int(found.value))
        stored = seen.stored
        counts = _counts(name, origin, seen.addresses)
        counted = dict(zip(possible, records, strict=True))
        taken = await self._throttle.take("sign_in_throttled", counts, [counted[count] for count in counts])
        if stored is None:
            await self._passwords.verify_nobody(password)
        if stored is None or not await self._passwords.verify(stored.user.password_hash, password):
            subject = NOBODY if stored is None else stored.user.id
            await self._audit.append(Action.SIGN_IN_FAILED, origin, actor=NOBODY, subject=subject)
            raise _wrong_credentials()
        return _right(stored, seen, taken)

    async def confirm(self, user_id: int, password: str, origin: Origin, pointer: str) -> Checked:
        """Who is signed in gives the password again, for what an access token alone must not do. Counted like a
        sign-in. Raises `Problem`: `sign_in_throttled`, `wrong_password`, `not_found`."""
        seen = await self._read(user_id)
        stored = seen.stored
        if stored is None:
            raise no_account()
        counts = _counts(account_name(normalise_email(stored.user.email)), origin, seen.addresses)
        taken = await self._throttle.take("sign_in_throttled", counts)
        if not await self._passwords.verify(stored.user.password_hash, password):
            await self._audit.append(Action.PASSWORD_WRONG, origin, actor=user_id, subject=user_id)
            raise wrong_password(pointer)
        checked = _right(stored, seen, taken)
        await self._throttle.take_back(checked.taken)
        return checked

    def still_holds(self, txn: kvstore.Transaction, checked: Checked, now: StoredUser) -> bool:
        """Within the transaction that uses it: the password is the one that was checked. Forgets failed attempts."""
        if now.user.password_hash != checked.user.password_hash:
            return False
        if checked.pair is not None:
            txn.delete(checked.pair.key)
        return True

    async def take_back(self, checked: Checked) -> None:
        """After `check`, where no other transaction does."""
        await self._throttle.take_back(checked.taken)

    async def _read(self, user_id: int) -> Seen:
        return Seen.of((await self._store.txn(success=ranges_of(user_id))).results)

    async def _records(self, *keys: bytes) -> list[kvstore.Record | None]:
        found = await self._store.txn(success=[kvstore.Range(key) for key in keys])
        return [record_of(one) for one in found.results]


def _right(stored: StoredUser, seen: Seen, taken: list[Taken]) -> Checked:
    pairs = [one.counted for one in taken if one.counted.rule is SIGN_IN_PAIR]
    others = tuple(one for one in taken if one.counted.rule is not SIGN_IN_PAIR)
    return Checked(stored.user, stored.revision, seen, pairs[0] if pairs else None, others)


def ranges_of(user_id: int) -> list[kvstore.Range]:
    """For `Seen.of`."""
    of_user = sessions_of(user_id)
    return [
        kvstore.Range(user_key(user_id)),
        kvstore.Range(known_key(user_id)),
        kvstore.Range(of_user, kvstore.prefix_end(of_user)),
    ]


async def read_user(txn: kvstore.Transaction, user_id: int) -> StoredUser:
    """Raises `Problem` `not_found`."""
    record = await txn.get(user_key(user_id))
    if record is None:
        raise no_account()
    return StoredUser(decode_user(record.value), record.mod_revision)


async def learn_address(txn: kvstore.Transaction, user_id: int, origin: Origin) -> None:
    """The password was right from there, or a mail to the account's address was read there."""
    if counted_address(origin.address) is None:
        return
    record = await txn.get(known_key(user_id))
    put = learned(user_id, decode_known(record.value).addresses if record is not None else (), origin)
    if put is not None:
        txn.put(put.key, put.value)


def learned(user_id: int, known: tuple[str, ...], origin: Origin) -> kvstore.Put | None:
    """The same for a transaction that has read `known`; None where nothing changes."""
    address = counted_address(origin.address)
    if address is None or known[:1] == (address,):
        return None
    others = [one for one in known if one != address]
    return kvstore.Put(known_key(user_id), encode(KnownAddresses((address, *others[: _KNOWN_MAX - 1]))))


def _counts(name: str, origin: Origin, known: tuple[str, ...]) -> list[Counted]:
    address = counted_address(origin.address)
    if address is None:
        return [Counted(SIGN_IN_ACCOUNT, name)]
    counts = [Counted(SIGN_IN_PAIR, f"{name}/{address}"), Counted(SIGN_IN_ADDRESS, address)]
    if address not in known:
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
