"""Mutants of the rules about leases (X14)."""

from __future__ import annotations

from kvstore.state import txn
from kvstore.state.leases import LeaseChanges, Leases
from tests.simulation.mutants.mutant import Catalogue, Patches

catalogue = Catalogue()
mutant = catalogue.mutant


@mutant("X14a")
def keep_alive_adds_nothing(patches: Patches) -> None:
    """A keep-alive is answered, and the lease ends when it would have ended without."""
    patches.rewrite(
        LeaseChanges,
        "keep",
        ("Lease(lease_id, lease.ttl_ms, now_ms + lease.ttl_ms, lease.keys, lease.size_bytes)", "lease"),
    )


@mutant("X14b")
def leases_expire_a_second_early(patches: Patches) -> None:
    """Expiry is judged by the clock of whoever proposed it, which may be ahead."""
    patches.rewrite(
        Leases,
        "expired",
        ("while self.expiry_due(log_time_ms):", "while self.expiry_due(log_time_ms + 999):"),
        ("lease.deadline_ms > log_time_ms:", "lease.deadline_ms > log_time_ms + 999:"),
    )


@mutant("X14c")
def records_outlive_their_lease(patches: Patches) -> None:
    """A lease ends, and its records stay."""
    patches.rewrite(
        txn,
        "end_lease",
        ("view.write(key, None, before, revision)", "del view.leases.need(lease_id).keys[key]"),
    )


@mutant("X14d")
def attachments_are_lost_at_a_restart(patches: Patches) -> None:
    """A node that restarts forgets which records are under a lease."""
    patches.rewrite(Leases, "load", ("storage.scan(ATTACHED, family_end(ATTACHED))", "()"))
