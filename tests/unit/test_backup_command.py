"""`kvstore backup` and `kvstore restore` as commands: what is under a name, and when; what a failing disk comes to."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import click
import pytest

from kvstore.backup import BackupWriter, Header
from kvstore.cli import backup as command
from kvstore.cli.main import run
from kvstore.client.backup import Made
from kvstore.env import SystemFiles
from kvstore.errors import Refused
from kvstore.state.storage import StorageFailed


async def one_made(_client: object, file: BinaryIO, *_: object) -> Made:
    writer = BackupWriter(file)
    writer.header(Header(2, "c", 1, 1, ""))
    writer.leases(())
    return Made(1, writer.end(), writer.size_bytes)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(command, "back_up", one_made)
    return tmp_path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_backup_is_under_its_name_for_good(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is synced before it has its name, and the directory after."""
    steps: list[tuple[str, list[str]]] = []
    replace, fsync, sync_dir = os.replace, os.fsync, SystemFiles.sync_dir

    def recorded(step: str, do: Any) -> Any:
        def call(*arguments: Any) -> None:
            do(*arguments)
            steps.append((step, names(directory)))

        return call

    monkeypatch.setattr(os, "replace", recorded("replace", replace))
    monkeypatch.setattr(os, "fsync", recorded("fsync", fsync))
    monkeypatch.setattr(SystemFiles, "sync_dir", recorded("sync_dir", sync_dir))
    assert run(["backup", str(directory / "file")]) == 0
    (_, before), *rest = [step for step in steps if step[0] != "fsync" or step[1] != ["file"]]
    assert len(before) == 1
    assert before[0].startswith("file.")
    assert before[0].endswith(".part")
    assert rest == [("replace", ["file"]), ("sync_dir", ["file"])]


