"""Mutants of what becomes of requests: exactly once, log time, transactions; in the state machine and in the client
(X1 to X5, X7, X8, X10, X11)."""

from __future__ import annotations

from kvstore.client.call import Call, WriteCall
from kvstore.client.protocol import ClientProtocol
from kvstore.client.transaction import Transaction
from kvstore.server.log_clock import LogClock
from kvstore.state import txn
from kvstore.state.machine import Machine
from kvstore.state.sessions import Sessions
from tests.simulation.mutants.mutant import Catalogue, Patches

catalogue = Catalogue()
mutant = catalogue.mutant

# --- exactly once -----------------------------------------------------------------------------------------------------


@mutant("X1")
def repeated_requests_run_again(patches: Patches) -> None:
    """The state machine does not look whether it has answered a request before."""
    patches.rewrite(Sessions, "admit", ("answer = session.answers.get(seq)", "answer = None"))


@mutant("X2")
def stale_requests_run(patches: Patches) -> None:
    """A request that its client gave up, and acknowledged, is executed when it comes late."""
    patches.rewrite(
        Sessions,
        "admit",
        (
            "            answer = _STALE if seq > 0 else _BAD_SEQUENCE\n",
            "            return session\n",
        ),
    )


@mutant("X3")
def answers_are_lost_at_a_restart(patches: Patches) -> None:
    """Sessions are read back at a start, but not what their requests were answered."""
    patches.rewrite(Sessions, "load", ("session.answers = dict(record.answers)", "session.answers = {}"))
    patches.rewrite(Sessions, "_replay", ("if isinstance(answer, bytes):", "if False:"))


@mutant("X4")
def expired_session_is_replaced_under_way(patches: Patches) -> None:
    """A client sends a mutation that is in doubt again under a new session, when the old one has expired."""
    patches.rewrite(
        WriteCall,
        "refused",
        ("        if self.in_doubt:", "        self.in_doubt = False\n        if self.in_doubt:"),
    )


@mutant("X7")
def retry_takes_a_new_number(patches: Patches) -> None:
    """A client numbers a mutation anew when it sends it again."""

    def lost(self: WriteCall) -> None:
        if self.session is not None:
            self.session.over(self.seq)
            self.seq = self.session.take()
        Call.lost(self)

    patches.override(WriteCall, "lost", lost)


@mutant("X8")
def lost_connection_leaves_no_doubt(patches: Patches) -> None:
    """A client reports a mutation whose connection was lost as surely not taken."""
    patches.rewrite(Call, "on_lost", ("self.in_doubt = True", "self.in_doubt = False"))


@mutant("X13")
def own_probe_is_a_sign_of_life(patches: Patches) -> None:
    """A client takes it for a sign of life of a silent node that what it sends piles up."""
    patches.rewrite(
        ClientProtocol,
        "_look",
        ("(waited_bytes and unsent_bytes < waited_bytes + written_bytes)", "unsent_bytes != waited_bytes"),
    )


# --- log time ---------------------------------------------------------------------------------------------------------


@mutant("X5a")
def log_time_goes_back(patches: Patches) -> None:
    """Log time is the stamp of the last entry, also where a leader with a slower clock gave an earlier one."""
    patches.rewrite(
        Machine,
        "_apply_batch",
        ("max(self._position.log_time_ms, entry.log_time_ms)", "entry.log_time_ms"),
    )


@mutant("X5b")
def stamp_is_the_wall_clock(patches: Patches) -> None:
    """A leader stamps entries with its wall clock, however far ahead that is."""
    patches.rewrite(
        LogClock,
        "_limit_ms",
        ("return min(wall_ms, self._base_ms + (now - self._base_at) * 1000.0 * _RATE)", "return wall_ms"),
    )


@mutant("X5c")
def first_stamp_before_the_log_is_replayed(patches: Patches) -> None:
    """A leader whose state holds no log time takes its wall clock at once, though its log may hold one."""
    patches.replace(LogClock, "is_known", property(lambda _self: True))
    patches.rewrite(LogClock, "_limit_ms", ("return wall_ms if self._is_empty else 0.0", "return wall_ms"))


@mutant("X5d", nodes=(5,))
def log_time_leaps_over_what_it_stood_still(patches: Patches) -> None:
    """A new leader counts from the first entry that had the newest log time, not from the last."""
    patches.rewrite(
        LogClock, "observe", ("if stamped_index > self._applied_index:", "if log_time_ms > self._applied_ms:")
    )


# --- transactions -----------------------------------------------------------------------------------------------------


@mutant("X10a")
def keys_read_are_not_compared(patches: Patches) -> None:
    """A transaction's commit does not compare the keys that it read."""
    patches.rewrite(Transaction, "_try_commit", ("for key, record in self._points.items():", "for key, record in ():"))


@mutant("X10b")
def phantoms(patches: Patches) -> None:
    """A transaction's commit does not compare how many records a range held that it read."""
    patches.rewrite(
        Transaction,
        "_try_commit",
        ("compares.append(Compare(start, Target.COUNT, Relation.EQUAL, held, end))", "pass"),
    )


@mutant("X11a")
def bounds_are_ignored(patches: Patches) -> None:
    """An addition below its minimum is executed."""
    patches.rewrite(txn, "_sum", ("if add.min is not None and number < add.min:", "if False:"))


@mutant("X11b")
def refused_transaction_happens_in_part(patches: Patches) -> None:
    """What a transaction wrote before an operation of it was refused stays."""
    patches.rewrite(
        txn,
        "_transaction",
        (
            "    result = run.transaction(txn)\n",
            "    try:\n"
            "        result = run.transaction(txn)\n"
            "    except Refused:\n"
            "        run.finish()\n"
            "        raise\n",
        ),
    )
