"""What a log looks like after power loss and after damage: cut, or refused, never wrong.

The log under test has a few small segments and a last batch of several records, so every byte of it can be tried.
"""

from __future__ import annotations

import contextlib
import random

import pytest

from kvstore.errors import StartupError
from kvstore.raft.wal import Wal
from kvstore.raft.wal_format import RECORD_HEADER_BYTES, decode_segment_header
from tests.fake_files import FaultyFiles, Stopped, keep_prefix, keep_random

DIRECTORY = "data/wal"
SEGMENT_BYTES = 500
SYNCED = 17  # entries synced before the last batch
LAST = 21

Entries = list[tuple[bytes, int, int]]


def open_wal(files: FaultyFiles, log: list[str] | None = None, segment_bytes: int = SEGMENT_BYTES) -> Wal:
    files.make_dirs("data")
    return Wal.open(
        files, DIRECTORY, node_id="node-a", segment_bytes=segment_bytes, log=None if log is None else log.append
    )


def entry(index: int, term: int, size_bytes: int = 24) -> tuple[bytes, int, int]:
    return (f"entry {index} of {term} ".encode().ljust(size_bytes, b"x"), index, term)


def write_log(files: FaultyFiles, segment_bytes: int = SEGMENT_BYTES) -> Wal:
    """Entries 1 to SYNCED, synced two at a time, with votes and a truncation in between."""
    wal = open_wal(files, segment_bytes=segment_bytes)
    for index in range(1, SYNCED + 1):
        if index % 5 == 0:
            wal.append(b"to be truncated", index, 1)
            wal.sync()
            wal.truncate_from(index)
            wal.set_term(index, f"n{index}")
        wal.append(*entry(index, 1))
        if index % 2 == 1:
            wal.sync()
    return wal


def add_last_batch(wal: Wal, size_bytes: int = 24) -> None:
    for index in range(SYNCED + 1, LAST + 1):
        wal.append(*entry(index, 2, size_bytes))


def expected(last: int, size_bytes: int = 24) -> Entries:
    old = [entry(index, 1) for index in range(1, min(last, SYNCED) + 1)]
    return old + [entry(index, 2, size_bytes) for index in range(SYNCED + 1, last + 1)]


def try_to_open(files: FaultyFiles, log: list[str] | None = None) -> Wal | StartupError:
    try:
        return open_wal(files, log)
    except StartupError as error:
        return error


def overwrite(image: dict[str, bytes], path: str, offset: int, content: bytes) -> FaultyFiles:
    data = image[path]
    return FaultyFiles.of_image(image | {path: data[:offset] + content + data[offset + len(content) :]})


# --- torn writes ------------------------------------------------------------------------------------------------------


def unsynced_last_batch(segment_bytes: int) -> FaultyFiles:
    """The last batch is written, and its sync has not returned."""
    files = FaultyFiles()
    wal = write_log(files, segment_bytes)
    add_last_batch(wal)
    work = wal.start_sync()
    assert work is not None
    files.stop_after = files.operation_count + 1  # after the write, before the sync
    with pytest.raises(Stopped):
        work()
    return files


def test_a_batch_torn_at_every_byte_is_cut_to_whole_records() -> None:
    batch_bytes = (LAST - SYNCED) * (RECORD_HEADER_BYTES + 24)
    seen: dict[int, int] = {}
    for kept_bytes in range(512 + batch_bytes):
        files = unsynced_last_batch(segment_bytes=2048)
        files.crash(keep_prefix(kept_bytes))
        log: list[str] = []
        wal = open_wal(files, log, segment_bytes=2048)
        assert wal.entries == expected(wal.last_index), kept_bytes
        assert SYNCED <= wal.last_index <= LAST
        assert wal.durable_index == wal.last_index
        seen[wal.last_index] = seen.get(wal.last_index, 0) + len(log)
        for line in log:
            assert "cut off at offset" in line
        # What is written in its place is what is read, whatever stood behind it.
        last = wal.last_index
        wal.append(b"after the tear", last + 1, 3)
        wal.sync()
        files.crash()
        again = open_wal(files, log, segment_bytes=2048)
        assert again.entries == [*expected(last), (b"after the tear", last + 1, 3)]
    assert sorted(seen) == list(range(SYNCED, LAST + 1))
    # Each record was torn at each of its bytes, but that its last ones may be zero already.
    assert all(seen[last] >= RECORD_HEADER_BYTES + 24 - 4 for last in range(SYNCED, LAST))


