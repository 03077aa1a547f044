"""What only RocksDB's storage has: the options that it is opened with."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.state import storage
from kvstore.state.storage import RocksStorage


def options_in(directory: Path) -> str:
    """What RocksDB wrote down at its last open."""
    newest = max(directory.glob("OPTIONS-*"), key=lambda path: int(path.name.removeprefix("OPTIONS-")))
    return newest.read_text()


def test_one_that_exists_is_opened_with_the_options_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RocksDB keeps options beside the data, and rocksdict would take what concerns the data from there."""
    with monkeypatch.context() as before:
        before.setattr(storage, "_WRITE_BUFFER_BYTES", 1024 * 1024)
        RocksStorage(str(tmp_path / "state")).close()
    assert "write_buffer_size=1048576\n" in options_in(tmp_path / "state")
    RocksStorage(str(tmp_path / "state")).close()
    assert f"write_buffer_size={storage._WRITE_BUFFER_BYTES}\n" in options_in(tmp_path / "state")
