"""Figures and report, on made-up data."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import pytest

from tests.chaos.campaign import Options, promises
from tests.chaos.meter import Kind, Span, by_kind, latency, longest_gap, slowest, throughput
from tests.chaos.plot import draw, sort_of
from tests.chaos.report import ChaosReport, clock, markdown, write_report
from tests.chaos.schedule import ROUND

# An acknowledgement every tenth of a second, but for an outage from 10 to 12.
ACKNOWLEDGED = [at / 10 for at in range(101)] + [12 + at / 10 for at in range(100)]


@pytest.mark.parametrize(
    ("begin", "end", "gap_s"),
    [
        (0.0, 9.0, 0.1),
        (9.95, 10.0, 0.1),
        (5.0, 15.0, 2.0),
        (10.5, 11.0, 2.0),  # the span lies inside the gap: the gap is what clients saw
        (12.05, 14.0, 0.1),
        (21.0, 25.0, 3.1),  # nothing ever came after it
        (-3.0, 5.0, 3.0),
    ],
)
def test_the_longest_gap_that_overlaps_a_span(begin: float, end: float, gap_s: float) -> None:
    assert longest_gap(ACKNOWLEDGED, begin, end) == pytest.approx(gap_s, abs=0.11)


def test_without_any_acknowledgement_the_whole_span_is_a_gap() -> None:
    assert longest_gap([], 3.0, 5.0) == 2.0


def spans(kind: str, *unavailable_s: float) -> list[Span]:
    return [
        Span(number, kind, "n1", 10.0 * number, 10.0 * number + 2, 10.0 * number + 4, gap_s, 2 * gap_s)
        for number, gap_s in enumerate(unavailable_s, start=1)
    ]


def test_median_p95_and_longest_by_kind() -> None:
    found = by_kind([*spans("b", 5.0), *spans("a", *(number / 100 for number in range(100, 0, -1)))])
    assert found == [Kind("a", 100, 0.5, 0.95, 1.0, 2.0), Kind("b", 1, 5.0, 5.0, 5.0, 10.0)]


def test_the_slowest_operation_that_ended_in_a_span() -> None:
    assert slowest([1.0, 2.0, 3.0, 4.0], [0.9, 0.1, 0.3, 0.8], 1.5, 3.0) == 0.3
    assert slowest([1.0, 2.0], [0.9, 0.1], 2.5, 3.0) == 0.0


def test_throughput_and_latency_by_window() -> None:
    acknowledged_at = [0.01, 0.02, 0.15, 1.95]
    assert throughput(acknowledged_at, 0.35).per_second == [20.0, 10.0, 0.0, 0.0]
    found = latency(acknowledged_at, [0.001, 0.002, 0.003, 0.5], 3.0)
    assert found.p50_ms == [2.0, 500.0, None]
    assert found.p99_ms == [3.0, 500.0, None]


def report(lasted_s: float = 500.0) -> ChaosReport:
    found = [*spans("kill the leader", 0.2, 0.4, 0.3), *spans("isolate the leader", 1.0)]
    acknowledged_at = [at / 10 for at in range(int(10 * lasted_s))]
    return ChaosReport(
        command="python -m tests.chaos --minutes 2 --seed 7",
        options=Options(minutes=2, seed=7),
        started="2026-01-01 00:00 UTC",
        machine="2 cores",
        lasted_s=lasted_s,
        kinds=by_kind(found),
        promises=promises(found, Options(minutes=2)),
        violations=[],
        judged={"ledger": 1, "bank": 4},
        digest="0123456789abcdef0123",
        acknowledged=len(acknowledged_at),
        unknown=1,
        unavailable=2,
        refused=3,
        per_second=10.0,
        p50_ms=1.5,
        p99_ms=30.0,
        longest_calm_s=0.04,
        longest_lag_s=0.01,
        spans=found,
        throughput=throughput(acknowledged_at, lasted_s),
        latency=latency(acknowledged_at, [0.002] * len(acknowledged_at), lasted_s),
    )


def test_the_report_says_what_was_promised_measured_and_how_to_repeat_it() -> None:
    text = markdown(report())
    assert "No violation." in text
    assert "python -m tests.chaos --minutes 2 --seed 7" in text
    assert "| kill the leader | 3 | 0.30 | 0.40 | 0.40 | 0.80 |" in text
    assert "| at least 3 leader kills | 3 | yes |" in text
    assert "| histories of `bank` hold | 4 judged | yes |" in text
    assert "| 2 | 0:20 | kill the leader | n1 | 2.0 s | after 2.0 s | 0.40 s |" in text


def test_a_report_of_a_failure_leads_with_it() -> None:
    failed = msgspec.structs.replace(report(), violations=["replicas are equal: they are not"], digest="")
    text = markdown(failed)
    assert "**1 violations.**" in text
    assert text.index("replicas are equal: they are not") < text.index("## Promises")
    assert "| replicas equal at the end | not compared | **no** |" in text


def test_what_is_written_can_be_read_again(tmp_path: Path) -> None:
    written = report()
    write_report(written, tmp_path)
    assert msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=ChaosReport) == written
    assert (tmp_path / "report.md").read_text() == markdown(written)


@pytest.mark.parametrize("lasted_s", [3.0, 500.0])
def test_the_plot_is_a_picture_with_every_fault_in_it(lasted_s: float, tmp_path: Path) -> None:
    draw(report(lasted_s), tmp_path / "chaos.svg")
    picture = (tmp_path / "chaos.svg").read_text()
    ElementTree.fromstring(picture)
    assert "kvstore under faults" in picture


def test_every_kind_of_fault_has_a_colour() -> None:
    sorts = {sort_of(entry.fault.kind) for entry in ROUND}
    assert sorts == {"leader killed", "killed or paused", "network", "disk", "members, restarts, hand-over"}


def test_clock() -> None:
    assert [clock(0), clock(61.9), clock(1200)] == ["0:00", "1:01", "20:00"]
