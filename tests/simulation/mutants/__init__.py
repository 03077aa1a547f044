"""Every rule that can be broken by itself, broken: see `docs/raft.md`, "The rules, and the mutant that breaks each".

`MUTANTS[name].applied()` is a context in which the product lacks one rule. A run of the simulation inside of it
(`Options(mutant=name)`) must end in a violation within 200 seeds; `python -m tests.simulation.mutation_table` finds the
seed and writes the table in docs/testing.md.

The mutants lie by what they break: `of_messages` (the guard's rules about replication), `of_elections` (votes,
hand-overs, members), `of_reads`, `of_seams` (where the engine is met), `of_the_log` and `of_the_state` (durability),
`of_requests` (exactly once, in the state machine, the server and the client), `of_leases`, `of_watches`,
`of_locks`.
"""

from __future__ import annotations

from tests.simulation.mutants import (
    of_elections,
    of_leases,
    of_locks,
    of_messages,
    of_reads,
    of_requests,
    of_seams,
    of_the_log,
    of_the_state,
    of_watches,
)
from tests.simulation.mutants.mutant import Mutant, Outdated, Patches

__all__ = ["MUTANTS", "Mutant", "Outdated", "Patches"]

_ALL = [
    mutant
    for part in (
        of_messages,
        of_elections,
        of_reads,
        of_seams,
        of_the_log,
        of_the_state,
        of_requests,
        of_leases,
        of_watches,
        of_locks,
    )
    for mutant in part.catalogue.mutants
]
MUTANTS: dict[str, Mutant] = {mutant.name: mutant for mutant in _ALL}
assert len(MUTANTS) == len(_ALL), "two mutants have one name"
