"""Emails as accounts know them: one spelling each, under which at most one account stands.

Other services that look an account up by its email do it with these and `records.email_key`; they need nothing else of
this service.
"""

from __future__ import annotations

import unicodedata
from typing import Final

from services.web.problems import Problem, field_problem

EMAIL_BYTES_MAX: Final = 254  # of RFC 5321's path, without its brackets


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
