"""Deleting more than one request may: what the store says, and `kvstore del --pieces`."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvstore
from kvstore import Client, Refused, model, versions
from kvstore.cli import data
from kvstore.cli.main import run
from kvstore.cli.options import Connection
from kvstore.embedded import EmbeddedClient
from kvstore.model import Delete, DeleteResult, Put
from tests.cluster.harness import until

ALL = (b"", b"")


async def raised(store: Client) -> None:
    """Until the store, which is of this program alone, judges by its newest rules."""
    assert isinstance(store, EmbeddedClient)
    node = store._connector_here.node
    assert node is not None

    async def is_raised() -> bool:
        return node.machine.version == versions.VERSION

    await until(is_raised, 5.0, "the store's version is raised")


async def fill(store: Client, count: int, size_bytes: int) -> None:
    for number in range(count):
        await store.put(b"%03d" % number, bytes(size_bytes))


async def test_what_is_too_much_for_one_request_is_refused_and_goes_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with kvstore.open_embedded(tmp_path) as store:
        await raised(store)
        await fill(store, 30, 1000)
        monkeypatch.setattr(model, "REPLACED_MAX", 29)
        for delete in (store.delete(*ALL), store.delete_prefix(b""), store.txn(success=[Delete(*ALL)])):
            with pytest.raises(Refused, match="smaller ranges") as caught:
                await delete
            assert caught.value.code == "range_too_large"
        assert (await store.range(*ALL, count_only=True)).count == 30
        monkeypatch.setattr(model, "RESULT_BYTES_MAX", 10_000)
        deleted = await data.delete_pieces(store, b"001", b"")
        assert deleted == DeleteResult(store.revision, 29)
        assert deleted.revision == 30 + 4
        assert [record.key for record in (await store.range(*ALL)).records] == [b"000"]
        assert await data.delete_pieces(store, b"000", None) == DeleteResult(35, 1)
        assert await data.delete_pieces(store, *ALL) == DeleteResult(35, 0)


async def test_a_large_page_of_large_records_may_be_deleted(tmp_path: Path) -> None:
    """With the limits as they are."""
    async with kvstore.open_embedded(tmp_path) as store:
        await raised(store)
        await fill(store, 40, model.VALUE_BYTES_MAX)
        with pytest.raises(Refused, match="smaller ranges"):
            await store.delete(*ALL)
        # Not hidden behind writes of one key each, either.
        with pytest.raises(Refused, match="smaller ranges"):
            await store.txn(success=[Put(b"%03d" % number, b"") for number in range(40)])
        assert (await data.delete_pieces(store, *ALL)).deleted == 40


def test_the_command_says_how(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def call(_connection: Connection, use: object) -> DeleteResult:
        asked.append("pieces" if len(asked) else "whole")
        if asked == ["whole"]:
            raise Refused("too much; delete smaller ranges, one after the other", code="range_too_large")
        return DeleteResult(9, 3)

    monkeypatch.setattr(Connection, "call", call)
    assert run(["del", "--prefix", "a/"]) == 1
    assert (
        "[range_too_large]: too much; delete smaller ranges, one after the other, as --pieces"
        in capsys.readouterr().err
    )
    assert run(["del", "--prefix", "a/", "--pieces"]) == 0
    assert capsys.readouterr().out == "deleted 3, revision 9\n"
