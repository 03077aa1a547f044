"""A slice of the campaign with every `make test`: the same few seeds, on all cores, and the seeds that once failed.

It holds that nothing is violated, that each thing which a campaign is made of really happened in it, and that a seed
decides everything. What a thousand seeds find is for `make sim SEEDS=1000`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from tests.simulation.campaign import nodes_of
from tests.simulation.faults import FAULTS
from tests.simulation.outcome import Options
from tests.simulation.report import ROWS

ROOT = Path(__file__).parents[2]
# Chosen for time: with the regressions some forty runs, about a minute (64 s) on two quiet cores. Together they have
# every kind of fault.
SLICE = [Options(seed=seed, nodes=nodes_of(seed)) for seed in range(1, 25)]
# It is to end within 120 s on two cores, and has two and a half times that for a machine that does other things, too;
# each run has a bound of its own besides.
pytestmark = pytest.mark.timeout(300)


class Regression(NamedTuple):
    """A run that once ended in a violation. What a seed hits changes with the simulation, too: `found` says as of which
    commit it was seen, `mended` which commit ended it."""

    options: Options
    what: str
    found: str
    mended: str


REGRESSIONS: list[Regression] = [
    Regression(
        Options(seed=10, nodes=3),
        "a disk that fails while its node stops left the state machine open, and the stop raised",
        "9895362",
        "af30e16",
    ),
    Regression(
        Options(seed=19, nodes=5),
        "a node that was away while a member was replaced under its name refused that one, also as its leader",
        "9895362",
        "af30e16",
    ),
    Regression(
        Options(seed=17, nodes=3),
        "a leader elected before its log was replayed stamped entries with a wall clock that may be far ahead",
        "9895362",
        "af30e16",
    ),
    Regression(
        Options(seed=34, nodes=3),
        "a client's own probe counted as a sign of life of a dead node, where the stream's buffer was full",
        "9895362",
        "af30e16",
    ),
    Regression(
        Options(seed=45, nodes=3),
        "a killed process's new state name was relied on before it was synced, and lost with the power",
        "22cfe83",
        "1b05aaa",
    ),
    Regression(
        Options(seed=126, nodes=5),
        "a follower's refusals of what follows a conflict led its leader away from it, for ever",
        "9a36db2",
        "7bfa6ca",
    ),
    Regression(
        Options(seed=16, nodes=5),
        "a hand-over failed whose target had just installed a snapshot: it was told once, too early",
        "7bfa6ca",
        "22c5c8d",
    ),
    Regression(
        Options(seed=64, nodes=5),
        "a snapshot of a later term was installed without recording the term, which the node then answered in",
        "4c78136",
        "3e40715",
    ),
    Regression(
        Options(seed=18, nodes=3),
        "a member that had been removed and taken in again while it was away stopped when it applied its removal",
        "a42821f",
        "314281e",
    ),
    Regression(
        Options(seed=159, nodes=3),
        "an old answer, to one that had a node's name before it, made the node take itself for removed",
        "314281e",
        "1f4662e",
    ),
    Regression(
        Options(seed=268, nodes=5),
        "a leader with a slow disk took what peers had acknowledged before for signs of life, and led on alone",
        "314281e",
        "1f4662e",
    ),
    Regression(
        Options(seed=323, nodes=3),
        "a new leader took a dead member that it was still connected with for alive, and let go of the quorum",
        "314281e",
        "1f4662e",
    ),
    Regression(
        Options(seed=102, nodes=5),
        "a node that came up was not dialled before an attempt from when it was down had timed out",
        "381ac06",
        "fdf98d0",
    ),
    Regression(
        Options(seed=411, nodes=3),
        "a removed voter that restarted before it had applied its membership never heard that it was removed",
        "783eae9",
        "f182ccb",
    ),
    Regression(
        Options(seed=641, nodes=3),
        "a client believed a node whose disk was lost about the members, and forgot where the others had gone",
        "2604dc2",
        "e8a1bda",
    ),
    Regression(
        Options(seed=64, nodes=5),
        "a watch that began while a turn applied missed what that turn had applied before it",
        "831b5fb",
        "9a202a8",
    ),
    Regression(
        Options(seed=90, nodes=5),
        "a flipped bit in META made a node say that the directory was another node's",
        "9a202a8",
        "8f5394a",
    ),
    Regression(
        Options(seed=377, nodes=3),
        "a node that died inside an install and came back with that state was taken for one that had refused it",
        "155e5d1",
        "6b059d5",
    ),
    Regression(
        Options(seed=60, nodes=5),
        "a leader that was deposed and elected anew let a peer wait for its snapshot, as if that had failed",
        "065d6ee",
        "6b93182",
    ),
]

RUNS = list(dict.fromkeys([*SLICE, *(regression.options for regression in REGRESSIONS)]))

_CAMPAIGN = """
import os, sys
import msgspec
from tests.simulation.campaign import campaign
from tests.simulation.outcome import Options
from tests.simulation.world import run

todo = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Options])
sys.stdout.buffer.write(campaign(run, todo, len(os.sched_getaffinity(0))).to_json())
"""
_ONE_AFTER_THE_OTHER = """
import sys
import msgspec
from tests.simulation.outcome import Options
from tests.simulation.world import run

for options in msgspec.json.decode(sys.stdin.buffer.read(), type=list[Options]):
    outcome = run(options)
outcome.real_s = outcome.cpu_s = 0.0
sys.stdout.buffer.write(msgspec.json.encode(outcome))
"""


def start(script: str, todo: list[Options]) -> subprocess.Popen[bytes]:
    """A process of its own: the hash seed is settled when Python starts."""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(todo))
    process.stdin.close()
    process.stdin = None
    return process


def result_of(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    with process:
        try:
            out, _ = process.communicate()
        finally:
            process.kill()
    assert process.returncode == 0
    result: dict[str, Any] = msgspec.json.decode(out)
    return result


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return result_of(start(_CAMPAIGN, RUNS))


def test_nothing_is_violated(report: dict[str, Any]) -> None:
    told = [
        f"{found['rule']}: seed {found['options']['seed']}\n{found['violation']}\n{found['story']}"
        for found in report["violations"]
    ]
    assert not told, "\n\n".join(told)
    assert report["total"]["runs"] == len(RUNS)


def test_everything_that_a_campaign_is_made_of_happened(report: dict[str, Any]) -> None:
    missing = [called for name, called in ROWS if not report["total"][name]]
    assert missing == []
    assert set(report["total"]["faults"]) == set(FAULTS)
    each = {floor["what"]: floor for floor in report["floors"] if "each seed" in floor["what"]}
    assert len(each) == 3
    assert all(floor["value"] >= floor["least"] for floor in each.values()), each


def test_a_seed_decides_everything() -> None:
    """Two processes tell the same story, though one of them has run other seeds before."""
    one, warm_up = Options(seed=2, nodes=5, duration_s=25.0), Options(seed=1, nodes=3, duration_s=5.0)
    alone, after_others = start(_ONE_AFTER_THE_OTHER, [one]), start(_ONE_AFTER_THE_OTHER, [warm_up, one])
    first, second = result_of(alone), result_of(after_others)
    assert first["counts"]["faults"]
    assert first == second
