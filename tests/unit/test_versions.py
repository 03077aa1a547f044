"""Versions: what a request needs, who raises the cluster's, and what it leaves in a state."""

from __future__ import annotations

import pytest

from kvstore import codec, model, versions
from kvstore.errors import StartupError, Unavailable
from kvstore.raft.config import RaftConfig
from kvstore.raft.members import Configuration
from kvstore.raft.roster import Roster, own_identity
from kvstore.raft.transport import Identity
from kvstore.state.machine import DATA, Machine
from kvstore.state.storage import MemoryDisk
from tests.state_model import entry

PUT = model.Put(b"k", b"")
LEASED = model.Put(b"k", b"", 7)


@pytest.mark.parametrize(
    ("request_", "needed"),
    [
        (PUT, 1),
        (LEASED, 2),
        (model.GrantLease(5000), 2),
        (model.Txn(success=(PUT, model.Delete(b"a"))), 1),
        (model.Txn(success=(PUT,), failure=(model.Txn(failure=(LEASED,)),)), 2),
        (model.Compact(1), 1),
    ],
)
def test_what_a_request_needs(request_: model.Mutation, needed: int) -> None:
    assert versions.needed_by(request_) == needed
    versions.check(request_, needed)
    if needed > 1:
        with pytest.raises(Unavailable) as caught:
            versions.check(request_, needed - 1)
        assert caught.value.code == "upgrade_pending"


def test_no_request_needs_more_than_there_is() -> None:
    assert versions.NEWEST_NEED <= versions.VERSION


def test_common_is_what_the_least_of_all_members_said() -> None:
    members = tuple(model.Member(name, "", "", "", True) for name in ("a", "b"))
    roster = Roster(own_identity(RaftConfig(name="a", cluster_id="c", members=members, version=3), "1"))
    roster.set_members(Configuration(members), (0, 0))
    assert roster.common_version == 0, "b was not heard"
    roster.note(Identity("c", "b", "2"))
    assert roster.common_version == 1, "who says nothing of it is of the first"
    roster.note(Identity("c", "b", "2", version=2))
    roster.note(Identity("c", "stranger", "3"))
    assert roster.common_version == 2
    roster.note(Identity("c", "b", "2", version=9))
    assert roster.common_version == 3


def test_what_a_node_understands_its_successor_of_that_name_may_not() -> None:
    member = model.Member("b", "", "", "new", False)
    roster = Roster(own_identity(RaftConfig(name="a", cluster_id="c", members=(), version=3), "1"))
    roster.set_members(Configuration((member,)), (0, 0))
    roster.note(Identity("c", "b", "old", version=3))
    assert (roster.version_of("b", "old"), roster.version_of("b", "")) == (3, 3)
    assert (roster.version_of("b", "new"), roster.common_version) == (0, 0), "the new one was not heard"
    roster.note(Identity("c", "b", "new", version=2))
    assert (roster.version_of("b", "new"), roster.common_version) == (2, 2)


def apply(machine: Machine, *requests: model.Mutation) -> None:
    machine.apply(machine.applied_index + 1, 1, DATA, entry(1, requests))


def test_a_raised_version_is_kept_and_never_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = MemoryDisk()
    machine = Machine(disk.open, "state")
    apply(machine, PUT)
    assert machine.version == versions.FIRST
    before = machine.digest()
    apply(machine, model.RaiseVersion(2))
    apply(machine, model.RaiseVersion(1))
    assert machine.version == 2
    assert machine.digest() != before
    machine.close()
    assert Machine(disk.open, "state").version == 2
    disk.crash()
    monkeypatch.setattr(versions, "VERSION", 1)
    with pytest.raises(StartupError, match="is of version 2") as caught:
        Machine(disk.open, "state")
    assert caught.value.code == "data_format_newer"


def test_a_version_that_this_program_does_not_know_is_not_taken_for_the_cluster_s() -> None:
    disk = MemoryDisk()
    machine = Machine(disk.open, "state")
    apply(machine, PUT)
    with pytest.raises(StartupError, match=f"entry 2 is of version {versions.VERSION + 1}") as caught:
        apply(machine, model.RaiseVersion(versions.VERSION + 1))
    assert caught.value.code == "data_format_newer"
    assert (machine.version, machine.applied_index) == (versions.FIRST, 1)
    machine.close()
    assert Machine(disk.open, "state").version == versions.FIRST


def test_an_entry_says_its_version() -> None:
    assert codec.decode_batch(codec.encode_batch(5, [], 2)) == codec.Batch(2, 5, ())
