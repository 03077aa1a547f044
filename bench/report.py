"""Thresholds and the table: what a run says to a reader."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.peers import etcd, postgres
from bench.results import (
    Measurement,
    Report,
    Threshold,
    median_p50_ms,
    median_per_second,
    merge_rounds,
    pick,
)
from bench.websystem import Workload

OURS = "kvstore (3 nodes)"
GIVEN = "kvstore (at the given endpoints)"
_WORKLOADS = ("put", "get", "get-local", "order-hot", "order-1000", *Workload)


def thresholds(measurements: Sequence[Measurement]) -> tuple[Threshold, ...]:
    """What we promise beside the peers, from the medians over the rounds."""
    orders = [
        median_per_second(pick(measurements, postgres.SYSTEM, workload, postgres.CONNECTIONS))
        for workload in postgres.TRANSACTIONS
    ]
    return (
        threshold(
            "puts at 256 connections, as a multiple of etcd's (JSON gateway)",
            median_per_second(pick(measurements, OURS, "put", 256)),
            median_per_second(pick(measurements, etcd.SYSTEM, "put", 256)),
            "/s",
            at_least=1.5,
        ),
        threshold(
            "orders of one hot product at 64 connections, as a multiple of PostgreSQL's fastest transaction",
            median_per_second(pick(measurements, OURS, "order-hot", 64)),
            max((one for one in orders if one is not None), default=None),
            "/s",
            at_least=4.0,
        ),
        threshold(
            "p50 of a put at one connection, as a share of etcd's (JSON gateway)",
            median_p50_ms(pick(measurements, OURS, "put", 1)),
            median_p50_ms(pick(measurements, etcd.SYSTEM, "put", 1)),
            "ms",
            at_most=1.0,
        ),
    )


def threshold(
    name: str,
    ours: float | None,
    theirs: float | None,
    unit: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Threshold:
    """The verdict on ours / theirs; `at_least` or `at_most` is the bound. Not measured where one of the two is None."""
    required = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
    if ours is None or theirs is None:
        return Threshold(name=name, ours=ours, theirs=theirs, unit=unit, ratio=None, required=required, met=None)
    ratio = ours / theirs
    met = ratio >= at_least if at_least is not None else at_most is not None and ratio <= at_most
    return Threshold(name=name, ours=ours, theirs=theirs, unit=unit, ratio=ratio, required=required, met=met)


def show(report: Report, console: Console, ours: str = OURS) -> None:
    """`ours` is the system that the others are compared with."""
    machine = report.machine
    console.print(
        f"\n{machine.cpu}, {machine.cores} cores (shared by nodes and load), {machine.kernel}, "
        f"Python {machine.python}, {machine.filesystem}, fdatasync p50 {machine.fdatasync_512_p50_ms:.2f} ms (512 B), "
        f"{machine.fdatasync_4096_p50_ms:.2f} ms (4 KiB)\n"
        f"{report.started}: {report.command}; windows of {report.window_s:g} s after {report.warmup_s:g} s",
        highlight=False,
    )
    merged = merge_rounds(report.measurements)
    console.print(_table(merged, ours))
    for one in report.generator_ceiling:
        cpu = one.cpu_us_per_op["generator"]
        console.print(
            f"generator alone ({one.workload}, {one.connections} x {one.pipeline}): {one.per_second:,.0f}/s against a "
            f"server that only answers, {cpu:.1f} µs of CPU each: one core of it would send {1e6 / cpu:,.0f}/s",
            highlight=False,
        )
    noisy = [one for one in merged if one.others_cores is not None and one.others_cores > 0.1]
    if noisy:
        worst = max(one.others_cores or 0.0 for one in noisy)
        console.print(
            f"[yellow]Other processes used up to {worst:.2f} cores during {len(noisy)} of {len(merged)} points "
            f"(marked *): those figures are too low.[/yellow]",
            highlight=False,
        )
    for threshold in report.thresholds:
        console.print(_verdict(threshold), highlight=False)


def _table(merged: Sequence[Measurement], our_name: str) -> Table:
    table = Table(title="One window per line; where rounds repeat, the median one", title_justify="left")
    for column in ("workload", "conns", "system"):
        table.add_column(column, no_wrap=True)
    for column in ("per second", "ours is", "p50 ms", "p99 ms", "p99.9 ms"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("CPU µs per operation")
    ours = {(one.workload, one.connections, one.pipeline): one for one in merged if one.system == our_name}
    last = None
    for one in sorted(merged, key=lambda one: _order(one, our_name)):
        # A variant of a workload ("order-hot, 2 rows") stands beside what ours does under the plain name.
        point = (one.workload.partition(",")[0], one.connections, one.pipeline)
        if last is not None and point != last:
            table.add_section()
        last = point
        mine = ours.get(point)
        ratio = f"{mine.per_second / one.per_second:.2f}x" if mine is not None and one.system != our_name else ""
        table.add_row(
            one.workload,
            f"{one.connections} x {one.pipeline}" if one.pipeline > 1 else str(one.connections),
            one.system,
            f"{one.per_second:,.0f}{'*' if (one.others_cores or 0.0) > 0.1 else ''}",
            ratio,
            *("" if value is None else f"{value:.3f}" for value in (one.p50_ms, one.p99_ms, one.p999_ms)),
            ", ".join(f"{name} {value:.1f}" for name, value in one.cpu_us_per_op.items()),
            style="bold" if one.system == our_name else None,
        )
    return table


def _order(one: Measurement, our_name: str) -> tuple[int, int, int, bool, str, str]:
    workload = one.workload.partition(",")[0]
    rank = _WORKLOADS.index(workload) if workload in _WORKLOADS else len(_WORKLOADS)
    return rank, one.pipeline, one.connections, one.system != our_name, one.system, one.workload


def _verdict(threshold: Threshold) -> str:
    if threshold.met is None:
        return f"not measured: {threshold.name}"
    word = "[green]met[/green]    " if threshold.met else "[red]NOT MET[/red]"
    digits = ",.0f" if threshold.unit == "/s" else ".3f"
    return (
        f"{word} {threshold.name}: {threshold.ratio:.2f} ({threshold.required}); "
        f"ours {threshold.ours:{digits}}, theirs {threshold.theirs:{digits}} {threshold.unit}"
    )


def command_line(arguments: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "bench", *arguments])
