"""The table of mutants: who is tried on which seeds, what counts as caught, and what is written."""

from __future__ import annotations

import pytest

from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.mutation_table import BEGIN, END, Trial, row_of, try_all, write_table
from tests.simulation.outcome import Counts, Options, Outcome
from tests.simulation.pool import RAISED

EARLY, LATE, NEVER, RAISES = (
    Mutant(name, "G1a", "Breaks it.", lambda _patches: None) for name in ("early", "late", "never", "raises")
)
_CAUGHT_AT = {"early": 1, "late": 4}
UNSOUND = 3  # a seed at which the product itself fails


def run(options: Options) -> Outcome:
    """A mutant is caught from its own seed on; one raises inside of the simulation; one seed fails for all."""
    if options.mutant == "raises":
        raise RuntimeError("a bug of the simulation")
    outcome = Outcome(options=options, counts=Counts(), at_s=12.34)
    if options.seed == UNSOUND or options.seed >= _CAUGHT_AT.get(options.mutant, 100):
        outcome.rule = "log matching"
    return outcome


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_is_tried_until_the_first_seed_that_catches_it(jobs: int) -> None:
    over: list[str] = []
    mutants = [EARLY, LATE, NEVER, RAISES]
    trials, failed = try_all(run, mutants, 6, jobs, lambda trial: over.append(trial.mutant.name))
    caught = {trial.mutant.name: trial.caught.options.seed if trial.caught else None for trial in trials}
    assert caught == {"early": 1, "late": 4, "never": None, "raises": None}
    assert sorted(over) == ["early", "late", "never", "raises"]
    assert [outcome.rule for outcome in trials[3].odd] == [RAISED] * 6
    assert [outcome.options.seed for outcome in trials[1].odd] == [UNSOUND]
    assert trials[1].next_seed <= 5 + jobs, "it goes no further than what was under way"
    assert [(outcome.options.seed, outcome.options.mutant) for outcome in failed] == [(UNSOUND, "")]


def test_the_lowest_seed_counts_whichever_ends_first() -> None:
    trial = Trial(LATE)
    first, second = trial.next_options(), trial.next_options()
    assert [(options.seed, options.nodes) for options in (first, second)] == [(1, 3), (2, 5)]
    trial.note(Outcome(options=second, counts=Counts(), rule="one vote"), True)
    assert not trial.is_over(200), "the run of a lower seed is not over"
    trial.note(Outcome(options=first, counts=Counts(), rule="log matching"), True)
    assert trial.is_over(200)
    assert trial.caught is not None
    assert trial.caught.rule == "log matching"


def test_the_page_holds_one_row_for_each_in_the_order_of_the_rules() -> None:
    page = f"# Testing\n\n{BEGIN}\nold\n{END}\n\nmore\n"
    names = ["no_loyalty", "acknowledgements_of_other_terms"]
    trials = [Trial(MUTANTS[name]) for name in names]
    trials[0].caught = Outcome(options=Options(seed=7, nodes=5), counts=Counts(), rule="one vote", at_s=12.34)
    written = write_table(page, trials, 200, complete=True)
    rows = [line for line in written.splitlines() if line.startswith("| G")]
    assert [row.split("|")[1].strip() for row in rows] == ["G1a", "G5d"]
    assert rows[1].endswith("| 7 | 5 | one vote | 12.3 |")
    assert "**not within 200**" in rows[0]
    assert written.startswith("# Testing\n")
    assert written.endswith("\n\nmore\n")
    assert "old" not in written

    again = write_table(written, [Trial(MUTANTS["no_pre_vote"])], 200, complete=False)
    rows = [line for line in again.splitlines() if line.startswith("| G")]
    assert [row.split("|")[1].strip() for row in rows] == ["G1a", "G5c", "G5d"], "others stay"


def test_a_page_without_a_place_for_it_is_refused() -> None:
    with pytest.raises(ValueError, match="no place"):
        write_table("# Testing\n", [], 200, complete=True)


def test_a_row_says_how_it_was_caught() -> None:
    assert row_of(Trial(NEVER), 6) == "| G1a | `never` | Breaks it. | **not within 6** | | | |\n"
