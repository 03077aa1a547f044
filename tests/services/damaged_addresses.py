"""What may be wrong with where orders of erased customers went to."""

from __future__ import annotations

from tests.services.damages import Damaged, damage


@damage("erased_address")
async def an_erased_customers_order_still_says_where_it_went(it: Damaged) -> str:
    return await it.set(it.order("returned"), forget_by_ms=1)


@damage("erased_address")
async def no_step_takes_an_erased_customers_address(it: Damaged) -> str:
    return await it.set(it.order("lines cancelled"), forget_by_ms=1)
