"""Trace context (W3C, https://www.w3.org/TR/trace-context/): which trace a request and what follows from it belong to.

A request's `traceparent` is taken as it came, where it is valid, and one is made where there is none. From then on it
is the context's: every line that is logged has it, every durable step that is written remembers it, the worker that
does the step takes it up again, and a handler passes it on (`traceparent()`) to whom it calls. Nothing is recorded
here, so the parent in it stays the caller's, as the standard has it for whoever only passes on. Answers say nothing of
it.
"""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar
from typing import Final

HEADER: Final = "traceparent"

# Version, trace, parent, flags. Versions to come may append fields; what we know of them is read, and "ff" is none.
_VALID: Final = re.compile(
    r"\A(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z"
)
_CHARS_MAX: Final = 256  # a version of today has 55

_current: ContextVar[str] = ContextVar("traceparent", default="")


def traceparent() -> str:
    """The trace that this belongs to; empty where it belongs to none."""
    return _current.get()


def begin(header: str | None) -> str:
    """From here on this context belongs to the trace that `header` names, or to a new one."""
    taken = _taken(header) if header is not None else None
    if taken is None:
        ids = secrets.token_hex(24)
        # Not sampled: nobody has recorded anything of it.
        taken = f"00-{ids[:32]}-{ids[32:]}-00"
    _current.set(taken)
    return taken


def resume(remembered: str) -> None:
    """The same for what was written down; empty is no trace."""
    _current.set(remembered)


def _taken(header: str) -> str | None:
    match = _VALID.match(header) if len(header) <= _CHARS_MAX else None
    if match is None or (match[1] == "00" and match[5]):
        return None
    # Passed on as the version that we know.
    return header if match[1] == "00" else f"00-{match[2]}-{match[3]}-{match[4]}"
