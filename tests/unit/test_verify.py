"""Comparing replicas page by page: which one differs, since when, and what is said of those that cannot be asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import pytest

import kvstore
from kvstore import codec, model
from kvstore.backup import PagedHash, packed
from kvstore.cli import backup as command
from kvstore.cli.main import run
from kvstore.client.backup import ReplicaDigest, Verified, verify
from kvstore.client.client import Client
from kvstore.client.members import member_status
from kvstore.errors import Refused, Unavailable, error_for
from kvstore.model import Digest, DigestResult, ErrorResult, Member, NodeStatus, RangeResult, Record
from kvstore.state import txn
from kvstore.state.mvcc import Overlay

PAGE_BYTES = 1000


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.backup.DIGEST_BYTES_MAX", PAGE_BYTES)


class Replica:
    """All revisions of a store, as `read_digest` wants to see them."""

    def __init__(self) -> None:
        self.revisions: list[dict[bytes, Record]] = [{}]
        self.compacted_revision = 0
        self.answers_left = 1_000_000  # and then it is gone

    @property
    def revision(self) -> int:
        return len(self.revisions) - 1

    def put(self, key: bytes, value: bytes) -> None:
        revision = len(self.revisions)
        self.revisions.append(self.revisions[-1] | {key: Record(key, value, revision, revision, 1)})

    def damage(self, key: bytes, value: bytes, since: int) -> None:
        for records in self.revisions[since:]:
            records[key] = Record(key, value, 1, 1, 1)

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        return self.scan_at(start, end, self.revision)

    def scan_at(self, start: bytes, end: bytes, revision: int) -> Iterator[tuple[bytes, bytes]]:
        for key, record in sorted(self.revisions[revision].items()):
            if start <= key and (not end or key < end):
                yield key, packed(record)


class Replicas:
    """A client of nodes `n1`, `n2`, … with these replicas; the address of one is its name."""

    def __init__(self, *replicas: Replica, without_address: tuple[str, ...] = ()) -> None:
        self.replicas = {f"n{number}": replica for number, replica in enumerate(replicas, 1)}
        self.members = tuple(
            Member(name, "", "" if name in without_address else name, "", True) for name in self.replicas
        )
        self.counts: list[int] = []  # of records in a page
        self.others: dict[str, tuple[str, str]] = {}  # by address, who answers there (name, node id)

    async def range(self, **_: object) -> RangeResult:
        revision = max(replica.revision for replica in self.replicas.values())
        return RangeResult(revision, (), len(self.replicas["n1"].revisions[-1]))

    async def status(self, address: str = "", *, digest: bool = False, timeout: float | None = None) -> NodeStatus:
        if address:
            self._check_alive(address)
        name, node_id = self.others.get(address, (address or "n1", ""))
        return NodeStatus(name, "c", "leader", "n1", "n1", 1, 1, 1, 1, 1, 1, self.members, (), node_id=node_id)

    async def digest(self, start: bytes = b"", end: bytes = b"", *, revision: int, address: str) -> DigestResult:
        replica = self._answer(address)
        request = Digest(start, end, revision, model.DIGEST_RECORDS_MAX, PAGE_BYTES)
        result = codec.decode_result(txn.read_digest(cast(Overlay, replica), request))
        if isinstance(result, ErrorResult):
            raise error_for(result.code, result.message)
        assert isinstance(result, DigestResult)
        self.counts.append(result.count)
        return result

    def _check_alive(self, address: str) -> None:
        if not self.replicas[address].answers_left:
            raise Unavailable(f"{address} is gone", code="timeout")

    def _answer(self, address: str) -> Replica:
        self._check_alive(address)
        replica = self.replicas[address]
        replica.answers_left -= 1
        return replica

    async def verify(self) -> Verified:
        return await verify(cast(Client, self))


def filled(count: int = 40, value_bytes: int = 200) -> Replica:
    replica = Replica()
    for number in range(count):
        replica.put(b"%04d" % number, b"v" * value_bytes)
    return replica


def statuses(found: Verified) -> dict[str, str]:
    return {replica.member.name: replica.status for replica in found.replicas}


def since(found: Verified) -> dict[str, int]:
    return {replica.member.name: replica.differs_since for replica in found.replicas if replica.differs}


async def test_a_page_ends_by_its_bytes_as_well() -> None:
    cluster = Replicas(filled(), filled(), filled())
    found = await cluster.verify()
    assert found.agree
    assert set(cluster.counts) == {5, 0}, "4 records of 237 bytes are less than a page; the last one is empty"
    whole = PagedHash()
    for record in cluster.replicas["n1"].revisions[-1].values():
        whole.add(record)
    assert {replica.digest for replica in found.replicas} == {whole.digest()}, "as in a backup"


@pytest.mark.parametrize("value", [b"x" * 200, b"", b"x" * 3000])
@pytest.mark.parametrize("key", [b"", b"0000", b"0017", b"0039", b"9"])
async def test_a_replica_that_differs_is_found_wherever_its_pages_end(key: bytes, value: bytes) -> None:
    cluster = Replicas(filled(), filled(), filled())
    cluster.replicas["n2"].damage(key, value, since=29)
    found = await cluster.verify()
    assert statuses(found) == {"n1": "same", "n2": "differs", "n3": "same"}
    assert since(found) == {"n2": 29}
    assert not found.undecided


async def test_a_replica_that_lacks_its_end_is_found() -> None:
    cluster = Replicas(filled(), filled(), filled())
    for key in [b"%04d" % number for number in range(30, 40)]:
        del cluster.replicas["n3"].revisions[-1][key]
    assert since(await cluster.verify()) == {"n3": 40}


async def test_the_largest_key_of_all_ends_its_page() -> None:
    cluster = Replicas(filled(), filled(), filled())
    for replica in cluster.replicas.values():
        replica.put(b"\xff" * model.KEY_BYTES_MAX, b"")
    assert (await cluster.verify()).agree
    cluster.replicas["n2"].damage(b"\xff" * model.KEY_BYTES_MAX, b"x", since=41)
    assert since(await cluster.verify()) == {"n2": 41}


async def test_since_when_is_found_where_the_range_took_more_pages_then() -> None:
    cluster = Replicas(filled(), filled(), filled())
    for replica in cluster.replicas.values():
        for number in range(40):
            replica.put(b"%04d" % number, b"small")
    cluster.replicas["n1"].damage(b"0013", b"damaged", since=45)
    assert since(await cluster.verify()) == {"n1": 45}


async def test_since_when_goes_back_as_far_as_history() -> None:
    cluster = Replicas(filled(), filled(), filled())
    cluster.replicas["n1"].damage(b"0000", b"", since=1)
    for replica in cluster.replicas.values():
        replica.compacted_revision = 33
    assert since(await cluster.verify()) == {"n1": 33}


async def test_one_that_goes_while_it_is_asked_since_when_ends_nothing() -> None:
    cluster = Replicas(*(filled() for _ in range(5)))
    for name in ("n2", "n4"):
        cluster.replicas[name].damage(b"0000", b"", since=7)
    cluster.replicas["n4"].answers_left = 9 + 1  # all of its pages, and one more
    found = await cluster.verify()
    assert statuses(found) == {"n1": "same", "n2": "differs", "n3": "same", "n4": "differs", "n5": "same"}
    assert since(found) == {"n2": 7, "n4": 0}
    assert [replica.error and replica.error.code for replica in found.replicas] == [None, None, None, "timeout", None]


async def test_it_is_held_against_another_where_one_of_most_goes() -> None:
    cluster = Replicas(filled(), filled(), filled())
    cluster.replicas["n3"].damage(b"0000", b"", since=7)
    cluster.replicas["n1"].answers_left = 9 + 1
    assert since(await cluster.verify()) == {"n3": 7}
    cluster.replicas["n1"].answers_left = cluster.replicas["n2"].answers_left = 9 + 1
    found = await cluster.verify()
    assert statuses(found) == {"n1": "same", "n2": "same", "n3": "differs"}
    assert since(found) == {"n3": 0}
    assert [replica.error for replica in found.replicas] == [None, None, None]


async def test_members_that_cannot_be_asked_are_named() -> None:
    cluster = Replicas(filled(), filled(), filled(), without_address=("n3",))
    assert statuses(await cluster.verify()) == {"n1": "same", "n2": "same", "n3": "no client address"}
    cluster.replicas["n2"].answers_left = 0
    found = await cluster.verify()
    assert statuses(found) == {"n1": "same", "n2": "unreachable", "n3": "no client address"}
    assert not found.agree


@pytest.mark.parametrize("replica", [filled(), Replica()])
async def test_another_node_at_a_members_address_does_not_count_for_it(replica: Replica) -> None:
    cluster = Replicas(replica, replica, replica)
    cluster.others["n3"] = ("n1", "id-1")
    found = await cluster.verify()
    assert statuses(found) == {"n1": "same", "n2": "same", "n3": "another node"}
    error = found.replicas[2].error
    assert error is not None
    assert error.code == "wrong_node"
    assert "another node, n1, answers at n3" in error.message
    assert not found.agree


async def test_one_that_took_a_members_name_does_not_count_for_it_either() -> None:
    cluster = Replicas(filled(), filled())
    cluster.members = tuple(Member(name, "", name, f"id-{name}", True) for name in cluster.replicas)
    cluster.others["n1"] = ("n1", "")  # of a version that did not say it
    cluster.others["n2"] = ("n2", "id-anew")
    assert statuses(await cluster.verify()) == {"n1": "same", "n2": "another node"}
    cluster.others["n2"] = ("n2", "id-n2")
    assert (await cluster.verify()).agree


async def test_a_member_whose_address_is_none_is_named() -> None:
    async with kvstore.connect("127.0.0.1:1") as client:
        for address in ("nonsense", "127.0.0.1:0"):
            with pytest.raises(Refused, match=f"n1 cannot be asked: '{address}' is no host:port"):
                await member_status(client, Member("n1", "", address, "", True))


async def test_an_empty_store_is_compared_only_where_a_node_answers() -> None:
    cluster = Replicas(Replica(), Replica(), Replica())
    assert (await cluster.verify()).agree
    cluster.replicas["n2"].answers_left = 0
    found = await cluster.verify()
    assert statuses(found) == {"n1": "same", "n2": "unreachable", "n3": "same"}
    assert not found.agree


async def test_where_none_is_like_most_none_is_said_to_be_the_good_one() -> None:
    cluster = Replicas(filled(), filled(), filled())
    cluster.replicas["n1"].answers_left = 0
    cluster.replicas["n3"].damage(b"0000", b"", since=7)
    found = await cluster.verify()
    assert found.undecided
    assert statuses(found) == {"n1": "unreachable", "n2": "differs", "n3": "differs"}
    assert since(found) == {"n2": 7, "n3": 7}


async def test_no_answer_at_all_is_no_verdict() -> None:
    cluster = Replicas(filled(), filled(), filled())
    for replica in cluster.replicas.values():
        replica.compacted_revision = 41
    found = await cluster.verify()
    assert set(statuses(found).values()) == {"unreachable"}
    assert not found.undecided


SAME = ReplicaDigest(Member("n1", "", "h:1", "", True), b"d", 5)
NO_ADDRESS = ReplicaDigest(Member("n2", "", "", "", True))
GONE = ReplicaDigest(Member("n3", "", "h:3", "", True), error=Unavailable("gone", code="timeout"))
OTHER = ReplicaDigest(Member("n6", "", "h:6", "", True), error=Refused("n1 answers there", code="wrong_node"))
DIFFERS = ReplicaDigest(Member("n4", "", "h:4", "", True), b"e", 6, True, 77)
UNKNOWN = ReplicaDigest(Member("n5", "", "h:5", "", True), b"e", 6, True, 0, Refused("x", code="too_many_sessions"))


@pytest.mark.parametrize(
    ("replicas", "code"),
    [
        ((SAME, SAME), 0),
        ((SAME, NO_ADDRESS), 3),
        ((SAME, GONE), 3),
        ((SAME, OTHER), 3),
        ((SAME, DIFFERS), 1),
        ((SAME, GONE, UNKNOWN), 1),
    ],
)
def test_what_the_command_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], replicas: tuple[ReplicaDigest, ...], code: int
) -> None:
    async def found(*_: object) -> Verified:
        return Verified(99, replicas)

    monkeypatch.setattr(command, "compare", found)
    assert run(["verify", "-o", "json"]) == code
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["agree"] is (code == 0)
    assert [replica["status"] for replica in said["replicas"]] == [replica.status for replica in replicas]
    assert run(["verify"]) == code
    table = capsys.readouterr().out
    notes = {
        "n2": "no client address",
        "n3": "unreachable: timeout",
        "n4": "differs since revision 77",
        "n5": "differs since when is not known: too_many_sessions",
        "n6": "another node: n1 answers there",
    }
    for replica in replicas:
        assert notes.get(replica.member.name, "the same") in table


def test_the_command_says_where_it_is_undecided(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def found(*_: object) -> Verified:
        return Verified(99, (DIFFERS, DIFFERS), undecided=True)

    monkeypatch.setattr(command, "compare", found)
    assert run(["verify"]) == 1
    assert "cannot be told" in capsys.readouterr().out
