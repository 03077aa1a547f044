"""The campaign itself, on runs that are not real: it must not miss a violation, nor a run that was lost."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from random import Random

import msgspec
import pytest
from rich.console import Console

from kvstore import Client, StartupError, Unavailable
from kvstore.server.node import ServerNode
from tests.simulation import __main__ as command
from tests.simulation import conduct
from tests.simulation.autopsy import NodeState, autopsy, autopsy_of, replay_command
from tests.simulation.campaign import Summary, campaign, nodes_of, options_of
from tests.simulation.checks import RULES, Checks
from tests.simulation.faults import FAULTS, FULL_MAX_S, NEED_TWO
from tests.simulation.machine import DISK_FAILURES
from tests.simulation.mutants import MUTANTS
from tests.simulation.mutation_table import BEGIN, END, Trial, write_table
from tests.simulation.outcome import Counts, Options, Outcome, Violation
from tests.simulation.pool import DIED, HANGS, RAISED, outcomes
from tests.simulation.report import coloured
from tests.simulation.shrink import shrink
from tests.simulation.story import EVENTS_PER_TELLER, Story
from tests.simulation.tap import tapped
from tests.simulation.world import World, run

ROOT = Path(__file__).parents[2]


def fine(options: Options) -> Outcome:
    """A run in which just enough happened."""
    counts = Counts(
        runs=1,
        virtual_s=60.0,
        faulty_s=60.0,
        led_s=36.0,
        elections=5,
        crashes=3,
        snapshot_installs=1,
        membership_changes=1,
        client_operations=500,
        acknowledged=450,
        faults=Counter(kill=3, partition=2, delay=1, reset=1),
    )
    return Outcome(options=options, counts=counts, real_s=3.0)


def with_seed(seed: int, other: Callable[[Options], Outcome]) -> Callable[[Options], Outcome]:
    """`fine`, but for one seed."""
    return lambda options: other(options) if options.seed == seed else fine(options)


def violating(options: Options) -> Outcome:
    outcome = fine(options)
    outcome.rule, outcome.violation, outcome.at_s = "election safety", "n1 and n2 lead in term 4", 12.5
    return outcome


def todo(seeds: int, **others: object) -> list[Options]:
    asked: dict[str, object] = {"nodes": None, "duration_s": 60.0, "mutant": "", "without": (), **others}
    return list(options_of(range(1, seeds + 1), **asked))  # type: ignore[arg-type]


# --- violations and what is lost --------------------------------------------------------------------------------------


def test_nothing_wrong_ends_with_0() -> None:
    summary = campaign(fine, todo(8), 2)
    assert (summary.runs, summary.exit_code, summary.violations) == (8, 0, [])


def test_a_violation_is_told_with_what_replays_it_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "_run_with", lambda: with_seed(7, violating))
    report = tmp_path / "report.json"
    assert command.main(["--seeds", "12", "--json", str(report)]) == 1
    told = capsys.readouterr().out
    assert "seed 7, 3 nodes, at 12.50 virtual seconds: election safety" in told
    assert "n1 and n2 lead in term 4" in told
    assert "make sim SEED=7 NODES=3" in told
    assert "12 of 12 seeds" in told
    written = json.loads(report.read_bytes())
    assert [violation["options"]["seed"] for violation in written["violations"]] == [7]
    assert (written["total"]["runs"], written["exit_code"]) == (12, 1)


def test_fail_fast_ends_at_the_first() -> None:
    summary = campaign(with_seed(1, violating), todo(500), 1, fail_fast=True)
    assert (summary.runs, len(summary.violations), summary.exit_code) == (1, 1, 1)


def killing(options: Options) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    return fine(options)


def exiting(options: Options) -> Outcome:
    os._exit(3)


def raising(options: Options) -> Outcome:
    raise KeyError("the simulation has a bug")


@pytest.mark.parametrize(
    ("run", "rule", "message"),
    [
        (killing, DIED, "while it ran seed 3, 3 nodes: killed by SIGKILL"),
        (exiting, DIED, "while it ran seed 3, 3 nodes: exit code 3"),
        (raising, RAISED, "KeyError: 'the simulation has a bug'"),
    ],
)
def test_a_run_that_is_lost_is_a_finding_with_its_seed(run: Callable[..., Outcome], rule: str, message: str) -> None:
    summary = campaign(with_seed(3, run), todo(6), 2)
    assert summary.runs == 6
    (lost,) = summary.violations
    assert (lost.options.seed, lost.rule, lost.violation) == (3, rule, message)
    assert summary.exit_code == 1


def standing_still(options: Options) -> Outcome:
    while True:
        time.sleep(0.01)


def test_a_run_without_end_is_a_finding_and_says_where_it_is() -> None:
    run = with_seed(2, standing_still)
    with closing(outcomes(run, todo(4), 2, bound=lambda _options: 0.5)) as ending:
        found = {outcome.options.seed: outcome for outcome in ending}
    assert [found[seed].rule for seed in (1, 2, 3, 4)] == ["", HANGS, "", ""]
    assert "standing_still" in found[2].story


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_with_what_there_is_and_leaves_no_process(ending: signal.Signals, tmp_path: Path) -> None:
    """Seeds 1 and 2 end, the others never do."""
    script = """
