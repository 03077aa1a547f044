"""How a checker says no: two exceptions, because two different things have happened.

`Inconsistent` is a finding: no correct store can have given these answers. `CheckBudgetExceeded` is none: the search
was given up before it knew, so the history is neither good nor bad, and whoever counts verdicts must not count it as
good.
"""

from __future__ import annotations


class Inconsistent(Exception):
    """A history that no correct store can produce. `rule` is a short stable name; `message` holds the shortest part of
    the history that tells why."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule
        self.message = message


class CheckBudgetExceeded(Exception):
    """Not decided: the search took more steps than it was allowed."""
