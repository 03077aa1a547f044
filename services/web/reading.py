"""Many records in few round trips, however large they are."""

from __future__ import annotations

from collections.abc import Sequence

import kvstore


async def read_ranges(store: kvstore.Client, ranges: Sequence[kvstore.Range]) -> list[tuple[kvstore.Record, ...]]:
    """The records of several ranges as of one moment, unless they are too large for one result: then of several. Raises
    `KvError`, also `Refused` `result_too_large` for a single range that is."""
    try:
        results = (await store.txn(success=ranges)).results
    except kvstore.Refused as refusal:
        if refusal.code != "result_too_large" or len(ranges) == 1:
            raise
        half = len(ranges) // 2
        return [*await read_ranges(store, ranges[:half]), *await read_ranges(store, ranges[half:])]
    return [one.records for one in results if isinstance(one, kvstore.RangeResult)]
