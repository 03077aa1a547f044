"""What the user service keeps in the store: records as JSON, each with its format in `v`, and their keys.

| key | holds | goes |
|---|---|---|
| `user/{id}` | `User` | at erasure |
| `user-email/{normalised}` | the id: so an email is unique | at erasure, or with another email |
| `user-newest/{inverted id}` | nothing: the list of all, newest first | at erasure |
| `user-role/{role}/{inverted id}` | nothing: the list of one role, newest first | at erasure, or with another role |
| `known-address/{user}` | `KnownAddresses`: where the password was right | at erasure |
| `address/{user}/{inverted id}` | `Address`: a postal one | when deleted, at erasure |
| `session/{user}/{session}` | `Session` | when it ends; 30 days after its last refresh |
| `mailed/{user}/{hash}` | `MailedToken`: what a mailed token is good for | when used; within two hours |
| `email-change/{user}` | `EmailChange`: waits for the new address's word | when confirmed; within two hours |
| `throttle/{rule}/{whom}` | `Attempts`: see `throttle.py`; an email is a hash there | four hours after the last one |
| `audit/{inverted time}/{id}` | `AuditEntry` | 180 days later |
| `activity/{user}/{inverted time}/{id}` | nothing: the entries about a user, or by one | with the entry, at erasure |
| `erased-user/{id}` | `ErasedUser`: its id is never used again | never |
| `ended-session/{time}/{session}` | see `services/web/ended.py` | twenty minutes later |
| `step-users/…` | steps of this service's workers: see `services.work.steps` | when done |

What goes after a time goes by its lease. A user's keys hold the id, never the email, but for `user-email/`. Inverted
numbers have 16 digits and sort newest first. User 0 never exists: what concerns an account that is not there is filed
under it, so that it costs what it costs for one that is.

**For other services**: `erased-user/{id}` is created in the transaction that erases the account. Whoever keeps copies
of a user's name, address or email watches this prefix (with a cursor of its own) and makes its copies anonymous;
reading the one key tells whether a user is still to be named at all. Whose an email is, staff's search for orders reads
in `user-email/`.
"""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec
from msgspec import Struct

from services.web.ids import ID_MAX
from services.web.tokens import Role

NOBODY: Final = 0

USERS: Final = b"user/"
EMAILS: Final = b"user-email/"
NEWEST: Final = b"user-newest/"
ROLES: Final = b"user-role/"
AUDIT: Final = b"audit/"
QUEUE: Final = "users"  # of the steps of this service's workers


class User(Struct, frozen=True, tag_field="v", tag=1):
    """The record of an account. The hash never leaves the service."""

    id: int
    email: str
    name: str
    age: int
    role: Role
    password_hash: str
    created_ms: int
    is_blocked: bool = False
    blocked_reason: str = ""
    password_changed_ms: int = 0


class StoredUser(Struct, frozen=True):
    user: User
    revision: int


class KnownAddresses(Struct, frozen=True, tag_field="v", tag=1):
    """Network addresses from which the account's password was given, the newest first."""

    addresses: tuple[str, ...] = ()


class Address(Struct, frozen=True, tag_field="v", tag=1):
    """A postal address. `country` is ISO 3166-1's two letters."""

    id: int
    name: str
    line1: str
    line2: str
    postal_code: str
    city: str
    region: str
    country: str
    phone: str
    created_ms: int


class Session(Struct, frozen=True, tag_field="v", tag=1):
    """One sign-in and all refresh tokens that follow from it; see `sessions.py`. Hashes are SHA-256, in hex."""

    id: str
    user_id: int
    created_ms: int
    refreshed_ms: int
    expires_ms: int
    token_hash: str
    previous_hash: str
    nonce: str
    address: str
    user_agent: str


class MailedToken(Struct, frozen=True, tag_field="v", tag=1):
    """`email` is where it was sent, and for an email change what the email will be."""

    purpose: str
    email: str
    created_ms: int
    expires_ms: int


class EmailChange(Struct, frozen=True, tag_field="v", tag=1):
    email: str
    created_ms: int


class AuditEntry(Struct, frozen=True, tag_field="v", tag=1):
    """Who (`actor`) did what to whose account (`subject`), from where. No email, name or secret stands in it."""

    id: str
    at_ms: int
    action: str
    actor: int
    subject: int
    address: str
    user_agent: str
    request_id: str
    details: dict[str, str] = {}


class ErasedUser(Struct, frozen=True, tag_field="v", tag=1):
    """`free_by_ms`: when history, log and backups hold nothing of them any more, but for where orders that are under
    way go to; `orders_free_by_ms`: when that is gone as well (0: by `free_by_ms`, as older versions did it)."""

    id: int
    erased_ms: int
    free_by_ms: int
    orders_free_by_ms: int = 0


decode_user = msgspec.json.Decoder(User).decode
decode_known = msgspec.json.Decoder(KnownAddresses).decode
decode_address = msgspec.json.Decoder(Address).decode
decode_session = msgspec.json.Decoder(Session).decode
decode_mailed = msgspec.json.Decoder(MailedToken).decode
decode_email_change = msgspec.json.Decoder(EmailChange).decode
decode_entry = msgspec.json.Decoder(AuditEntry).decode
decode_erased = msgspec.json.Decoder(ErasedUser).decode
encode = msgspec.json.Encoder().encode


def user_key(user_id: int) -> bytes:
    return b"user/%d" % user_id


def email_key(normalised: str) -> bytes:
    return EMAILS + normalised.encode()


def newest_key(user_id: int) -> bytes:
    return b"%b%016d" % (NEWEST, ID_MAX - user_id)


def roles_of(role: Role) -> bytes:
    return b"%b%b/" % (ROLES, role.value.encode())


def role_key(role: Role, user_id: int) -> bytes:
    return b"%b%016d" % (roles_of(role), ID_MAX - user_id)


def user_of_index(key: bytes) -> int:
    """The user that a key under `NEWEST` or `ROLES` stands for."""
    return ID_MAX - int(key[-16:])


def known_key(user_id: int) -> bytes:
    return b"known-address/%d" % user_id


def addresses_of(user_id: int) -> bytes:
    return b"address/%d/" % user_id


def address_key(user_id: int, address_id: int) -> bytes:
    return b"%b%016d" % (addresses_of(user_id), ID_MAX - address_id)


def sessions_of(user_id: int) -> bytes:
    return b"session/%d/" % user_id


def session_key(user_id: int, session_id: str) -> bytes:
    return sessions_of(user_id) + session_id.encode()


def mailed_of(user_id: int) -> bytes:
    return b"mailed/%d/" % user_id


def mailed_key(user_id: int, token_hash: str) -> bytes:
    return mailed_of(user_id) + token_hash.encode()


def email_change_key(user_id: int) -> bytes:
    return b"email-change/%d" % user_id


def audit_key(at_ms: int, entry_id: str) -> bytes:
    return b"%b%016d/%b" % (AUDIT, ID_MAX - at_ms, entry_id.encode())


def activity_of(user_id: int) -> bytes:
    return b"activity/%d/" % user_id


def activity_key(user_id: int, at_ms: int, entry_id: str) -> bytes:
    return activity_of(user_id) + audit_key(at_ms, entry_id)[len(AUDIT) :]


def erased_key(user_id: int) -> bytes:
    return b"erased-user/%d" % user_id


def secret_hash(secret: str) -> str:
    """For secrets of 256 random bits: they need no salt, and no hash that takes its time."""
    return hashlib.sha256(secret.encode()).hexdigest()
