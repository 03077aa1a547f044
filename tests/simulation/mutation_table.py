"""Runs every mutant until a run catches it, and writes the table of docs/testing.md: `make mutants`.

    python -m tests.simulation.mutation_table                   all, and write the table
    python -m tests.simulation.mutation_table --only NAME …     these; the other rows of the table stay

A mutant is caught by a run that ends in a violation, where the same run of the product as it is does not. The seeds
are those of the campaign, from 1 on, odd ones with three nodes and even ones with five, and all faults (a few mutants
say otherwise, and a note above the table says which); what a mutant survives for `SEEDS` runs it survives for good: it
is printed, and the exit code is 1. A run that hangs, dies or raises inside of the simulation catches nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from msgspec import Struct, field, structs

from tests.simulation.campaign import NODES
from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.mutants.rules import PAGE as RULES_PAGE
from tests.simulation.mutants.rules import read_rules
from tests.simulation.outcome import Options, Outcome
from tests.simulation.pool import DIED, HANGS, RAISED, Run, outcomes

SEEDS = 200
PAGE = Path(__file__).parents[2] / "docs" / "testing.md"
BEGIN, END = "<!-- mutation table: begin -->", "<!-- mutation table: end -->"
_HEAD = (
    "| rule | mutant | what it does | caught after seeds | nodes | by the check | at virtual s |\n"
    "|---|---|---|---|---|---|---|\n"
)
_ROW = re.compile(r"^\| \S+ \| `(\w+)` \|")
_NO_CATCH = frozenset({DIED, HANGS, RAISED})


class Trial(Struct):
    """How far one mutant has come."""

    mutant: Mutant
    next_seed: int = 1
    under_way: set[int] = field(default_factory=set)  # seeds
    caught: Outcome | None = None  # by the lowest seed so far
    odd: list[Outcome] = field(default_factory=list)  # runs that say nothing about this mutant

    def wants_run(self, seeds: int) -> bool:
        return self.caught is None and self.next_seed <= seeds

    def next_options(self) -> Options:
        seed, self.next_seed = self.next_seed, self.next_seed + 1
        self.under_way.add(seed)
        mutant = self.mutant
        return Options(seed=seed, nodes=mutant.nodes_for(seed), mutant=mutant.name, without=mutant.without)

    def note(self, outcome: Outcome, is_sound: bool) -> None:
        """`is_sound`: the product as it is survives the same run."""
        seed = outcome.options.seed
        self.under_way.discard(seed)
        if outcome.rule and (outcome.rule in _NO_CATCH or not is_sound):
            self.odd.append(outcome)
        elif outcome.rule and (self.caught is None or seed < self.caught.options.seed):
            self.caught = outcome

    def is_over(self, seeds: int) -> bool:
        return not self.under_way and not self.wants_run(seeds)


class Controls:
    """Runs of the product as it is, for comparison: one for each run that found something with a mutant."""

    def __init__(self) -> None:
        self.wanted: list[Options] = []
        self.failed: list[Outcome] = []
        self._is_sound: dict[Options, bool | None] = {}  # None: not known yet
        self._waiting: list[Outcome] = []

    def judge(self, outcome: Outcome) -> list[tuple[Outcome, bool]]:
        """A run has ended: the runs with mutants that can be judged now, and whether the product survives them."""
        if outcome.options.mutant:
            self._waiting.append(outcome)
            control = _without_mutant(outcome.options)
            if outcome.rule and control not in self._is_sound:
                self._is_sound[control] = None
                self.wanted.append(control)
        else:
            self._is_sound[outcome.options] = not outcome.rule
            if outcome.rule:
                self.failed.append(outcome)
        known = [(waits, self._verdict(waits)) for waits in self._waiting]
        self._waiting = [waits for waits, verdict in known if verdict is None]
        return [(waits, verdict) for waits, verdict in known if verdict is not None]

    def _verdict(self, outcome: Outcome) -> bool | None:
        return self._is_sound[_without_mutant(outcome.options)] if outcome.rule else True


def _without_mutant(options: Options) -> Options:
    return structs.replace(options, mutant="")


def try_all(
    run: Run, mutants: Sequence[Mutant], seeds: int, jobs: int, over: Callable[[Trial], None]
) -> tuple[list[Trial], list[Outcome]]:
    """Every mutant on one seed after the other, until one catches it. `over` hears of each that is done. Gives the
    trials, and the runs that the product as it is did not survive."""
    trials = {mutant.name: Trial(mutant) for mutant in mutants}
    controls = Controls()

    def todo() -> Iterator[Options]:
        # The pool asks for the next run when a worker is free, so what is known by then decides. A mutant whose last
        # run may have caught it waits while there is another.
        while True:
            if controls.wanted:
                yield controls.wanted.pop()
                continue
            waiting = [trial for trial in trials.values() if trial.wants_run(seeds)]
            idle = next((trial for trial in waiting if not trial.under_way), None)
            if idle is None and not waiting:
                return
            yield (idle or waiting[0]).next_options()

    def rounds() -> Iterator[Outcome]:
        # A control that was asked for when the pool had asked for its last run needs another round.
        while controls.wanted or any(trial.wants_run(seeds) for trial in trials.values()):
            with closing(outcomes(run, todo(), jobs)) as ending:
                yield from ending

    for outcome in rounds():
        for judged, is_sound in controls.judge(outcome):
            trial = trials[judged.options.mutant]
            trial.note(judged, is_sound)
            if trial.is_over(seeds):
                over(trial)
    return list(trials.values()), controls.failed


def row_of(trial: Trial, seeds: int) -> str:
    mutant, caught = trial.mutant, trial.caught
    begin = f"| {mutant.rule} | `{mutant.name}` | {mutant.description} |"
    if caught is None:
        return f"{begin} **not within {seeds}** | | | |\n"
    return f"{begin} {caught.options.seed} | {caught.options.nodes} | {caught.rule} | {caught.at_s:.1f} |\n"


def write_table(page: str, trials: Sequence[Trial], seeds: int, *, complete: bool) -> str:
    """The page with a new table between its marks; rows of mutants that were not tried stay, if not `complete`."""
    before, begin, rest = page.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no place for the table: {BEGIN} … {END}")
    rows: dict[str, str] = {}
    if not complete:
        for line in old.splitlines(keepends=True):
            if (row := _ROW.match(line)) is not None and row[1] in MUTANTS:
                rows[row[1]] = line
    rows |= {trial.mutant.name: row_of(trial, seeds) for trial in trials}
    order = [rule.mutant for rule in read_rules(RULES_PAGE.read_text(encoding="utf-8")).values()]
    table = "".join(rows[name] for name in order if name in rows)
    return f"{before}{BEGIN}\n\n{_note([MUTANTS[name] for name in order if name in rows])}{_HEAD}{table}\n{END}{after}"


def _note(mutants: Sequence[Mutant]) -> str:
    """Which rows ran otherwise than a campaign does."""
    others: dict[tuple[tuple[int, ...], tuple[str, ...]], list[str]] = {}
    for mutant in mutants:
        if mutant.nodes != NODES or mutant.without:
            others.setdefault((mutant.nodes, mutant.without), []).append(f"`{mutant.name}`")
    lines = []
    for (sizes, without), names in others.items():
        how = f"clusters of {' and '.join(map(str, sizes))} only"
        if without:
            how += f", without {', '.join(f'`{kind}`' for kind in without)}"
        lines.append(f"- {how}: {', '.join(names)}\n")
    if not lines:
        return ""
    return (
        f"Odd seeds are clusters of 3, even ones of 5, with all faults; but these ran otherwise:\n\n{''.join(lines)}\n"
    )


def _summary(trials: Sequence[Trial]) -> str:
    caught = [trial.caught for trial in trials if trial.caught is not None]
    seeds = sorted(outcome.options.seed for outcome in caught)
    checks = Counter(outcome.rule for outcome in caught)
    median = seeds[len(seeds) // 2] if seeds else 0
    by = ", ".join(f"{rule} {count}" for rule, count in checks.most_common())
    return f"{len(caught)} of {len(trials)} caught; median {median} seeds; by {by}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutation_table", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted(MUTANTS), help="these mutants")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="give up after so many (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args(arguments)
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of strings must have one order in all runs of a seed; that is settled when a process starts.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation.mutation_table", *sys.argv[1:]])
    from tests.simulation.world import run

    mutants = [MUTANTS[name] for name in options.only] if options.only else list(MUTANTS.values())
    began_s = time.monotonic()
    done = 0

    def over(trial: Trial) -> None:
        nonlocal done
        done += 1
        caught = trial.caught
        how = "NOT CAUGHT"
        if caught is not None:
            how = f"seed {caught.options.seed} ({caught.options.nodes} nodes) at {caught.at_s:.1f} s: {caught.rule}"
        elapsed_s = time.monotonic() - began_s
        print(
            f"{elapsed_s:6.0f} s {done:3}/{len(mutants)}  {trial.mutant.rule:5} {trial.mutant.name}: {how}", flush=True
        )
        for outcome in trial.odd:
            first = outcome.violation.splitlines()[0]
            print(f"        seed {outcome.options.seed} says nothing: {outcome.rule}: {first}", flush=True)

    trials, failed = try_all(run, mutants, options.seeds, options.jobs, over)
    print(_summary(trials))
    for outcome in failed:
        seed, nodes = outcome.options.seed, outcome.options.nodes
        print(f"the product itself fails at seed {seed} ({nodes} nodes): {outcome.rule}: {outcome.violation}")
    if not options.dry:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(write_table(page, trials, options.seeds, complete=not options.only), encoding="utf-8")
        print(f"the table in {PAGE.name} is written")
    return 0 if not failed and all(trial.caught is not None for trial in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
