"""How much one request may look at, and replace.

Who looks at very many records, or deletes them, holds up all else on the node meanwhile, and what is replaced lies in
memory until its entry is written. So each request has a budget (`model.WALK_MAX` and what follows it), which a
transaction shares with all its compares, operations and nested transactions. Past it the request is refused as a whole
(`range_too_large`); only a page or count by itself ends there instead, and says so (`more`).

- **Walked over** is each record of a range that is returned, counted, compared, sorted or deleted, each that would be
  in it, had the same entry not deleted it before, and each large one that is read by itself. What a range costs
  besides has a price in records.
- **Replaced** is each record of a deleted range, and each large one that is deleted or overwritten by itself.

`apply` decides by this, so it counts only what every replica sees alike: the records before the entry, and what the
entry did to them. How much of the past a replica still has, and walks over, is its own affair.

An entry's requests are counted together, too. Once they have used up as much as one may, those of its requests that
would need more are sent back (`HELD_UP`), so that no entry takes much longer than its largest request.

Up to version 2 of a cluster each operation was judged by itself, and by the number of its records: `EachByItself`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from kvstore import model
from kvstore.errors import Refused, Unavailable

Pairs = Iterator[tuple[bytes, bytes]]

# A record that is read or replaced by itself is counted from this size on. Of smaller ones a transaction replaces half
# a MiB at most, and an entry of the smallest operations some 50 MiB.
LARGE_BYTES = 512
# A range at an older revision walks over history as well; how far, each replica has for itself. So many of them, and
# nothing else, may be in one transaction.
_PAST_RANGES_MAX = 16
# A range looks through what its entry has written before: at so many keys in the time that one record takes.
_WRITTEN_PER_RECORD = 16
_UNBOUNDED = model.INT64_MAX


class _Count:
    """Records and their bytes, with their keys: of the entry so far, and where the request at work must stop."""

    __slots__ = ("bytes_end", "records", "records_end", "size_bytes")

    def __init__(self) -> None:
        self.records = self.records_end = 0
        self.size_bytes = self.bytes_end = 0

    def begin(self, records_max: int, bytes_max: int) -> None:
        self.records_end = self.records + records_max
        self.bytes_end = self.size_bytes + bytes_max

    def add(self, records: int, size_bytes: int) -> bool:
        """True if that is more than the request may."""
        self.records += records
        self.size_bytes += size_bytes
        return self.records > self.records_end or self.size_bytes > self.bytes_end


class Walk:
    """What the requests of one entry, or the reads between two, have walked over and replaced. `next_request` comes
    before each request, and `begin` before it has anything counted. Whatever counts raises `Refused(range_too_large)`
    past the budget."""

    __slots__ = ("_ahead", "_has_begun", "_is_entry", "_replaced", "_walked")

    is_each_by_itself = False

    def __init__(self, *, is_entry: bool) -> None:
        self._is_entry = is_entry
        self._has_begun = False
        self._walked, self._ahead, self._replaced = _Count(), _Count(), _Count()

    def next_request(self) -> None:
        self._has_begun = False

    def begin(self) -> None:
        """The request needs its budget. Raises `Unavailable(overloaded)` where its entry has done enough: then nothing
        of it happens, and it may be sent again. The second time for one request it does nothing."""
        if self._has_begun:
            return
        self._has_begun = True
        if self._is_entry and self.spent:
            raise held_up()
        self._walked.begin(model.WALK_MAX, model.WALK_BYTES_MAX)
        self._ahead.begin(model.COUNT_AHEAD_MAX, model.COUNT_AHEAD_BYTES_MAX)
        self._replaced.begin(model.REPLACED_MAX, model.REPLACED_BYTES_MAX)

    @property
    def spent(self) -> bool:
        """True once all requests together have used what one may."""
        walked, replaced = self._walked, self._replaced
        return (
            walked.records >= model.WALK_MAX
            or walked.size_bytes >= model.WALK_BYTES_MAX
            or replaced.records >= model.REPLACED_MAX
            or replaced.size_bytes >= model.REPLACED_BYTES_MAX
        )

    @property
    def room(self) -> tuple[int, int]:
        """How many records the request may still walk over, and how many bytes."""
        walked = self._walked
        return max(0, walked.records_end - walked.records), max(0, walked.bytes_end - walked.size_bytes)

    @property
    def room_to_count(self) -> tuple[int, int]:
        """The same, where records are only counted."""
        return self.room

    def over(self, pairs: Pairs) -> Pairs:
        """The pairs, each counted as it is taken."""
        walked = self._walked
        for pair in pairs:
            walked.records += 1
            walked.size_bytes += len(pair[0]) + len(pair[1])
            if walked.records > walked.records_end or walked.size_bytes > walked.bytes_end:
                raise _walked_too_far()
            yield pair

    def take(self, records: int, size_bytes: int) -> None:
        """So many were walked over."""
        if self._walked.add(records, size_bytes):
            raise _walked_too_far()

    def too_far(self, records: int, size_bytes: int) -> Refused:
        """So many were walked over, and that is how it was found out that they are too many."""
        self._walked.add(records, size_bytes)
        return _walked_too_far()

    def take_written(self, count: int) -> None:
        """A range looks through so many keys that its entry has written."""
        self.take(count // _WRITTEN_PER_RECORD, 0)

    def take_past_range(self) -> None:
        """A transaction reads a range at an older revision."""
        self.take(model.WALK_MAX // _PAST_RANGES_MAX, 0)

    def count_ahead(self, pairs: Pairs) -> int:
        """How many pairs there are, as far as the request may look ahead; one at least, which is known."""
        ahead = self._ahead
        count = size_bytes = 0
        count_max, bytes_max = max(1, ahead.records_end - ahead.records), ahead.bytes_end - ahead.size_bytes
        for pair in islice(pairs, count_max):
            count += 1
            size_bytes += len(pair[1])
            if size_bytes >= bytes_max:
                break
        ahead.add(count, size_bytes)
        self._walked.add(count, size_bytes)
        return count

    def note_replaced(self, records: int, size_bytes: int) -> None:
        """A request is about to replace these."""
        if self._replaced.add(records, size_bytes):
            raise Refused(
                f"one request may delete or replace {model.REPLACED_MAX} records, or "
                f"{_mib(model.REPLACED_BYTES_MAX)} of them, and this one would do more; delete smaller ranges, one "
                "after the other",
                code="range_too_large",
            )

    def replacing(self, pairs: Pairs) -> Pairs:
        """The pairs, which are about to be deleted, each counted as it is taken."""
        for pair in self.over(pairs):
            self.note_replaced(1, len(pair[0]) + len(pair[1]))
            yield pair

    def end_lease(self, records: int, size_bytes: int) -> None:
        """The records of a lease go with it, however many they are."""
        self._replaced.add(records, size_bytes)


class EachByItself(Walk):
    """The rule of entries below `versions.WITH_BUDGETS`. Its refusals are stored answers, so their words stay, too."""

    __slots__ = ()

    is_each_by_itself = True

    def begin(self) -> None:
        pass

    @property
    def spent(self) -> bool:
        return False

    @property
    def room(self) -> tuple[int, int]:
        return _UNBOUNDED, _UNBOUNDED

    @property
    def room_to_count(self) -> tuple[int, int]:
        return model.WALK_MAX, _UNBOUNDED

    def over(self, pairs: Pairs) -> Pairs:
        for walked, pair in enumerate(pairs):
            if walked == model.WALK_MAX:
                raise Refused(
                    f"there are more than {model.WALK_MAX} records in this range; do it in parts",
                    code="range_too_large",
                )
            yield pair

    def take(self, records: int, size_bytes: int) -> None:
        pass

    def count_ahead(self, pairs: Pairs) -> int:
        return sum(1 for _ in islice(pairs, model.COUNT_AHEAD_MAX))

    def note_replaced(self, records: int, size_bytes: int) -> None:
        pass

    def end_lease(self, records: int, size_bytes: int) -> None:
        pass


def held_up() -> Unavailable:
    return Unavailable("the requests sent together with this one had too much to do; send it again", code="overloaded")


def _walked_too_far() -> Refused:
    return Refused(
        f"one request may walk over {model.WALK_MAX} records, or {_mib(model.WALK_BYTES_MAX)} of them, in all that it "
        "reads, counts, compares, sorts and deletes, and this one has more to do; take smaller ranges, or fewer at a "
        "time",
        code="range_too_large",
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1024 * 1024):g} MiB"
