"""What one simulated run is asked to do, and what it reports."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct, field


class Violation(Exception):
    """Something happened that must not. `rule` is a short stable name, `message` says what was seen, with numbers."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule
        self.message = message


class Options(Struct, frozen=True, kw_only=True):
    """One run. Everything in it follows from these."""

    seed: int
    nodes: int = 3
    # Faults and load go on for this long in virtual seconds; healing and the last checks come after it.
    duration_s: float = 60.0
    # The name of a mutant in `mutants.MUTANTS`, patched in for this run; empty for the product as it is.
    mutant: str = ""
    # Kinds of fault (`faults.FAULTS`) that are left out.
    without: tuple[str, ...] = ()


class Counts(Struct, kw_only=True):
    """What happened in one run, or (added up) in many."""

    runs: int = 0
    virtual_s: float = 0.0
    node_s: float = 0.0  # nodes × virtual seconds
    faulty_s: float = 0.0  # virtual seconds in which faults happened
    led_s: float = 0.0  # of these, with a leader
    elections: int = 0  # terms in which a leader was elected, while faults happened
    crashes: int = 0  # processes and machines that died by a fault
    snapshot_installs: int = 0
    membership_changes: int = 0  # configurations that were committed, beyond the first
    hand_overs: int = 0
    entries: int = 0  # committed log entries
    client_operations: int = 0  # begun by clients
    acknowledged: int = 0
    unknown: int = 0
    faults: Counter[str] = field(default_factory=Counter)  # kind of fault -> how often

    def add(self, other: Counts) -> None:
        for name in self.__struct_fields__:
            if name == "faults":
                self.faults.update(other.faults)
            else:
                setattr(self, name, getattr(self, name) + getattr(other, name))


class Outcome(Struct, kw_only=True):
    """How one run ended. `violation` is empty where nothing was wrong."""

    options: Options
    counts: Counts
    rule: str = ""
    violation: str = ""
    at_s: float = 0.0  # virtual seconds until the end or the violation
    real_s: float = 0.0
    cpu_s: float = 0.0  # of the process that ran it; less than `real_s` where the machine does other things, too
    story_digest: str = ""  # of everything that was told: two runs of one seed have the same
    story: str = ""  # the shortest story of a violation, ready to print
