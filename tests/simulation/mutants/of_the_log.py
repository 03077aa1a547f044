"""Mutants of what makes the log durable: the order of promises and syncs, and the write-ahead log itself (D1 to D6,
D11, D15, D17 to D19)."""

from __future__ import annotations

from kvstore.raft import wal as wal_module
from kvstore.raft import wal_format
from kvstore.raft.engine import _WalJournal
from kvstore.raft.node import RaftNode
from kvstore.raft.wal import Wal
from tests.simulation.mutants.mutant import Catalogue, Patches

catalogue = Catalogue()
mutant = catalogue.mutant

# --- nothing is promised before it is on disk -------------------------------------------------------------------------


@mutant("D1")
def acknowledgement_before_the_sync(patches: Patches) -> None:
    """A follower acknowledges entries before they are synced."""
    patches.rewrite(
        RaftNode, "_send_after", ("self._outbox.add(peer, message, wal.position)", "self._outbox.add(peer, message, 0)")
    )


@mutant("D2a")
def vote_before_the_sync(patches: Patches) -> None:
    """A vote is sent before term and vote are synced."""
    patches.rewrite(
        RaftNode,
        "_emit",
        ('self._outbox.add(peer, VoteReply(m["term"]), needs)', 'self._outbox.add(peer, VoteReply(m["term"]), 0)'),
    )


@mutant("D2b")
def candidacy_before_the_sync(patches: Patches) -> None:
    """A candidate asks for votes before its new term and its vote for itself are synced."""
    patches.rewrite(RaftNode, "_emit", ("self._outbox.add(peer, message, needs)", "self._outbox.add(peer, message, 0)"))


@mutant("D3a")
def votes_are_not_recorded(patches: Patches) -> None:
    """The log records a node's term, but not whom it voted for."""
    patches.rewrite(
        _WalJournal, "setCurrentTerm", ("self._wal.set_term(term, votedForNodeId)", "self._wal.set_term(term, None)")
    )


@mutant("D3b")
def terms_are_not_recorded(patches: Patches) -> None:
    """The log records neither term nor vote."""
    patches.rewrite(_WalJournal, "setCurrentTerm", ("self._wal.set_term(term, votedForNodeId)", "pass"))


@mutant("D3c")
def reset_does_not_record_the_term(patches: Patches) -> None:
    """A log that restarts at a snapshot of a later term does not record that term."""
    patches.rewrite(Wal, "reset", ("if term > self.term:", "if False:"))


# --- files ------------------------------------------------------------------------------------------------------------


@mutant("D4a")
def new_segment_without_a_directory_sync(patches: Patches) -> None:
    """A new segment gets its name, and the directory is not synced."""
    patches.rewrite(Wal, "_create_segment", ("self._files.sync_dir(self._directory)", "pass"))


@mutant("D4b")
def first_batch_of_a_segment_is_not_synced(patches: Patches) -> None:
    """A new segment is synced with its header alone, and gets its name before the batch in it is on the disk."""
    patches.rewrite(
        Wal,
        "_create_segment",
        ("file.write_at(0, [head, *batch.buffers, ", "file.write_at(0, [head])\n        later = ([*batch.buffers, "),
        ("file.sync()", "file.sync()\n        file.write_at(len(head), later)"),
    )


@mutant("D4c")
def new_segment_has_its_name_at_once(patches: Patches) -> None:
    """A new segment is made under its own name, so that one which was not finished is there as well."""
    patches.rewrite(
        Wal,
        "_create_segment",
        ('temporary = f"{self._directory}/{_TEMPORARY}"', "temporary = batch.segment.path"),
        ("self._files.rename(temporary, batch.segment.path)", "pass"),
    )


@mutant("D4d")
def segment_that_is_found_is_trusted(patches: Patches) -> None:
    """A log is opened without syncing its directory, though the process that renamed its last segment may have died
    before it did."""
    patches.rewrite(Wal, "_load", ("self._files.sync_dir(self._directory)", "pass"))


@mutant("D5a")
def torn_tail_is_refused(patches: Patches) -> None:
    """A log whose last batch was torn by a power loss is taken for damaged."""
    patches.rewrite(
        wal_format,
        "read_records",
        (
            "return records, Tail(offset, position, batch_start, used_bytes - offset)",
            "raise Damaged(offset, reason)",
        ),
        also=(wal_module,),
    )


@mutant("D5b")
def damage_is_cut_off(patches: Patches) -> None:
    """Whatever cannot be read ends the log there, also where it had been synced."""
    patches.rewrite(
        wal_format,
        "read_records",
        ("if position < synced_until:", "if position < synced_until and end_position is not None:"),
        ("if (witness := _find_witness(seed, data, offset, position)) is not None:", "witness = 0\n    if False:"),
        also=(wal_module,),
    )


@mutant("D6a")
def payload_checksum_is_ignored(patches: Patches) -> None:
    """An entry is read from the log without looking at its payload's checksum."""
    patches.rewrite(
        wal_format,
        "read_records",
        (" or crc32c(0, payload) != found.payload_checksum:", ":"),
        also=(wal_module,),
    )


@mutant("D6b")
def header_checksum_is_ignored(patches: Patches) -> None:
    """A record's header is taken as it reads, without its checksum (and with it, without its position and log)."""
    patches.rewrite(
        wal_format,
        "_read_header",
        ("if crc32c(seed, covered) != _CHECKSUM.unpack_from(data, end - _CHECKSUM.size)[0]:", "if False:"),
    )


# --- syncing ----------------------------------------------------------------------------------------------------------


@mutant("D11a")
def failed_sync_is_tried_again(patches: Patches) -> None:
    """A sync that failed is made again; the second one succeeds, and what the first one lost counts as durable."""
    patches.rewrite(
        Wal,
        "_make_durable",
        (
            "            batch.file.sync()\n",
            "            try:\n"
            "                batch.file.sync()\n"
            "            except OSError:\n"
            "                batch.file.sync()\n",
        ),
    )


@mutant("D11b")
def node_with_a_failed_disk_goes_on(patches: Patches) -> None:
    """A node whose disk failed does not go silent: a leader keeps its term alive, and can commit nothing in it."""
    patches.replace(RaftNode, "_fail_storage", lambda _self, _error: None)


@mutant("D15")
def sync_covers_what_came_meanwhile(patches: Patches) -> None:
    """A sync in a thread counts for all that the log holds when it ends, not for what it held when it began."""
    patches.rewrite(
        Wal,
        "finish_sync",
        ("self.synced_position = batch.end_position", "self.synced_position = self.position"),
        ("self.durable_index = self._covered_index", "self.durable_index = self.last_index"),
    )


@mutant("D17")
def truncation_is_not_recorded(patches: Patches) -> None:
    """A truncation happens in memory only."""
    patches.rewrite(Wal, "truncate_from", ('self._write(RecordKind.TRUNCATE, index if keep else 0, 0, b"")', "pass"))


@mutant("D18")
def segments_are_removed_at_once(patches: Patches) -> None:
    """A segment that is no longer needed is removed before a durable record says so."""
    patches.rewrite(
        Wal,
        "drop_before",
        (
            "self._obsolete += [segment.path for segment in segments[:obsolete]]",
            "self._remove([segment.path for segment in segments[:obsolete]])",
        ),
    )


@mutant("D19")
def reopened_log_is_trusted(patches: Patches) -> None:
    """A log is opened without writing its last batch again, though the process before may have left it unsynced."""
    patches.rewrite(
        Wal,
        "_mend",
        ("if batch_bytes := tail.position - tail.batch_start:", "if batch_bytes := 0:"),
        ("    file.sync()", "    pass"),
    )
