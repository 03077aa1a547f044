"""The picture of a campaign: throughput and latency over time, with the faults.

One strip for each few minutes, so that an outage of a second can be seen. Each strip has the throughput above, the
latency below, and the faults as bands through both, with their numbers as in the report's table; the colour says what
sort a fault is of.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tests.chaos.meter import LATENCY_WINDOW_S, WINDOW_S, Span
from tests.chaos.report import ChaosReport, clock

STRIP_S = 240.0
# Colours that stay apart for most kinds of colour blindness (Okabe and Ito).
_SORTS = {
    "leader killed": "#D55E00",
    "killed or paused": "#E69F00",
    "network": "#56B4E9",
    "disk": "#CC79A7",
    "members, restarts, hand-over": "#009E73",
}
_THROUGHPUT, _P50, _P99 = "#404040", "#0072B2", "#B03A2E"


def sort_of(kind: str) -> str:
    """Which sort of fault a kind is, for its colour."""
    if kind == "kill the leader":
        return "leader killed"
    if kind.startswith(("kill", "pause")):
        return "killed or paused"
    if "disk" in kind:
        return "disk"
    if kind.startswith(("rolling", "hand over", "a node joins", "a dead node")):
        return "members, restarts, hand-over"
    return "network"


def draw(report: ChaosReport, path: Path) -> None:
    """Write the picture; its format is the path's suffix."""
    strips = max(1, math.ceil(report.lasted_s / STRIP_S))
    length_s = max(report.lasted_s, 1.0) / strips
    figure = Figure(figsize=(18, 1.2 + 3.6 * strips), layout="constrained")
    heights = [height for _ in range(strips) for height in (1.4, 1.0)]
    axes: Any = figure.subplots(2 * strips, 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    # The highest windows follow an outage, when all that waited is answered at once: they would press the rest flat.
    steady = sorted(report.throughput.per_second)
    top = 1.6 * max(steady[int(0.98 * (len(steady) - 1))] if steady else 0.0, 10.0)
    for number in range(strips):
        begin = number * length_s
        above, below = axes[2 * number, 0], axes[2 * number + 1, 0]
        _throughput(above, report, begin, length_s, top)
        _latency(below, report, begin, length_s)
        for axis in (above, below):
            axis.set_xlim(begin, begin + length_s)
            axis.margins(x=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(_tick_s(length_s)))
        above.tick_params(labelbottom=False)
        below.xaxis.set_major_formatter(lambda value, _: clock(value))
        _faults(above, below, report.spans, begin, begin + length_s, top)
    axes[-1, 0].set_xlabel("minutes since the campaign began")
    figure.suptitle(
        f"kvstore under faults: {report.options.nodes} nodes, seed {report.options.seed}, {len(report.spans)} faults",
        fontsize=14, fontweight="bold",
    )  # fmt: skip
    lines = [
        Patch(color=_THROUGHPUT, label="acknowledged operations per second (100 ms windows)"),
        Patch(color=_P50, label="latency p50 (1 s windows)"),
        Patch(color=_P99, label="latency p99"),
    ]
    bands = [Patch(color=colour, alpha=0.45, label=sort) for sort, colour in _SORTS.items()]
    figure.legend(handles=[*lines, *bands], loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    figure.savefig(path)


def _throughput(axis: Any, report: ChaosReport, begin: float, length_s: float, top: float) -> None:
    values = report.throughput.per_second[int(begin / WINDOW_S) : math.ceil((begin + length_s) / WINDOW_S)]
    moments = [begin + (at + 0.5) * WINDOW_S for at in range(len(values))]
    axis.fill_between(moments, values, step="mid", color=_THROUGHPUT, alpha=0.25, linewidth=0)
    axis.step(moments, values, where="mid", color=_THROUGHPUT, linewidth=0.6)
    axis.set_ylim(0, top)
    axis.set_ylabel("ops/s")


def _latency(axis: Any, report: ChaosReport, begin: float, length_s: float) -> None:
    window = slice(int(begin / LATENCY_WINDOW_S), math.ceil((begin + length_s) / LATENCY_WINDOW_S))
    for series, colour in ((report.latency.p50_ms, _P50), (report.latency.p99_ms, _P99)):
        values = [math.nan if value is None else value for value in series[window]]
        moments = [begin + (at + 0.5) * LATENCY_WINDOW_S for at in range(len(values))]
        axis.plot(moments, values, color=colour, linewidth=1.2)
    axis.set_yscale("log")
    axis.set_ylim(0.5, 20_000)
    axis.set_yticks([1, 10, 100, 1000, 10_000], ["1 ms", "10 ms", "100 ms", "1 s", "10 s"])
    axis.minorticks_off()
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)


def _faults(above: Any, below: Any, spans: list[Span], begin: float, end: float, top: float) -> None:
    numbered, height = -math.inf, 0
    for span in spans:
        if span.struck_at >= end or span.ended_at < begin:
            continue
        colour = _SORTS[sort_of(span.kind)]
        # At least as wide as can be seen.
        left, right = span.struck_at, max(span.ended_at, span.struck_at + 0.3)
        for axis in (above, below):
            axis.axvspan(left, right, color=colour, alpha=0.30, linewidth=0)
        if left >= begin:
            # Numbers that would touch stand one above the other.
            height = 1 - height if left - numbered < 0.012 * (end - begin) else 0
            numbered = left
            y = top * (1.0 + 0.07 * height)
            above.text(left, y, str(span.number), fontsize=7, color="#222222", ha="left", va="bottom", clip_on=False)


def _tick_s(length_s: float) -> float:
    return next(step for step in (1, 2, 5, 10, 15, 30, 60) if length_s / step <= 25)
