"""Mutants of the rules about locks (X16)."""

from __future__ import annotations

from kvstore.client.lease import Lease
from kvstore.client.lock import Lock
from tests.simulation.mutants.mutant import Catalogue, Patches

catalogue = Catalogue()
mutant = catalogue.mutant


@mutant("X16a")
def who_waited_takes_the_lock(patches: Patches) -> None:
    """Once the one right before it is gone, a waiter enters, though that one may have gone without its turn."""
    patches.rewrite(Lock, "_acquire", ("before, revision = await self._look(before, place, patience)", "break"))


@mutant("X16b")
def lock_is_entered_on_a_lost_lease(patches: Patches) -> None:
    """Whose turn it is enters, though the time of its lease is over."""
    patches.rewrite(Lock, "_acquire", ("if lease.lost:", "if False:"))


@mutant("X16c")
def lease_counts_from_its_answer(patches: Patches) -> None:
    """How long a lease is surely there is counted from when its keep-alive was answered."""
    patches.rewrite(Lease, "_sent", ("sent_at + result.ttl_ms", "self._loop.time() + result.ttl_ms"))


@mutant("X16d")
def waiter_misses_what_went_meanwhile(patches: Patches) -> None:
    """Who waits watches from when its watch stands: one that went since it looked is waited for in vain."""
    patches.rewrite(Lock, "_acquire", ("from_revision=revision + 1", "from_revision=0"))


@mutant("X16e")
def fence_is_open_once_the_key_is_gone(patches: Patches) -> None:
    """What a fenced transaction compares is true of no key, too."""
    patches.rewrite(Lock, "held", ("Relation.EQUAL, self.token", "Relation.LESS, self.token + 1"))
