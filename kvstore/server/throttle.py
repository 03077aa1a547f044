"""One connection's rate: whose turn it is now, who waits, and who has waited for too long. Pure: no clock, no timer.

Rules
- A request costs a token. `rate` of them come in a second; what is not used is kept, up to a second's worth; nothing is
  ever overdrawn. So in `t` seconds no more than `rate * (t + 1)` requests have their turn.
- A new connection has one token, so connecting again gains nothing but that.
- Signs of life go first: a client that sent too much is slowed down, yet keeps its leases, and hears that its node
  lives. `SIGNS_PER_S` of them have tokens of their own, so that they leave something for the rest where `rate` is
  small; more of them cost what others cost.
- Whoever has waited for `HOLD_S` is handed out as late, to be refused. Clients give up on what waits for long: past its
  rate, a line without an end would spend every turn on requests that nobody waits for any more.
- What waits is bounded in bytes. Past that nothing more should be read; by the rule before, that ends by itself.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from kvstore import codec

# One burst of a second's worth goes at once, so one of three seconds' worth is served in full. Well below a client's
# default timeout, so that it hears why, and tries again.
HOLD_S = 2.0
# Three leases of the shortest kind, and a client that asks again and again whether a slow node lives (some four times a
# second, `client/protocol.py`).
SIGNS_PER_S = 10
# As much as a connection may have in flight. A request counts for its bytes and what keeping it adds: some 30,000 small
# ones, more than our client has under way (`client/call.py`, `client/session.py`), so that its signs of life are read.
HELD_BYTES_MAX = 8 * 1024 * 1024
_HELD_OVERHEAD_BYTES = 256
# A turn comes no more often than this: thousands of requests a second go in portions. And no less often: whoever
# could not go when its turn came, as the node was busy, looks again.
TURN_MIN_S, TURN_MAX_S = 0.01, 0.05


class _Bucket:
    __slots__ = ("_as_of", "_rate", "_tokens")

    def __init__(self, rate: int, now: float) -> None:
        self._rate = float(rate)
        self._tokens = 1.0
        self._as_of = now

    def pay(self, now: float) -> bool:
        """Spend a token, if there is one."""
        self._earn(now)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def missing_s(self, now: float) -> float:
        """How long until there is one; 0 if there is."""
        self._earn(now)
        return max(0.0, (1.0 - self._tokens) / self._rate)

    def _earn(self, now: float) -> None:
        self._tokens = min(self._rate, self._tokens + (now - self._as_of) * self._rate)
        self._as_of = now


class _Held(NamedTuple):
    body: bytes
    since: float


class Throttle:
    """What one connection sent and is not handled yet. Times are those of one clock, in seconds. All costs are O(1),
    but for `leave`."""

    __slots__ = ("_for_all", "_for_signs", "_held_bytes", "_others", "_signs")

    def __init__(self, rate: int, now: float) -> None:
        """`rate`: requests a second, at least 1."""
        self._for_all = _Bucket(rate, now)
        self._for_signs = _Bucket(SIGNS_PER_S, now)
        self._signs: deque[_Held] = deque()
        self._others: deque[_Held] = deque()
        self._held_bytes = 0

    @property
    def waiting(self) -> bool:
        return bool(self._signs or self._others)

    @property
    def full(self) -> bool:
        return self._held_bytes >= HELD_BYTES_MAX

    def add(self, body: bytes, is_sign: bool, now: float) -> None:
        """A request joins the line, even if it is its turn at once."""
        (self._signs if is_sign else self._others).append(_Held(body, now))
        self._held_bytes += len(body) + _HELD_OVERHEAD_BYTES

    def next(self, now: float) -> bytes | None:
        """The one whose turn it is; it has paid."""
        if self._signs:
            has_paid = self._for_signs.pay(now) or self._for_all.pay(now)
            return self._leaves(self._signs) if has_paid else None
        return self._leaves(self._others) if self._others and self._for_all.pay(now) else None

    def late(self, now: float) -> bytes | None:
        """One that has waited for `HOLD_S`; it pays nothing."""
        for line in (self._signs, self._others):
            if line and now - line[0].since >= HOLD_S:
                return self._leaves(line)
        return None

    def leave(self) -> list[bytes]:
        """All that wait leave, in the order in which they would have had their turn."""
        bodies = [held.body for line in (self._signs, self._others) for held in line]
        self._signs.clear()
        self._others.clear()
        self._held_bytes = 0
        return bodies

    def turn_in_s(self, now: float) -> float:
        """When to ask again, while somebody waits."""
        missing_s = self._for_all.missing_s(now)
        return TURN_MAX_S if missing_s == 0.0 else min(max(missing_s, TURN_MIN_S), TURN_MAX_S)

    def _leaves(self, line: deque[_Held]) -> bytes:
        body = line.popleft().body
        self._held_bytes -= len(body) + _HELD_OVERHEAD_BYTES
        return body


def is_sign_of_life(frame: codec.ClientFrame) -> bool:
    """Whether a client sends it to keep what it has: it asks whether the node lives, or keeps its session or a lease.
    (A digest is no such thing: the node hashes its whole state for it.)"""
    if type(frame) is codec.StatusRequest:
        return not frame.digest
    return type(frame) is codec.Write and codec.is_keep_alive(frame.request)
