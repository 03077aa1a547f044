"""The workloads find what is wrong with a store, and nothing where nothing is wrong.

They run on the embedded store, and on a fake cluster whose store has one bug, which strikes now and then. Every answer
of that store looks right by itself: revisions grow, and reads name the newest one.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

import kvstore
from kvstore import Add, Client, Delete, Put, Range, RangeResult, Txn, TxnResult, model
from kvstore.codec import Read, Write
from kvstore.model import Mutation, Result
from tests.checkers.history import History, Outcome
from tests.checkers.verdict import Inconsistent
from tests.fake_server import FakeCluster, FakeNode, FakeStore, answer, apply_and_lose, swallow
from tests.workloads import Workload, all_workloads
from tests.workloads.base import noted
from tests.workloads.drive import drive

WORKERS = 8
STEPS = 400
# An answer that is lost costs a worker this long.
TIMEOUT_S = 0.05
# The fake store has no leases, and nobody watches it.
ON_A_FAKE = ("register", "append", "bank", "sale", "counters", "queue")


def workloads_named(*names: str, size: int = STEPS, timeout_s: float = 5.0) -> tuple[History, list[Workload]]:
    history = History(asyncio.get_running_loop().time)
    made = all_workloads(history, Random(1), size, timeout_s=timeout_s)
    return history, [workload for workload in made if not names or workload.name in names]


# What the workloads do with one another, when all goes well. A round does the seldom ones twice or so, or not at all.
ALL_KINDS = {
    *("Get", "LocalGet", "Put", "Delete", "Swap", "Add"),
    "Steps",
    *("Transfer", "ReadAccounts"),
    *("Issue", "Look"),
    *("PutJob", "Take", "LookAtQueue"),
    *("Grant", "Attach", "Keep", "Revoke", "LastLook"),
    "Change",
    *("Acquire", "Fenced", "Release", "Die", "End"),
    "TakeBackup",
}
# Each kind is in more than four of five rounds. How the workers take turns is up to the machine: no seed settles it.
MAX_ROUNDS = 12


async def test_on_the_embedded_store_nothing_is_wrong(tmp_path: Path) -> None:
    kinds: set[str] = set()
    for round_number in range(MAX_ROUNDS):
        async with kvstore.open_embedded(str(tmp_path / str(round_number))) as kv:
            history, workloads = workloads_named()
            await drive([kv] * WORKERS, workloads, Random(round_number), 4 * STEPS)
        for workload in workloads:
            workload.check()
            assert workload.history.count(Outcome.OK) > STEPS / 10, workload.name
        results = {type(entry.result).__name__ for entry in history.entries}
        assert {"Refusal", "SoldOut", "Swapped"} <= results
        assert history.count(Outcome.UNKNOWN, Outcome.OPEN) == 0
        assert history.count() >= STEPS
        kinds |= {type(entry.operation).__name__ for entry in history.entries if entry.is_ok}
        if kinds == ALL_KINDS:
            return
    assert kinds == ALL_KINDS


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_with_lost_answers_nothing_is_wrong(seed: int) -> None:
    """A tenth of the requests get no answer; half of those took effect."""
    chance = Random(seed)

    def lossy(node: FakeNode, connection: object, frame: Write | Read) -> None:
        kind = chance.random()
        act = swallow if kind < 0.05 else apply_and_lose if kind < 0.10 else answer
        act(node, connection, frame)  # type: ignore[arg-type]

    async with FakeCluster() as cluster, kvstore.connect(cluster.endpoints) as kv:
        history, workloads = workloads_named(*ON_A_FAKE, timeout_s=TIMEOUT_S)
        for workload in workloads:
            await workload.set_up(kv)
        cluster.nodes[0].always = lossy
        await drive([kv] * WORKERS, [_Ready(workload, cluster) for workload in workloads], chance, STEPS)
    for workload in workloads:
        workload.check()
    assert history.count(Outcome.UNKNOWN) > STEPS / 50
    assert history.count(Outcome.FAILED) > 0


class _Ready:
    """A workload that is set up already, and finishes on a cluster that answers again."""

    def __init__(self, workload: Workload, cluster: FakeCluster) -> None:
        self.name, self.history = workload.name, workload.history
        self._workload, self._cluster = workload, cluster
        self.step, self.check = workload.step, workload.check

    async def set_up(self, kv: Client) -> None: ...

    async def finish(self, kv: Client) -> None:
        self._cluster.nodes[0].always = None
        await self._workload.finish(kv)


# --- stores with a bug ------------------------------------------------------------------------------------------------


class BuggyStore(FakeStore):
    """A store whose bug strikes with a small chance."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.chance = Random(seed)
        self.strikes = 0

    def strikes_now(self, share: float = 0.05) -> bool:
        # Not at once, so that there is something to lose.
        struck = self.revision > 20 and self.chance.random() < share
        self.strikes += struck
        return struck


