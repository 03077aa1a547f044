"""What a caller gives in seconds: for how long a call, a lease or a wait may last.

What is no number is a `TypeError` that names the argument, and what is out of its bounds (nan is, of all) a
`ValueError`; both before anything is sent.
"""

from __future__ import annotations

from kvstore.model import LEASE_TTL_MS_MAX, LEASE_TTL_MS_MIN

# Longer than any outage that a caller would sit out, and short enough that a forgotten call cannot live for ever.
TIMEOUT_MAX_S = 3600.0


def checked_timeout(timeout: float) -> float:
    _check_number("timeout", timeout)
    if not 0 < timeout <= TIMEOUT_MAX_S:
        raise ValueError(f"a timeout is above 0 and at most {TIMEOUT_MAX_S:.0f} seconds, not {timeout!r}")
    return timeout


def ttl_ms(ttl_s: float) -> int:
    """A lease's time to live in whole milliseconds."""
    _check_number("ttl_s", ttl_s)
    if not LEASE_TTL_MS_MIN <= ttl_s * 1000 <= LEASE_TTL_MS_MAX:
        least_s, most_s = LEASE_TTL_MS_MIN / 1000, LEASE_TTL_MS_MAX / 1000
        raise ValueError(f"a lease lives at least {least_s:g} and at most {most_s:.0f} seconds, not {ttl_s!r}")
    return round(ttl_s * 1000)


def checked_wait(wait_s: float | None) -> float | None:
    """None: as long as it takes."""
    if wait_s is None:
        return None
    _check_number("wait_s", wait_s)
    if not wait_s >= 0:
        raise ValueError(f"wait_s is 0 or more, not {wait_s!r}")
    return wait_s


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