def test_a_backup_without_a_directory_in_its_name(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    assert run(["backup", "file"]) == 0
    assert names(directory) == ["file"]


def test_a_backup_is_no_device_s_nor_a_directory_s(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(directory / "fifo")
    for file in (str(directory / "fifo"), ""):
        assert run(["backup", file, "--force"]) == 2
        assert "must be the name of a file" in capsys.readouterr().err
    assert names(directory) == ["fifo"]
    assert not (directory / "fifo").is_file()


@pytest.mark.parametrize("before", [None, b"an older one"])
@pytest.mark.parametrize(
    ("error", "code"),
    [(Refused("gone", code="revision_compacted"), 1), (OSError(errno.ENOSPC, "full"), 1), (KeyboardInterrupt(), 130)],
)
def test_a_backup_that_fails_leaves_the_directory_as_it_was(
    directory: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, before: bytes | None
) -> None:
    async def fails(_client: object, file: BinaryIO, *_: object) -> Made:
        file.write(b"something")
        raise error

    monkeypatch.setattr(command, "back_up", fails)
    if before is not None:
        (directory / "file").write_bytes(before)
    assert run(["backup", str(directory / "file"), "--force"]) == code
    if before is None:
        assert names(directory) == []
    else:
        assert names(directory) == ["file"]
        assert (directory / "file").read_bytes() == before


def test_a_part_that_cannot_be_removed_is_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "fsync", broken)
    monkeypatch.setattr(os, "remove", broken)
    assert run(["backup", str(directory / "file")]) == 1
    (part,) = names(directory)
    said = capsys.readouterr().err
    assert f"{part} is incomplete and could not be removed" in said
    assert "no backup was made" in said


def test_a_directory_that_cannot_be_synced_is_told(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sync(code: int) -> Any:
        def fails(*_: object) -> None:
            raise OSError(code, "no sync of this directory")

        return fails

    monkeypatch.setattr(SystemFiles, "sync_dir", sync(errno.EIO))
    assert run(["backup", str(directory / "file")]) == 1
    assert "is complete, but its directory could not be synced" in capsys.readouterr().err
    monkeypatch.setattr(SystemFiles, "sync_dir", sync(errno.EINVAL))
    assert run(["backup", str(directory / "other")]) == 0


def test_two_backups_to_one_name_do_not_write_into_each_other(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def while_another_runs(client: object, opened: BinaryIO, *_: object) -> Made:
        with monkeypatch.context() as inner:
            inner.setattr(command, "back_up", one_made)
            await asyncio.to_thread(run, ["backup", str(directory / "file")])
        whole.append((directory / "file").read_bytes())
        return await one_made(client, opened)

    whole: list[bytes] = []
    monkeypatch.setattr(command, "back_up", while_another_runs)
    assert run(["backup", str(directory / "file")]) == 0
    assert names(directory) == ["file"]
    assert (directory / "file").read_bytes() == whole[0]


def test_a_backup_of_a_clock_far_ahead_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Log time goes on from when it was made, and leases end by log time."""
    for number, ahead_ms in enumerate((-3600_000, 3600_000)):
        with open(tmp_path / "file", "wb") as file:
            writer = BackupWriter(file)
            writer.header(Header(2, "c", 1, time.time_ns() // 1_000_000 + ahead_ms, ""))
            writer.leases(())
            writer.end()
        assert run(["restore", str(tmp_path / "file"), "--name", "n1", "--data-dir", str(tmp_path / f"{number}")]) == 0
        assert ("no lease ends before" in capsys.readouterr().err) is (ahead_ms > 0)


@pytest.mark.parametrize("arguments", [["restore", "FILE", "--name", "n1", "--data-dir", "NEW"], ["inspect", "DIR"]])
def test_a_disk_that_fails_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageFailed(errno.ENOSPC, "writing failed: no space left")

    for what in ("restore", "inspect"):
        monkeypatch.setattr(f"kvstore.server.offline.{what}", full)
    (tmp_path / "file").write_bytes(b"")
    paths = {"FILE": str(tmp_path / "file"), "NEW": str(tmp_path / "new"), "DIR": str(tmp_path)}
    assert run([paths.get(argument, argument) for argument in arguments]) == 1
    said = capsys.readouterr().err
    assert "no space left" in said
    assert "Traceback" not in said


def test_the_help_says_what_the_exit_codes_are(capsys: pytest.CaptureFixture[str]) -> None:
    for each in command.COMMANDS:
        assert run([str(each.name), "--help"]) == 0
        said = capsys.readouterr().out
        assert "Exit code 0:" in said, each.name
        assert any(isinstance(option, click.Option) and "--output" in option.opts for option in each.params)


# --- restore, recover -------------------------------------------------------------------------------------------------


def test_a_restore_takes_the_token_from_where_a_node_does(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(directory / "file")
    assert run(["backup", file]) == 0
    capsys.readouterr()

    def cluster_id(data_dir: str, *options: str) -> str:
        assert (
            run(["restore", file, "--name", "n1", "--data-dir", str(directory / data_dir), "-o", "json", *options]) == 0
        )
        return str(json.loads(capsys.readouterr().out)["cluster_id"])

    monkeypatch.delenv("KVSTORE_CLUSTER_TOKEN", raising=False)
    none, given = cluster_id("a"), cluster_id("b", "--cluster-token", "t")
    monkeypatch.setenv("KVSTORE_CLUSTER_TOKEN", "t")
    assert cluster_id("c") == given != none


@pytest.mark.parametrize("typed", [b"", b"\n", b"n2\n", b"\xff\n"])
def test_a_recovery_that_is_not_confirmed_says_so(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: bytes
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    assert run(["recover", str(directory), "--name", "n1"]) == 1
    assert "not confirmed; nothing was changed" in capsys.readouterr().err


def test_a_recovery_that_is_confirmed_goes_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"n1\r\n")))
    assert run(["recover", str(directory), "--name", "n1"]) == 5
    assert "no node's data" in capsys.readouterr().err
