"""Kinds of steps that one service writes and the workers of another do; all others are their service's own business."""

from __future__ import annotations

from typing import Final

# The subject is the id of a user whose account is erased: what the orders hold of the person is to go. Orders that are
# under way keep their addresses until their ends, but not past the moment that the argument `by_ms` says; in a step
# without it, that is when the step is due.
FORGET_CUSTOMER: Final = "forget-customer"