def test_a_torn_new_segment_is_no_segment() -> None:
    """A batch that begins a segment is there as a whole or not at all: the name comes after its sync."""
    for operations in range(8):
        files = FaultyFiles(random.Random(operations))
        wal = write_log(files)
        add_last_batch(wal, size_bytes=200)
        files.stop_after = files.operation_count + operations
        with contextlib.suppress(Stopped):
            wal.sync()
        files.crash(keep_random(files.chance))
        wal = open_wal(files)
        assert wal.entries in (expected(SYNCED), expected(LAST, 200))


@pytest.mark.parametrize("seed", range(150))
def test_sectors_of_an_unsynced_batch_survive_in_any_order(seed: int) -> None:
    """Readable records behind a hole prove nothing, as long as all are of one batch."""
    files = FaultyFiles(random.Random(seed))
    wal = write_log(files, segment_bytes=1 << 14)
    for index in range(SYNCED + 1, LAST + 1):
        wal.append(*entry(index, 2, 700))
    work = wal.start_sync()
    assert work is not None
    files.stop_after = files.operation_count + 1
    with pytest.raises(Stopped):
        work()
    files.crash(keep_random(files.chance))
    wal = open_wal(files, segment_bytes=1 << 14)
    assert SYNCED <= wal.last_index <= LAST
    assert wal.entries == expected(wal.last_index, 700)
    last = wal.last_index
    wal.append(*entry(last + 1, 4, 700))
    wal.sync()
    files.crash()
    assert open_wal(files, segment_bytes=1 << 14).entries == [*expected(last, 700), entry(last + 1, 4, 700)]


def test_a_torn_tail_does_not_come_back_behind_what_is_written_later() -> None:
    """A record written in place of a lost one may end just where an old one begins that was not lost, and, at a
    multiple of 256 KiB, no zeroes are written behind it."""
    files = FaultyFiles()
    wal = open_wal(files, segment_bytes=1 << 21)
    [head] = files.image().values()
    second_bytes = 256 * 1024 - decode_segment_header(head)[1] - 2 * RECORD_HEADER_BYTES - 100_000
    sizes = [100_000, second_bytes, 1000, 1000]
    for index, size_bytes in enumerate(sizes, 1):
        wal.append(*entry(index, 1, size_bytes))
    work = wal.start_sync()
    assert work is not None
    files.stop_after = files.operation_count + 1
    with pytest.raises(Stopped):
        work()

    def lose_the_second_entry(path: str, offset: int, old: bytes, new: bytes) -> bytes:
        return old if 110_000 < offset < 200_000 else new

    files.crash(lose_the_second_entry)
    log: list[str] = []
    wal = open_wal(files, log, segment_bytes=1 << 21)
    assert wal.entries == [entry(1, 1, 100_000)]
    [line] = log
    assert "bytes of a batch that was not synced" in line
    wal.append(*entry(2, 2, second_bytes))
    wal.sync()
    files.crash()
    assert open_wal(files, segment_bytes=1 << 21).entries == [entry(1, 1, 100_000), entry(2, 2, second_bytes)]


# --- flipped bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
@pytest.mark.parametrize("segment_bytes", [SEGMENT_BYTES, SEGMENT_BYTES + 180])
def test_a_flip_of_any_byte_is_refused_or_lies_in_the_last_batch(flip: int, segment_bytes: int) -> None:
    files = FaultyFiles()
    wal = write_log(files, segment_bytes)
    segments_before = len(files.image())
    add_last_batch(wal)
    wal.sync()
    image = files.image()
    assert len(image) >= 3
    newest = max(image)
    last_batch_position = wal.position - (LAST - SYNCED) * (RECORD_HEADER_BYTES + 24)
    refused = cut = harmless = 0
    for path, data in image.items():
        # Behind the records of a segment there are zeroes, which nobody reads but in the last one.
        used_bytes = len(data.rstrip(b"\0")) + (8 if path == newest else 0)
        for offset in range(min(used_bytes, len(data))):
            damaged = overwrite(image, path, offset, bytes([data[offset] ^ flip]))
            log: list[str] = []
            opened = try_to_open(damaged, log)
            if isinstance(opened, StartupError):
                assert opened.code == "wal_damaged"
                assert f"{path} is damaged at offset" in opened.message
                refused += 1
                continue
            # Only the newest segment's last batch may be cut: nothing written later testifies for it.
            assert path == newest, offset
            assert log, offset
            assert opened.position >= last_batch_position
            assert opened.entries == expected(opened.last_index)
            assert (opened.term, opened.voted_for) == (15, "n15")
            if opened.last_index == LAST:
                harmless += 1
            else:
                assert opened.last_index >= SYNCED
                cut += 1
    assert harmless == min(8, len(image[newest]) - len(image[newest].rstrip(b"\0")))
    # A segment has its name only once its first batch is synced: so that one is never cut.
    last_batch_begins_segment = len(image) > segments_before
    assert last_batch_begins_segment is (segment_bytes == SEGMENT_BYTES)
    assert cut == (0 if last_batch_begins_segment else (LAST - SYNCED) * (RECORD_HEADER_BYTES + 24))
    assert refused > 800