class LosesWrites(BuggyStore):
    """A write is acknowledged and gone."""

    def apply(self, session: int, seq: int, acked_below: int, request: Mutation) -> Result:
        before = self.records
        result = super().apply(session, seq, acked_below, request)
        if self.records is not before and self.strikes_now():
            self.history[-1] = dict(before)
        return result


class RepeatsWrites(BuggyStore):
    """A write that was acknowledged is applied a second time, at once: what a retry does without sessions."""

    def apply(self, session: int, seq: int, acked_below: int, request: Mutation) -> Result:
        result = super().apply(session, seq, acked_below, request)
        if isinstance(request, (Add, Txn)) and self.strikes_now():
            self._guarded(request)
        return result


class RepeatsLate(BuggyStore):
    """A write that was acknowledged is applied again after some later ones."""

    late: Mutation | None = None

    def apply(self, session: int, seq: int, acked_below: int, request: Mutation) -> Result:
        result = super().apply(session, seq, acked_below, request)
        if isinstance(request, (Put, Delete, Add, Txn)):
            if self.late is None and self.strikes_now():
                self.late = request
            elif self.late is not None and self.chance.random() < 0.2:
                self._guarded(self.late)  # type: ignore[arg-type]
                self.late = None
        return result


class ReadsStale(BuggyStore):
    """A read of the newest state sees it as it was some revisions ago."""

    def read(self, request: Range | Txn) -> Result:
        if (isinstance(request, Range) and request.revision) or not self.strikes_now(0.1):
            return super().read(request)
        newest = self.history
        self.history = newest[:-6]
        try:
            result = super().read(request)
        finally:
            self.history = newest
        if isinstance(result, RangeResult):
            return RangeResult(self.revision, result.records, result.count, result.more)
        assert isinstance(result, TxnResult)
        return TxnResult(self.revision, result.succeeded, result.results)


class TearsTransactions(BuggyStore):
    """One of a transaction's writes is not done, though it is answered."""

    def apply(self, session: int, seq: int, acked_below: int, request: Mutation) -> Result:
        before = self.records
        result = super().apply(session, seq, acked_below, request)
        changed = sorted(key for key in before.keys() | self.records if before.get(key) != self.records.get(key))
        if len(changed) > 1 and self.strikes_now():
            torn = dict(self.records)
            key = self.chance.choice(changed)
            if key in before:
                torn[key] = before[key]
            else:
                del torn[key]
            self.history[-1] = torn
        return result


class ForgetsCompares(BuggyStore):
    """A transaction's compares are taken as true."""

    def _txn(self, txn: Txn, after: dict[bytes, model.Record], written: set[bytes], next_: int) -> TxnResult:
        if txn.compare and self.strikes_now(0.3):
            txn = Txn((), txn.success)
        return super()._txn(txn, after, written, next_)


class ForgetsBounds(BuggyStore):
    """An addition goes below its minimum."""

    def _add(self, add: Add, after: dict[bytes, model.Record], written: set[bytes], next_: int) -> model.AddResult:
        old = after.get(add.key)
        value = int(old.value) if old is not None else 0
        if add.min is not None and value + add.delta < add.min and self.strikes_now(0.5):
            add = Add(add.key, add.delta)
        return super()._add(add, after, written, next_)


