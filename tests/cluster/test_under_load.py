"""Faults of processes and members on real processes, under load: short slices of what `make chaos` does for long.

`tests.chaos.campaign` is what judges them: each fault is undone and survived within its bounds, no process ends by
itself, the histories of all clients are strictly serializable, every acknowledged write is there at the end, and the
replicas are equal.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import faults
from tests.chaos.campaign import Campaign, Options
from tests.chaos.faults import Fault
from tests.chaos.schedule import plan

pytestmark = pytest.mark.timeout(150)


@pytest.mark.parametrize(
    "slice_",
    [
        pytest.param(((faults.PauseLeader, 1.5), (faults.PauseFollower, 1.0), (faults.PauseAll, 1.0)), id="sigstop"),
        pytest.param(((faults.KillAll, 0.2), (faults.KillMajority, 0.5)), id="restart-of-all"),
        pytest.param(((faults.RollingRestart, 0.0), (faults.HandOver, 0.0)), id="rolling-restart"),
        pytest.param(((faults.JoinAndLeave, 0.0), (faults.Replace, 0.0), (faults.KillLeader, 0.3)), id="members"),
        pytest.param(((faults.ResetClients, 1.5), (faults.Delay, 1.0)), id="clients"),
    ],
)
async def test_nothing_is_lost(slice_: tuple[tuple[type[Fault], float], ...], tmp_path: Path) -> None:
    campaign = Campaign(Options(), tmp_path, plan=plan(*slice_))
    await campaign.run()
    assert not campaign.violations
    assert [span.kind for span in campaign.spans] == [fault.kind for fault, _ in slice_]
    assert campaign.judged.keys() >= {"ledger", "register", "append", "bank", "sale", "counters"}
