"""How a command of the bench ends, whatever it measures."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console

from bench.results import BenchError


def exit_code(measure: Callable[[], int], console: Console) -> int:
    """What `measure` says; 2 and the reason where it could not be done; 130 for Ctrl-C and SIGTERM."""
    try:
        # However we are told to end, what we started ends first.
        signal.signal(signal.SIGTERM, _interrupted)
        return measure()
    except BenchError as error:
        console.print(f"[red]bench:[/red] {error}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130


def _interrupted(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt
