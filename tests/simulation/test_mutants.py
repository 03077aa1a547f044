"""Every rule has a mutant or says why it needs none; each mutant leaves a working cluster, and some are caught here.

That all are caught is what `make mutants` shows, and the table in docs/testing.md says after how many seeds.
"""

from __future__ import annotations

import ast
from collections import Counter
from types import ModuleType

import pytest

from kvstore.raft.guard import Guard
from tests.raft_cluster import Cluster
from tests.simulation.mutants import MUTANTS, Mutant, Outdated, Patches
from tests.simulation.mutants.rules import PAGE, Rule, keeper_of, read_rules

RULES = read_rules(PAGE.read_text(encoding="utf-8"))
KVSTORE = PAGE.parents[1] / "kvstore"
# What a node's durability rests on; the engine's storage keeps its own promises (docs/testing.md).
ON_DISK = ("raft/*.py", "server/*.py", "state/*.py", "backup.py")
STEPS = {"sync", "sync_dir", "rename", "replace"}
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
    assert {f"D{number}" for number in range(1, 27)} <= numbers
    assert {f"X{number}" for number in range(1, 17)} <= numbers


def steps_in(source: str) -> dict[str, set[str]]:
    """What functions do that makes something durable, by qualified name; what they define inside counts as theirs."""
    found: dict[str, set[str]] = {}

    def look(node: ast.AST, within: str) -> None:
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not is_function:
                look(child, f"{within}.{child.name}".lstrip("."))
                continue
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute):
                step, of = child.func.attr, ast.unparse(child.func.value)
                is_text = step == "replace" and all(isinstance(arg, ast.Constant) for arg in child.args)
                if step in STEPS and not is_text and not of.endswith("structs"):
                    found.setdefault(within, set()).add(step)
            look(child, within)

    look(ast.parse(source), "")
    return found


def test_every_step_to_the_disk_has_a_rule() -> None:
    """A function that makes something durable has at least a row D for each kind of step that it takes."""
    rows = Counter((rule.file, rule.name) for rule in RULES.values() if rule.id[0] == "D")
    steps = {
        (str(path.relative_to(KVSTORE)), name): kinds
        for part in ON_DISK
        for path in sorted(KVSTORE.glob(part))
        for name, kinds in steps_in(path.read_text(encoding="utf-8")).items()
    }
    assert steps["raft/wal.py", "Wal._create_segment"] == {"sync", "rename", "sync_dir"}
    assert {where: kinds for where, kinds in steps.items() if rows[where] < len(kinds)} == {}


def test_steps_are_found_and_told_from_other_calls_of_their_names() -> None:
    source = """
class Log:
    async def close(self):
        text.replace("_", " ")
        msgspec.structs.replace(options, name=name)
        with lock:
            self._files.replace(path, data)
        def later():
            [file.sync() for file in files]
file.sync()
def end(files):
    files.rename(old, new) and files.sync_dir(".")
"""
    assert steps_in(source) == {
        "Log.close": {"replace", "sync"},
        "": {"sync"},
        "end": {"rename", "sync_dir"},
    }


def test_every_bullet_seam_and_step_that_protects_something_has_a_mutant() -> None:
    """Those that have none are told one by one, so that none loses its mutant unseen; the page says why."""
    with_mutant = {number_of(rule.id) for rule in RULES.values() if rule.mutant}
    assert {number_of(rule_id) for rule_id in RULES} - with_mutant == {
        *("S1", "S2", "S4", "S6", "S9"),  # they replace the engine's own ways, and protect nothing by themselves
        *("D7", "D12", "D16", "D20"),  # each is held by another: D1 and S5c, G4d, an assertion, a unit test
        "D14",  # the fake disk cannot lose a directory
        *("D23", "D24", "D25"),  # D1 and its like wait for them; S5c mends it; nobody was promised what it syncs
        "D26",  # no simulated run restores or recovers
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
