"""An entry of an earlier version makes of the state what that version made of it, to the byte: answers are part of it.

The digests were made by the program that had the version (this file needs no more than it knew). They never change.
"""

from __future__ import annotations

import hashlib
from random import Random
from typing import Any

import pytest
from msgspec import Raw

from kvstore import codec, model
from kvstore.model import (
    Add,
    Compact,
    Compare,
    Delete,
    ExpireLeases,
    GrantLease,
    KeepLease,
    OpenSession,
    Put,
    Range,
    Relation,
    RevokeLease,
    SortBy,
    Target,
    Txn,
)
from kvstore.state.machine import DATA, Machine
from kvstore.state.storage import MemoryDisk

KEYS = [b"%02d" % number for number in range(30)]
SESSION = 1 << 16
ENTRIES = 150
# Of before as well as of now: what may be refused is then refused all the time.
SMALL = {"WALK_MAX": 12, "LEASE_KEYS_MAX": 4, "COUNT_AHEAD_MAX": 3}
NONE = dict.fromkeys(
    ("WALK_BYTES_MAX", "REPLACED_MAX", "REPLACED_BYTES_MAX", "COUNT_AHEAD_BYTES_MAX", "LEASE_BYTES_MAX"), 0
)


class Log:
    """Requests of all kinds, the same ones for one seed."""

    def __init__(self, seed: int, version: int) -> None:
        self._chance = Random(seed)
        self._version = version
        self._seq = 0

    def entries(self) -> list[bytes]:
        first = [(0, OpenSession()), (0, GrantLease(5000, 1)), (0, GrantLease(5000, 2))]
        return [self._entry(1, first), *(self._entry(60 * index, self._requests()) for index in range(2, ENTRIES))]

    def _entry(self, log_time_ms: int, requests: list[tuple[int, Any]]) -> bytes:
        items = []
        for session, request in requests:
            self._seq += bool(session)
            acked_below = max(1, self._seq - 40)
            encoded = Raw(codec.encode_request(request))
            items.append(codec.RawBatchItem(session, self._seq if session else 0, acked_below, encoded))
        return codec.encode_batch(log_time_ms, items, self._version)

    def _requests(self) -> list[tuple[int, Any]]:
        chance, requests = self._chance, []
        for _ in range(chance.randrange(1, 7)):
            kind, session = chance.random(), chance.choice([0, SESSION])
            if kind < 0.2:
                # Outside the session: which key is written twice in nested ones was said by the order of a set.
                requests.append((0, self._txn(nested=True)))
            elif kind < 0.5:
                requests.append((session, self._txn(nested=False)))
            elif kind < 0.9:
                requests.append((session, self._operation()))
            else:
                requests.append((session, self._other()))
        return requests

    def _other(self) -> Any:
        compact = Compact(self._chance.randrange(1, 60))
        return self._chance.choice([KeepLease(1), RevokeLease(2), GrantLease(5000, 2), ExpireLeases(), compact])

    def _txn(self, *, nested: bool) -> Txn:
        chance = self._chance
        success = [self._operation() for _ in range(chance.randrange(5))]
        if nested:
            success.append(self._txn(nested=chance.random() < 0.3))
        compares = tuple(self._compare() for _ in range(chance.choice([0, 0, 1, 2])))
        return Txn(compares, tuple(success), tuple(self._operation() for _ in range(chance.randrange(3))))

    def _compare(self) -> Compare:
        target = self._chance.choice(list(Target))
        operand = b"3" if target is Target.VALUE else self._chance.randrange(4)
        return Compare(self._key(), target, self._chance.choice(list(Relation)), operand, self._end())

    def _operation(self) -> Any:
        chance, kind = self._chance, self._chance.random()
        if kind < 0.4:
            size = chance.choice([0, 1, 3, 200])
            value = chance.randbytes(size) if chance.random() < 0.6 else b"%d" % chance.randrange(9)
            return Put(self._key(), value, chance.choice([0, 0, 1, 2]), chance.random() < 0.3)
        if kind < 0.5:
            return Add(self._key(), chance.choice([-1, 1]), chance.choice([None, 0]))
        if kind < 0.6:
            return Delete(self._key(), self._end(), chance.random() < 0.4)
        return Range(
            chance.choice([b"", self._key()]),
            chance.choice([b"", b"", self._key()]),
            chance.choice([0, 0, 1, 3]),
            chance.choice([0, 0, 0, chance.randrange(60)]),
            chance.random() < 0.4,
            chance.random() < 0.3,
            chance.random() < 0.4,
            chance.choice(list(SortBy)),
        )

    def _key(self) -> bytes:
        return self._chance.choice(KEYS)

    def _end(self) -> bytes | None:
        return self._chance.choice([None, b"", self._key(), self._key()])


@pytest.mark.parametrize(
    ("version", "result_bytes_max", "digest"),
    [
        (2, 400, "ded3bdcc6cae12600c9ae58e7cc0e539"),
        (2, 100_000, "fc481eeb4370925d3abc8f94f4428198"),
    ],
)
def test_entries_are_judged_by_the_rules_of_their_version(
    monkeypatch: pytest.MonkeyPatch, version: int, result_bytes_max: int, digest: str
) -> None:
    for name, limit in {**SMALL, **NONE, "RESULT_BYTES_MAX": result_bytes_max}.items():
        monkeypatch.setattr(model, name, limit, raising=False)
    made = hashlib.blake2b(digest_size=16)
    for seed in range(8):
        machine = Machine(MemoryDisk().open, "state")
        for index, payload in enumerate(Log(seed, version).entries(), 1):
            for result in machine.apply(index, 1, DATA, payload):
                answer = codec.decode_result(result)
                if isinstance(answer, model.ErrorResult) and answer.code == "duplicate_key":
                    made.update(codec.encode_result(model.ErrorResult(answer.code, "", answer.operation)))
                else:
                    made.update(result)
            made.update(machine.digest().encode())
        machine.close()
    assert made.hexdigest() == digest
