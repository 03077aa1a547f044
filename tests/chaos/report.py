"""What a campaign came to: `report.json` with every figure, and `report.md` with the plot for people."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.results import percentile
from tests.chaos.campaign import Campaign, Options, Promise, promises
from tests.chaos.meter import Kind, Latency, Span, Throughput, by_kind, latency, throughput

PLOT = "chaos.svg"


class ChaosReport(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds since the campaign began, unless their names say otherwise."""

    command: str
    options: Options
    started: str
    machine: str
    lasted_s: float
    kinds: list[Kind]
    promises: list[Promise]
    violations: list[str]
    judged: dict[str, int]
    """Histories by workload; all of them hold, unless there is a violation."""
    digest: str
    acknowledged: int
    unknown: int
    unavailable: int
    refused: int
    per_second: float
    p50_ms: float
    p99_ms: float
    longest_calm_s: float
    longest_lag_s: float
    spans: list[Span]
    throughput: Throughput
    latency: Latency


def report_of(campaign: Campaign, command: str, started: str) -> ChaosReport:
    meter = campaign.meter
    ordered = sorted(meter.latency_s)
    return ChaosReport(
        command=command,
        options=campaign.options,
        started=started,
        machine=f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}",
        lasted_s=campaign.lasted_s,
        kinds=by_kind(campaign.spans),
        promises=promises(campaign.spans, campaign.options),
        violations=[str(violation) for violation in campaign.violations],
        judged=campaign.judged,
        digest=campaign.digest,
        acknowledged=len(ordered),
        unknown=meter.unknown,
        unavailable=meter.unavailable,
        refused=meter.refused,
        per_second=len(ordered) / campaign.lasted_s if campaign.lasted_s else 0.0,
        p50_ms=1000 * percentile(ordered, 0.5) if ordered else 0.0,
        p99_ms=1000 * percentile(ordered, 0.99) if ordered else 0.0,
        longest_calm_s=campaign.longest_calm_s,
        longest_lag_s=campaign.longest_lag_s,
        spans=campaign.spans,
        throughput=throughput(meter.acknowledged_at, campaign.lasted_s),
        latency=latency(meter.acknowledged_at, meter.latency_s, campaign.lasted_s),
    )


def write_report(report: ChaosReport, out: Path) -> None:
    """`report.json` and `report.md` in a directory; the plot is `plot.draw`'s."""
    (out / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    (out / "report.md").write_text(markdown(report))


def markdown(report: ChaosReport) -> str:
    options = report.options
    outcome = "No violation." if not report.violations else f"**{len(report.violations)} violations.**"
    lines = [
        "# Chaos campaign",
        "",
        f"{outcome} {len(report.spans)} faults of {len(report.kinds)} kinds in {report.lasted_s / 60:.1f} minutes on "
        f"{options.nodes} nodes, seed {options.seed}; {report.started}; {report.machine}.",
        "",
        f"    {report.command}",
        "",
        "repeats it: the same faults in the same order. Who leads at each, and what the machine makes of it, differs.",
        "",
    ]
    for violation in report.violations:
        lines += ["```", violation, "```", ""]
    lines += ["## Promises", "", "| promise | measured | kept |", "|---|---|---|"]
    lines += [f"| {p.text} | {p.measured} | {'yes' if p.kept else '**no**'} |" for p in report.promises]
    lines += [f"| histories of `{name}` hold | {count} judged | yes |" for name, count in sorted(report.judged.items())]
    same = f"digest `{report.digest[:16]}…` on all" if report.digest else "not compared"
    lines += [f"| replicas equal at the end | {same} | {'yes' if report.digest else '**no**'} |", ""]
    lines += [
        "## Unavailability by kind of fault",
        "",
        "Seconds: the longest time between two consecutive acknowledged writes of one client that writes all the time, "
        "from the fault's first effect until all nodes were together again. Where a fault takes the majority, or the "
        "clients' way to the leader, it holds at least as long as the fault.",
        "",
        "| fault | count | median | p95 | longest | slowest operation of any client |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {k.name} | {k.count} | {k.median_s:.2f} | {k.p95_s:.2f} | {k.longest_s:.2f} | {k.slowest_s:.2f} |"
        for k in report.kinds
    ]
    lines += [
        f"| (no fault) | | | | {report.longest_calm_s:.2f} | |",
        "",
        f"The clients' own process was held up for {report.longest_lag_s:.2f} s at most; no gap is measured finer than "
        "that.",
        "",
        "## Load",
        "",
        f"{report.acknowledged} operations acknowledged ({report.per_second:.0f} a second, latency p50 "
        f"{report.p50_ms:.1f} ms, p99 {report.p99_ms:.0f} ms, faults included); {report.unknown} ended in doubt, "
        f"{report.unavailable} without effect, {report.refused} were refused. The workers pause between their "
        "operations: this is no measure of what the store can do.",
        "",
        f"![Throughput and latency over time, with the faults]({PLOT})",
        "",
        "## Faults, one by one",
        "",
        "| # | at | fault | whom | held | whole again | unavailable |",
        "|---:|---:|---|---|---:|---:|---:|",
    ]
    lines += [_row(span) for span in report.spans]
    return "\n".join(lines) + "\n"


def _row(span: Span) -> str:
    return (
        f"| {span.number} | {clock(span.struck_at)} | {span.kind} | {span.note} | "
        f"{span.ended_at - span.struck_at:.1f} s | after {span.whole_at - span.ended_at:.1f} s | "
        f"{span.unavailable_s:.2f} s |"
    )


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def worst(spans: Sequence[Span]) -> Span | None:
    return max(spans, key=lambda span: span.unavailable_s, default=None)
