"""What a measurement promises in absolute figures: a value, its bound, and the lines that say whether it is held.

(`report.Threshold` compares two systems of one run; a bound stands alone.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table


class Bound(Struct, frozen=True, kw_only=True):
    """`below` or `at_least` is the bound; where both are None the figure is for information."""

    name: str
    value: float
    unit: str
    digits: int = 1
    below: float | None = None
    at_least: float | None = None

    @property
    def held(self) -> bool:
        if self.below is not None and not self.value < self.below:
            return False
        return self.at_least is None or self.value >= self.at_least


def show(bounds: Sequence[Bound], title: str, console: Console) -> int:
    """Print all of them. 0: each is held; 1: one is not."""
    table = Table("what", "is", "bound", "held", title=title, title_justify="left", box=None)
    table.columns[1].justify = "right"
    for bound in bounds:
        required = ""
        if bound.below is not None:
            required = f"below {bound.below:g} {bound.unit}"
        elif bound.at_least is not None:
            required = f"at least {bound.at_least:g} {bound.unit}"
        held = "[green]yes[/green]" if bound.held else "[red]NO[/red]"
        value = f"{bound.value:,.{bound.digits}f} {bound.unit}"
        table.add_row(bound.name, value.strip(), required.strip(), held if required else "")
    console.print(table)
    return 0 if all(bound.held for bound in bounds) else 1


def write_json(path: Path | None, report: Struct, console: Console) -> None:
    """The whole report, for a program; nothing where no file was asked for. Paths become text."""
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report, enc_hook=str), indent=2) + b"\n")
        console.print(f"written to {path}")
