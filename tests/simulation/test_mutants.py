"""Every rule has a mutant or says why it needs none; each mutant leaves a working cluster, and some are caught here.

That all are caught is what `make mutants` shows, and the table in docs/testing.md says after how many seeds.
"""

from __future__ import annotations

from types import ModuleType

import pytest

from kvstore.raft.guard import Guard
from tests.raft_cluster import Cluster
from tests.simulation.mutants import MUTANTS, Mutant, Outdated, Patches
from tests.simulation.mutants.rules import PAGE, Rule, keeper_of, read_rules

RULES = read_rules(PAGE.read_text(encoding="utf-8"))
_TABLE = "## The rules, and the mutant that breaks each\n\n| id | rule | kept in | broken by |\n|---|---|---|---|\n"


def number_of(rule_id: str) -> str:
    return rule_id.rstrip("abcdefghijklmnopqrstuvwxyz")


def test_every_rule_has_a_mutant_or_a_reason() -> None:
    assert len(RULES) > 80
    by_rule = {mutant.rule: mutant.name for mutant in MUTANTS.values()}
    assert len(by_rule) == len(MUTANTS), "two mutants break one rule"
    assert {rule.id: rule.mutant for rule in RULES.values() if rule.mutant} == by_rule


def test_every_bullet_seam_and_step_has_a_rule() -> None:
    """The guard's bullets in design section 6 and its numbered seams; durability and requests have at least these."""
    numbers = {number_of(rule_id) for rule_id in RULES}
    assert {f"G{number}" for number in range(1, 12)} <= numbers
    assert {f"S{number}" for number in range(1, 10)} <= numbers
    assert {f"D{number}" for number in range(1, 12)} <= numbers


def test_every_bullet_seam_and_step_that_protects_something_has_a_mutant() -> None:
    """Those that have none are told one by one, so that none loses its mutant unseen; the page says why."""
    with_mutant = {number_of(rule.id) for rule in RULES.values() if rule.mutant}
    assert {number_of(rule_id) for rule_id in RULES} - with_mutant == {
        *("S1", "S2", "S4", "S6", "S9"),  # they replace the engine's own ways, and protect nothing by themselves
        *("D7", "D12", "D16", "D20"),  # each is held by another: D1 and S5c, G4d, an assertion, a unit test
    }


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.id)
def test_the_code_that_keeps_a_rule_is_where_the_page_says(rule: Rule) -> None:
    assert keeper_of(rule) is not None


@pytest.mark.parametrize(
    "row",
    [
        "| G1a | A rule. | `raft/guard.py Guard` | |",
        "| G1a | A rule. | `raft/guard.py Guard` | nothing |",
        "| G1a | A rule. | `raft/guard.py Guard` | nothing: why |",
        "| G1a | A rule. | somewhere | `no_pre_vote` |",
        "| G1a | A rule. | `raft/guard.py Guard` | `one` |\n| G1a | A rule. | `raft/guard.py Guard` | `two` |",
    ],
)
def test_a_row_that_says_too_little_is_refused(row: str) -> None:
    with pytest.raises(ValueError, match=r"row|neither|twice"):
        read_rules(_TABLE + row)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=lambda mutant: mutant.name)
def test_a_mutant_leaves_a_working_cluster_and_no_trace(mutant: Mutant) -> None:
    before = {owner: dict(vars(owner)) for owner in _owners(mutant)}
    assert before, "it changes nothing"
    with mutant.applied():
        cluster = Cluster()
        cluster.start("a", "b", "c")
        cluster.commit("one", "two", "three")
        cluster.time.advance(2.0)
        cluster.commit("four")
        assert {node.failure for node in cluster.nodes.values()} == {None}
        assert all(cluster.machine(name).payloads == [b"one", b"two", b"three", b"four"] for name in cluster.nodes)
    for owner, names in before.items():
        assert dict(vars(owner)) == names


def _owners(mutant: Mutant) -> list[type | ModuleType]:
    """The classes and modules that a mutant changes."""

    class Noting(Patches):
        def __init__(self) -> None:
            super().__init__()
            self.owners: list[type | ModuleType] = []

        def replace(self, owner: type | ModuleType, name: str, value: object) -> None:
            self.owners.append(owner)
            super().replace(owner, name, value)

        def override(self, owner: type, name: str, value: object) -> None:
            self.owners.append(owner)
            super().override(owner, name, value)

    noting = Noting()
    mutant.patch(noting)
    noting.undo()
    return noting.owners


def test_a_mutant_whose_code_has_changed_says_so() -> None:
    patches = Patches()
    with pytest.raises(Outdated, match="0 times"):
        patches.rewrite(Guard, "tick", ("what never stood there", "pass"))
    with pytest.raises(Outdated, match="no_such_rule"):
        patches.rewrite(Guard, "no_such_rule", ("a", "b"))
    with pytest.raises(Outdated, match="times"):
        patches.rewrite(Guard, "_append_entries", ("return", "pass"))
