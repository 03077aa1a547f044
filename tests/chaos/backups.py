"""Backups of a cluster under load, as an operator takes them: with `kvstore backup`, in a process of its own.

Each that is done is restored at once into an empty directory, by `kvstore restore`, which reads every byte of it; its
digest has to be that of a replica at the backup's revision, where one can still tell. One that fails has to leave no
file that is taken for a backup. The last one, when all is calm, has to succeed, every replica has to agree with it, and
so has the store that was made of it, opened and asked.

Processes of their own, so that the prober's loop does not wait for a hash of everything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kvstore
from kvstore import Client
from kvstore.backup import PagedHash, read_backup
from kvstore.client.transaction import key_after
from kvstore.embedded import NODE_NAME
from kvstore.errors import KvError, Refused
from tests.checkers.verdict import Inconsistent
from tests.cluster.harness import run_command

# Often enough that a fault of every kind meets one in twenty minutes, seldom enough to leave the machine to the load.
EVERY_S = 15.0
TIMEOUT_S = 10.0


class Backups:
    """`take` any number of times, one after the other, and `take_last`. Both raise `Inconsistent`."""

    def __init__(self, path: Path, endpoints: Callable[[], str]) -> None:
        """`path`: a directory for files and restored stores. `endpoints` as they are now."""
        self._path = path
        self._endpoints = endpoints
        self._number = 0
        self.taken = 0
        self.failed = 0
        self.compared = 0
        """Of those taken: how many of them a replica could still be asked about."""

    async def take(self, kv: Client) -> bool:
        """Whether it succeeded, which nobody promises under faults."""
        file, made = await self._backup()
        if made is None:
            return False
        shutil.rmtree(await self._restored(file, made))
        address = next((member.client_address for member in await _members(kv)), "")
        digest = await _digest(kv, made["revision"], address)
        if digest is not None:
            self.compared += 1
            _hold(digest, made, address)
        file.unlink()
        self.taken += 1
        return True

    async def take_last(self, kv: Client) -> None:
        """All nodes run, and nothing is broken."""
        file, made = await self._backup()
        if made is None:
            raise Inconsistent("backup_fails", "nothing is broken, and no backup can be taken")
        addresses = [member.client_address for member in (await kv.status()).members]
        for address in addresses:
            digest = await _digest(kv, made["revision"], address)
            if digest is None:
                raise Inconsistent("backup_differs", f"{address} does not tell its digest at {made['revision']}")
            _hold(digest, made, address)
        restored = await self._restored(file, made)
        async with kvstore.open_embedded(str(restored)) as opened:
            digest = await _digest(opened, made["revision"], "")
            if digest is None:
                raise Inconsistent("backup_differs", f"the store restored from {file} does not tell its digest")
            _hold(digest, made, "the store restored from it")
        shutil.rmtree(restored)
        self.taken += 1
        self.compared += 1

    async def _backup(self) -> tuple[Path, Any]:
        """What the command said, or None if it failed."""
        self._path.mkdir(exist_ok=True)
        self._number += 1
        file = self._path / f"{self._number}.backup"
        arguments = ("backup", str(file), "--timeout", f"{TIMEOUT_S:g}", "-o", "json")
        try:
            code, out, err = await run_command(*arguments, environment={"KVSTORE_ENDPOINTS": self._endpoints()})
        except TimeoutError:
            code, out, err = -1, "", "it was killed, for it took too long"
        if code == 0:
            return file, json.loads(out)
        self.failed += 1
        if "Traceback" in err:
            raise Inconsistent("backup_fails", f"no caller may see this: {err[-2000:]}")
        for left in sorted(self._path.glob(f"{file.name}*")):
            _refuse(left)
            left.unlink()
        return file, None

    async def _restored(self, file: Path, made: Any) -> Path:
        """Restore it, which reads all of it; the directory."""
        directory = self._path / "restored"
        code, out, err = await run_command(
            "restore", str(file), "--name", NODE_NAME, "--data-dir", str(directory), "-o", "json"
        )
        if code:
            raise Inconsistent("backup_damaged", f"{file} was reported done, and is not restored: {err[-2000:]}")
        told = json.loads(out)
        if (told["digest"], told["revision"], told["records"]) != (made["digest"], made["revision"], made["records"]):
            raise Inconsistent("backup_damaged", f"{file}: reported done as {made}, and restored as {told}")
        return directory


def _refuse(file: Path) -> None:
    """It was left by a backup that failed."""
    try:
        with file.open("rb") as opened:
            for _ in read_backup(opened):
                pass
    except Refused:
        if file.suffix == ".part":
            return
    raise Inconsistent("backup_of_a_failure", f"a backup failed, and left {file}")


def _hold(digest: bytes, made: Any, where: str) -> None:
    if digest.hex() != made["digest"]:
        raise Inconsistent("backup_differs", f"{made}, and {where} has digest {digest.hex()} at that revision")


async def _members(kv: Client) -> Sequence[Any]:
    try:
        return (await kv.status()).members
    except KvError:
        return ()


async def _digest(kv: Client, revision: int, address: str) -> bytes | None:
    """Of all records of one node at a revision; None if it does not tell."""
    hashed, start = PagedHash(), b""
    try:
        while revision:
            page = await kv.digest(start, revision=revision, address=address, timeout=TIMEOUT_S)
            hashed.add_page(page.digest, page.count)
            if not page.last:
                break
            start = key_after(page.last)
    except KvError:
        return None
    return hashed.digest()
