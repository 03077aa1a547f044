"""The quota: what it refuses, what it lets through, and when it ends."""

from __future__ import annotations

import pytest

from kvstore import model
from kvstore.errors import Refused
from kvstore.server.quota import Quota
from tests.unit.server_fakes import RecordingLog

PUT = model.Put(b"k", b"v")


class Sized:
    size_bytes = 0


class Setup:
    def __init__(self, quota_bytes: int = 1000) -> None:
        self.machine = Sized()
        self.log = RecordingLog()
        self.quota = Quota(quota_bytes, lambda: self.machine, self.log)  # type: ignore[arg-type, return-value]

    def at(self, size_bytes: int) -> bool:
        self.machine.size_bytes = size_bytes
        self.quota.look()
        return self.quota.exceeded


def test_it_begins_at_the_quota_and_ends_below_it() -> None:
    setup = Setup()
    assert not setup.at(999)
    assert setup.at(1000)
    assert setup.at(960), "it does not come and go around the bound"
    assert not setup.at(940)
    assert setup.log.names() == ["quota_alarm", "quota_alarm_over"]


def test_none_is_none() -> None:
    assert not Setup(0).at(10**15)


@pytest.mark.parametrize(
    "mutation",
    [
        PUT,
        model.Add(b"n", -1),
        model.GrantLease(5000),
        model.Txn(success=(model.Delete(b"k"), PUT)),
        model.Txn(failure=(model.Txn(success=(model.Add(b"n", 1),)),)),
    ],
)
def test_what_may_grow_is_refused_while_it_lasts(mutation: model.Mutation) -> None:
    setup = Setup()
    setup.quota.check(mutation)
    setup.at(2000)
    with pytest.raises(Refused, match="delete what is not needed") as caught:
        setup.quota.check(mutation)
    assert caught.value.code == "quota_exceeded"
    setup.at(0)
    setup.quota.check(mutation)


@pytest.mark.parametrize(
    "mutation",
    [
        model.Delete(b"k"),
        model.Compact(1),
        model.RevokeLease(1),
        model.KeepLease(1),
        model.OpenSession(),
        model.KeepSession(),
        model.CloseSession(),
        model.Txn(success=(model.Delete(b"a", b"b"), model.Range(b"k"))),
    ],
)
def test_what_frees_or_only_looks_is_not(mutation: model.Mutation) -> None:
    setup = Setup()
    setup.at(2000)
    setup.quota.check(mutation)
