"""What the walk tells: each step with what it took, for people; or figures as JSON, for programs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape


class Step(Struct):
    name: str
    duration_ms: float
    detail: str


class Figures(Struct):
    """What `--json` prints. Durations after the kill are counted from the SIGKILL."""

    passed: bool = False
    failure: str = ""
    steps: list[Step] = []
    killed: str = ""
    new_leader: str = ""
    kill_to_order_ms: float = 0.0
    kill_to_read_ms: float = 0.0
    kill_to_back_ms: float = 0.0


class Report:
    def __init__(self, as_json: bool) -> None:
        self.figures = Figures()
        self._as_json = as_json
        # Its own output may be one of several that a process manager merges: no cursor movements.
        self._console = Console(quiet=as_json, highlight=False, soft_wrap=True)

    def say(self, text: str = "") -> None:
        """A line for people. Text that came from elsewhere must be escaped."""
        self._console.print(text)

    def plain(self, text: str) -> None:
        """A line as it stands, to be copied."""
        self._console.print(text, markup=False, highlight=False)

    def waiting(self, what: str, why: str) -> None:
        self._console.print(f"  [dim]… {escape(what)}: {escape(why)}[/]")

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Times what runs inside, and tells it when it is done. `detail` may be set inside."""
        step = Step(name, 0.0, "")
        started = time.perf_counter()
        yield step
        self.add(step, (time.perf_counter() - started) * 1000)

    def add(self, step: Step, duration_ms: float) -> None:
        step.duration_ms = round(duration_ms, 1)
        self.figures.steps.append(step)
        number = len(self.figures.steps)
        detail = f"  [dim]{escape(step.detail)}[/]" if step.detail else ""
        self._console.print(
            f"[green]✓[/] {number:>2}  {escape(step.name):<34} [bold]{_duration(duration_ms):>9}[/]{detail}"
        )

    def fail(self, name: str, why: str) -> None:
        self.figures.failure = f"{name}: {why}"
        self._console.print(f"[red]✗[/]     {escape(name)}: {escape(why)}")

    def end(self) -> None:
        if self._as_json:
            print(msgspec.json.encode(self.figures).decode(), flush=True)


def _duration(duration_ms: float) -> str:
    return f"{duration_ms / 1000:.2f} s" if duration_ms >= 1000 else f"{duration_ms:.1f} ms"
