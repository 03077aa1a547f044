"""What changed, as memory and history tell it: the same, from any place on."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from msgspec import Raw

from kvstore import codec, model
from kvstore.model import Delete, Put, Txn
from kvstore.state import feed, layout
from kvstore.state.feed import Changed, LargeRevision, Place, place_of, revision_of
from kvstore.state.machine import DATA, Machine
from kvstore.state.storage import MemoryDisk
from tests.state_model import entry

NO_LIMIT = 10**9


@pytest.fixture
def machine() -> Machine:
    return Machine(MemoryDisk().open, "state")


def apply(machine: Machine, *requests: model.Mutation) -> None:
    machine.apply(machine.applied_index + 1, 1, DATA, entry(1000, requests))


def decoded(event: bytes) -> model.Event:
    return codec.decode_events([Raw(event)])[0]


def fresh(machine: Machine, first: int, most: int = NO_LIMIT) -> list[Changed | LargeRevision]:
    changes = machine.fresh_changes(first, most)
    assert changes is not None
    return changes


def told(machine: Machine, changes: Iterator[Changed] | list[Changed | LargeRevision]) -> list[tuple[Place, bytes]]:
    """Each change's place, and its event with the record before."""
    found = []
    for changed in changes:
        assert isinstance(changed, Changed)
        found.append((changed.place, machine.event(changed, True)))
    return found


def random_batches(machine: Machine, chance: Random) -> None:
    """Few keys, so that a batch changes most of them several times."""
    for _ in range(8):
        requests: list[model.Mutation] = []
        for _ in range(chance.randint(1, 5)):
            keys = sorted({b"%d" % chance.randrange(8) for _ in range(chance.randint(1, 4))})
            if chance.random() < 0.3:
                requests.append(Delete(keys[0], keys[-1]))
            else:
                requests.append(Txn((), tuple(Put(key, b"%f" % chance.random()) for key in keys)))
        apply(machine, *requests)


@pytest.mark.parametrize("seed", range(20))
def test_memory_and_history_tell_the_same_from_any_place_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(feed, "_LARGE_BATCH_CHANGES", 3)
    random_batches(machine, Random(seed))
    if machine.revision == 0:
        return
    everything = told(machine, fresh(machine, 1))
    places = [place for place, _ in everything]
    assert places == sorted(set(places))
    for at, place in enumerate(places):
        # Some are read only in part, so that the next reader finds them half read.
        assert told(machine, machine.read_changes(place)) == everything[at:]
        some = machine.read_changes(place)
        assert [next(some).place for _ in places[at : at + 2]] == places[at : at + 2]
        revision = revision_of(place)
        if place == place_of(revision):
            assert told(machine, fresh(machine, revision)) == everything[at:]


@pytest.mark.parametrize("seed", range(20))
def test_large_revisions_stand_for_their_changes(machine: Machine, seed: int) -> None:
    random_batches(machine, Random(seed))
    everything = [changed for changed in fresh(machine, 1) if isinstance(changed, Changed)]
    for most in (1, 2, 3):
        at = 0
        for part in fresh(machine, 1, most):
            if isinstance(part, LargeRevision):
                assert len(part.keys) > most
                changes = everything[at : at + len(part.keys)]
                assert [changed.key for changed in changes] == part.keys
                assert {changed.revision for changed in changes} == {part.revision}
                assert changes[-1].after == place_of(part.revision + 1)
                at += len(part.keys)
            else:
                assert part == everything[at]
                at += 1
        assert at == len(everything)


def test_a_batch_of_many_requests_has_no_large_revision(machine: Machine) -> None:
    apply(machine, *(Put(b"%d" % number, b"") for number in range(100)))
    assert len(fresh(machine, 1, 1)) == 100
    assert len(fresh(machine, 99, 1)) == 2


def test_a_batch_that_is_read_in_parts_is_decoded_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it changes its keys twice, and each record before lies in the batch itself."""
    keys = [b"%04d" % number for number in range(1000)]
    apply(machine, Txn((), tuple(Put(key, key) for key in keys)), Delete(b"", b""))
    decodings = 0
    decode = layout.decode_batch_record

    def counted(encoded: bytes) -> layout.BatchRecord:
        nonlocal decodings
        decodings += 1
        return decode(encoded)

    monkeypatch.setattr(layout, "decode_batch_record", counted)
    place = place_of(1)
    found = []
    for _ in range(len(keys) // 5):
        changes = machine.read_changes(place)
        for _ in range(10):
            changed = next(changes)
            found.append((changed.revision, changed.key))
            event = decoded(machine.event(changed, True))
            assert (event.prev and event.prev.value) == (None if changed.revision == 1 else changed.key)
            place = changed.after
    assert found == [(revision, key) for revision in (1, 2) for key in keys]
    assert place == place_of(3)
    assert decodings == 1


def test_what_is_half_read_is_bounded(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [b"%04d" % number for number in range(300)]
    for _ in range(10):
        apply(machine, Txn((), tuple(Put(key, b"") for key in keys)))
    monkeypatch.setattr(feed, "_HALF_READ_BYTES", 12_000)
    for revision in range(1, 11):
        assert next(machine.read_changes(place_of(revision, 5))).key == keys[5]
    half_read = machine._feed._half_read
    assert 0 < sum(batch.size_bytes for batch in half_read.values()) <= 12_000
    assert 10 in half_read, "the newest stays"
    for revision in range(1, 11):
        assert next(machine.read_changes(place_of(revision, 299))).key == keys[299]
    assert len(list(machine.read_changes(place_of(1)))) == 3000
    assert half_read == {}, "whoever reads to an end needs it no more"
