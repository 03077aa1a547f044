"""The picture of docs/services.md: the state machines of an order as an SVG, drawn from their tables.

Where a state stands is written here, since a grid by hand reads better than one that a program finds; which states and
which arrows there are comes from the tables. A state without a place, or a place without a state, is a `ValueError`.

It has a background of its own, and follows the reader's light or dark mode, so it can be read on any page.
"""

from __future__ import annotations

from enum import StrEnum
from html import escape
from typing import Any, Final, NamedTuple

from services.orders.states import ORDER, PAYMENT, REFUND, RETURN, SHIPMENT, StateMachine

BOX_W: Final = 132
BOX_H: Final = 34
COLUMN: Final = 190
ROW: Final = 92
MARGIN: Final = 24
TITLE: Final = 34

# Column and row of each state; the point where a machine begins stands left of its first state.
Place = tuple[float, float]
_ORDER: Final[dict[str, Place]] = {
    "pending_payment": (0.6, 0),
    "confirmed": (2.6, 0),
    "completed": (4.6, 0),
    "expired": (0.6, 1.2),
    "cancelling": (2.6, 1.2),
    "cancelled": (4.6, 1.2),
}
_PAYMENT: Final[dict[str, Place]] = {
    "created": (0.6, 0),
    "authorising": (1.6, 0),
    "unknown": (2.3, 1.15),
    "requires_action": (3.0, 2.3),
    "authorised": (3.9, 0),
    "capturing": (4.9, 0),
    "captured": (5.9, 0),
    "partially_captured": (4.9, 1.15),
    "failed": (1.6, 3.4),
    "voiding": (4.4, 2.3),
    "voided": (5.9, 2.3),
}
_REFUND: Final[dict[str, Place]] = {
    "pending": (0.6, 0), "succeeded": (1.85, 0), "failed": (1.85, 0.7), "settled_outside": (1.85, 1.5),
}  # fmt: skip
_SHIPMENT: Final[dict[str, Place]] = {"shipped": (0.6, 0), "delivered": (1.85, 0)}
_RETURN: Final[dict[str, Place]] = {
    "requested": (0.6, 0), "approved": (1.85, 0), "received": (3.1, 0), "rejected": (1.85, 0.7),
}  # fmt: skip

# How an arrow leaves its first box and enters its second one, where straight from side to side would not do:
# the sides (l, r, t, b) with an offset along each, and how far along the arrow its label stands.
Bend = tuple[str, float, str, float, float]
_BENDS: Final[dict[tuple[str, str, str], Bend]] = {
    ("order", "pending_payment", "expired"): ("b", 0, "t", 0, 0.5),
    ("order", "pending_payment", "cancelling"): ("r", 8, "l", 0, 0.6),
    ("order", "confirmed", "cancelling"): ("b", 0, "t", 0, 0.5),
    ("payment", "created", "failed"): ("b", 0, "l", 0, 0.35),
    ("payment", "authorising", "unknown"): ("b", 40, "t", -20, 0.5),
    ("payment", "authorising", "requires_action"): ("b", 0, "l", 0, 0.45),
    ("payment", "authorising", "failed"): ("b", -40, "t", -40, 0.6),
    ("payment", "unknown", "requires_action"): ("b", 30, "t", -40, 0.55),
    ("payment", "unknown", "authorised"): ("r", 0, "b", -45, 0.35),
    ("payment", "unknown", "failed"): ("b", -20, "t", 20, 0.6),
    ("payment", "requires_action", "authorised"): ("t", 20, "b", -10, 0.35),
    ("payment", "requires_action", "failed"): ("b", 0, "r", 0, 0.5),
    ("payment", "requires_action", "voiding"): ("r", 0, "l", 0, 0.5),
    ("payment", "authorised", "voiding"): ("b", 40, "t", 0, 0.62),
    ("payment", "voiding", "partially_captured"): ("t", 45, "b", 20, 0.5),
    ("payment", "voiding", "captured"): ("r", -8, "b", 30, 0.62),
    ("payment", "partially_captured", "capturing"): ("t", -30, "b", -30, 0.3),
    ("payment", "capturing", "partially_captured"): ("b", 30, "t", 30, 0.3),
    ("refund", "pending", "failed"): ("b", 0, "l", 0, 0.6),
    ("refund", "failed", "settled_outside"): ("b", 0, "t", 0, 0.5),
    ("return", "requested", "rejected"): ("b", 0, "l", 0, 0.6),
}

_STYLE: Final = """
  .page { fill: #fbfbfa; stroke: #d8d8d4 }
  .box { fill: #e8eef6; stroke: #55708f }
  .end { fill: #e9f1e6; stroke: #5d7f55 }
  .arrow { fill: none; stroke: #6b6f76; stroke-width: 1.3 }
  .head { fill: #6b6f76 }
  text { font: 12px ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
  .state { font-weight: 600; text-anchor: middle }
  .event { font-size: 11px; text-anchor: middle; fill: #4c5157 }
  .event { paint-order: stroke; stroke: #fbfbfa; stroke-width: 4px }
  .title { font-size: 14px; font-weight: 700 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #16191d; stroke: #33383f }
    .box { fill: #1f2b3a; stroke: #7f9dc0 }
    .end { fill: #202c20; stroke: #86ab7c }
    .arrow { stroke: #9aa0a8 }
    .head { fill: #9aa0a8 }
    text { fill: #e4e7eb }
    .event { fill: #b4bac2; stroke: #16191d }
  }
"""


