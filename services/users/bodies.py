"""What the user service takes and answers over HTTP."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from msgspec import Meta, Struct

from services.users.mailing import TOKEN_CHARS_MAX
from services.users.passwords import PASSWORD_CHARS_MAX, PASSWORD_CHARS_MIN
from services.users.records import User
from services.users.sessions import REFRESH_TOKEN_CHARS_MAX
from services.web.bodies import Name, RequestBody, Text
from services.web.ids import Timestamp, timestamp
from services.web.tokens import Role

# `normalise_email` decides; the document says what comes closest.
Email = Annotated[
    str, Meta(min_length=3, max_length=254, examples=["ada@example.com"], extra_json_schema={"format": "email"})
]
NewPassword = Annotated[
    str,
    Meta(
        min_length=PASSWORD_CHARS_MIN,
        max_length=PASSWORD_CHARS_MAX,
        description="Any but the most common ones, and the email.",
        examples=["correct horse battery staple"],
    ),
]
# Only bounded: a password that could never have been chosen is wrong, not malformed.
GivenPassword = Annotated[str, Meta(max_length=1000, examples=["correct horse battery staple"])]
GivenEmail = Annotated[str, Meta(max_length=1000, examples=["ada@example.com"])]
PersonName = Annotated[Name, Meta(examples=["Ada"])]
Age = Annotated[int, Meta(ge=0, le=150, examples=[36])]
MailToken = Annotated[str, Meta(min_length=1, max_length=TOKEN_CHARS_MAX, description="As it stood in the mail.")]


class Registration(RequestBody, frozen=True):
    email: Email
    password: NewPassword
    name: PersonName
    age: Age


class Credentials(RequestBody, frozen=True):
    email: GivenEmail
    password: GivenPassword


class RefreshInput(RequestBody, frozen=True):
    refresh_token: Annotated[
        str, Meta(min_length=1, max_length=REFRESH_TOKEN_CHARS_MAX, description="The last one that you were given.")
    ]


class ProfileInput(RequestBody, frozen=True):
    """What is left out, or null, stays."""

    schema_adds: ClassVar[dict[str, Any]] = {
        "anyOf": [
            {"required": ["name"], "properties": {"name": {"type": "string"}}},
            {"required": ["age"], "properties": {"age": {"type": "integer"}}},
        ]
    }

    name: PersonName | None = None
    age: Age | None = None


class PasswordInput(RequestBody, frozen=True):
    old_password: GivenPassword
    new_password: NewPassword


class ResetRequest(RequestBody, frozen=True):
    email: GivenEmail


class ResetInput(RequestBody, frozen=True):
    """The token is in the body, because paths are logged."""

    token: MailToken
    password: NewPassword


class EmailInput(RequestBody, frozen=True):
    password: GivenPassword
    email: Email


class EmailConfirmation(RequestBody, frozen=True):
    token: MailToken


class ErasureInput(RequestBody, frozen=True):
    password: GivenPassword


class RoleInput(RequestBody, frozen=True):
    role: Role


class BlockInput(RequestBody, frozen=True):
    reason: Text


class AccountBody(Struct, frozen=True):
    id: int
    email: str
    name: str
    age: int
    role: Role
    created_at: Timestamp


class UserBody(Struct, frozen=True):
    id: int
    name: str
    age: int


class AccountForStaffBody(Struct, frozen=True):
    id: int
    email: str
    name: str
    age: int
    role: Role
    created_at: Timestamp
    is_blocked: bool
    blocked_reason: str


class SessionBody(Struct, frozen=True):
    """`expires_in` seconds the access token is good for, `refresh_expires_in` the refresh token."""

    access_token: str
    token_type: str
    expires_in: int
    user_id: int
    refresh_token: str
    refresh_expires_in: int
    session_id: str


class SessionItem(Struct, frozen=True):
    id: str
    created_at: Timestamp
    last_used_at: Timestamp
    expires_at: Timestamp
    address: str
    user_agent: str
    is_current: bool


class SessionList(Struct, frozen=True):
    """All there are: at most twenty."""

    data: list[SessionItem]
    has_more: bool = False
    next_cursor: str | None = None


class EndedBody(Struct, frozen=True):
    ended: int


class AcceptedBody(Struct, frozen=True):
    """It goes on from here, or it does not: the answer is the same."""

    status: str = "accepted"


class ErasureBody(Struct, frozen=True):
    """By `free_by` history, log and backups hold nothing of the account any more, but for where orders that are under
    way go to: they keep that until they have arrived or ended. By `orders_free_by` it is gone as well, at the latest.
    """

    id: int
    erased_at: Timestamp
    free_by: Timestamp
    orders_free_by: Timestamp


def account_body(user: User) -> AccountBody:
    return AccountBody(user.id, user.email, user.name, user.age, user.role, timestamp(user.created_ms))


def account_for_staff(user: User) -> AccountForStaffBody:
    return AccountForStaffBody(
        user.id,
        user.email,
        user.name,
        user.age,
        user.role,
        timestamp(user.created_ms),
        user.is_blocked,
        user.blocked_reason,
    )
