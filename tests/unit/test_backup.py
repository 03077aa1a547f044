"""The backup's file: whole or refused, whatever byte is changed. And what is done with it offline."""

from __future__ import annotations

import asyncio
import errno
import io
import subprocess
import zlib
from pathlib import Path
from random import Random

import google_crc32c
import msgspec
import pytest

import kvstore
from kvstore import Put, Refused, StartupError, Unavailable, versions
from kvstore.backup import (
    MAGIC,
    BackupWriter,
    End,
    Header,
    Leases,
    PagedHash,
    Records,
    SavedLease,
    packed,
    read_backup,
)
from kvstore.client import backup as client_backup
from kvstore.client.backup import back_up
from kvstore.client.transaction import key_after
from kvstore.embedded import NODE_NAME
from kvstore.env import SystemChance, SystemFiles
from kvstore.model import Member, Record
from kvstore.server import offline
from kvstore.server.identity import UNFINISHED, DataDirectory
from kvstore.state.layout import record_of
from kvstore.state.machine import Machine
from kvstore.state.storage import MemoryDisk, RocksStorage
from tests.fake_files import FaultyFiles, Keep, Stopped, keep_everything, keep_nothing

ALONE = (Member(NODE_NAME, "", "", "", True),)


def written(records: int = 50, leases: int = 3) -> bytes:
    file = io.BytesIO()
    writer = BackupWriter(file)
    writer.header(Header(2, "cluster", 77, 1_700_000_000_000, "1.0"))
    for number in range(records):
        writer.record(Record(b"k%04d" % number, b"value %d" % number * 3, number + 1, number + 2, 2, number % 2))
    writer.leases(tuple(SavedLease(number + 1, 60_000, 1_000 * number) for number in range(leases)))
    end = writer.end()
    assert (end.records, end.leases, writer.size_bytes) == (records, leases, len(file.getvalue()))
    return file.getvalue()


def code_of(data: bytes) -> str:
    try:
        for _ in read_backup(io.BytesIO(data)):
            pass
    except Refused as refusal:
        if not refusal.message:
            raise
        return refusal.code
    return ""


def test_what_was_written_is_read() -> None:
    header, records, leases, end = read_backup(io.BytesIO(written()))
    assert header == Header(2, "cluster", 77, 1_700_000_000_000, "1.0")
    assert isinstance(records, Records)
    assert len(records.records) == 50
    assert records.records[7] == Record(b"k0007", b"value 7value 7value 7", 8, 9, 2, 1)
    assert leases == Leases((SavedLease(1, 60_000, 0), SavedLease(2, 60_000, 1000), SavedLease(3, 60_000, 2000)))
    assert isinstance(end, End)
    assert (end.records, end.leases) == (50, 3)
    assert code_of(written(records=0, leases=0)) == ""


def test_many_tiny_records_make_chunks_that_can_be_read() -> None:
    file = io.BytesIO()
    writer = BackupWriter(file)
    writer.header(Header(2, "c", 1, 1, ""))
    for number in range(150_000):
        writer.record(Record(b"%08d" % number, b"", 2**40, 2**40, 2**40, 2**40))
    writer.leases(())
    assert writer.end().records == 150_000
    assert code_of(file.getvalue()) == ""


def test_every_flipped_bit_and_every_cut_is_refused() -> None:
    whole = written(records=12)
    assert code_of(whole) == ""
    for at in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            assert code_of(bytes(flipped)) == "backup_damaged", (at, bit)
        assert code_of(whole[:at]) == "backup_damaged"
    assert code_of(whole + b"\x00") == "backup_damaged"
    assert code_of(whole + whole) == "backup_damaged"
    assert code_of(b"") == "backup_damaged"


