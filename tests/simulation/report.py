"""How a campaign and a replay are shown: progress, violations, tables, and the story in colours.

On a terminal progress is a bar; into a file or a pipe it is a line now and then.
"""

from __future__ import annotations

import re
import time

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tests.simulation.autopsy import replay_command
from tests.simulation.campaign import NODES, Floor, Summary
from tests.simulation.outcome import Counts, Outcome

# The stories of the first few violations; of the others what replays them.
STORIES_TOLD = 3
VERDICTS_TOLD = 40
LINE_EVERY_S = 30.0
# (field of Counts, what it is called)
ROWS = (
    ("runs", "runs"),
    ("virtual_s", "virtual seconds"),
    ("faulty_s", "  of which with faults"),
    ("led_s", "    of which with a leader"),
    ("elections", "elections"),
    ("crashes", "crashes"),
    ("snapshot_installs", "snapshot installs"),
    ("membership_changes", "membership changes"),
    ("hand_overs", "hand-overs of leadership"),
    ("entries", "committed entries"),
    ("client_operations", "client operations"),
    ("acknowledged", "  acknowledged"),
    ("unknown", "  of unknown outcome"),
)


class Display:
    """Shows a campaign while it runs: hand `noted` and `tick` to `campaign`."""

    def __init__(self, console: Console, seeds: int) -> None:
        self._console = console
        self._told = 0
        self._shown_at_s = time.monotonic()
        self._bar = Progress(
            TextColumn("seeds"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,  # no thread: processes are forked while it runs
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=seeds)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tick(self, summary: Summary) -> None:
        state = (
            f"{_count(len(summary.violations), 'violation')}, "
            f"{summary.runs / max(summary.elapsed_s, 0.001):.2f} seeds/s, "
            f"{summary.pace():.1f} cluster-seconds per second and core"
        )
        if self._console.is_terminal:
            self._bar.update(self._task, completed=summary.runs, description=state)
            self._bar.refresh()
        elif time.monotonic() - self._shown_at_s >= LINE_EVERY_S:
            self._shown_at_s = time.monotonic()
            left_s = summary.elapsed_s * (summary.seeds - summary.runs) / max(1, summary.runs)
            about = f", about {left_s / 60:.0f} min left" if summary.runs else ""
            self._console.print(f"{summary.runs}/{summary.seeds} seeds, {state}{about}", highlight=False)

    def noted(self, summary: Summary, outcome: Outcome) -> None:
        self.tick(summary)
        if outcome.rule:
            self._told += 1
            print_violation(self._console, outcome, with_story=self._told <= STORIES_TOLD)


def print_violation(console: Console, outcome: Outcome, *, with_story: bool) -> None:
    """The whole story, or what it is and what replays it."""
    options = outcome.options
    console.print(
        Text.assemble(
            ("VIOLATION", "bold red"),
            f"  seed {options.seed}, {options.nodes} nodes, at {outcome.at_s:.2f} virtual seconds: {outcome.rule}",
        ),
        soft_wrap=True,
    )
    text = outcome.story if with_story else ""
    if not text.startswith("VIOLATION"):  # an autopsy says all of this itself
        message = outcome.violation.splitlines() or [""]
        lines = [*(message if with_story else message[:1]), f"replay it: {replay_command(options)}"]
        text = "\n".join([*(f"  {line}" for line in lines), text]).rstrip()
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if with_story:
        console.print()


def print_summary(console: Console, summary: Summary) -> None:
    sizes = [nodes for nodes in NODES if nodes in summary.counts]
    total = summary.total
    console.print(
        f"{summary.runs:,} of {summary.seeds:,} seeds in {_duration(summary.elapsed_s)}, {summary.jobs} at a time"
        + (", then interrupted" if summary.is_interrupted else ""),
        highlight=False,
    )
    table = _table("what happened", *(f"{nodes} nodes" for nodes in sizes), "together")
    for name, called in ROWS:
        values = [getattr(summary.counts[nodes], name) for nodes in sizes] + [getattr(total, name)]
        table.add_row(called, *(f"{value:,.0f}" for value in values))
    for what, of_processor in (("real second and core", False), ("second on a processor", True)):
        pace = [summary.pace(nodes, of_processor=of_processor) for nodes in (*sizes, None)]
        table.add_row(f"cluster-seconds per {what}", *(f"{value:.1f}" for value in pace))
    console.print(table)
    print_faults(console, total, summary)
    if summary.runs:
        _print_floors(console, summary)
    if summary.violations:
        print_verdicts(console, summary)
    else:
        console.print(f"[green]no violation[/green] in {_count(summary.runs, 'run')}", highlight=False)


def print_faults(console: Console, counts: Counts, summary: Summary | None = None) -> None:
    table = _table("fault", "times", *(["in runs"] if summary else []))
    for kind, times in sorted(counts.faults.items(), key=lambda each: (-each[1], each[0])):
        table.add_row(kind, f"{times:,}", *([f"{summary.runs_with[kind]:,}"] if summary else []))
    console.print(table)


def _print_floors(console: Console, summary: Summary) -> None:
    title = "what has to be there" if summary.is_full else "what a full campaign has to have (not judged here)"
    table = _table(title, "is", "floor", "")
    for floor in summary.floors():
        table.add_row(floor.what, _least(floor), f"{floor.least:,.0f}", _mark(floor, summary.is_full))
    console.print(table)


def _least(floor: Floor) -> str:
    if floor.value == float("inf"):
        return "-"
    return f"{floor.value:,.1f}" + (f" (seed {floor.seed})" if floor.seed else "")


def _mark(floor: Floor, is_judged: bool) -> str:
    if not is_judged:
        return ""
    return "[green]met[/green]" if floor.is_met else "[bold red]MISSED[/bold red]"


def print_verdicts(console: Console, summary: Summary) -> None:
    """The violations in short."""
    table = _table("violated", "seed", "nodes", "at s", "replay")
    for outcome in summary.violations[:VERDICTS_TOLD]:
        options = outcome.options
        replay = replay_command(options)
        table.add_row(outcome.rule, str(options.seed), str(options.nodes), f"{outcome.at_s:.2f}", replay)
    console.print(table)
    if len(summary.violations) > VERDICTS_TOLD:
        console.print(f"… and {len(summary.violations) - VERDICTS_TOLD:,} more", highlight=False)
    console.print(f"[bold red]{_count(len(summary.violations), 'violation')}[/bold red]", highlight=False)


def print_outcome(console: Console, outcome: Outcome, seconds: float) -> None:
    """How a replay ended: its counts and its verdict."""
    counts = outcome.counts
    console.print()
    table = _table("what happened", "")
    for name, called in ROWS[1:]:
        table.add_row(called, f"{getattr(counts, name):,.0f}")
    console.print(table)
    print_faults(console, counts)
    console.print(
        f"{counts.virtual_s:.1f} virtual seconds in {seconds:.1f} real ones; digest {outcome.story_digest}",
        highlight=False,
    )
    if outcome.rule:
        console.print()
        print_violation(console, outcome, with_story=True)
    else:
        console.print("[green]no violation[/green]")


# --- the story on a terminal ------------------------------------------------------------------------------------------

_LINE = re.compile(r"(?P<time> *[\d.]+)  (?P<who>\S+) +(?P<what>.*?)(?P<fields>  \w+=.*)?$", re.DOTALL)
_NODES = ("cyan", "magenta", "yellow", "blue", "green", "bright_cyan", "bright_magenta")
_OTHERS = {"faults": "red", "checks": "bold red", "operator": "bold", "world": "bold"}
_TELLING = re.compile(r"VIOLATION|leads|killed|power lost|stopped|refused to start|heals|removed|installed")


def coloured(line: str) -> Text:
    """A line of the story: time and fields dim, a colour for each teller, what changes most in bold."""
    match = _LINE.match(line)
    if match is None:
        return Text(line)
    who, what = match["who"], match["what"]
    return Text.assemble(
        (match["time"], "dim"),
        "  ",
        (f"{who:<9}", _style_of(who)),
        " ",
        (what, "bold" if _TELLING.search(what) else ""),
        (match["fields"] or "", "dim"),
    )


def _style_of(who: str) -> str:
    if who[:1] == "n" and who[1:].isdigit():
        return _NODES[int(who[1:]) % len(_NODES)]
    return _OTHERS.get(who, "dim")


# --- words ------------------------------------------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 or column == "replay" else "right", no_wrap=True)
    return table


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
