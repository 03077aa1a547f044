"""Passwords: which are allowed, and their argon2id hashes, made in a bounded pool of threads.

OWASP ASVS 5, chapter 6: 8 to 128 characters, no rules on their composition, the most common refused, argon2id with
19 MiB and two passes. Hashing takes some 25 ms of one core on purpose, so only `HASHING_MAX` wait for it; past that
the service says that it is overloaded rather than let sign-ins take every core and all memory.

A hash is verified for an email that nobody has, too (`verify_nobody`), so that the time of an answer says nothing.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError
from zxcvbn.frequency_lists import FREQUENCY_LISTS  # type: ignore[import-untyped]

from services.web.problems import Problem, field_problem

PASSWORD_CHARS_MIN: Final = 8
PASSWORD_CHARS_MAX: Final = 128

# One hash keeps a core busy for its whole time, so more threads than cores only add memory (19 MiB each); at most 4,
# so that on a large machine the loop and the store's processes keep theirs.
_THREADS: Final = min(4, os.cpu_count() or 1)
# At 25 ms a hash and two threads the last of 64 has waited 0.8 s: longer, and a person has pressed the button again.
HASHING_MAX: Final = 64

# zxcvbn's list of leaked passwords, most frequent first; of its 30,000 those that our length allows are 11,611.
_COMMON: Final[frozenset[str]] = frozenset(
    password for password in FREQUENCY_LISTS["passwords"] if len(password) >= PASSWORD_CHARS_MIN
)

T = TypeVar("T")


def check_length(password: str) -> None:
    """Raises `Problem`. HTTP bodies are checked by their type; this is for other ways in."""
    if not PASSWORD_CHARS_MIN <= len(password) <= PASSWORD_CHARS_MAX:
        wanted = f"A password has {PASSWORD_CHARS_MIN} to {PASSWORD_CHARS_MAX} characters"
        raise field_problem("/password", "invalid_value", wanted)


def check_password(password: str, email: str, pointer: str = "/password") -> None:
    """Raises `Problem` for a password that may not be chosen. Its length is checked before."""
    folded = password.casefold()
    if folded in _COMMON or len(set(folded)) == 1:
        raise field_problem(
            pointer, "common_password", "This password is among the most common ones", problem="common_password"
        )
    if folded in (email.casefold(), email.casefold().partition("@")[0]):
        raise field_problem(
            pointer, "common_password", "The email is no password for itself", problem="common_password"
        )


class Passwords:
    """Hashes and verifies beside the event loop. One per process; close it at the end."""

    def __init__(self) -> None:
        self._hasher = PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1, type=Type.ID)
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="argon2")
        self._waiting = 0
        # Of a password that nobody can know: what unknown emails are verified against. Made when a process serves,
        # not when it first meets such an email: that answer would come later than others.
        self._nobody = ""

    async def start(self) -> None:
        """Before the first `verify_nobody`."""
        self._nobody = await self.hash(secrets.token_urlsafe(24))

    async def hash(self, password: str) -> str:
        return await self._run(lambda: self._hasher.hash(password))

    async def verify(self, stored: str, password: str) -> bool:
        return await self._run(lambda: self._matches(stored, password))

    async def verify_nobody(self, password: str) -> None:
        """Take as long as `verify` does."""
        await self.verify(self._nobody, password)

    def outdated(self, stored: str) -> bool:
        """True if a hash was made with other parameters than today's."""
        return self._hasher.check_needs_rehash(stored)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _matches(self, stored: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored, password)
        except VerifyMismatchError:
            return False
        except (InvalidHashError, VerificationError) as error:
            # Not the user's fault, and not to be mistaken for a wrong password: the record is damaged.
            raise RuntimeError("a stored password hash cannot be verified") from error

    async def _run(self, work: Callable[[], T]) -> T:
        if self._waiting >= HASHING_MAX:
            raise Problem("overloaded", "Too many sign-ins at once; try again in a moment")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1
