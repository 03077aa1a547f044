"""Backups of a campaign must be able to be found wrong."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

import kvstore
from kvstore.backup import FORMAT, BackupWriter, Header
from tests.chaos import backups
from tests.chaos.backups import Backups
from tests.checkers.verdict import Inconsistent


def whole() -> bytes:
    file = io.BytesIO()
    writer = BackupWriter(file)
    writer.header(Header(FORMAT, "cluster", 6, 1, "1.0"))
    writer.leases(())
    writer.end()
    return file.getvalue()


async def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backups, "TIMEOUT_S", 0.5)
    taken = Backups(tmp_path / "backups", lambda: "127.0.0.1:1")
    async with kvstore.connect("127.0.0.1:1") as kv:
        assert not await taken.take(kv)
        with pytest.raises(Inconsistent, match="backup_fails"):
            await taken.take_last(kv)
    assert (taken.taken, taken.failed) == (0, 2)
    assert not list((tmp_path / "backups").iterdir())


@pytest.mark.parametrize(("name", "cut"), [("1.backup", 0), ("1.backup", 1), ("1.backup.part", 0)])
def test_what_is_left_and_may_be_taken_for_a_backup_is_found_out(tmp_path: Path, name: str, cut: int) -> None:
    left = tmp_path / name
    left.write_bytes(whole()[: len(whole()) - cut])
    with pytest.raises(Inconsistent, match="backup_of_a_failure"):
        backups._refuse(left)


def test_a_part_that_is_cut_is_none(tmp_path: Path) -> None:
    left = tmp_path / "1.backup.part"
    left.write_bytes(whole()[:-1])
    backups._refuse(left)


def test_other_records_are_found_out() -> None:
    made = {"digest": b"one".hex(), "revision": 6}
    backups._hold(b"one", made, "n1")
    with pytest.raises(Inconsistent, match="backup_differs"):
        backups._hold(b"two", made, "n1")
