"""The write-ahead log's interface: what it holds, what is durable when, and what it does when the disk fails."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from kvstore.errors import StartupError
from kvstore.raft.wal import Wal
from kvstore.raft.wal_format import FORMAT_VERSION, SegmentHeader, encode_segment_header
from tests.fake_files import FaultyFiles, Stopped, keep_everything

DIRECTORY = "data/wal"


def open_wal(
    files: FaultyFiles, segment_bytes: int = 4096, node_id: str = "node-a", log: list[str] | None = None
) -> Wal:
    files.make_dirs("data")
    return Wal.open(
        files, DIRECTORY, node_id=node_id, segment_bytes=segment_bytes, log=None if log is None else log.append
    )


def reopen(files: FaultyFiles, segment_bytes: int = 4096) -> Wal:
    """After power loss: only what was synced is there."""
    files.crash()
    return open_wal(files, segment_bytes, node_id="ignored")


def add(wal: Wal, first: int, last: int, term: int = 1, size_bytes: int = 20) -> None:
    for index in range(first, last + 1):
        wal.append(f"{index}/{term}".encode().ljust(size_bytes, b"."), index, term)


def segments(files: FaultyFiles) -> list[str]:
    return [name for name in files.list_dir(DIRECTORY) if name.endswith(".wal")]


# --- what it holds ----------------------------------------------------------------------------------------------------


def test_a_new_log_is_empty_and_keeps_its_node_id() -> None:
    files = FaultyFiles()
    wal = open_wal(files)
    assert (wal.first_index, wal.last_index, wal.last_term, wal.durable_index) == (0, 0, 0, 0)
    assert (wal.term, wal.voted_for, wal.entries, wal.size_bytes) == (0, None, [], 0)
    assert wal.position == wal.synced_position == 0
    assert wal.term_at(1) is None
    assert reopen(files).node_id == "node-a"


def test_entries_term_and_vote_survive_power_loss() -> None:
    files = FaultyFiles()
    wal = open_wal(files)
    wal.set_term(3, "n2")
    add(wal, 1, 5, term=3)
    wal.sync()
    entries = list(wal.entries)
    wal = reopen(files)
    assert wal.entries == entries
    assert (wal.term, wal.voted_for) == (3, "n2")
    assert (wal.first_index, wal.last_index, wal.last_term, wal.durable_index) == (1, 5, 3, 5)
    assert wal.size_bytes == 100
    assert [wal.term_at(index) for index in (0, 1, 5, 6)] == [None, 3, 3, None]
    wal.set_term(4, None)
    wal.sync()
    assert (reopen(files).term, reopen(files).voted_for) == (4, None)


def test_what_was_not_synced_is_gone_after_power_loss_and_stays_after_a_kill() -> None:
    files = FaultyFiles()
    wal = open_wal(files)
    add(wal, 1, 3)
    wal.sync()
    add(wal, 4, 6)
    assert reopen(files).last_index == 3
    wal = open_wal(files)
    add(wal, 4, 6)
    work = wal.start_sync()
    assert work is not None
    files.fail_sync()
    with pytest.raises(OSError, match="Input/output"):
        work()
    files.kill()
    assert open_wal(files).last_index == 6  # the kernel has it; opening makes it durable
    assert reopen(files).last_index == 6


def test_an_entry_must_follow_the_last_one() -> None:
    wal = open_wal(FaultyFiles())
    add(wal, 7, 8)  # any index starts an empty log
    with pytest.raises(AssertionError):
        wal.append(b"", 10, 1)
    with pytest.raises(AssertionError):
        wal.append(b"", 8, 1)


def test_the_list_of_entries_is_always_the_same_object() -> None:
    wal = open_wal(FaultyFiles())
    entries = wal.entries
    add(wal, 1, 9)
    wal.truncate_from(5)
    wal.drop_before(3, 0)
    wal.reset(20, 2)
    assert wal.entries is entries == [(b"\x01", 20, 2)]


# --- positions and the durable index ----------------------------------------------------------------------------------


def test_the_durable_index_follows_the_sync() -> None:
    wal = open_wal(FaultyFiles())
    add(wal, 1, 3)
    assert (wal.durable_index, wal.synced_position) == (0, 0)
    assert wal.position > 0
    wal.sync()
    assert (wal.durable_index, wal.synced_position) == (3, wal.position)


def test_truncation_lowers_the_durable_index() -> None:
    files = FaultyFiles()
    wal = open_wal(files)
    add(wal, 1, 9)
    wal.sync()
    wal.truncate_from(6)
    assert (wal.durable_index, wal.last_index) == (5, 5)
    add(wal, 6, 12, term=2)
    assert wal.durable_index == 5
    wal.sync()
    assert wal.durable_index == 12
    entries = list(wal.entries)
    assert reopen(files).entries == entries
    wal.truncate_from(13)  # nothing there
    assert wal.position == wal.synced_position


def test_appends_go_on_while_a_sync_is_under_way() -> None:
    files = FaultyFiles()
    wal = open_wal(files)
    add(wal, 1, 3)
    work = wal.start_sync()
    assert work is not None
    covered = wal.position
    add(wal, 4, 5)
    wal.set_term(2, "n1")
    work()
    assert (wal.durable_index, wal.synced_position) == (0, 0)  # not before the loop says so
    wal.finish_sync()
    assert (wal.durable_index, wal.synced_position) == (3, covered)
    wal.sync()
    assert (wal.durable_index, wal.synced_position) == (5, wal.position)
    assert reopen(files).last_index == 5


def test_what_is_truncated_while_a_sync_is_under_way_does_not_become_durable() -> None:
    wal = open_wal(FaultyFiles())
    add(wal, 1, 9)
    work = wal.start_sync()
    assert work is not None
    wal.truncate_from(5)
    add(wal, 5, 8, term=2)
    work()
    wal.finish_sync()
    assert wal.durable_index == 4  # 5 to 8 on the disk are others
    wal.sync()
    assert wal.durable_index == 8


def test_a_reset_while_a_sync_is_under_way_leaves_nothing_durable() -> None:
    wal = open_wal(FaultyFiles())
    add(wal, 1, 9)
    work = wal.start_sync()
    assert work is not None
    wal.reset(40, 3)
    work()
    wal.finish_sync()
    assert wal.durable_index == 0
    wal.sync()
    assert wal.durable_index == 40


def test_one_sync_writes_once_and_syncs_once() -> None:
    files = FaultyFiles()
    wal = open_wal(files)
    syncs, operations = files.sync_count, files.operation_count
    add(wal, 1, 50)
    wal.set_term(2, "n3")
    wal.sync()
    assert (files.sync_count - syncs, files.operation_count - operations) == (1, 2)
    wal.sync()
    assert wal.start_sync() is None
    assert files.sync_count - syncs == 1
    wal.set_term(2, "n3")  # no change
    assert wal.start_sync() is None


# --- segments ---------------------------------------------------------------------------------------------------------


def test_a_log_runs_over_many_segments_at_one_sync_each() -> None:
    files = FaultyFiles()
    wal = open_wal(files, segment_bytes=600)
    wal.set_term(1, "n1")
    for index in range(1, 41):
        syncs = files.sync_count
        add(wal, index, index)
        wal.sync()
        assert files.sync_count == syncs + 1
    assert len(segments(files)) >= 4
    entries, position = list(wal.entries), wal.position
    wal = reopen(files, segment_bytes=600)
    assert (wal.entries, wal.position, wal.voted_for) == (entries, position, "n1")
    add(wal, 41, 60)
    wal.sync()
    assert reopen(files, segment_bytes=600).last_index == 60


def test_a_batch_larger_than_a_segment_has_one_of_its_own() -> None:
    files = FaultyFiles()
    wal = open_wal(files, segment_bytes=600)
    for index in range(1, 5):
        add(wal, index, index, size_bytes=2000)
        wal.sync()
    assert len(segments(files)) == 4
    assert all(files.size(f"{DIRECTORY}/{name}") < 2200 for name in segments(files))
    entries = list(wal.entries)
    assert reopen(files, segment_bytes=600).entries == entries


def test_segments_that_are_no_longer_needed_are_removed_and_term_and_vote_stay() -> None:
    files = FaultyFiles()
    wal = open_wal(files, segment_bytes=600)
    wal.set_term(7, "n2")
    for index in range(1, 41):
        add(wal, index, index, term=7)
        wal.sync()
    before = segments(files)
    wal.drop_before(35, 0)
    assert (wal.first_index, wal.last_index, wal.size_bytes) == (35, 40, 6 * 20)
    assert segments(files) == before  # not before it is durable that they are not needed
    wal.sync()
    assert len(segments(files)) < len(before)
    wal = reopen(files, segment_bytes=600)
    assert 25 < wal.first_index <= 35
    assert (wal.last_index, wal.term, wal.voted_for) == (40, 7, "n2")
    add(wal, 41, 42, term=7)
    wal.sync()
    assert reopen(files, segment_bytes=600).last_index == 42


def test_segments_are_removed_in_a_thread_if_there_is_one() -> None:
    files = FaultyFiles()
    files.make_dirs("data")
    handed: list[Callable[[], None]] = []
    wal = Wal.open(files, DIRECTORY, node_id="n", segment_bytes=300, in_thread=handed.append)
    for index in range(1, 20):
        add(wal, index, index)
        wal.sync()
    before = segments(files)
    wal.drop_before(19, 0)
    wal.sync()
    assert segments(files) == before
    [work] = handed
    work()
    assert len(segments(files)) == 1


def test_dropping_never_takes_an_entry_that_is_needed() -> None:
    for index in range(2, 40):
        files = FaultyFiles()
        wal = open_wal(files, segment_bytes=300)
        for step in range(1, 40):
            add(wal, step, step)
            wal.sync()
        wal.drop_before(index, 0)
        wal.sync()
        wal = reopen(files, segment_bytes=300)
        assert 1 <= wal.first_index <= index
        assert index - wal.first_index < 10  # a few to a segment


def test_a_tail_is_kept_for_peers() -> None:
    wal = open_wal(FaultyFiles())
    add(wal, 1, 100, size_bytes=10)
    wal.drop_before(90, 500)
    assert (wal.first_index, wal.size_bytes) == (51, 500)
    wal.drop_before(90, 499)
    assert wal.first_index == 51  # one less would leave 490
    wal.drop_before(60, 0)
    assert wal.first_index == 60
    wal.drop_before(60, 0)
    wal.drop_before(10, 0)
    assert wal.first_index == 60
    wal.drop_before(1000, 0)
    assert (wal.first_index, wal.last_index, wal.size_bytes) == (100, 100, 10)  # the last one always stays


def test_a_log_that_is_emptied_by_truncation_is_empty_after_opening_too() -> None:
    files = FaultyFiles()
    wal = open_wal(files)
    add(wal, 1, 20)
    wal.drop_before(10, 0)
    wal.truncate_from(4)
    assert (wal.entries, wal.size_bytes, wal.durable_index) == ([], 0, 0)
    wal.sync()
    assert reopen(files).entries == []  # not the entries 1 to 9 that are still in the segment
    wal = open_wal(files)
    add(wal, 30, 31)
    wal.sync()
    assert reopen(files).first_index == 30


def test_reset_makes_a_log_of_one_entry() -> None:
    files = FaultyFiles()
    wal = open_wal(files, segment_bytes=600)
    for index in range(1, 30):
        add(wal, index, index)
        wal.sync()
    wal.reset(500, 9)
    assert (wal.entries, wal.first_index, wal.last_term, wal.size_bytes) == ([(b"\x01", 500, 9)], 500, 9, 1)
    assert wal.durable_index == 0
    add(wal, 501, 502, term=9)
    wal.sync()
    assert wal.durable_index == 502
    wal.drop_before(500, 0)
    wal.sync()
    assert len(segments(files)) == 1
    entries = list(wal.entries)
    assert reopen(files, segment_bytes=600).entries == entries


def test_a_reset_to_a_later_term_records_that_term_without_a_vote() -> None:
    files = FaultyFiles()
    wal = open_wal(files)
    wal.set_term(3, "b")
    wal.reset(10, 2)
    assert (wal.term, wal.voted_for) == (3, "b")
    wal.reset(20, 5)
    wal.sync()
    assert (wal.term, wal.voted_for) == (5, None)
    assert reopen(files).term == 5


def test_a_segment_that_was_not_finished_is_thrown_away() -> None:
    files = FaultyFiles()
    wal = open_wal(files)
    add(wal, 1, 3)
    wal.sync()
    files.open(f"{DIRECTORY}/next.tmp", create=True).write_at(0, [b"half a segment"])
    files.crash(keep_everything)
    assert open_wal(files).last_index == 3
    assert not files.exists(f"{DIRECTORY}/next.tmp")


def test_opening_makes_the_name_of_the_last_segment_durable() -> None:
    files = FaultyFiles()
    wal = open_wal(files, segment_bytes=300)
    add(wal, 1, 2)
    wal.sync()
    add(wal, 3, 6)
    files.stop_after = files.operation_count + 5  # create, allocate, write, sync, rename; not the directory's sync
    with pytest.raises(Stopped):
        wal.sync()
    files.kill()
    wal = open_wal(files, segment_bytes=300)
    assert wal.durable_index == 6
    assert reopen(files, segment_bytes=300).last_index == 6


def test_a_segment_whose_removal_was_interrupted_is_removed_on_opening() -> None:
    files = FaultyFiles()
    wal = open_wal(files, segment_bytes=600)
    for index in range(1, 41):
        add(wal, index, index)
        wal.sync()
    everything = files.image()
    wal.drop_before(40, 0)
    wal.sync()
    newest = files.image()
    # The removals came back, one of them damaged: nobody needs it.
    files = FaultyFiles.of_image(everything | {sorted(everything)[1]: b"junk"} | newest)
    assert len(segments(files)) > 2
    assert open_wal(files, segment_bytes=600).last_index == 40
    assert segments(files) == [path.rpartition("/")[2] for path in sorted(newest)]


# --- when the disk fails ----------------------------------------------------------------------------------------------


def test_a_full_disk_fails_the_log_until_it_is_opened_anew() -> None:
    files = FaultyFiles(capacity_bytes=3000)
    wal = open_wal(files, segment_bytes=1000)
    acknowledged = 0
    with pytest.raises(OSError, match="No space left") as caught:  # noqa: PT012
        for index in range(1, 200):
            add(wal, index, index)
            wal.sync()
            acknowledged = wal.durable_index
    assert caught.value.errno == errno.ENOSPC
    assert acknowledged > 30
    assert wal.failed is caught.value
    for _ in range(2):
        with pytest.raises(OSError, match="failed before") as again:
            wal.sync()
        assert again.value.errno == errno.ENOSPC
    position = wal.position
    add(wal, acknowledged + 2, acknowledged + 3)  # counted, held in memory, never written
    assert wal.position > position
    assert wal.durable_index == acknowledged
    wal.close()
    files.crash()
    files.capacity_bytes = None
    wal = open_wal(files, segment_bytes=1000)
    assert wal.last_index == acknowledged
    add(wal, acknowledged + 1, acknowledged + 100)
    wal.sync()
    assert reopen(files, segment_bytes=1000).last_index == acknowledged + 100


def test_no_log_is_made_on_a_full_disk() -> None:
    files = FaultyFiles(capacity_bytes=100)
    with pytest.raises(OSError, match="No space left"):
        open_wal(files)
    files.crash(keep_everything)
    files.capacity_bytes = None
    assert open_wal(files).entries == []


def test_a_failed_sync_is_not_repeated() -> None:
    files = FaultyFiles()
    wal = open_wal(files)
    add(wal, 1, 3)
    wal.sync()
    files.fail_sync()
    add(wal, 4, 40)
    with pytest.raises(OSError, match="Input/output error"):
        wal.sync()
    syncs = files.sync_count
    with pytest.raises(OSError, match="failed before") as again:
        wal.start_sync()
    assert again.value.errno == errno.EIO
    assert files.sync_count == syncs
    assert (wal.durable_index, wal.last_index) == (3, 40)
    wal.close()
    assert reopen(files).last_index >= 3


def test_opening_rewrites_what_a_failed_sync_may_have_left_in_the_page_cache_only() -> None:
    files = FaultyFiles()
    wal = open_wal(files, segment_bytes=1 << 16)
    add(wal, 1, 3)
    wal.sync()
    files.fail_sync()
    add(wal, 4, 200, size_bytes=100)
    with pytest.raises(OSError, match="Input/output error"):
        wal.sync()
    files.kill()
    wal = open_wal(files, segment_bytes=1 << 16)
    assert wal.last_index == 200  # all of it reads well from the page cache
    assert wal.durable_index == 200
    assert reopen(files, segment_bytes=1 << 16).last_index == 200


def test_a_sync_that_fails_in_its_thread_fails_the_log() -> None:
    files = FaultyFiles()
    wal = open_wal(files)
    add(wal, 1, 3)
    work = wal.start_sync()
    assert work is not None
    files.fail_sync()
    with pytest.raises(OSError, match="Input/output error"):
        work()
    with pytest.raises(AssertionError):
        wal.finish_sync()
    with pytest.raises(OSError, match="failed before"):
        wal.sync()


def test_a_segment_that_cannot_be_created_loses_nothing() -> None:
    files = FaultyFiles()
    wal = open_wal(files, segment_bytes=600)
    add(wal, 1, 8)
    wal.sync()
    add(wal, 9, 12)
    files.fail_sync()
    with pytest.raises(OSError, match="Input/output error"):
        wal.sync()
    assert len(segments(files)) == 1
    wal.close()
    assert reopen(files, segment_bytes=600).last_index == 8


def test_a_removal_that_fails_fails_the_log_but_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    files = FaultyFiles()
    wal = open_wal(files, segment_bytes=300)
    for index in range(1, 20):
        add(wal, index, index)
        wal.sync()
    wal.drop_before(19, 0)
    before = segments(files)

    def fail(path: str) -> None:
        raise OSError(errno.EIO, "Input/output error", path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", fail)
        with pytest.raises(OSError, match="Input/output error"):
            wal.sync()
    assert wal.failed is not None
    wal.close()
    assert segments(files) == before
    assert reopen(files, segment_bytes=300).last_index == 19
    assert len(segments(files)) == 1


# --- refusing to open -------------------------------------------------------------------------------------------------


def test_a_newer_format_is_refused_by_name() -> None:
    header = encode_segment_header(SegmentHeader("n", 0, 0, 0, None, 0, 0, 0), version=FORMAT_VERSION + 1)
    files = FaultyFiles.of_image({f"{DIRECTORY}/{0:020d}.wal": header + bytes(4096)})
    with pytest.raises(StartupError, match=f"version {FORMAT_VERSION + 1}.*newer kvstore") as caught:
        open_wal(files)
    assert caught.value.code == "data_format_newer"


def test_a_missing_segment_is_damage() -> None:
    files = FaultyFiles()
    wal = open_wal(files, segment_bytes=600)
    for index in range(1, 41):
        add(wal, index, index)
        wal.sync()
    wal.close()
    image = files.image()
    for missing in sorted(image)[:-1]:
        rest = FaultyFiles.of_image({path: data for path, data in image.items() if path != missing})
        with pytest.raises(StartupError) as caught:
            open_wal(rest, segment_bytes=600)
        assert caught.value.code == "wal_damaged"


def test_a_segment_of_another_log_is_damage() -> None:
    images = []
    for node_id in ("node-a", "node-b"):
        files = FaultyFiles()
        wal = open_wal(files, segment_bytes=600, node_id=node_id)
        for index in range(1, 21):
            add(wal, index, index)
            wal.sync()
        images.append(files.image())
    first = min(images[0])
    with pytest.raises(StartupError, match="does not continue") as caught:
        open_wal(FaultyFiles.of_image(images[0] | {first: images[1][first]}), segment_bytes=600)
    assert caught.value.code == "wal_damaged"


def test_a_segment_that_cannot_be_read_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    files = FaultyFiles()
    open_wal(files).close()

    def fail(path: str) -> bytes:
        raise OSError(errno.EIO, "Input/output error", path)

    monkeypatch.setattr(files, "read", fail)
    with pytest.raises(StartupError, match="cannot be read") as caught:
        open_wal(files)
    assert caught.value.code == "wal_damaged"


# --- closing ----------------------------------------------------------------------------------------------------------


def test_closing_makes_everything_durable() -> None:
    files = FaultyFiles()
    wal = open_wal(files)
    add(wal, 1, 3)
    wal.close()
    wal.close()
    assert reopen(files).last_index == 3
    add(wal, 4, 4)
    with pytest.raises(AssertionError):
        wal.sync()
