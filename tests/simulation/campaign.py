"""Many seeds: what came of them, added up, and held against what a campaign has to show.

A proof by simulation says as much as happened in it. So a campaign counts, and a full one (a thousand seeds or more,
both sizes of cluster, full length, the product as it is) fails also when too little happened: see `floors`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import msgspec
from msgspec import Struct, field

from tests.simulation.outcome import Counts, Options, Outcome
from tests.simulation.pool import Run, outcomes

NODES = (3, 5)
FULL_SEEDS = 1000
FULL_DURATION_S = 60.0
# What each seed of a full campaign has to show.
EACH_VIRTUAL_S = 60.0
EACH_OPERATIONS = 500
EACH_KINDS = 4
# What a thousand seeds have to show together.
PER_THOUSAND = {"elections": 5000, "crashes": 2500, "snapshot_installs": 250, "membership_changes": 250}
# Virtual seconds of a cluster of three per real second and core.
PACE_MIN = 10.0
# A cluster that is always down does nothing wrong. Faults take a leader a few times a minute, and more of them than a
# quorum is left of is down together now and then.
LED_PERCENT_MIN = 60.0
ACKNOWLEDGED_PERCENT_MIN = 90.0


def nodes_of(seed: int) -> int:
    """A campaign's odd seeds are clusters of three, its even ones of five."""
    return 3 if seed % 2 else 5


class Least(Struct):
    """The smallest of something among the runs that went to their end, and in which."""

    value: float = float("inf")
    seed: int = 0

    def note(self, value: float, seed: int) -> None:
        if value < self.value:
            self.value, self.seed = value, seed


class Floor(Struct, frozen=True):
    """Something that must not be less; `seed` is where it was least."""

    what: str
    value: float
    least: float
    seed: int = 0

    @property
    def is_met(self) -> bool:
        return self.value >= self.least


