"""The whole shop under kills and a provider that fails: a short slice of what `make chaos-shop` does for long.

`tests.chaos_shop.campaign` is what judges it: everything that was acknowledged is so in the end, orders are confirmed
after the last fault, and the auditor finds nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos_shop.campaign import Campaign, Options
from tests.chaos_shop.kills import SERVICE_ROUND, STORE_ROUND, Target, lane, victims


class Nobody:
    """Watches nothing."""

    def says(self, text: str) -> None: ...

    def killed(self, at_s: float, what: str, names: list[str], back_s: float) -> None: ...


@pytest.mark.timeout(150)
async def test_the_shop_is_in_order_after_all_of_it(tmp_path: Path) -> None:
    options = Options(
        minutes=0.15, shoppers=20, accounts=6, hot_products=5, think_s=0.2, patience_s=3.0, service_pause_s=1.5,
        store_pause_s=2.0, pay_within_minutes=0.1, orders_after=6, seed=3,
    )  # fmt: skip
    campaign = Campaign(options, tmp_path, Nobody())
    await campaign.run()
    assert not campaign.violations
    figures = campaign.figures
    assert figures.shoppers is not None
    assert figures.shoppers.orders_read_back >= 20
    assert figures.confirmed_after == 6
    assert campaign.processes_killed >= 3
    assert figures.audit["is_clean"] is True
    assert figures.audit["checked"]["orders"] >= figures.shoppers.orders_placed


def test_kills_follow_from_the_seed_and_have_every_target_in_a_round() -> None:
    length = sum(SERVICE_ROUND.values())
    one, same, other = (
        [next(kills) for _ in range(length)] for kills in (lane(s, SERVICE_ROUND, 5.0) for s in (1, 1, 2))
    )
    assert [kill[:3] for kill in one] == [kill[:3] for kill in same]
    assert [kill[:3] for kill in one] != [kill[:3] for kill in other]
    assert {kill.target for kill in one} == set(SERVICE_ROUND)
    assert {*SERVICE_ROUND, *STORE_ROUND} == set(Target)


@pytest.mark.parametrize("target", list(Target))
def test_every_target_names_processes(target: Target) -> None:
    kill = next(lane(1, {target: 1}, 1.0))
    names = victims(target, "n2", ["n1", "n2", "n3"], kill.chance)
    known = {"n1", "n2", "n3", "users", "orders 1", "orders 2", "worker 1", "worker 2", "psp"}
    assert names
    assert set(names) <= known
    assert ("n2" in names) is (target in (Target.LEADER, Target.MAJORITY))
