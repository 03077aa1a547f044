"""Mail: what is sent, and how a deployment plugs in who sends it.

A mailer is an object with `send`; `--mailer module:function` names a function without arguments that makes it, once in
each process. It is called by a worker, after and outside of every transaction, and may be called twice for one mail
(a worker that died): `Mail.id` is the same then, for a provider that knows idempotency keys. Raising anything has the
mail tried again, with growing pauses, for half an hour.

`FileMailer` is for development: it writes each mail into a directory, tokens included.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import re
from pathlib import Path
from typing import Final, Protocol

import msgspec
from msgspec import Struct

_SEND_TIMEOUT_S: Final = 30.0  # a mail server that has not taken it by then is down


class Mail(Struct, frozen=True):
    """`kind` is stable, for a mailer with texts of its own; `token` is empty where the mail is only a notice."""

    id: str
    kind: str
    to: str
    name: str
    token: str
    subject: str
    text: str


class Mailer(Protocol):
    async def send(self, mail: Mail) -> None:
        """Deliver, or raise."""


class CannotMail(Exception):
    """The option does not name a mailer; the message says why."""


async def send(mailer: Mailer, mail: Mail) -> None:
    async with asyncio.timeout(_SEND_TIMEOUT_S):
        await mailer.send(mail)


def load_mailer(name: str) -> Mailer:
    """What `module:function` makes. Raises `CannotMail`."""
    match = re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)", name)
    if match is None:
        raise CannotMail(f"a mailer is given as module:function, not {name!r}")
    try:
        make = getattr(importlib.import_module(match[1]), match[2])
    except (ImportError, AttributeError) as error:
        raise CannotMail(f"there is no mailer {name}: {error}") from None
    if not callable(make):
        raise CannotMail(f"{name} is no function")
    mailer: Mailer = make()
    if not callable(getattr(mailer, "send", None)):
        raise CannotMail(f"what {name} returns has no `send`")
    return mailer


class FileMailer:
    """Writes each mail as a JSON file, named by its id: the second of two with one id replaces the first."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)

    async def send(self, mail: Mail) -> None:
        await asyncio.to_thread(self._write, mail)

    def _write(self, mail: Mail) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9-]", "-", mail.id)
        written = self._directory / f".{name}.{os.getpid()}"
        written.write_bytes(msgspec.json.format(msgspec.json.encode(mail)))
        written.rename(self._directory / f"{name}.json")