def test_chunks_that_are_whole_but_out_of_place_are_refused() -> None:
    other = written(records=13)
    whole = written(records=12)
    assert code_of(whole[: len(whole) // 2] + other[len(whole) // 2 :]) == "backup_damaged"
    file = io.BytesIO()
    writer = BackupWriter(file)
    writer.header(Header(2, "c", 1, 1, ""))
    writer.record(Record(b"b", b"", 1, 1, 1))
    writer.record(Record(b"a", b"", 1, 1, 1))
    writer.leases(())
    writer.leases((SavedLease(1, 1, 1),))
    writer.end()
    assert code_of(file.getvalue()) == "backup_damaged"


def begins(line: bytes, *header: object) -> bytes:
    """A file of any format, as far as its header."""
    body = zlib.compress(msgspec.msgpack.encode([0, *header]))
    length = len(body).to_bytes(4, "big")
    return line + length + google_crc32c.value(length + body).to_bytes(4, "big") + body + b"what comes then"


def test_a_newer_format_is_one_that_line_and_header_name() -> None:
    for number in (3, 10, 1000):
        assert code_of(begins(b"kvstore backup %d\n" % number, number, "other", ["fields"])) == "backup_format_newer"
    whole = written()
    for number in (0, 1, 3, 9):
        assert code_of(whole.replace(b"backup 2\n", b"backup %d\n" % number, 1)) == "backup_damaged"
    assert code_of(begins(b"kvstore backup 2\n", 9, "c", 1, 1, "")) == "backup_damaged"
    assert code_of(begins(b"kvstore backup 03\n", 3)) == "backup_damaged"
    assert code_of(begins(b"kvstore backup 3\n")) == "backup_damaged"


def test_no_byte_of_the_first_line_can_be_another() -> None:
    whole = written(records=1)
    for at in range(len(MAGIC)):
        for byte in set(range(256)) - {whole[at]}:
            assert code_of(whole[:at] + bytes([byte]) + whole[at + 1 :]) == "backup_damaged", (at, byte)


def test_a_file_of_the_format_before_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, records alone ended the pages of its digest."""

    def large(format: int) -> bytes:
        file = io.BytesIO()
        writer = BackupWriter(file)
        writer.header(Header(format, "c", 1, 1, ""))
        for number in range(9):
            writer.record(Record(b"%d" % number, bytes(100), 1, 1, 1))
        writer.leases(())
        writer.end()
        return file.getvalue()

    monkeypatch.setattr("kvstore.backup.DIGEST_BYTES_MAX", 300)
    new = large(2)
    with monkeypatch.context() as before:
        before.setattr("kvstore.backup.MAGIC", b"kvstore backup 1\n")
        before.setattr("kvstore.backup.DIGEST_BYTES_MAX", 10**9)
        old = large(1)
    assert code_of(old) == code_of(new) == ""
    assert code_of(new.replace(b"backup 2\n", b"backup 1\n", 1)) == "backup_damaged"
    ends = [chunk for data in (old, new) for chunk in read_backup(io.BytesIO(data)) if isinstance(chunk, End)]
    assert ends[0].digest != ends[1].digest


def test_a_record_is_hashed_as_the_state_keeps_it() -> None:
    record = Record(b"k", b"value", 3, 9, 4, 77)
    assert record_of(b"k", packed(record)) == record


async def fill(path: Path, chance: Random, count: int = 300) -> None:
    async with kvstore.open_embedded(path) as kv:
        lease = (await kv.grant_lease(3600.0)).lease
        for number in range(0, count, 20):
            await kv.txn(
                success=[
                    Put(b"%04d" % (number + part), chance.randbytes(30), lease if part % 5 == 0 else 0)
                    for part in range(20)
                ]
            )
        await kv.delete_prefix(b"00")
        await kv.put(b"0101", b"again")
        await kv.put(b"empty", b"")


async def backed_up(path: Path, file: Path) -> client_backup.Made:
    async with kvstore.open_embedded(path) as kv:
        with file.open("wb") as opened:
            return await back_up(kv, opened, "test")


def restored(file: Path, path: Path, members: tuple[Member, ...] = ALONE, name: str = NODE_NAME) -> offline.Restored:
    with file.open("rb") as opened:
        return offline.restore(SystemFiles(), SystemChance(), RocksStorage, opened, str(path), name, members, "token")


async def test_a_restored_store_holds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.backup.CHUNK_BYTES", 1000)
    monkeypatch.setattr("kvstore.backup.DIGEST_RECORDS_MAX", 64)
    monkeypatch.setattr("kvstore.model.DIGEST_RECORDS_MAX", 64)
    monkeypatch.setattr("kvstore.client.client.model.DIGEST_RECORDS_MAX", 64)
    await fill(tmp_path / "old", Random(1))
    made = await backed_up(tmp_path / "old", tmp_path / "file")
    result = restored(tmp_path / "file", tmp_path / "new")
    assert (result.revision, result.records, result.digest) == (made.revision, made.end.records, made.end.digest)
    async with kvstore.open_embedded(tmp_path / "old") as old, kvstore.open_embedded(tmp_path / "new") as new:
        assert [record async for record in old.scan(prefix=b"")] == [record async for record in new.scan(prefix=b"")]
        assert [lease async for lease in old.leases()] == [lease async for lease in new.leases()]
        (lease,) = [lease async for lease in new.leases()]
        before, after = await old.lease_status(lease, keys=True), await new.lease_status(lease, keys=True)
        assert (after.ttl_ms, after.keys) == (before.ttl_ms, before.keys)
        assert 3_500_000 < after.remaining_ms <= 3_600_000
        assert (await old.status()).cluster_id != (await new.status()).cluster_id == result.cluster_id
        # It is a store like any other, from there on.
        async with new.watch(prefix=b"", from_revision=made.revision + 1) as watch:
            assert (await new.put(b"more", b"")).revision == made.revision + 1
            assert (await anext(watch)).key == b"more"
        assert (await new.revoke_lease(lease)).count == len(before.keys)
        with pytest.raises(Refused) as caught:
            await new.get(b"more", revision=made.revision - 1)
        assert caught.value.code == "revision_compacted"
    async with kvstore.open_embedded(tmp_path / "new") as new:
        assert await new.get(b"more") is not None, "also after another start"


async def test_a_backup_is_of_one_revision_while_others_write(tmp_path: Path) -> None:
    async with kvstore.open_embedded(tmp_path / "store") as kv:
        for number in range(3000):
            await kv.put(b"%04d" % number, b"before")
        wanted = PagedHash()
        async for record in kv.scan(prefix=b""):
            wanted.add(record)
        changes = iter(range(10_000))

        under_way = []

        def change(_done: int, _all: int) -> None:
            under_way.append(asyncio.ensure_future(kv.put(b"%04d" % (next(changes) * 97 % 3000), b"after")))

        with (tmp_path / "file").open("wb") as opened:
            made = await back_up(kv, opened, "test", change)
        assert next(changes) >= 3
        assert made.end.digest == wanted.digest()
        await asyncio.gather(*under_way)


async def test_a_page_of_a_digest_is_bounded_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.backup.DIGEST_BYTES_MAX", 1000)
    async with kvstore.open_embedded(tmp_path / "store") as kv:
        for number in range(20):
            await kv.put(b"%02d" % number, bytes(300))
        for _ in range(2):  # the second time that is an older revision
            first = await kv.digest(revision=20, limit_bytes=1000)
            assert (first.count, first.last) == (3, b"02"), "of 335 bytes each"
            for number in range(20):
                await kv.put(b"%02d" % number, b"")
        await kv.put(b"large", bytes(5000))
        whole = PagedHash()
        start, counts = b"", []
        while not counts or start:
            page = await kv.digest(start, revision=61, limit_bytes=1000)
            whole.add_page(page.digest, page.count)
            counts.append(page.count)
            start = key_after(page.last) if page.last else b""
        assert counts == [21, 0], "the last is larger than a page by itself"
        for limit_bytes in (0, 4 * 1024 * 1024 + 1):
            with pytest.raises(Refused, match="1 to 4194304 bytes"):
                await kv.digest(revision=61, limit_bytes=limit_bytes)
    made = await backed_up(tmp_path / "store", tmp_path / "file")
    assert made.end.digest == whole.digest()
    assert code_of((tmp_path / "file").read_bytes()) == ""


async def test_digests_of_pages_and_of_revisions(tmp_path: Path) -> None:
    async with kvstore.open_embedded(tmp_path / "store", timeout_s=1.5) as kv:
        for number in range(20):
            await kv.put(b"%02d" % number, b"")
        whole = await kv.digest(revision=20)
        assert (whole.count, whole.last) == (20, b"")
        first = await kv.digest(revision=20, limit=8)
        assert (first.count, first.last) == (8, b"07")
        await kv.put(b"03", b"changed")
        assert await kv.digest(b"00", b"08", revision=20) == msgspec.structs.replace(first, revision=21, last=b"")
        assert (await kv.digest(b"00", b"08", revision=21)).digest != first.digest
        assert (await kv.digest(revision=10)).count == 10
        with pytest.raises(Unavailable, match="holds revision 21"):
            await kv.digest(revision=22)
        await kv.compact(15)
        for revision, limit, code in (
            (14, 1, "revision_compacted"),
            (20, 0, "invalid_request"),
            (20, 10_001, "invalid_request"),
            (0, 1, "invalid_request"),
        ):
            with pytest.raises(Refused) as caught:
                await kv.digest(revision=revision, limit=limit)
            assert caught.value.code == code


def test_what_cannot_be_restored_leaves_nothing(tmp_path: Path) -> None:
    whole = written()
    (tmp_path / "cut").write_bytes(whole[:-7])
    (tmp_path / "good").write_bytes(whole)
    with pytest.raises(Refused) as refused:
        restored(tmp_path / "cut", tmp_path / "new")
    assert refused.value.code == "backup_damaged"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["LOCK"]
    (tmp_path / "new" / "lost+found").mkdir()  # as a file system of its own has it
    restored(tmp_path / "good", tmp_path / "new")
    for directory in (tmp_path / "new", tmp_path):
        with pytest.raises(StartupError) as not_empty:
            restored(tmp_path / "good", directory)
        assert not_empty.value.code == "data_dir_not_empty"
    with pytest.raises(StartupError, match="not among the members"):
        restored(tmp_path / "good", tmp_path / "other", name="somebody")
    assert not (tmp_path / "LOCK").exists(), "a directory of somebody else's is as it was"


class SyncedFiles(SystemFiles):
    """Knows what was in each directory when it was last synced."""

    def __init__(self) -> None:
        self.synced: dict[str, list[str]] = {}

    def sync_dir(self, path: str) -> None:
        super().sync_dir(path)
        self.synced[path] = self.list_dir(path)


def test_all_that_was_restored_is_durable(tmp_path: Path) -> None:
    files = SyncedFiles()
    made = tmp_path / "made" / "with" / "it"
    offline.restore(files, SystemChance(), RocksStorage, io.BytesIO(written()), str(made), NODE_NAME, ALONE, "token")
    for path in (made, *made.parents, made / "wal", made / "state"):
        assert files.synced[str(path)] == sorted(child.name for child in path.iterdir()), path
        if path == tmp_path:
            break
    for part in ("wal", "state"):  # what is in state-0, RocksDB syncs by itself
        assert files.synced[f"{made}/{part}"] == files.list_dir(f"{made}/{part}")
    assert files.list_dir(f"{made}/state") == ["CURRENT", "state-0"]


class FailingFiles(SystemFiles):
    """Renames what it was to replace, the time that it is told to; and then cannot sync the directory."""

    def __init__(self, fails_at: int, cannot_remove: bool = False) -> None:
        self.replacements_left = fails_at
        self.cannot_remove = cannot_remove

    def replace(self, path: str, data: bytes) -> None:
        super().replace(path, data)
        self.replacements_left -= 1
        if self.replacements_left == 0:
            raise OSError(errno.EIO, "the directory cannot be synced")

    def remove_tree(self, path: str) -> None:
        if self.cannot_remove:
            raise OSError(errno.EIO, "the disk is broken")
        super().remove_tree(path)


def test_a_restore_that_fails_can_be_repeated(tmp_path: Path) -> None:
    data = written()

    def restore(files: SystemFiles) -> None:
        directory = str(tmp_path / "new")
        offline.restore(files, SystemChance(), RocksStorage, io.BytesIO(data), directory, NODE_NAME, ALONE, "token")

    for at in (1, 2, 3):  # META, the pointer to the state, META
        with pytest.raises((OSError, StartupError), match="cannot be synced"):
            restore(FailingFiles(at))
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["LOCK"]
    with pytest.raises(StartupError, match=r"cannot be synced.*remove META, state and wal from .*/new"):
        restore(FailingFiles(3, cannot_remove=True))
    with pytest.raises(StartupError, match=r"a restore that was killed left it there.*remove META and state from"):
        restore(SystemFiles())
    for part in ("META", "state"):
        subprocess.run(["rm", "-r", tmp_path / "new" / part], check=True)
    restore(SystemFiles())


@pytest.mark.parametrize("keep", [keep_nothing, keep_everything])
def test_a_restore_that_a_power_loss_ends_leaves_nothing_to_start_on(keep: Keep) -> None:
    data = written()
    finished = False
    stops = 0
    while not finished:
        files, disk = FaultyFiles(), MemoryDisk()
        files.stop_after = stops
        try:
            offline.restore(files, SystemChance(), disk.open, io.BytesIO(data), "/data", NODE_NAME, ALONE, "token")
            finished = True
        except Stopped:
            stops += 1
        files.crash(keep)
        disk.crash()
        files.stop_after = None
        machine = Machine(disk.open, "/data/state/state-0")
        whole = machine.revision == 77
        machine.close()
        directory = DataDirectory(files, "/data")
        cluster = directory.belongs_to(NODE_NAME)
        if not cluster:
            assert not whole, f"a new node would start on it: {stops}"
        elif cluster == UNFINISHED:
            with pytest.raises(StartupError, match="restore again"):
                directory.check(NODE_NAME, cluster)
        elif files.list_dir("/data/wal") not in ([], ["next.tmp"]):
            directory.check(NODE_NAME, cluster)
            assert whole, f"a node would start without it: {stops}"
        else:
            with pytest.raises(StartupError, match="the log is missing"):
                directory.check(NODE_NAME, cluster)
        assert finished <= (whole and cluster not in ("", UNFINISHED) and bool(files.list_dir("/data/wal")))
        directory.close()
        if not finished and cluster:
            with pytest.raises(StartupError) as refused:
                offline.restore(files, SystemChance(), disk.open, io.BytesIO(data), "/data", NODE_NAME, ALONE, "token")
            assert refused.value.code == "data_dir_not_empty"
            assert "remove META" in refused.value.message
    assert stops > 20


def test_nodes_restored_alike_are_of_one_cluster_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(written())
    (tmp_path / "two").write_bytes(written(records=51))
    members = tuple(Member(name, f"{name}:1", "", "", True) for name in ("n1", "n2"))
    ids = {
        restored(tmp_path / file, tmp_path / f"{file}-{name}", members, name).cluster_id
        for file, name in (("one", "n1"), ("one", "n2"), ("two", "n1"))
    }
    assert len(ids) == 2
    found = offline.inspect(SystemFiles(), RocksStorage, str(tmp_path / "one-n1"), digest=True)
    assert [member["name"] for member in found["members"]] == ["n1", "n2"]
    assert found["state"]["records"] == 50
    assert (found["state"]["revision"], found["log"]["last_index"]) == (77, 2)


def test_what_is_restored_depends_on_no_version_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that are restored by different programs must hold one state, which the oldest of them takes."""

    def state_of(file: bytes, program: int) -> tuple[int, str]:
        monkeypatch.setattr(versions, "VERSION", program)
        disk = MemoryDisk()
        offline.restore(FaultyFiles(), SystemChance(), disk.open, io.BytesIO(file), "/data", NODE_NAME, ALONE, "token")
        machine = Machine(disk.open, "/data/state/state-0")
        return machine.version, machine.digest()

    leased, plain = written(), written(records=1, leases=0)
    assert state_of(leased, 2) == state_of(leased, 3)
    assert state_of(plain, 1) == state_of(plain, 3)
    assert (state_of(leased, 3)[0], state_of(plain, 3)[0]) == (2, 1)


def contents(path: Path) -> dict[str, bytes]:
    """Of all files, but for the space that the log has reserved at its end."""
    return {str(file.relative_to(path)): file.read_bytes().rstrip(b"\0") for file in path.rglob("*") if file.is_file()}


LOST = {
    "state": ("state",),
    "its directory": ("state/state-0",),
    "its pointer and it": ("state/CURRENT", "state/state-0"),
}


@pytest.mark.parametrize("lost", LOST.values(), ids=LOST)
async def test_a_state_that_is_lost_is_neither_recovered_nor_called_healthy(
    tmp_path: Path, lost: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_bytes(written())
    store = tmp_path / "store"
    restored(tmp_path / "file", store)  # its log begins at 2
    for part in lost:
        subprocess.run(["rm", "-r", store / part], check=True)
    before = contents(store)
    with pytest.raises(StartupError, match="ends at entry 0, and the log begins at 2") as refused:
        offline.recover(SystemFiles(), SystemChance(), RocksStorage, str(store), NODE_NAME)
    assert refused.value.code == "state_damaged"
    with pytest.raises(StartupError, match="ends at entry 0, and the log begins at 2") as refused:
        offline.inspect(SystemFiles(), RocksStorage, str(store))
    assert refused.value.code == "state_damaged"
    assert contents(store) == before
    with pytest.raises(StartupError, match="ends at entry 0, and the log begins at 2"):
        await kvstore.open_embedded(store).__aenter__()


async def test_a_state_that_the_log_makes_anew_is_not_missed(tmp_path: Path) -> None:
    await fill(tmp_path / "store", Random(2))
    whole = offline.inspect(SystemFiles(), RocksStorage, str(tmp_path / "store"), digest=True)
    assert whole["log"]["first_index"] == 1
    subprocess.run(["rm", "-r", tmp_path / "store" / "state"], check=True)
    before = contents(tmp_path / "store")
    found = offline.inspect(SystemFiles(), RocksStorage, str(tmp_path / "store"), digest=True)
    assert found == {**whole, "state": {"applied_index": 0}}
    assert contents(tmp_path / "store") == before
    offline.recover(SystemFiles(), SystemChance(), RocksStorage, str(tmp_path / "store"), NODE_NAME)
    async with kvstore.open_embedded(tmp_path / "store") as kv:
        assert await kv.get(b"empty") is not None


async def test_looking_inside_changes_nothing(tmp_path: Path) -> None:
    await fill(tmp_path / "store", Random(2))
    before = contents(tmp_path / "store")
    offline.inspect(SystemFiles(), RocksStorage, str(tmp_path / "store"), digest=True)
    assert contents(tmp_path / "store") == before


async def test_recovering_keeps_all_that_is_in_the_log(tmp_path: Path) -> None:
    await fill(tmp_path / "store", Random(2))
    before = offline.inspect(SystemFiles(), RocksStorage, str(tmp_path / "store"))
    recovered = offline.recover(SystemFiles(), SystemChance(), RocksStorage, str(tmp_path / "store"), NODE_NAME)
    assert recovered.old_cluster_id == before["cluster_id"] != recovered.cluster_id
    assert recovered.last_index == before["log"]["last_index"] + 1
    async with kvstore.open_embedded(tmp_path / "store") as kv:
        assert await kv.get(b"empty") is not None
        assert (await kv.status()).cluster_id == recovered.cluster_id
        await kv.put(b"after", b"")
    with pytest.raises(StartupError) as refused:
        offline.recover(SystemFiles(), SystemChance(), RocksStorage, str(tmp_path / "store"), "another")
    assert refused.value.code == "data_dir_mismatch"
    for directory in (tmp_path / "nothing", tmp_path):
        with pytest.raises(StartupError, match="no node's data"):
            offline.recover(SystemFiles(), SystemChance(), RocksStorage, str(directory), NODE_NAME)
        with pytest.raises(StartupError, match="no node's data"):
            offline.inspect(SystemFiles(), RocksStorage, str(directory))
    async with kvstore.open_embedded(tmp_path / "store"):
        with pytest.raises(StartupError) as in_use:
            offline.inspect(SystemFiles(), RocksStorage, str(tmp_path / "store"))
        assert in_use.value.code == "data_dir_in_use"
