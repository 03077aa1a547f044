"""A campaign must be able to fail: each of its ways to is shown once, the last ones on real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.campaign import Campaign, Options, promises
from tests.chaos.faults import Fault, KillLeader, ResetClients
from tests.chaos.meter import Span
from tests.chaos.schedule import ROUND, plan, schedule


def kills(*unavailable_s: float) -> list[Span]:
    return [
        Span(number, KillLeader.kind, "n1", 10.0 * number, 10.0 * number + 2, 10.0 * number + 4, gap_s, gap_s)
        for number, gap_s in enumerate(unavailable_s)
    ]


def test_promises_are_kept_by_fast_recoveries() -> None:
    found = promises(kills(*[0.2] * 29, 1.4), Options(minutes=20))
    assert [promise.kept for promise in found] == [True, True, True]


@pytest.mark.parametrize(
    ("unavailable_s", "broken"),
    [
        ([0.2] * 29, "at least 30"),
        ([0.2] * 27 + [1.6] * 3, "p95"),
        ([0.2] * 29 + [3.1], "over 3 s"),
    ],
)
def test_promises_are_broken(unavailable_s: list[float], broken: str) -> None:
    found = promises(kills(*unavailable_s), Options(minutes=20))
    (text,) = [promise.text for promise in found if not promise.kept]
    assert broken in text


def test_the_schedule_follows_from_the_seed_and_has_every_kind_in_a_round() -> None:
    length = sum(entry.times for entry in ROUND)
    one, same, other = ([next(faults) for _ in range(length)] for faults in map(schedule, (1, 1, 2)))
    assert one == same
    assert [str(planned) for planned in one] != [str(planned) for planned in other]
    assert {planned.fault for planned in one} == {entry.fault for entry in ROUND}


def test_a_schedule_of_one_kind_only() -> None:
    faults = schedule(1, "disk")
    assert {next(faults).fault.kind for _ in range(10)} == {"the leader's disk is full", "a follower's disk is full"}
    with pytest.raises(ValueError, match="no kind of fault"):
        next(schedule(1, "earthquake"))


def test_every_fault_has_a_place_in_the_round_and_a_name_of_its_own() -> None:
    def leaves(kind: type[Fault]) -> set[type[Fault]]:
        below = [each for each in kind.__subclasses__() if each.__module__ == Fault.__module__]
        return {leaf for each in below for leaf in leaves(each)} if below else {kind}

    assert {entry.fault for entry in ROUND} == leaves(Fault)  # type: ignore[type-abstract]
    assert len({entry.fault.kind for entry in ROUND}) == len(ROUND)


@pytest.mark.timeout(120)
async def test_a_store_that_does_repeated_requests_again_is_found_out(tmp_path: Path) -> None:
    options = Options(main="tests.chaos.forgetful_main")
    campaign = Campaign(options, tmp_path, plan=plan((ResetClients, 3.0)))
    await campaign.run()
    (violation,) = campaign.violations
    assert violation.rule.startswith(("history: ", "the last histories", "a client met")), violation


class _Murder(KillLeader):
    """Kills a node behind the campaign's back, as a bug that ends a process would."""

    kind = "murder"

    async def begin(self) -> None:
        self.strike(self.leader)
        process = self.cluster.nodes[self.leader].process
        assert process is not None
        process.kill()

    async def end(self) -> None: ...


@pytest.mark.timeout(120)
async def test_a_process_that_ends_by_itself_is_found_out(tmp_path: Path) -> None:
    campaign = Campaign(Options(), tmp_path, plan=plan((_Murder, 5.0)))
    await campaign.run()
    (violation,) = campaign.violations
    assert violation.rule == "no node ends by itself"