@pytest.mark.parametrize("flip", [0x01, 0xFF])
@pytest.mark.parametrize("segment_bytes", [SEGMENT_BYTES, SEGMENT_BYTES + 180])
def test_after_a_clean_close_a_flip_of_any_byte_is_refused(flip: int, segment_bytes: int) -> None:
    files = FaultyFiles()
    wal = write_log(files, segment_bytes)
    add_last_batch(wal)
    wal.close()
    image = files.image()
    for path, data in image.items():
        used_bytes = len(data.rstrip(b"\0"))
        for offset in range(used_bytes):
            damaged = overwrite(image, path, offset, bytes([data[offset] ^ flip]))
            opened = try_to_open(damaged)
            if isinstance(opened, StartupError):
                continue
            # The record that a clean close adds says nothing but that all before it was synced.
            assert path == max(image)
            assert offset >= used_bytes - RECORD_HEADER_BYTES
            assert opened.entries == expected(LAST)


def test_the_error_names_file_and_offset_and_says_what_to_do() -> None:
    files = FaultyFiles()
    write_log(files).close()
    image = files.image()
    path = min(image)
    offset = image[path].index(b"entry 2 of 1")
    with pytest.raises(StartupError) as caught:
        open_wal(overwrite(image, path, offset, b"E"))
    assert caught.value.code == "wal_damaged"
    assert f"{path} is damaged at offset {offset - RECORD_HEADER_BYTES}" in caught.value.message
    assert "kvstore member remove" in caught.value.message
    assert "kvstore join" in caught.value.message


def test_a_hole_in_a_synced_batch_is_refused_and_in_the_last_one_cut() -> None:
    files = FaultyFiles()
    wal = open_wal(files, segment_bytes=1 << 14)
    for index in range(1, 13):
        wal.append(*entry(index, 1))
        if index % 4 == 0:
            wal.sync()
    image = files.image()
    [path] = image
    for index in range(1, 13):
        offset = image[path].index(f"entry {index} ".encode()) - RECORD_HEADER_BYTES
        damaged = overwrite(image, path, offset, bytes(RECORD_HEADER_BYTES + 24))
        if index <= 8:
            with pytest.raises(StartupError, match=f"offset {offset}:"):
                open_wal(damaged, segment_bytes=1 << 14)
        else:
            assert open_wal(damaged, segment_bytes=1 << 14).last_index == index - 1


def test_a_segment_cut_short_is_refused_unless_it_is_the_last_batch() -> None:
    files = FaultyFiles()
    wal = write_log(files)
    add_last_batch(wal)
    wal.sync()
    image = files.image()
    for path in sorted(image)[:-1]:
        for size in range(0, len(image[path].rstrip(b"\0")), 7):
            with pytest.raises(StartupError) as caught:
                open_wal(FaultyFiles.of_image(image | {path: image[path][:size]}))
            assert caught.value.code == "wal_damaged"
    newest = max(image)
    for size in range(len(image[newest])):
        opened = try_to_open(FaultyFiles.of_image(image | {newest: image[newest][:size]}))
        if isinstance(opened, StartupError):
            continue
        assert opened.entries == expected(opened.last_index)


def test_old_bytes_of_a_log_behind_its_end_are_no_records() -> None:
    """Nor a whole log as a value: a record is one only at its own position of its own log."""
    files = FaultyFiles()
    write_log(files).close()
    image = files.image()
    whole = b"".join(image.values()).rstrip(b"\0")
    files = FaultyFiles()
    wal = open_wal(files, segment_bytes=1 << 16)
    for index in range(1, 5):
        wal.append(whole, index, 1)
        wal.sync()
    path = max(files.image())
    end = len(files.image()[path].rstrip(b"\0"))
    for junk in (whole, image[min(image)], whole[:100]):
        log: list[str] = []
        damaged = overwrite(files.image(), path, end, junk)
        opened = open_wal(damaged, log, segment_bytes=1 << 16)
        assert opened.entries == [(whole, index, 1) for index in range(1, 5)]
        assert len(log) == 1
    # A tear in the last batch, which is full of what looks like records.
    damaged = overwrite(files.image(), path, end - len(whole) - 10, b"????")
    assert open_wal(damaged, segment_bytes=1 << 16).last_index == 3