class Panel(NamedTuple):
    """One machine at a point of the picture."""

    machine: StateMachine[Any, Any]
    places: dict[str, Place]
    x: float
    y: float


_PANELS: Final = (
    Panel(ORDER, _ORDER, 0, 0),
    Panel(PAYMENT, _PAYMENT, 0, 230),
    Panel(REFUND, _REFUND, 0, 660),
    Panel(SHIPMENT, _SHIPMENT, 0, 885),
    Panel(RETURN, _RETURN, 530, 660),
)
WIDTH: Final = 1310
HEIGHT: Final = 1000


def draw() -> str:
    """The SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title">',
        '<title id="title">The states of an order and of what belongs to it</title>',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="head" d="M0,0.5 L8,4 L0,7.5 Z"/></marker></defs>',
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>',
    ]
    for panel in _PANELS:
        parts += _panel(panel)
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel) -> list[str]:
    machine, places = panel.machine, panel.places
    states = {str(step.target) for step in machine.transitions}
    if states != set(places):
        raise ValueError(f"the picture of the {machine.noun} has other states than its table: {states ^ set(places)}")
    events: dict[tuple[str, str], list[str]] = {}
    for step in machine.transitions:
        events.setdefault((str(step.source or ""), str(step.target)), []).append(_label(step.event))
    leading = {source for source, _ in events}
    parts = [f'<text class="title" x="{panel.x + MARGIN}" y="{panel.y + TITLE}">{machine.noun.capitalize()}</text>']
    arrows, labels = [], []
    for (source, target), names in events.items():
        path, at = _arrow(panel, source, target)
        arrows.append(f'<path class="arrow" d="{path}" marker-end="url(#head)"/>')
        label = escape(", ".join(names))
        labels.append(f'<text class="event" x="{at[0]:.0f}" y="{at[1]:.0f}">{label}</text>')
    parts += arrows
    for state, place in places.items():
        x, y = _centre(panel, place)
        kind = "box" if state in leading else "end"
        parts.append(
            f'<rect class="{kind}" x="{x - BOX_W / 2:.0f}" y="{y - BOX_H / 2:.0f}" width="{BOX_W}" height="{BOX_H}" '
            'rx="6"/>'
        )
        parts.append(f'<text class="state" x="{x:.0f}" y="{y + 4:.0f}">{state.replace("_", " ")}</text>')
    return parts + labels


def _label(event: StrEnum) -> str:
    return event.removeprefix("be_").replace("_", " ")


def _centre(panel: Panel, place: Place) -> tuple[float, float]:
    return panel.x + MARGIN + BOX_W / 2 + place[0] * COLUMN, panel.y + TITLE + MARGIN + BOX_H / 2 + place[1] * ROW


def _arrow(panel: Panel, source: str, target: str) -> tuple[str, tuple[float, float]]:
    """The path, and where its label stands."""
    there = _centre(panel, panel.places[target])
    if not source:
        x, y = there[0] - BOX_W / 2, there[1]
        return f"M{x - 80:.0f},{y:.0f} L{x:.0f},{y:.0f}", (x - 42, y - 7)
    here = _centre(panel, panel.places[source])
    out, out_by, into, into_by, along = _BENDS.get((panel.machine.noun, source, target), ("r", 0, "l", 0, 0.5))
    (x1, y1), (dx1, dy1) = _side(here, out, out_by)
    (x2, y2), (dx2, dy2) = _side(there, into, into_by)
    pull = max(abs(x2 - x1), abs(y2 - y1)) * 0.45
    c1, c2 = (x1 + dx1 * pull, y1 + dy1 * pull), (x2 + dx2 * pull, y2 + dy2 * pull)
    points = ((x1, y1), c1, c2, (x2, y2))
    x, y = (_bezier([point[axis] for point in points], along) for axis in (0, 1))
    flat = abs(y2 - y1) < 1
    path = f"M{x1:.0f},{y1:.0f} C{c1[0]:.0f},{c1[1]:.0f} {c2[0]:.0f},{c2[1]:.0f} {x2:.0f},{y2:.0f}"
    return path, (x, y - 7 if flat else y + 4)


def _side(centre: tuple[float, float], side: str, by: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """A point on the border of a box, and the direction that leads away from it."""
    x, y = centre
    match side:
        case "l":
            return (x - BOX_W / 2, y + by), (-1, 0)
        case "r":
            return (x + BOX_W / 2, y + by), (1, 0)
        case "t":
            return (x + by, y - BOX_H / 2), (0, -1)
        case "b":
            return (x + by, y + BOX_H / 2), (0, 1)
    raise ValueError(f"a box has no side {side}")


def _bezier(values: list[float], t: float) -> float:
    a, b, c, d = values
    u = 1 - t
    return u * u * u * a + 3 * u * u * t * b + 3 * u * t * t * c + t * t * t * d