class RefusesTooMuch(BuggyStore):
    """An addition is refused although it stays in its bounds."""

    def _add(self, add: Add, after: dict[bytes, model.Record], written: set[bytes], next_: int) -> model.AddResult:
        if add.min is not None and self.strikes_now(0.3):
            add = Add(add.key, add.delta, min=model.INT64_MAX)
        return super()._add(add, after, written, next_)


class DoesWhatItRefused(BuggyStore):
    """A transaction is refused, and took effect all the same."""

    def _guarded(self, request: model.Operation) -> Result:
        result = super()._guarded(request)
        if isinstance(request, (Txn, Put)) and not isinstance(result, RangeResult) and self.strikes_now():
            return model.ErrorResult("invalid_request", "refused for no reason", ())
        return result


CAUGHT = [
    (LosesWrites, ("register", "append", "bank", "sale", "counters", "queue")),
    (RepeatsWrites, ("register", "bank", "sale", "counters")),
    (RepeatsLate, ("register", "bank", "sale", "counters")),
    (ReadsStale, ("register", "append", "bank", "sale", "counters", "queue")),
    (TearsTransactions, ("append", "bank", "sale", "counters", "queue")),
    (ForgetsCompares, ("register", "append", "bank", "queue")),
    (ForgetsBounds, ("register", "bank", "sale")),
    (RefusesTooMuch, ("register", "sale")),
    (DoesWhatItRefused, ("register", "append", "bank", "sale", "counters", "queue")),
]


@pytest.mark.parametrize(
    ("bug", "name"), [pytest.param(bug, name, id=f"{bug.__name__}-{name}") for bug, names in CAUGHT for name in names]
)
async def test_a_bug_is_caught(bug: type[BuggyStore], name: str) -> None:
    store = bug(seed=3)
    async with FakeCluster(store=store) as cluster, kvstore.connect(cluster.endpoints) as kv:
        _, (workload,) = workloads_named(name, size=5 * STEPS)
        await drive([kv] * WORKERS, [workload], Random(4), STEPS)
    assert store.strikes
    with pytest.raises(Inconsistent) as caught:
        workload.check()
    assert caught.value.message
    print(caught.value)


async def test_what_an_error_means() -> None:
    history = History(lambda: 1.5)

    async def raising(error: Exception) -> None:
        raise error

    outcomes = {
        kvstore.Refused("no", code="conflict"): Outcome.FAILED,
        kvstore.Unavailable("later"): Outcome.FAILED,
        kvstore.OutcomeUnknown("who knows"): Outcome.UNKNOWN,
    }
    for error, outcome in outcomes.items():
        entry = history.begin(1, "an operation")
        assert await noted(entry, raising(error)) is None
        assert entry.outcome is outcome
        assert error.code in str(entry)
    refusal = kvstore.Refused("no", code="out_of_range")
    entry = history.begin(1, "an operation")
    assert await noted(entry, raising(refusal), {"out_of_range"}) is refusal
    assert entry.outcome is Outcome.OPEN
    for other in (kvstore.InternalError("a bug"), ZeroDivisionError()):
        entry = history.begin(1, "an operation")
        with pytest.raises(type(other)):
            await noted(entry, raising(other))
        assert entry.is_unknown


async def test_parts_share_one_order() -> None:
    history = History(lambda: 0.0)
    one, other = history.part("one"), history.part("other")
    first, second = one.begin(1, "a"), other.begin(2, "b")
    first.ok("done", revision=3)
    second.failed("conflict")
    assert [first.called, second.called, first.returned, second.returned] == [1, 2, 3, 4]
    assert history.entries == [first, second]
    assert one.entries == [first]
    assert "-> done at revision 3" in str(first)
    assert "-> failed (conflict)" in str(second)