class Summary(Struct, kw_only=True):
    """Everything that came of a campaign so far."""

    seeds: int
    duration_s: float = FULL_DURATION_S
    jobs: int = 1
    is_product: bool = True  # no mutant, no fault left out, both sizes
    counts: dict[int, Counts] = field(default_factory=dict)  # nodes -> added up
    real_s: dict[int, float] = field(default_factory=dict)  # nodes -> real seconds of one process
    cpu_s: dict[int, float] = field(default_factory=dict)  # nodes -> of these, seconds on a processor
    runs_with: Counter[str] = field(default_factory=Counter)  # kind of fault -> runs in which it happened
    virtual_s: Least = field(default_factory=Least)
    operations: Least = field(default_factory=Least)
    kinds: Least = field(default_factory=Least)
    violations: list[Outcome] = field(default_factory=list)
    elapsed_s: float = 0.0
    is_interrupted: bool = False

    def note(self, outcome: Outcome) -> None:
        counts, nodes, seed = outcome.counts, outcome.options.nodes, outcome.options.seed
        self.counts.setdefault(nodes, Counts()).add(counts)
        self.real_s[nodes] = self.real_s.get(nodes, 0.0) + outcome.real_s
        self.cpu_s[nodes] = self.cpu_s.get(nodes, 0.0) + outcome.cpu_s
        kinds = [kind for kind, times in counts.faults.items() if times]
        self.runs_with.update(kinds)
        if outcome.rule:
            self.violations.append(outcome)
            return  # it ended early: what it lacks says nothing
        self.virtual_s.note(counts.virtual_s, seed)
        self.operations.note(counts.client_operations, seed)
        self.kinds.note(len(kinds), seed)

    @property
    def total(self) -> Counts:
        total = Counts()
        for counts in self.counts.values():
            total.add(counts)
        return total

    @property
    def runs(self) -> int:
        return sum(counts.runs for counts in self.counts.values())

    def pace(self, nodes: int | None = None, *, of_processor: bool = False) -> float:
        """Virtual seconds of a cluster per real second and core; of all sizes together if none is named.
        `of_processor`: per second that its process had a core to itself."""
        sizes = [nodes] if nodes is not None else list(self.counts)
        virtual_s = sum(self.counts[size].virtual_s for size in sizes if size in self.counts)
        taken_s = self.cpu_s if of_processor else self.real_s
        seconds = sum(taken_s.get(size, 0.0) for size in sizes)
        return virtual_s / seconds if seconds else 0.0

    @property
    def is_full(self) -> bool:
        """Whether it has to show what a full campaign has to."""
        return self.is_product and self.seeds >= FULL_SEEDS and self.duration_s >= FULL_DURATION_S

    def floors(self) -> list[Floor]:
        """What has to be there, and what is; of a smaller campaign scaled to a thousand seeds, for comparison."""
        total, runs = self.total, max(1, self.runs)
        floors = [
            Floor("virtual seconds in each seed", self.virtual_s.value, EACH_VIRTUAL_S, self.virtual_s.seed),
            Floor("client operations in each seed", self.operations.value, EACH_OPERATIONS, self.operations.seed),
            Floor("kinds of fault in each seed", self.kinds.value, EACH_KINDS, self.kinds.seed),
        ]
        for name, least in PER_THOUSAND.items():
            per_thousand = getattr(total, name) * 1000 / runs
            floors.append(Floor(f"{name.replace('_', ' ')} per 1,000 seeds", per_thousand, least))
        led = 100.0 * total.led_s / max(1.0, total.faulty_s)
        acknowledged = 100.0 * total.acknowledged / max(1, total.client_operations)
        floors.append(Floor("percent of the time with faults that there is a leader", led, LED_PERCENT_MIN))
        floors.append(Floor("percent of operations acknowledged", acknowledged, ACKNOWLEDGED_PERCENT_MIN))
        if 3 in self.counts:
            floors.append(Floor("cluster-seconds per real second and core, 3 nodes", self.pace(3), PACE_MIN))
        return floors

    @property
    def exit_code(self) -> int:
        """0: nothing was wrong. 1: a violation, or a full campaign that lacks something. 130: interrupted."""
        if self.violations or (not self.is_interrupted and self.is_full and not all(f.is_met for f in self.floors())):
            return 1
        return 130 if self.is_interrupted else 0

    def to_json(self) -> bytes:
        """Everything, for a program to read."""
        written: dict[str, Any] = {
            "seeds": self.seeds,
            "duration_s": self.duration_s,
            "jobs": self.jobs,
            "elapsed_s": self.elapsed_s,
            "interrupted": self.is_interrupted,
            "total": self.total,
            "by_nodes": {str(nodes): counts for nodes, counts in sorted(self.counts.items())},
            "cluster_s_per_core_s": {str(nodes): self.pace(nodes) for nodes in sorted(self.counts)},
            "cluster_s_per_cpu_s": {str(nodes): self.pace(nodes, of_processor=True) for nodes in sorted(self.counts)},
            "runs_with_fault": dict(self.runs_with),
            # JSON knows no infinity: before the first run has ended there is no least.
            "floors": [floor for floor in self.floors() if floor.value != float("inf")],
            "violations": self.violations,
            "exit_code": self.exit_code,
        }
        return msgspec.json.format(msgspec.json.encode(written), indent=2)


def options_of(
    seeds: Sequence[int], *, nodes: int | None, duration_s: float, mutant: str, without: tuple[str, ...]
) -> Iterator[Options]:
    """The runs of a campaign; `nodes` None: both sizes, by seed."""
    for seed in seeds:
        yield Options(seed=seed, nodes=nodes or nodes_of(seed), duration_s=duration_s, mutant=mutant, without=without)


def campaign(
    run: Run,
    todo: Sequence[Options],
    jobs: int,
    *,
    noted: Callable[[Summary, Outcome], None] = lambda _summary, _outcome: None,
    tick: Callable[[Summary], None] = lambda _summary: None,
    fail_fast: bool = False,
) -> Summary:
    """Run all of them. `noted` hears of each outcome, `tick` a few times a second; Ctrl-C ends it early."""
    first = todo[0]
    summary = Summary(
        seeds=len(todo),
        duration_s=first.duration_s,
        jobs=jobs,
        is_product=not first.mutant and not first.without and {options.nodes for options in todo} >= set(NODES),
    )
    began_s = time.monotonic()

    def on_tick() -> None:
        summary.elapsed_s = time.monotonic() - began_s
        tick(summary)

    try:
        with closing(outcomes(run, todo, jobs, tick=on_tick)) as ending:
            for outcome in ending:
                summary.note(outcome)
                summary.elapsed_s = time.monotonic() - began_s
                noted(summary, outcome)
                if fail_fast and outcome.rule:
                    summary.is_interrupted = summary.runs < len(todo)
                    break
    except KeyboardInterrupt:
        summary.is_interrupted = True
    summary.elapsed_s = time.monotonic() - began_s
    return summary
