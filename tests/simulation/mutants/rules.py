"""The list of rules in docs/raft.md, read."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parents[3] / "docs" / "raft.md"
_HEADING = "## The rules, and the mutant that breaks each"
_ROW = re.compile(r"^\| ([GSDX]\d+[a-z]?) \| (.+?) \| `(\S+) (\S+)` \| (.+) \|$")
_MUTANT = re.compile(r"^`(\w+)`$")
_REASON = re.compile(r"^nothing\b[^:]*: (.{20,})$")


class Rule(NamedTuple):
    id: str
    text: str
    file: str  # that keeps it, below kvstore/
    name: str  # of the function there
    mutant: str  # empty: none breaks it, because of `reason`
    reason: str


def read_rules(page: str) -> dict[str, Rule]:
    """Raises ValueError for a row that is none."""
    rules: dict[str, Rule] = {}
    _, heading, section = page.partition(_HEADING)
    if not heading:
        raise ValueError(f"there is no section {_HEADING!r}")
    for line in section.split("\n## ")[0].splitlines():
        if not line.startswith("| ") or line.startswith("| id |"):
            continue
        row = _ROW.match(line)
        if row is None:
            raise ValueError(f"this row is no rule: {line}")
        rule_id, text, file, name, broken_by = row.groups()
        mutant, reason = _MUTANT.match(broken_by), _REASON.match(broken_by)
        if mutant is None and reason is None:
            raise ValueError(f"rule {rule_id} has neither a mutant nor a reason why it needs none")
        if rule_id in rules:
            raise ValueError(f"rule {rule_id} is there twice")
        rules[rule_id] = Rule(rule_id, text, file, name, mutant[1] if mutant else "", reason[1] if reason else "")
    return rules


def keeper_of(rule: Rule) -> Any:
    """The code that keeps it. Raises ImportError or AttributeError where that has moved."""
    module = importlib.import_module("kvstore." + rule.file.removesuffix(".py").replace("/", "."))
    kept: Any = module
    for part in rule.name.split("."):
        kept = getattr(kept, part)
    return kept
