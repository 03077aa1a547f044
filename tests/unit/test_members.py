"""The configuration, and by which rules it changes."""

from __future__ import annotations

from itertools import combinations

import msgspec
import pytest

from kvstore.errors import Refused
from kvstore.model import Member
from kvstore.raft.fsm import EntryKind
from kvstore.raft.members import (
    CONFIGURATION_FORMAT,
    MEMBERS_MAX,
    Configuration,
    MalformedConfiguration,
    NewerConfiguration,
)
from tests.raft_fixtures import configuration

NEW = Member("d", "d:1", "d:2", "id-d", False)


def code_of(caught: pytest.ExceptionInfo[Refused]) -> str:
    assert caught.value.message
    return caught.value.code


def test_encoded_and_decoded_it_is_the_same() -> None:
    members = Configuration.of([NEW, Member("a", "a:1", "a:2", "id-a", True)])
    assert [member.name for member in members.members] == ["a", "d"]
    entry = members.entry()
    assert entry[0] == EntryKind.MEMBERS
    assert Configuration.decode(entry[1:]) == members


@pytest.mark.parametrize("payload", [b"", b"\xff", b"\x92\x01\x01", msgspec.msgpack.encode([1, [["a"]]])])
def test_what_is_no_configuration_is_refused(payload: bytes) -> None:
    with pytest.raises(MalformedConfiguration):
        Configuration.decode(payload)


def test_a_newer_format_is_refused() -> None:
    payload = msgspec.msgpack.encode([CONFIGURATION_FORMAT + 1, []])
    with pytest.raises(NewerConfiguration, match="format"):
        Configuration.decode(payload)


@pytest.mark.parametrize(("voters", "quorum"), [("a", 1), ("ab", 2), ("abc", 2), ("abcd", 3), ("abcde", 3)])
def test_quorum(voters: str, quorum: int) -> None:
    members = configuration(voters, ["x", "y", "z"])
    assert members.quorum == quorum
    assert not members.has_quorum(["x", "y", "z", *voters[: quorum - 1]])
    assert members.has_quorum(voters[:quorum])


def test_nobody_is_no_quorum() -> None:
    assert not Configuration().has_quorum([])


def test_voters_and_learners() -> None:
    members = configuration("ab", ["c"])
    assert members.voters == {"a", "b"}
    assert members.learners == {"c"}
    assert members.is_voter("a")
    assert not members.is_voter("c")
    assert not members.is_voter("stranger")
    assert members.get("stranger") is None


def test_a_new_member_begins_as_a_learner() -> None:
    changed = configuration("abc").add_learner(msgspec.structs.replace(NEW, voter=True))
    assert changed.voters == {"a", "b", "c"}
    assert changed.learners == {"d"}


def test_a_known_name_is_not_added_again() -> None:
    members = configuration("abc").add_learner(NEW)
    with pytest.raises(Refused) as caught:
        members.add_learner(NEW)
    assert code_of(caught) == "member_exists"


def test_a_known_name_with_another_node_id_is_refused_as_such() -> None:
    members = configuration("abc").add_learner(NEW)
    with pytest.raises(Refused) as caught:
        members.add_learner(msgspec.structs.replace(NEW, node_id="another"))
    assert code_of(caught) == "node_identity_changed"


@pytest.mark.parametrize("field", ["name", "peer_address", "node_id"])
def test_a_member_without_name_address_or_id_is_refused(field: str) -> None:
    with pytest.raises(Refused) as caught:
        configuration("abc").add_learner(msgspec.structs.replace(NEW, **{field: ""}))
    assert code_of(caught) == "invalid_request"


@pytest.mark.parametrize(
    "field",
    [
        {"name": "../x y\n"},
        {"name": "."},
        {"name": "n" * 65},
        {"node_id": "1" * 100_000},
        {"peer_address": "nonsense"},
        {"peer_address": "[::1"},
        {"peer_address": "::1:7411"},
        {"peer_address": "127.0.0.1:0"},
        {"peer_address": "0.0.0.0:7411"},
        {"peer_address": "[::]:7411"},
        {"peer_address": "1.2.3:7411"},
        {"peer_address": "h:65536"},
        {"peer_address": f"{'h' * 300}:1"},
        {"client_address": "bogus"},
        {"client_address": "d:1"},  # its own for nodes
        {"peer_address": "a:1"},
        {"client_address": "a:1"},
    ],
)
def test_a_member_that_the_others_could_not_use_is_refused(field: dict[str, str]) -> None:
    with pytest.raises(Refused) as caught:
        configuration("abc").add_learner(msgspec.structs.replace(NEW, **field))
    assert code_of(caught) == "invalid_request"
    assert len(caught.value.message) < 400, "a message of its size would not help"


