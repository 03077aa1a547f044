"""What the log on a fake disk would be if the power went now: read from the disk itself, not asked of the product.

`DurableLog` follows the write-ahead log of one node through its life, over crashes, by reading the records that have
become durable since it last looked. So it costs as much as the log has grown, and nothing where nobody asks. It knows
the record format of `wal_format.py`, judges checksums itself, and trusts no claim of the product: not `durable_index`,
not `synced_position`.

A file counts once its name is durable; bytes count as `FaultyFiles` leaves them where it keeps nothing unsynced.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from google_crc32c import extend as crc32c

from kvstore.raft.fsm import EntryKind
from kvstore.raft.members import Configuration
from kvstore.raft.wal_format import RECORD_HEADER_BYTES, RecordKind, decode_segment_header, seed_of
from tests.fake_files import FaultyFiles
from tests.simulation.ledger import Broken

_SUFFIX = ".wal"
# As much as a few batches; a longer record is read with its own length.
_CHUNK_BYTES = 8192
# As `wal_format.py` says: magic, kind, payload length, bytes since the batch began, index, term, checksum of the
# payload; then the checksum of these and of the record's position.
_HEADER = struct.Struct("<2sBxIIQQII")
_POSITION = struct.Struct("<Q")
_MAGIC = b"\xd7\x1e"
_COVERED_BYTES = RECORD_HEADER_BYTES - 4
assert _HEADER.size == RECORD_HEADER_BYTES

# (index, term, payload) of each entry that is found on the disk
Found = Callable[[int, int, bytes], None]


class DurableLog:
    """`first` and `terms` are its entries, `term` and `voted_for` what it records of votes."""

    __slots__ = (
        "_configurations", "_found", "_offset", "_path", "_position", "_seed", "_testified", "directory", "files",
        "first", "is_frozen", "must_hold", "name", "node_id", "removals", "removals_made", "term", "terms", "voted_for",
    )  # fmt: skip

    def __init__(self, files: FaultyFiles, directory: str, name: str, node_id: str, found: Found) -> None:
        self.files = files
        self.directory = directory
        self.name = name
        self.node_id = node_id
        # Entries that no crash may take, as of the end of the last process: (last index, its term).
        self.must_hold: tuple[int, int] | None = None
        # Truncations and resets, on the disk and in the product's memory. Where there are fewer on the disk, it may
        # lose entries with the next sync.
        self.removals = self.removals_made = 0
        # No process uses the disk, and it does not change.
        self.is_frozen = False
        self._found = found
        self._seed = seed_of(node_id)
        self._begin()

    def _begin(self) -> None:
        self.first = 0
        self.terms: list[int] = []
        self._configurations: dict[int, bytes] = {}
        self.term = 0
        self.voted_for: str | None = None
        self._path = ""
        self._position = self._offset = self._testified = 0

    @property
    def last(self) -> int:
        return self.first + len(self.terms) - 1 if self.terms else 0

    def term_at(self, index: int) -> int | None:
        at = index - self.first
        return self.terms[at] if 0 <= at < len(self.terms) else None

    def holds(self, index: int, term: int) -> bool:
        """Is this entry durable there? What lies before the log's first entry is in the state."""
        if self._is_current(index) and (index < self.first or self.term_at(index) == term):
            return True
        self.refresh()
        return bool(self.terms) and (index < self.first or self.term_at(index) == term)

    def reaches(self, index: int) -> int | None:
        """The durable term at `index`; None where the disk has nothing there. 0 for what is in the state only."""
        if not self._is_current(index):
            self.refresh()
        if not self.terms or index > self.last:
            return None
        return 0 if index < self.first else self.term_at(index)

    def configurations_after(self, index: int) -> list[Configuration]:
        """Those in its entries past `index`: what nobody may have committed, and this node would work with."""
        self.refresh()
        return [Configuration.decode(members) for at, members in self._configurations.items() if at > index]

    def is_in_doubt(self, path: str, offset_bytes: int) -> bool:
        """Is this in the last batch of the log? Nothing on the disk proves that it was ever synced, so damage there
        looks like a tail that a power loss tore (`wal_format.py` states this limit)."""
        return path == self._path and self._offset - (self._position - self._testified) <= offset_bytes < self._offset

    def _is_current(self, index: int) -> bool:
        return bool(self.terms) and index <= self.last and self.removals == self.removals_made

    # --- reading ------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read what has become durable since the last time."""
        if self.is_frozen:
            return
        if not self._is_durable(self._path):
            self._begin()  # not begun yet, or the segment was dropped before we read its end
            segments = [path for path in self.files.durable_paths(self.directory + "/") if path.endswith(_SUFFIX)]
            if not segments:
                return
            self._open(segments[0])
        while self._read_segment():
            following = f"{self.directory}/{self._position:020d}{_SUFFIX}"
            if following == self._path or not self._is_durable(following):
                return
            self._open(following)

    def _is_durable(self, path: str) -> bool:
        return path in self.files._durable

    def _open(self, path: str) -> None:
        header, self._offset = decode_segment_header(self.files.durable_read(path, 0, _CHUNK_BYTES))
        assert header.node_id == self.node_id, f"{path} is the log of {header.node_id}, not of {self.node_id}"
        if not self._path:
            self.term, self.voted_for = header.term, header.voted_for
        self._path, self._position = path, header.start_position
        self._testified = header.start_position + header.first_batch_bytes

    def _read_segment(self) -> bool:
        """All records that are there; True once there is no more."""
        wanted = _CHUNK_BYTES
        while True:
            data = self.files.durable_read(self._path, self._offset, wanted)
            at, missing = self._read_records(data)
            if not missing or (at == 0 and len(data) < wanted):
                return True
            wanted = max(_CHUNK_BYTES, missing)

    def _read_records(self, data: bytes) -> tuple[int, int]:
        """How many bytes were whole records, and how many are needed to read the next one; 0 if there is none."""
        at, size = 0, len(data)
        while True:
            begin = at + RECORD_HEADER_BYTES
            if begin > size:
                return at, RECORD_HEADER_BYTES
            magic, kind, payload_bytes, in_batch, index, term, payload_checksum, checksum = _HEADER.unpack_from(
                data, at
            )
            if magic != _MAGIC:
                return at, 0
            covered = data[at : at + _COVERED_BYTES] + _POSITION.pack(self._position)
            if crc32c(self._seed, covered) != checksum:
                return at, 0
            end = begin + payload_bytes
            if end > size:
                return at, end - at
            payload = data[begin:end]
            if crc32c(0, payload) != payload_checksum:
                return at, 0
            self._replay(kind, index, term, payload)
            self._testified = max(self._testified, self._position - in_batch)
            self._position += end - at
            self._offset += end - at
            at = end

    def _replay(self, kind: int, index: int, term: int, payload: bytes) -> None:
        if kind == RecordKind.ENTRY:
            if not self.terms:
                self.first = index
            elif index != self.first + len(self.terms):
                message = f"on the disk of {self.name} entry {index} of term {term} follows entry {self.last}"
                raise Broken("nothing durable is lost", f"{message}: this log cannot be read", self.last, index)
            self.terms.append(term)
            if payload[0] == EntryKind.MEMBERS:
                self._configurations[index] = payload[1:]
            self._found(index, term, payload)
        elif kind == RecordKind.TERM:
            self.term, self.voted_for = term, payload.decode() if index else None
        elif kind == RecordKind.TRUNCATE:
            del self.terms[max(0, index - self.first) if index else 0 :]
            self._configurations = {at: members for at, members in self._configurations.items() if at < index}
            self.removals += 1
        elif kind == RecordKind.RESET:
            self.first, self.terms, self._configurations = index, [term], {}
            self.removals += 1
