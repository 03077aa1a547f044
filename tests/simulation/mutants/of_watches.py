"""Mutants of the rules about watches (X15)."""

from __future__ import annotations

from kvstore.client.watch import Stream
from kvstore.server.watch import WatchHub
from kvstore.state import feed
from tests.simulation.mutants.mutant import Catalogue, Patches

catalogue = Catalogue()
mutant = catalogue.mutant


@mutant("X15a")
def watches_resume_without_a_barrier(patches: Patches) -> None:
    """A replica that lags takes a watch over as it stands: what its client knows is in the future to it."""
    patches.rewrite(WatchHub, "_barrier", ("self._raft.read_index(passed)", "passed(None)"))


@mutant("X15b")
def watches_skip_what_a_snapshot_brought(patches: Patches) -> None:
    """What a node holds from one moment to the next, without having applied it, is told to no watch."""
    patches.rewrite(WatchHub, "_all_fall_behind", ("watch.state is _State.LIVE", "False"))


@mutant("X15c")
def half_a_revision_counts_as_seen(patches: Patches) -> None:
    """A watch that lost its node resumes after the newest revision of which it has anything."""
    patches.rewrite(
        Stream,
        "_on_events",
        ("self._partial.extend(frame.events)", "self._partial.extend(frame.events); self.next = frame.revision + 1"),
    )


@mutant("X15d")
def catching_up_skips_the_revisions_of_one_batch(patches: Patches) -> None:
    """History is read from the next batch on, though the revision asked for lies within one."""
    patches.rewrite(feed.Feed, "read", ("start = batch_key", "pass"))


@mutant("X15e")
def the_record_before_is_that_before_the_batch(patches: Patches) -> None:
    """A key that one batch changes twice: its second event tells of the record before the batch."""
    patches.rewrite(feed, "_changes", ("before.get(key, change.before)", "change.before"))


@mutant("X15f")
def who_is_further_behind_joins_the_slice(patches: Patches) -> None:
    """A slice of history is delivered to every watch that is behind, also to those that lack what came before it."""
    patches.rewrite(WatchHub, "_deliver", ("first <= watch.place <= here", "watch.place <= here"))


@mutant("X15g")
def large_revisions_are_passed_over(patches: Patches) -> None:
    """A revision with very many changes is over for all live watches, also for those that it matches."""
    patches.rewrite(WatchHub, "_pass_over", ("watch.state is _State.LIVE", "False"))
