"""Looks for the smallest run that still violates: fewer nodes, fewer kinds of fault, less time.

A run with one kind of fault less is another run altogether, since everything in it follows from one stream of chance.
So this is a search more than a reduction: each smaller setting is tried with the seed itself and with some others, on
all cores, and counts as smaller if any of them violates the same rule. What comes out is a run with few kinds of fault
in which it happens early; often that is enough to see why.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing

import msgspec
from rich.console import Console

from tests.simulation.autopsy import replay_command
from tests.simulation.faults import FAULTS
from tests.simulation.outcome import Options, Outcome
from tests.simulation.pool import Run, outcomes
from tests.simulation.report import print_violation

# Other seeds that are tried with each smaller setting, beside the one that is to be shrunk.
OTHER_SEEDS = range(1, 20)
DURATION_MIN_S = 1.0


def shrink(run: Run, options: Options, jobs: int, console: Console) -> int:
    """Print the smallest violation that was found; 1, or 0 where the run does not violate at all."""
    best = _first([options], run, jobs, rule="")
    if best is None:
        console.print(f"{replay_command(options)}: no violation, so there is nothing to shrink")
        return 0
    rule = best.rule
    _tell(console, f"to shrink: “{rule}”", best)
    if options.nodes > 3:
        best = _smaller(best, {"nodes": 3}, run, jobs, console) or best
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for kind in _kinds(best):
            without = tuple(k for k in FAULTS if k not in _kinds(best) or k == kind)
            found = _smaller(best, {"without": without}, run, jobs, console)
            if found is not None:
                best, is_smaller = found, True
                break
    while best.options.duration_s > DURATION_MIN_S:
        # What happens at the end, in the last checks, happens earlier in a shorter run.
        shorter_s = round(min(best.at_s, best.options.duration_s) / 2, 1)
        found = _smaller(best, {"duration_s": shorter_s}, run, jobs, console)
        if found is None:
            break
        best = found
    console.print()
    print_violation(console, best, with_story=True)
    return 1


def _kinds(outcome: Outcome) -> list[str]:
    """Kinds of fault that happened in it, in a fixed order."""
    return [kind for kind in FAULTS if outcome.counts.faults.get(kind)]


def _smaller(best: Outcome, change: dict[str, object], run: Run, jobs: int, console: Console) -> Outcome | None:
    """A violation of the same rule with this change, if there is one among the seeds that are tried."""
    options = msgspec.structs.replace(best.options, **change)
    seeds = [options.seed, *(seed for seed in OTHER_SEEDS if seed != options.seed)]
    found = _first([msgspec.structs.replace(options, seed=seed) for seed in seeds], run, jobs, best.rule)
    if found is not None:
        _tell(console, "smaller", found)
    return found


def _tell(console: Console, what: str, outcome: Outcome) -> None:
    options = outcome.options
    size = f"seed {options.seed}, {options.nodes} nodes, {options.duration_s:g} s"
    kinds = ", ".join(_kinds(outcome)) or "no fault"
    console.print(f"{what}: {size}: at {outcome.at_s:.2f} s with {kinds}", highlight=False, soft_wrap=True)


def _first(todo: Iterable[Options], run: Run, jobs: int, rule: str) -> Outcome | None:
    """The first violation of this rule (of any, if none is named) that is found."""
    with closing(outcomes(run, todo, jobs)) as ending:
        for outcome in ending:
            if outcome.rule and (not rule or outcome.rule == rule):
                return outcome
    return None