import os, sys, time
from tests.simulation import __main__ as command
from tests.simulation import conduct
from tests.simulation.test_campaign import fine

def run(options):
    if options.seed > 2:
        open(f"{sys.argv[1]}/pid.{options.seed}", "w").write(str(os.getpid()))
        time.sleep(600)
    return fine(options)

command._run_with = lambda: run
sys.argv = ["simulation", *sys.argv[1:]]
# Who runs the tests in the background has Ctrl-C ignored, and Python leaves it so.
command.signal.signal(command.signal.SIGINT, command.signal.default_int_handler)
command.signal.signal(command.signal.SIGTERM, command._interrupted)
sys.exit(command.main(["--seeds", "10", "--jobs", "2"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with process:
        try:
            until = time.monotonic() + 30
            while len(list(tmp_path.glob("pid.*"))) < 2:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < until
                time.sleep(0.01)
            process.send_signal(ending)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert err == ""
    assert "2 of 10 seeds" in out
    assert "then interrupted" in out
    assert process.returncode == 130
    for path in tmp_path.glob("pid.*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


# --- sums and floors --------------------------------------------------------------------------------------------------


def full(**others: object) -> Summary:
    """A full campaign that had just enough of everything, noted without running anything."""
    summary = Summary(seeds=1000)
    for options in todo(1000):
        outcome = fine(options)
        for name, value in others.items():
            setattr(outcome.counts if hasattr(outcome.counts, name) else outcome, name, value)
        summary.note(outcome)
    return summary


def test_half_of_the_seeds_have_three_nodes_and_half_have_five() -> None:
    sizes = Counter(options.nodes for options in todo(1000))
    assert sizes == {3: 500, 5: 500}
    assert {options.nodes for options in todo(10, nodes=5)} == {5}
    assert nodes_of(123) == 3


def test_sums_and_the_least_of_each() -> None:
    summary = Summary(seeds=3)
    for seed, operations, real_s in ((1, 700, 2.0), (2, 600, 6.0), (3, 650, 1.0)):
        outcome = fine(Options(seed=seed, nodes=nodes_of(seed)))
        outcome.counts.client_operations, outcome.real_s = operations, real_s
        summary.note(outcome)
    assert summary.total.client_operations == 1950
    assert summary.total.faults["kill"] == 9
    assert summary.runs_with["kill"] == 3
    assert (summary.operations.value, summary.operations.seed) == (600, 2)
    assert summary.pace(3) == pytest.approx(120 / 3)
    assert summary.pace(5) == pytest.approx(60 / 6)
    assert summary.pace() == pytest.approx(180 / 9)


def test_a_run_that_violated_is_no_measure_of_how_much_happens() -> None:
    summary = Summary(seeds=2)
    short = violating(Options(seed=1))
    short.counts.client_operations = 3
    summary.note(short)
    summary.note(fine(Options(seed=2, nodes=5)))
    assert (summary.operations.value, summary.operations.seed) == (500, 2)


def test_a_full_campaign_with_just_enough_passes() -> None:
    summary = full()
    assert summary.is_full
    # 3 crashes × 1,000 runs, and so on: the same as the floors, or a little more.
    assert all(floor.is_met for floor in summary.floors())
    assert summary.exit_code == 0


@pytest.mark.parametrize(
    ("lacking", "floor"),
    [
        ({"virtual_s": 59.9}, "virtual seconds in each seed"),
        ({"client_operations": 499}, "client operations in each seed"),
        ({"acknowledged": 449}, "percent of operations acknowledged"),
        ({"led_s": 35.9}, "percent of the time with faults that there is a leader"),
        ({"faults": Counter(kill=9, delay=9, reset=9, partition=0)}, "kinds of fault in each seed"),
        ({"elections": 4}, "elections per 1,000 seeds"),
        ({"crashes": 2}, "crashes per 1,000 seeds"),
        ({"snapshot_installs": 0}, "snapshot installs per 1,000 seeds"),
        ({"membership_changes": 0}, "membership changes per 1,000 seeds"),
        ({"real_s": 6.1}, "cluster-seconds per real second and core, 3 nodes"),
    ],
)
def test_a_full_campaign_that_lacks_something_fails(lacking: dict[str, object], floor: str) -> None:
    summary = full(**lacking)
    assert [each.what for each in summary.floors() if not each.is_met] == [floor]
    assert summary.exit_code == 1


def test_one_seed_below_the_floor_is_enough() -> None:
    summary = full()
    poor = fine(Options(seed=77))
    poor.counts.client_operations = 499
    summary.note(poor)
    (missed,) = [floor for floor in summary.floors() if not floor.is_met]
    assert (missed.what, missed.seed) == ("client operations in each seed", 77)


@pytest.mark.parametrize("change", [{"seeds": 999}, {"duration_s": 59.0}, {"is_product": False}])
def test_a_smaller_campaign_is_not_held_to_the_floors(change: dict[str, object]) -> None:
    summary = msgspec.structs.replace(full(elections=0), **change)
    assert not summary.is_full
    assert summary.exit_code == 0


def test_a_mutant_or_one_size_of_cluster_is_no_full_campaign() -> None:
    assert campaign(fine, todo(2), 1).is_product
    for others in ({"mutant": "m"}, {"without": ("kill",)}, {"nodes": 3}):
        assert not campaign(fine, todo(2, **others), 1).is_product


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_names_every_fault() -> None:
    """docs/testing.md has each kind of fault in its table, and no other."""
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    table = page.partition("| fault in the simulation |")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert sorted(named) == sorted(FAULTS)


def test_the_page_names_every_check() -> None:
    """Each rule that is checked after every step stands behind some promise."""
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    promises = page.partition("## What is promised")[2].partition("\n## ")[0]
    assert {*RULES, *conduct.RULES} - set(re.findall(r"(?<!\*)\*([^*|]+)\*(?!\*)", promises)) == set()


def test_the_story_on_the_page_is_told_by_the_command_beside_it() -> None:
    """Where this fails, the seed has become another run: look for another one with `--seeds 30 --fail-fast` instead of
    `--seed`, and let the page tell that one's story."""
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    section = page.partition("\n## How to replay a failure")[2].partition("\n## ")[0]
    told = section.partition("```\n")[2].partition("```")[0].splitlines()
    (replay,) = (line for line in told if line.startswith("replay it: "))
    arguments = _arguments(replay)
    # A process of its own: the hash seed is settled when Python starts.
    ended = subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1, ended.stdout[-1000:]
    lines = {line.rstrip() for line in ended.stdout.splitlines()}
    assert [line for line in told if line.strip() and line not in lines] == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_names_that_nothing_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--without", "kil"], ["--mutant", "no such"], ["--jobs", "-1"]):
        with pytest.raises(SystemExit) as refused:
            command.parse(["--seeds", "1", *arguments])
        assert refused.value.code == 2
    assert "no such fault: kil; there are: " in capsys.readouterr().err


def test_a_mutant_runs_with_its_own_sizes_and_faults_unless_others_are_asked_for() -> None:
    name = "sole_voter_commits_what_it_has_not_synced"
    own = MUTANTS[name].without
    assert own

    def options(*arguments: str) -> Options:
        return command._options(command.parse(["--seed", "4", "--mutant", name, *arguments]), 4)

    for asked, expected in (
        ([], Options(seed=4, nodes=1, mutant=name, without=own)),
        (["--nodes", "3", "--without", "kill"], Options(seed=4, nodes=3, mutant=name, without=("kill",))),
        (["--nodes", "both", "--without", ""], Options(seed=4, nodes=5, mutant=name)),
    ):
        assert options(*asked) == expected
        assert options(*_arguments(replay_command(expected))[2:]) == expected, "what is printed replays it"
    assert "--without" not in replay_command(options())


def test_the_table_says_which_mutants_ran_otherwise() -> None:
    names = ["sole_voter_commits_what_it_has_not_synced", "no_pre_vote", "acknowledgements_of_other_terms"]
    page = write_table(f"{BEGIN}{END}", [Trial(MUTANTS[name]) for name in names], 200, complete=True)
    notes = page.partition("| rule |")[0]
    assert "clusters of 1 only, without `delay`, " in notes
    assert f"- clusters of 5 only: `{names[2]}`\n" in notes
    assert names[1] not in notes
    assert write_table(page, [], 200, complete=False) == page


def test_what_replays_a_run_names_all_that_is_not_standard() -> None:
    assert replay_command(Options(seed=8, nodes=5)) == "make sim SEED=8 NODES=5"
    special = Options(seed=8, nodes=3, duration_s=2.5, mutant="m", without=("kill", "power loss"))
    said = replay_command(special)
    assert said == "python -m tests.simulation --seed 8 --nodes 3 --duration 2.5 --mutant m --without 'kill,power loss'"


# --- stories ----------------------------------------------------------------------------------------------------------


def test_two_stories_that_tell_the_same_have_one_digest() -> None:
    def story(reason: str) -> Story:
        told = Story(lambda: 1.5)
        for number in range(5000):
            told.tell("n1", "up", term=number, applied=[1, 2], reason=reason)
        return told

    assert story("a").digest() == story("a").digest()
    assert story("a").digest() != story("b").digest()
    assert len(story("a").last("n1")) == EVENTS_PER_TELLER


def test_a_value_that_two_runs_would_tell_differently_is_refused() -> None:
    with pytest.raises(TypeError, match="plain values"):
        Story(lambda: 0.0).tell("n1", "up", node=object())


def test_a_story_reads_on_one_line_each() -> None:
    lines: list[str] = []
    story = Story(lambda: 12.34567, lines.append)
    story.tell("n1", "refused to start", reason="one\ntwo", took_s=1 / 3, value=b"x", names=["a", "b"])
    assert lines == ["  12.3457  n1        refused to start  reason=one | two  took_s=0.333333  value='x'  names=[a b]"]
    assert story.tail() == lines[0]


def test_an_autopsy_shows_where_logs_differ_first() -> None:
    clock = iter(range(100))
    story = Story(lambda: float(next(clock)))
    story.tell("faults", "cut", links="n1-n2")
    for number in range(30):
        story.tell("n1", f"event {number}")
    story.tell("c1", "killed")
    log = tuple((index, 1, 0xAA) for index in range(1, 40))
    states = [
        NodeState(name="n1", role="leader", term=3, commit=30, log=log),
        NodeState(name="n2", role="follower", term=3, commit=31, log=(*log[:29], (30, 2, 0xBB))),
        NodeState(name="n3", failure="wal_damaged"),
    ]
    text = autopsy(Options(seed=5), "log matching", "entry 30 differs", 31.0, story, states, ["n1-n2 cut"])
    assert text.startswith(
        "VIOLATION of “log matching” at 31.0000 virtual seconds, seed 5, 3 nodes\n  entry 30 differs\n"
    )
    assert "make sim SEED=5 NODES=3" in text
    assert "where the logs differ first, at entry 30" in text
    (row,) = [line.split() for line in text.splitlines() if "<- differ" in line]
    assert row[:3] == ["30", "1.000000aa", "2.000000bb"]
    assert "n3   down  wal_damaged" in text
    assert "faults under way: n1-n2 cut" in text
    assert "event 29" in text
    assert "event 10" not in text  # the shortest story: the last few of each


# --- a real run -------------------------------------------------------------------------------------------------------


def test_who_reads_along_changes_nothing() -> None:
    """And sees the nodes, the nemesis, the clients, and with `every_message` what they send each other."""
    options = Options(seed=1, duration_s=3.0)
    lines: list[str] = []
    with tapped(lines.append, every_message=True):
        read = run(options, lines.append)
    alone = run(options)
    assert (read.story_digest, read.counts) == (alone.story_digest, alone.counts)
    told = [coloured(line) for line in lines]
    assert [text.plain for text in told] == lines
    tellers = {line.split()[1] for line in lines}
    assert {"n1", "n2", "n3", "faults", "world", "c1"} <= tellers
    assert any("message=AppendEntries(" in line for line in lines)
    assert any("frame=Write(" in line for line in lines)
    times = [float(line.split()[0]) for line in lines]
    assert times == sorted(times)


def test_the_autopsy_of_a_real_run(monkeypatch: pytest.MonkeyPatch) -> None:
    live, texts = World.live, []
    cut: list[str] = []

    def live_and_die(world: World) -> Violation | None:
        found = live(world)
        assert found is not None
        cut.extend(list(world.machines)[:2])
        world.network.cut(*cut)
        world.machines[cut[0]].clock.jump_ms = 5000
        texts.append(autopsy_of(world, found))
        return found

    monkeypatch.setattr(World, "live", live_and_die)
    monkeypatch.setattr(Checks, "at_end", lambda checks: checks.world.violation("a rule", "entry 3 is not as it was"))
    assert run(Options(seed=1, duration_s=3.0)).rule == "a rule"
    (text,) = texts
    assert re.search(r"^  n\d +leader +term \d+ +log 1\.\.\d+ ", text, re.MULTILINE)
    assert "around entry 3  " in text
    assert f"{cut[0]}-{cut[1]} cut" in text
    assert f"{cut[0]} has its wall clock +5.0 s" in text


def _raising(error: Exception) -> Callable[..., object]:
    async def call(*_arguments: object, **_options: object) -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("rule", "owner", "name", "broken"),
    [
        ("liveness", World, "leader", lambda _world: None),
        ("hand-over", Client, "transfer_leader", _raising(Unavailable("Nobody answers", code="timeout"))),
        ("starts again", ServerNode, "start", _raising(StartupError("It is damaged", code="wal_damaged"))),
        ("no exception", ServerNode, "start", _raising(RuntimeError("a bug"))),
    ],
)
def test_rules_of_the_run_itself_are_broken_by_what_breaks_them(
    rule: str, owner: type, name: str, broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, broken)
    # Of two, the exam always hands over to the other one.
    without = tuple(kind for kind in FAULTS if kind != "clock jump")
    calm = Options(seed=1, nodes=2, duration_s=1.0, without=without)
    assert run(calm).rule == rule


def test_a_fault_of_a_disk_counts_when_it_strikes_and_only_then_may_a_node_fail() -> None:
    world = World(Options(seed=1), Random(1))
    machine, nemesis, faults = world.machines["n1"], world.nemesis, world.counts.faults
    nemesis._victim = lambda: machine  # type: ignore[method-assign]
    file = machine.files.open("/file", create=True)
    nemesis._full_disk()
    nemesis._failing_sync()
    nemesis._slow_disk()
    assert not faults
    assert not machine.expected_failures
    with pytest.raises(OSError, match="No space"):
        file.allocate(1 << 20)
    assert faults == {"full disk": 1}
    assert machine.expected_failures == DISK_FAILURES
    for _ in range(2):
        with suppress(OSError):
            file.sync()
    with pytest.raises(OSError, match="No space"):
        file.write_at(0, [bytes(1 << 20)])
    assert faults == {"full disk": 1, "failing sync": 1, "slow disk": 1}


def test_a_disk_that_nobody_fills_is_given_back() -> None:
    world = World(Options(seed=1), Random(1))
    machine, nemesis = world.machines["n1"], world.nemesis
    nemesis._victim = lambda: machine  # type: ignore[method-assign]
    nemesis._full_disk()
    assert machine.files.capacity_bytes is not None
    world.time.advance(2 * FULL_MAX_S)
    assert machine.files.capacity_bytes is None
    assert not world.counts.faults
    assert not machine.expected_failures


def test_a_cluster_of_one_has_no_fault_that_needs_two() -> None:
    assert not set(World(Options(seed=1, nodes=1), Random(1)).nemesis.kinds) & NEED_TWO


# --- shrinking --------------------------------------------------------------------------------------------------------


def test_shrinking_finds_the_one_kind_of_fault_that_matters() -> None:
    def run(options: Options) -> Outcome:
        """Violates wherever power is lost; with whatever other kinds this seed has."""
        outcome = fine(options)
        kinds = [kind for kind in FAULTS if kind not in options.without]
        outcome.counts.faults = Counter(kinds)
        if "power loss" in kinds:
            outcome.rule, outcome.violation, outcome.at_s = "durability", "entry 3 is gone", options.duration_s / 2
        return outcome

    console = Console(file=io.StringIO(), width=300)
    assert shrink(run, Options(seed=40, nodes=5), 1, console) == 1
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue()
    last = told[told.rindex("VIOLATION") :]
    assert "3 nodes" in last
    (replay,) = [line for line in last.splitlines() if "replay it" in line]
    without = command.parse([*_arguments(replay)]).without
    assert set(FAULTS) - set(without) == {"power loss"}


def _arguments(replay: str) -> list[str]:
    import shlex

    return shlex.split(replay.partition("tests.simulation ")[2])


def test_what_does_not_violate_is_not_shrunk() -> None:
    console = Console(file=io.StringIO())
    assert shrink(fine, Options(seed=1), 1, console) == 0
