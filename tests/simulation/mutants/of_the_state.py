"""Mutants of what makes the state durable: snapshots, flushes, and whose data directory it is (D7 to D10, D13, D22)."""

from __future__ import annotations

from kvstore.raft.flush import StateFlush
from kvstore.raft.node import RaftNode
from kvstore.raft.roster import Roster
from kvstore.raft.snapshot_receiver import SnapshotReceiver
from kvstore.raft.state_directory import StateDirectory
from kvstore.server.node import ServerNode
from kvstore.state.machine import Machine
from tests.simulation.mutants.mutant import Catalogue, Patches

catalogue = Catalogue()
mutant = catalogue.mutant

# --- snapshots --------------------------------------------------------------------------------------------------------


@mutant("D8")
def log_is_reset_before_the_state_is_switched(patches: Patches) -> None:
    """An install resets the log first, and then makes the received state the current one."""
    patches.rewrite(
        RaftNode,
        "snapshot_received",
        ("            self._state_directory.switch(path)\n", ""),
        (
            "            self._wal.sync()\n",
            "            self._wal.sync()\n            self._state_directory.switch(path)\n",
        ),
    )


@mutant("D9a")
def snapshot_is_not_verified(patches: Patches) -> None:
    """A received snapshot's files are not held against the checksums of its offer."""
    patches.rewrite(SnapshotReceiver, "_verify", ("if describe(files, partial.path, info.name) != info:", "if False:"))


@mutant("D9b")
def snapshot_is_not_synced(patches: Patches) -> None:
    """A received snapshot's files are not synced before the pointer names them."""
    patches.rewrite(SnapshotReceiver, "_verify", ("file.sync()", "pass"))


# --- flushes ----------------------------------------------------------------------------------------------------------


@mutant("D10a")
def log_is_dropped_before_the_flush(patches: Patches) -> None:
    """The log's head is dropped when a flush begins, not when it has ended."""
    patches.rewrite(
        StateFlush,
        "step",
        (
            "        self.running = True\n",
            "        self.running = True\n        self._wal.drop_before(machine.applied_index, 0)\n",
        ),
    )


@mutant("D10b")
def log_is_dropped_to_what_is_applied(patches: Patches) -> None:
    """After a flush the log's head is dropped up to what is applied by then, not up to what the flush covered."""
    patches.rewrite(
        StateFlush,
        "step",
        (
            "self._env.scheduler.run_in_thread(machine.flush, self._ended)",
            "self._env.scheduler.run_in_thread(\n"
            "            machine.flush, lambda index, error: self._ended(machine.applied_index, error)\n"
            "        )",
        ),
    )
    patches.rewrite(
        StateFlush,
        "_ended",
        ("self._wal.drop_before(self._needed(index), LOG_TAIL_BYTES)", "self._wal.drop_before(index, 0)"),
    )


@mutant("D22")
def position_in_a_batch_of_its_own(patches: Patches) -> None:
    """What an entry changed and the position that says so are two storage batches."""
    patches.rewrite(
        Machine,
        "_commit",
        (
            "batch.put(M_POSITION, layout.encode(position))",
            "first = self._storage.batch()\n"
            "    first.put(M_POSITION, layout.encode(position))\n"
            "    self._storage.write(first)",
        ),
    )


@mutant("D21b")
def pointer_that_is_read_is_trusted(patches: Patches) -> None:
    """The state's pointer is taken as it reads, though the process that renamed it may have died before its sync."""
    patches.rewrite(
        StateDirectory,
        "_named",
        ("        files.sync_dir(directory)\n        name = _decode", "        name = _decode"),
    )


# --- whose data it is -------------------------------------------------------------------------------------------------


@mutant("D13a")
def directory_is_claimed_first(patches: Patches) -> None:
    """META is written before the log exists that it vouches for."""
    patches.rewrite(
        ServerNode,
        "start",
        (
            "self._directory.check(options.name, options.cluster_id)",
            "self._directory.claim(options.name, options.cluster_id)",
        ),
    )


@mutant("D13c")
def wiped_node_is_let_in(patches: Patches) -> None:
    """A node that lost its data directory is taken for the member that it was."""
    patches.replace(Roster, "judge", lambda _self, _identity: None)


@mutant("D13d")
def replaced_member_is_kept_out(patches: Patches) -> None:
    """A node that was away while a member was replaced under its name refuses the new one for good."""
    patches.rewrite(Roster, "judge", ("        and identity.member_at <= self._members_at\n", ""))
