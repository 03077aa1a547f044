"""The store's revisions are one order of everything; does it agree with real time, and with itself?

Every answer names a revision: a change the one it made, a linearizable read the one it read at. So one pass over the
events of a run, whatever its keys, tells much of what strict serializability means:

- No two changes made the same revision.
- What was called after something of revision r was acknowledged changes at a later revision than r, and reads at r or
  later.
- What makes a revision makes none that was read before it was called.

Cost: O(n log n). It trusts what the store says of revisions; the other checkers do not.
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.checkers.history import Entry, told
from tests.checkers.verdict import Inconsistent


def check_revisions(entries: Iterable[Entry]) -> None:
    """Raises `Inconsistent("revision_order")`. Local reads must not be among the entries with a revision: they may be
    old, and `local.py` judges them."""
    answered = [entry for entry in entries if entry.is_ok and entry.revision]
    made: dict[int, Entry] = {}
    events: list[tuple[int, Entry]] = []
    for entry in answered:
        if entry.changed:
            other = made.setdefault(entry.revision, entry)
            if other is not entry:
                raise Inconsistent("revision_order", f"two changes made one revision:\n{told([other, entry])}")
        events.append((entry.called, entry))
        events.append((entry.returned, entry))
    events.sort(key=lambda event: event[0])
    newest: Entry | None = None  # the acknowledged operation of the greatest revision so far
    for number, entry in events:
        if number == entry.returned:
            if newest is None or entry.revision > newest.revision:
                newest = entry
        elif newest is not None and entry.revision < newest.revision + entry.changed:
            what = "changed" if entry.changed else "read"
            raise Inconsistent(
                "revision_order",
                f"the second was called after the first was answered, and {what} at an older revision:\n"
                f"{told([newest, entry])}",
            )