@pytest.mark.parametrize(
    "address", ["127.0.0.1:7411", "[::1]:1", "[fe80::1%eth0]:1", "kv-1.kv.svc.cluster.local.:65535", "node_1:1"]
)
def test_addresses_that_are_some(address: str) -> None:
    assert configuration("abc").add_learner(msgspec.structs.replace(NEW, peer_address=address)).get("d")
    serves_no_clients = msgspec.structs.replace(NEW, peer_address=address, client_address="")
    assert configuration("abc").add_learner(serves_no_clients).get("d")


def test_what_earlier_versions_took_is_still_read() -> None:
    odd = Configuration.of([NEW, Member("../x", "[::1", "bogus", "1" * 1000, False)])
    assert Configuration.decode(odd.encode()) == odd


def test_the_number_of_members_is_bounded() -> None:
    members = configuration([f"n{number}" for number in range(MEMBERS_MAX)])
    with pytest.raises(Refused) as caught:
        members.add_learner(NEW)
    assert code_of(caught) == "invalid_request"


def test_a_learner_is_promoted_if_the_new_quorum_lives() -> None:
    members = configuration("abc", "d")
    assert members.promote("d", "abd").voters == set("abcd")
    with pytest.raises(Refused) as caught:
        members.promote("d", "ab")
    assert code_of(caught) == "would_lose_quorum"


def test_only_a_learner_is_promoted() -> None:
    with pytest.raises(Refused) as caught:
        configuration("abc").promote("a", "abc")
    assert code_of(caught) == "not_learner"
    with pytest.raises(Refused) as caught:
        configuration("abc").promote("d", "abc")
    assert code_of(caught) == "member_unknown"


def test_a_removal_that_would_lose_the_quorum_is_refused() -> None:
    members = configuration("abc")
    assert members.remove("c", "ab").voters == {"a", "b"}
    with pytest.raises(Refused) as caught:
        members.remove("c", "ac")
    assert code_of(caught) == "would_lose_quorum"


def test_a_dead_node_may_always_be_removed_while_the_others_are_a_quorum() -> None:
    assert configuration("abcde").remove("e", "abc").voters == set("abcd")


def test_a_learner_may_be_removed() -> None:
    assert configuration("abc", "d").remove("d", "ab").learners == frozenset()


def test_the_last_voter_is_not_removed() -> None:
    with pytest.raises(Refused) as caught:
        configuration("a").remove("a", "a")
    assert code_of(caught) == "would_lose_quorum"


def test_an_unknown_member_is_not_removed() -> None:
    with pytest.raises(Refused) as caught:
        configuration("abc").remove("d", "abc")
    assert code_of(caught) == "member_unknown"


@pytest.mark.parametrize("voters", ["a", "ab", "abc", "abcd", "abcde"])
def test_majorities_before_and_after_a_change_share_a_node(voters: str) -> None:
    before = configuration(voters, "x")
    changes = [before.promote("x", "abcdex"), before.remove("x", voters)]
    if len(voters) > 1:
        changes += [before.remove(name, set(voters) - {name}) for name in voters]
    for after in changes:
        for one in combinations(sorted(before.voters), before.quorum):
            for other in combinations(sorted(after.voters), after.quorum):
                assert set(one) & set(other)


def test_what_members_said_of_themselves_is_recorded() -> None:
    members = configuration("ab", "c")
    changed = members.identify({"a": Member("a", "new:1", "new:2", "id-a", False)})
    assert changed.get("a") == Member("a", "new:1", "new:2", "id-a", True)
    assert changed.get("b") == members.get("b")
    assert changed.identify({"a": Member("a", "", "", "id-a", False)}) == changed


def test_a_node_id_once_known_stays() -> None:
    members = configuration("ab").identify({"a": Member("a", "a:1", "", "id-a", False)})
    assert members.identify({"a": Member("a", "evil:1", "", "another", False)}) == members


def test_identifying_adds_nobody() -> None:
    members = configuration("ab")
    assert members.identify({"stranger": NEW}) == members
