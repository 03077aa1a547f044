"""A slice of what `make fuzz` does: each service, as each kind of caller, with a fixed seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.campaign import Effort, endpoints_by_luck, fuzz_all
from tests.fuzz.shops import SERVICES, WHO, FuzzedShop

# Between them they do everything once.
_PHASES = {"nobody": "fuzzing", "customer": "fuzzing", "staff": "examples,fuzzing", "admin": "coverage,stateful"}
_EFFORT = Effort(seed=1, examples=3, phases=_PHASES)


@pytest.mark.timeout(600)  # some 30 s where nothing else runs
async def test_no_answer_breaks_the_document(tmp_path: Path) -> None:
    async with FuzzedShop(tmp_path, for_s=600) as shop:
        outcomes = await fuzz_all(shop, SERVICES, WHO, _EFFORT, lambda _: None)
        bad = [f"{one.service} as {one.who}:\n{one.report}" for one in outcomes if not one.is_good]
        assert not bad, "\n".join(bad)
        for service in SERVICES:
            never_asked, _ = await endpoints_by_luck(shop, service)
            assert not never_asked
        report = await shop.audited()
        assert report.is_clean, report.violations
        assert report.checked["orders"] > 12  # those there were before, and some that were placed by fuzzing
